"""Processes that are killed, hang, are asked to stop, or can't hear each other: the others end and say who it was."""

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
from support import ROOT, Commands, train_losses

from xlam_jax.errors import STOPPED
from xlam_jax.launch import GRACE, free_ports
from xlam_jax.parallel.link import LOST, SILENCE

AT_MOST = 60.0
"""Seconds in which all are to end when one is lost."""
HOST = """
import atexit, json, queue, signal, sys, time
from xlam_jax import errors
from xlam_jax.parallel.link import Hub, Link

address, port, process, count, timeout = json.loads(sys.argv[1])
asked = []
signal.signal(signal.SIGTERM, lambda *_: asked.append(True))

def boom(*_):
    atexit.register(time.sleep, 1000)  # as JAX may wait for the others then
    raise RuntimeError("boom\\nand more")

signal.signal(signal.SIGUSR1, boom)

class Late(queue.SimpleQueue):
    def get(self):
        value = super().get()
        time.sleep(0.5)
        return value

def main():
    if process == 0:
        Hub(port, count, timeout=timeout, silence=6)
    with Link((address, port), process, count, timeout=timeout, silence=6) as hosts:
        print("here", flush=True)
        for step in range(1, 10**6):
            time.sleep(0.01 * (1 + process))  # some are faster
            if step % 50 == 0:
                assert hosts.gather([process, step]) == [[other, step] for other in range(count)]
            if hosts.stops(step, bool(asked)):
                break
        if process == count - 1:
            hosts._told = Late()  # host 0 has ended when this one learns that all are at their end
    print(step)

errors.run(main)
"""
"""A host that only counts: all but the link is left out."""


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
        timeout: float = 30,
        within: Sequence[str] = (),
    ) -> None:
        """Starts some of `count` hosts, by a command such as `ip netns exec NAME`."""
        for process in range(count) if processes is None else processes:
            told = json.dumps([address, port, process, count, timeout])
            self.started.append(
                subprocess.Popen(
                    [*within, sys.executable, "-c", HOST, told],
                    env=self._env,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )

    def met(self) -> None:
        """Returns when all have met."""
        for process in self.started:
            assert process.stdout
            assert process.stdout.readline() == "here\n", process.communicate()[1]

    def ended(self) -> list[tuple[int, str, str]]:
        """Code, stdout and stderr of each."""
        said = [process.communicate(timeout=AT_MOST) for process in self.started]
        return [(process.returncode, *both) for process, both in zip(self.started, said, strict=True)]


@pytest.fixture
def group(environment: dict[str, str]) -> Iterator[Group]:
    made = Group(environment)
    yield made
    for process in made.started:
        process.kill()
        process.communicate()


# ---- real runs ------------------------------------------------------------------------------------------------------


def children(launch: subprocess.Popen[str]) -> list[int]:
    """The processes of a launch, by their number."""
    pids = map(int, Path(f"/proc/{launch.pid}/task/{launch.pid}/children").read_text().split())
    found = {}
    for pid in pids:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
        found[int(words[words.index("--process-id") + 1])] = pid
    return [found[process] for process in sorted(found)]


def wait_for(path: Path, *running: subprocess.Popen[str]) -> None:
    until = time.monotonic() + 300
    while not path.exists():
        assert time.monotonic() < until, f"{path} was not written"
        for process in running:
            assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)


def tokens(run: Path) -> dict[int, float]:
    """Step → trained tokens of its batch."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return {one["step"]: one["trained_tokens"] for one in map(json.loads, lines) if one["kind"] == "train"}


def launch(processes: int, devices: int, config: Path, run: Path, *overrides: str) -> list[object]:
    """The arguments of a launch."""
    own = ["--config", config, f"output_dir={run}", "checkpoint.every=4", *overrides]
    return ["--processes", processes, "--devices-per-process", devices, "--", *own]


def test_a_killed_process_ends_the_run_and_another_number_of_them_continues_it(
    commands: Commands, short_config: Path, tmp_path: Path
):
    """Two processes train as one does, and after one of them is killed, one goes on alone with what both have saved."""
    mesh = ("mesh.fsdp=2", "mesh.tensor=2")
    whole, run = tmp_path / "whole", tmp_path / "run"
    T = time.monotonic()
    O = os.times()

    def lap(n):
        o = os.times()
        print(
            "LAP",
            n,
            round(time.monotonic() - T, 1),
            "cpu",
            round(o.children_user + o.children_system - O.children_user - O.children_system, 1),
            flush=True,
        )

    commands.run("xlam_jax.train", "--config", short_config, f"output_dir={whole}", "mesh.cpu_devices=4", *mesh)
    lap("whole")
    started = commands.start("xlam_jax.launch", *launch(2, 2, short_config, run, *mesh))
    wait_for(run / "checkpoints/4", started)
    lap("ckpt4")
    killed = children(started)[1]
    os.kill(killed, signal.SIGKILL)
    began = time.monotonic()
    _, err = started.communicate(timeout=AT_MOST)
    lap("ended")
    assert time.monotonic() - began < AT_MOST
    assert started.returncode == 128 + signal.SIGKILL
    assert err.count("error: ") == 1, err
    assert f"error: host 1 ({socket.gethostname()}) ended without a word" in err
    assert "Traceback" not in err
    told = commands.run("xlam_jax.launch", *launch(1, 4, short_config, run, *mesh)).stderr
    assert f"continuing {run} after step " in told
    lap("resumed")
    print(told)
    losses, expected = train_losses(run), train_losses(whole)
    assert sorted(losses) == sorted(expected) == list(range(1, 21))
    assert max(abs(losses[step] - expected[step]) for step in losses) <= 1e-6
    assert tokens(run) == tokens(whole)
