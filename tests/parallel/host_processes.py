"""Processes that are hosts of a run reduced to the control channel."""

import json
import subprocess
import sys
from collections.abc import Sequence

from support import deadline

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
