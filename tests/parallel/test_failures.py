"""Processes that are killed, hang, are asked to stop or lose the network: the others end and name the lost one."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from support import ROOT, Commands, deadline, train_losses, wait_until

from xlam_jax.errors import STOPPED
from xlam_jax.launch import GRACE, free_ports
from xlam_jax.parallel.hub import WARNINGS, Hub
from xlam_jax.parallel.link import HEARTBEAT_TIMEOUT, LOST, connect

AT_MOST = deadline(60)
"""Seconds in which all are to end when one is lost."""
HOST = """
import atexit, json, os, queue, signal, sys, time
from xlam_jax import cli, errors
from xlam_jax.parallel.hub import Hub
from xlam_jax.parallel.link import Link

address, port, process, count, timeout, heartbeat_timeout = json.loads(sys.argv[1])
options = {"timeout": timeout, "heartbeat_timeout": heartbeat_timeout, "secret": os.environ.get("XLAM_JAX_SECRET", "")}
asked = []
signal.signal(signal.SIGTERM, lambda *_: asked.append(True))

def boom(*_):
    atexit.register(time.sleep, 1000)  # as JAX may wait for the others then
    raise RuntimeError("boom\\nand more")

signal.signal(signal.SIGUSR1, boom)

def stop(*_):
    raise errors.StoppedError("stopped by SIGUSR2 before the first step")

signal.signal(signal.SIGUSR2, stop)

class Late(queue.SimpleQueue):
    def get(self):
        value = super().get()
        time.sleep(0.5)
        return value

def main():
    if process == 0:
        Hub(port, count, **options)
    with Link((address, port), process, count, **options) as hosts:
        print("here", flush=True)
        for step in range(1, 10**6):
            time.sleep(0.01 * (1 + process))  # some are faster
            if step % 50 == 0:
                assert hosts.gather([process, step]) == [[other, step] for other in range(count)]
            if hosts.stops(step, bool(asked)):
                break
        if process == count - 1:
            hosts._values = Late()  # host 0 has ended when this one learns that all are at their end
    print(step)

cli.run(main)
"""
"""A host that only counts steps: a run reduced to the control channel."""


class Group:
    """Processes that are `HOST`s."""

    def __init__(self, environment: dict[str, str]):
        self._env = environment
        self.started: list[subprocess.Popen[str]] = []

    def start(
        self,
        count: int,
        *,
        port: int,
        processes: Sequence[int] | None = None,
        address: str = "localhost",
        timeout: float = deadline(30),
        heartbeat_timeout: float = deadline(6),
        within: Sequence[str] = (),
        secret: str = "",
    ) -> None:
        """Starts some of `count` hosts, within a command such as `ip netns exec NAME`."""
        for process in range(count) if processes is None else processes:
            arguments = json.dumps([address, port, process, count, timeout, heartbeat_timeout])
            self.started.append(
                subprocess.Popen(
                    [*within, sys.executable, "-c", HOST, arguments],
                    env=self._env | {"XLAM_JAX_SECRET": secret},
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )

    def met(self) -> None:
        """Waits until all hosts have joined."""
        for process in self.started:
            assert process.stdout
            assert process.stdout.readline() == "here\n", process.communicate()[1]

    def ended(self) -> list[tuple[int, str, str]]:
        """Returns code, stdout and stderr of each host."""
        said = [process.communicate(timeout=AT_MOST) for process in self.started]
        return [(process.returncode, *both) for process, both in zip(self.started, said, strict=True)]


@pytest.fixture
def group(environment: dict[str, str]) -> Iterator[Group]:
    hosts = Group(environment)
    yield hosts
    for process in hosts.started:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(
    ("lost", "signal_sent", "why"),
    [
        (2, signal.SIGKILL, "closed its connection without a message: it was killed"),
        (0, signal.SIGKILL, "closed its connection without a message: it was killed"),
        pytest.param(1, signal.SIGSTOP, "sent no heartbeat for 6 s: it hangs", marks=pytest.mark.nightly),
        pytest.param(0, signal.SIGSTOP, "sent no heartbeat for 6 s: it hangs", marks=pytest.mark.nightly),
    ],
)
def test_a_lost_host_is_named_by_all_others(group: Group, lost: int, signal_sent: signal.Signals, why: str):
    group.start(4, port=free_ports())
    group.met()
    gone = group.started.pop(lost)
    gone.send_signal(signal_sent)
    ended = group.ended()
    gone.kill()
    gone.communicate()
    for code, _, err in ended:
        assert code == LOST
        assert [line.startswith(f"error: host {lost} (") and why in line for line in err.splitlines()] == [True], err


@pytest.mark.parametrize("heard", [True, False])
def test_a_host_that_fails_says_why_to_all(group: Group, heard: bool):
    group.start(3, port=free_ports())
    group.met()
    failing = group.started[1]
    assert failing.stderr
    if not heard:  # its terminal is gone
        failing.stderr.close()
        failing.stderr = None
    failing.send_signal(signal.SIGUSR1)
    me = f"host 1 ({socket.gethostname()})"
    for process, (code, _, err) in enumerate(group.ended()):
        if process != 1:
            assert code == 1  # not the code of a lost host: a restart would reach the same error
            assert err == f"error: {me} stopped: RuntimeError: boom; this host ends with code 1\n"
        else:
            assert code == 1
            assert not heard or err.startswith("Traceback")
            assert not heard or err.endswith(f"error: {me}: RuntimeError: boom\n")


def test_a_host_that_is_stopped_early_stops_all(group: Group):
    group.start(3, port=free_ports())
    group.met()
    group.started[1].send_signal(signal.SIGUSR2)
    me = f"host 1 ({socket.gethostname()})"
    for process, (code, _, err) in enumerate(group.ended()):
        assert code == STOPPED
        if process == 1:
            assert err == f"{me}: stopped by SIGUSR2 before the first step\n"
        else:
            assert err.startswith(
                f"{me} stopped: stopped by SIGUSR2 before the first step; this host ends with code 75, so"
            )


def test_all_stop_after_the_same_step_when_one_is_asked(group: Group):
    group.start(4, port=free_ports())
    group.met()
    time.sleep(0.5)
    group.started[2].terminate()
    ended = group.ended()
    assert [(code, err) for code, _, err in ended] == [(0, "")] * 4
    assert len({out for _, out, _ in ended}) == 1


@pytest.mark.nightly
def test_a_host_that_never_comes_is_named(group: Group):
    group.start(4, port=free_ports(), processes=(0, 1, 3), timeout=3)
    for code, _, err in group.ended():
        assert code == 2
        assert err == (
            "error: 3 of 4 processes joined within 3 s; missing: process 2; were all of them started, and can they "
            "reach host 0?\n"
        )


def test_hosts_that_count_differently(group: Group):
    port = free_ports()
    group.start(3, port=port, processes=(0,))
    group.start(2, port=port, processes=(1,))
    for code, _, err in group.ended():
        assert code == 2
        assert err.startswith("error: host 1 (")
        assert "is one of 2 processes, and host 0 expects 3" in err


def test_two_processes_with_one_id(group: Group):
    group.start(3, port=free_ports(), processes=(0, 1, 1))
    for code, _, err in group.ended():
        assert (code, "two processes have the id 1" in err) == (2, True)


STRANGE = [
    b"",
    b"\0" * 100 + b"\n",
    b"GET / HTTP/1.1\r\nHost: here\r\n\r\n",
    b"[" * 100_000 + b"\n",
    b"x" * 100_000,
    b"null\n[1]\n7\n",
    b'{"hello": 1, "name": "x", "count": 3}\n',
    b'{"hello": 1, "name": "x", "count": 9}\n{"failed": "x", "code": 2}\n',
    b'{"hello": 1, "name": "x", "count": 3, "proof": "' + b"0" * 64 + b'"}\n{"bye": true}\n',
    b'{"hello": [], "name": {}, "count": null, "proof": "\xc3\xa9"}\n',
    b'{"failed": "x", "code": 2}\n',
    b'{"step": 1, "asked": true}\n',
]
"""What other programs may send to the port."""


def call_as_strangers(port: int) -> None:
    """Connects and sends the given bytes; some connections then stay open and silent."""
    for sent in STRANGE:
        with socket.create_connection(("localhost", port)) as stranger, contextlib.suppress(OSError):
            stranger.sendall(sent)
            stranger.shutdown(socket.SHUT_WR)
            while stranger.recv(4096):
                pass


@pytest.mark.parametrize("secret", ["", "of this run"])
def test_strangers_do_not_stop_a_run(group: Group, secret: str):
    port = free_ports()
    group.start(3, port=port, processes=(0, 2), secret=secret)
    with connect(("localhost", port), 60):  # says nothing
        call_as_strangers(port)
        group.start(3, port=port, processes=(1,), secret=secret)
        group.met()
        call_as_strangers(port)
        group.start(3, port=port, processes=(1,), secret=secret)  # left over, or of another run
        late = group.started.pop()
        _, err = late.communicate(timeout=AT_MOST)
        assert late.returncode == 2
        assert "arrived after all 3 processes of the run had joined" in err
        group.started[1].terminate()
        ended = group.ended()
    assert [code for code, *_ in ended] == [0] * 3
    assert len({out for _, out, _ in ended}) == 1
    assert ended[0][2].count("warning: refused: ") == WARNINGS
    assert [err for *_, err in ended[1:]] == [""] * 2


def test_a_host_with_another_secret_is_refused_and_the_run_begins_without_it(group: Group):
    port = free_ports()
    group.start(2, port=port, processes=(0,), secret="of this run")
    for wrong in ("", "of another run"):
        group.start(2, port=port, processes=(1,), secret=wrong)
        refused = group.started.pop()
        _, err = refused.communicate(timeout=AT_MOST)
        assert refused.returncode == 2
        assert "has another XLAM_JAX_SECRET than host 0; set the variable to one value on all hosts" in err
    group.start(2, port=port, processes=(1,), secret="of this run")
    group.met()
    group.started[0].terminate()
    assert [code for code, *_ in group.ended()] == [0] * 2


def test_a_coordinator_on_this_machine_is_open_to_it_alone():
    for local, bound in ((True, {"127.0.0.1"}), (False, {"::", "0.0.0.0"})):
        hub = Hub(free_ports(), 2, timeout=0, local=local)
        assert hub.server.getsockname()[0] in bound


def test_processes_of_one_launch_share_a_secret(commands: Commands):
    code = (
        "import sys; from xlam_jax.launch import Processes\n"
        "say = 'import os; print(os.environ[\"XLAM_JAX_SECRET\"])'\n"
        "sys.exit(Processes([[sys.executable, '-c', say]] * 2, [None] * 2).wait())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stderr == f"[1] {done.stdout}"
    assert len(done.stdout.strip()) == 64


def test_a_port_that_is_taken(group: Group):
    port = free_ports()
    with socket.create_server(("", port)):
        group.start(2, port=port, processes=(0,))
        ((code, _, err),) = group.ended()
    assert (code, f"port {port} of this machine is not available" in err) == (2, True)


@pytest.mark.deadlines
def test_a_coordinator_that_never_answers(commands: Commands, short_config: Path, tmp_path: Path):
    flags = ["--num-processes", 2, "--process-id", 1, "--join-timeout", 1]
    port = free_ports()
    began = time.monotonic()
    said = commands.fails(
        "xlam_jax.train", "--config", short_config, f"output_dir={tmp_path}/run", "--coordinator", f"localhost:{port}",
        *flags,
    )  # fmt: skip
    assert time.monotonic() - began < deadline(5)
    assert f"the coordinator, host 0 at localhost:{port + 1}, did not answer within 1 s" in said
    with socket.create_server(("", port + 1)):  # accepts connections and sends nothing
        said = commands.fails(
            "xlam_jax.train", "--config", short_config, f"output_dir={tmp_path}/run", "--coordinator",
            f"localhost:{port}", *flags,
        )  # fmt: skip
    assert f"host 0 at localhost:{port + 1} accepted the connection and sent nothing for 1 s" in said
    assert not (tmp_path / "run").exists()


def test_hosts_with_different_configs(commands: Commands, short_config: Path, tmp_path: Path):
    where = ["--coordinator", f"localhost:{free_ports()}", "--num-processes", 2]
    started = [
        commands.start(
            "xlam_jax.train", "--config", short_config, f"output_dir={tmp_path}/run", *where, "--process-id", process,
            f"train.learning_rate={rate}", f"data.cache={tmp_path}/{process}",
        )
        for process, rate in enumerate((0.001, 0.002))
    ]  # fmt: skip
    for process in started:
        _, err = process.communicate(timeout=AT_MOST)
        assert process.returncode == 2
        # each host detects it, or learns it from the other
        assert err.count("error: ") - err.count("stopped: the hosts differ") <= 1, err
        assert "Traceback" not in err
        assert "the hosts differ; start all of them with the same code, config and data" in err
        name = socket.gethostname()
        assert f"train.learning_rate: 0.001 on host 0 ({name}), 0.002 on host 1 ({name})" in err
        assert "data.cache" not in err
    assert not (tmp_path / "run").exists()


# ---- real runs ------------------------------------------------------------------------------------------------------


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
