"""Runs of several processes that lose one or the network, or get a signal: all end in time, others continue."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from host_processes import AT_MOST, Group
from support import ROOT, Commands, train_losses, wait_until

from xlam_jax.errors import STOPPED
from xlam_jax.launch import GRACE, free_ports
from xlam_jax.parallel.link import HEARTBEAT_TIMEOUT, LOST


def children(launch: subprocess.Popen[str]) -> list[int]:
    """Returns the process ids of a launch, by process number."""
    pids = map(int, Path(f"/proc/{launch.pid}/task/{launch.pid}/children").read_text().split())
    by_process = {}
    for pid in pids:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
        by_process[int(words[words.index("--process-id") + 1])] = pid
    return [by_process[process] for process in sorted(by_process)]


def wait_for(path: Path, *running: subprocess.Popen[str]) -> None:
    def written() -> bool:
        for process in running:
            assert process.poll() is None, process.communicate()[1]
        return path.exists()

    wait_until(written, within=300)


def tokens(run: Path) -> dict[int, float]:
    """Returns the number of trained tokens of each step."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return {one["step"]: one["trained_tokens"] for one in map(json.loads, lines) if one["kind"] == "train"}


def launch(processes: int, devices: int, config: Path, run: Path, *overrides: str) -> list[object]:
    """Returns the arguments of a launch."""
    own = ["--config", config, f"output_dir={run}", "checkpoint.every=4", *overrides]
    return ["--processes", processes, "--devices-per-process", devices, "--", *own]


def test_the_time_in_which_all_end():
    assert HEARTBEAT_TIMEOUT < GRACE < 60


@pytest.mark.deadlines
@pytest.mark.slow
def test_a_killed_process_ends_the_run_and_another_number_of_them_continues_it(
    commands: Commands, short_config: Path, tmp_path: Path
):
    """Two processes train like one; after one is killed, a single process continues from what both have saved."""
    mesh = ("mesh.fsdp=2", "mesh.tensor=2")
    whole, run = tmp_path / "whole", tmp_path / "run"
    commands.run("xlam_jax.train", "--config", short_config, f"output_dir={whole}", "mesh.cpu_devices=4", *mesh)
    started = commands.start("xlam_jax.launch", *launch(2, 2, short_config, run, *mesh))
    wait_for(run / "checkpoints/4", started)
    killed = children(started)[1]
    os.kill(killed, signal.SIGKILL)
    began = time.monotonic()
    _, err = started.communicate(timeout=AT_MOST)
    assert time.monotonic() - began < AT_MOST
    assert started.returncode == 128 + signal.SIGKILL
    assert err.count("error: ") == 1, err
    assert f"error: host 1 ({socket.gethostname()}) closed its connection without a message" in err
    assert "Traceback" not in err
    log = commands.run("xlam_jax.launch", *launch(1, 4, short_config, run, *mesh)).stderr
    assert f"continuing {run} after step " in log
    losses, expected = train_losses(run), train_losses(whole)
    assert sorted(losses) == sorted(expected) == list(range(1, 21))
    assert max(abs(losses[step] - expected[step]) for step in losses) <= 1e-6
    assert tokens(run) == tokens(whole)


@pytest.mark.slow
@pytest.mark.deadlines
def test_one_of_four_is_killed_and_three_or_four_continue(commands: Commands, short_config: Path, tmp_path: Path):
    batch = "train.batch_size=12"
    whole, run = tmp_path / "whole", tmp_path / "run"
    commands.run("xlam_jax.train", "--config", short_config, f"output_dir={whole}", batch)
    started = commands.start("xlam_jax.launch", *launch(4, 1, short_config, run, batch))
    wait_for(run / "checkpoints/4", started)
    os.kill(children(started)[2], signal.SIGKILL)
    began = time.monotonic()
    _, err = started.communicate(timeout=AT_MOST)
    print(f"all ended {time.monotonic() - began:.1f} s after the kill:\n{err}")
    assert started.returncode == 128 + signal.SIGKILL
    assert err.count("error: ") == 1
    assert f"error: host 2 ({socket.gethostname()}) closed its connection without a message" in err
    for processes in (3, 4):
        copy = tmp_path / f"run-{processes}"
        shutil.copytree(run, copy)
        log = commands.run("xlam_jax.launch", *launch(processes, 1, short_config, copy, batch)).stderr
        assert f"continuing {copy} after step " in log
        losses, expected = train_losses(copy), train_losses(whole)
        assert sorted(losses) == sorted(expected)
        difference = max(abs(losses[step] - expected[step]) for step in losses)
        print(f"{processes} processes: losses differ from those of one by {difference:.1e}")
        assert difference < 1e-5
        assert tokens(copy) == tokens(whole)


@pytest.mark.slow
def test_sigterm_on_one_of_four_saves_and_ends_all(commands: Commands, short_config: Path, tmp_path: Path):
    run, batch = tmp_path / "run", "train.batch_size=12"
    started = commands.start("xlam_jax.launch", *launch(4, 1, short_config, run, batch, "train.steps=500"))
    wait_for(run / "checkpoints/4", started)
    os.kill(children(started)[3], signal.SIGTERM)
    _, err = started.communicate(timeout=AT_MOST)
    assert started.returncode == STOPPED, err
    assert "stopped by a signal to another host after step " in err
    assert "error" not in err
    step = max(train_losses(run))
    assert (run / "checkpoints" / str(step)).is_dir()


# ---- a network of our own -------------------------------------------------------------------------------------------


@pytest.fixture
def link_of_two(tmp_path: Path) -> Iterator[tuple[str, str]]:
    """Two network namespaces connected by a virtual cable, 10.99.7.1 and 10.99.7.2."""
    names = [f"xlam-{os.getpid()}-{at}" for at in range(2)]
    cable = [f"xl{os.getpid() % 10**6}{at}" for at in "ab"]

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True, text=True)

    with contextlib.ExitStack() as undo:
        try:
            for at, name in enumerate(names, start=1):
                ip("netns", "add", name)
                undo.callback(subprocess.run, ["ip", "netns", "del", name], check=False, capture_output=True)
                hosts = Path("/etc/netns", name, "hosts")  # `ip netns exec` shows it as /etc/hosts
                undo.callback(shutil.rmtree, hosts.parent)
                hosts.parent.mkdir(parents=True)
                hosts.write_text(f"127.0.0.1 localhost\n10.99.7.{at} {socket.gethostname()}\n")
            ip("link", "add", cable[0], "netns", names[0], "type", "veth", "peer", "name", cable[1], "netns", names[1])
            for at, (name, end) in enumerate(zip(names, cable, strict=True), start=1):
                ip("-n", name, "addr", "add", f"10.99.7.{at}/24", "dev", end)
                ip("-n", name, "link", "set", end, "up")
                ip("-n", name, "link", "set", "lo", "up")
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"no network namespaces here ({getattr(error, 'stderr', None) or error})")
        yield names[0], names[1]


def cut(name: str) -> None:
    """Disconnects one side."""
    links = json.loads(subprocess.run(["ip", "-n", name, "-j", "link"], check=True, capture_output=True).stdout)
    (end,) = [one["ifname"] for one in links if one["ifname"].startswith("xl")]
    subprocess.run(["ip", "-n", name, "link", "set", end, "down"], check=True)


@pytest.mark.nightly
def test_a_cut_link_ends_both_sides(group: Group, link_of_two: tuple[str, str]):
    near, far = link_of_two
    port = free_ports()
    group.start(4, port=port, processes=(0, 1), address="10.99.7.1", within=("ip", "netns", "exec", near))
    group.start(4, port=port, processes=(2, 3), address="10.99.7.1", within=("ip", "netns", "exec", far))
    group.met()
    cut(near)
    ended = group.ended()
    assert [code for code, *_ in ended] == [LOST] * 4
    for _, _, err in ended[:2]:
        assert err.startswith(("error: host 2 (", "error: host 3 ("))
        assert "sent no heartbeat for 6 s: it hangs, or the network is interrupted" in err
    for _, _, err in ended[2:]:
        assert err.startswith("error: host 0 (")


@pytest.mark.slow
@pytest.mark.deadlines
def test_a_cut_link_ends_a_run(
    commands: Commands, environment: dict[str, str], short_config: Path, tmp_path: Path, link_of_two: tuple[str, str]
):
    run, port = tmp_path / "run", free_ports()
    flags = ["--config", short_config, f"output_dir={run}", "checkpoint.every=4", "train.steps=2000"]
    flags += ["--coordinator", f"10.99.7.1:{port}", "--num-processes", 2]
    started = [
        subprocess.Popen(
            ["ip", "netns", "exec", name, sys.executable, "-m", "xlam_jax.train", *map(str, flags), "--process-id", at],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for at, name in zip("01", link_of_two, strict=True)
    ]
    try:
        wait_for(run / "checkpoints/4", *started)
        began = time.monotonic()
        cut(link_of_two[0])
        said = [process.communicate(timeout=AT_MOST)[1] for process in started]
        print(f"ended {time.monotonic() - began:.1f} s after the cut:\n{said[0]}\n{said[1]}")
        assert time.monotonic() - began < AT_MOST
    finally:
        for process in started:
            process.kill()
    for process, err, other in zip(started, said, (1, 0), strict=True):
        assert process.returncode == LOST
        assert f"error: host {other} ({socket.gethostname()}) sent no heartbeat for {HEARTBEAT_TIMEOUT:.0f} s" in err
        assert "Traceback" not in err
