"""What tests share that is no fixture: starting commands, reading runs, comparing arrays."""

import contextlib
import importlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from xlam_jax import cli

ROOT = Path(__file__).parent.parent


def deadline(seconds: float) -> float:
    """How long to wait for what must be done within `seconds`: exactly so long in `make test-nightly`, which is for an
    idle machine, and else long enough for a busy one, so that only what hangs for ever fails."""
    return seconds if "REAL_DEADLINES" in os.environ else 20 * seconds


def wait_until(condition: Callable[[], object], *, within: float = 60) -> None:
    """Returns as soon as a condition holds; fails when it does not within a `deadline`."""
    until = time.monotonic() + deadline(within)
    while not condition():
        assert time.monotonic() < until, "it did not come to pass in time"
        time.sleep(0.01)


class Watched(io.StringIO):
    """Keeps what is written to it, and does something as soon as a certain text is."""

    def __init__(self, at: Mapping[str, Callable[[], object]]):
        super().__init__()
        self._at = dict(at)

    def write(self, text: str) -> int:
        written = super().write(text)
        for due in [awaited for awaited in self._at if awaited in text]:
            self._at.pop(due)()
        return written


class Commands:
    """Starts commands from the repository's root."""

    def __init__(self, environment: dict[str, str]):
        self.environment = environment

    def start(self, module: str, *arguments: object, **extra: str) -> subprocess.Popen[str]:
        """Starts `python -m module …` and returns at once."""
        return subprocess.Popen(
            [sys.executable, "-m", module, *map(str, arguments)],
            cwd=ROOT,
            env=self.environment | extra,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def kill(self, module: str, *arguments: object, at: str, count: int = 1, delay: float = 0.0, **extra: str) -> str:
        """Starts a command and ends it with SIGKILL, `delay` seconds after its stderr has had `at` in `count` lines.
        Returns its stderr. The command must not end by itself before."""
        process = self.start(module, *arguments, **extra)
        assert process.stderr
        lines: list[str] = []
        for line in process.stderr:
            lines.append(line)
            count -= at in line
            if not count:
                break
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        lines.append(process.communicate()[1])
        assert process.returncode == -signal.SIGKILL, "".join(lines)
        return "".join(lines)

    def run(
        self, module: str, *arguments: object, code: int = 0, limit: float = 600, **extra: str
    ) -> subprocess.CompletedProcess[str]:
        """Runs it to its end, for `limit` seconds at most, and checks the exit code."""
        process = self.start(module, *arguments, **extra)
        out, err = process.communicate(timeout=limit)
        assert process.returncode == code, f"exit {process.returncode}\n{out}\n{err}"
        return subprocess.CompletedProcess(process.args, code, out, err)

    def call(
        self,
        module: str,
        *arguments: object,
        code: int = 0,
        at: Mapping[str, Callable[[], object]] | None = None,
        folder: Path = ROOT,
    ) -> subprocess.CompletedProcess[str]:
        """Runs a command to its end inside this process: spares its imports, where a process is not the point.

        `at` maps texts of its stderr to what is done when they are written, the command waiting for it.
        """
        argv = [module, *map(str, arguments)]
        program = importlib.import_module(module)
        if hasattr(program, "__path__"):  # a package
            program = importlib.import_module(f"{module}.__main__")
        out, err = io.StringIO(), Watched(at or {})
        terminates = signal.getsignal(signal.SIGTERM)
        with (
            contextlib.chdir(folder),
            # a training run starts itself again where this is missing
            mock.patch.dict(os.environ, GLIBC_TUNABLES="glibc.malloc.hugetlb=1"),
            mock.patch.object(sys, "argv", argv),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            pytest.raises(SystemExit) as ended,
        ):
            cli.run(program.main)
        signal.signal(signal.SIGTERM, terminates)
        assert ended.value.code == code, f"exit {ended.value.code}\n{out.getvalue()}\n{err.getvalue()}"
        return subprocess.CompletedProcess(argv, code, out.getvalue(), err.getvalue())

    def fails(self, module: str, *arguments: object) -> str:
        """Calls a command that must end with code 2 and one message; returns the message."""
        said = self.call(module, *arguments, code=2).stderr
        assert [line.startswith("error: ") for line in said.splitlines()].count(True) == 1, said
        return said[said.index("error: ") :]


@contextlib.contextmanager
def cpu_limit(seconds: float) -> Iterator[None]:
    """Fails what takes more CPU time of this thread; how busy the machine and other threads are does not matter.

    What is too slow runs to its end: an exception that a signal raised could land in a finalizer, or in pytest.
    """
    begin = time.thread_time()
    yield
    took = time.thread_time() - begin
    assert took <= seconds, f"took {took:.1f} seconds of CPU time, more than {seconds:g}"


def train_losses(run: Path) -> dict[int, float]:
    """Step → loss of a run; a step that stands there twice is an error."""
    losses: dict[int, float] = {}
    for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        if record["kind"] == "train":
            assert record["step"] not in losses
            losses[record["step"]] = record["loss"]
    return losses


def saved_arrays(run: Path) -> Any:
    """Everything that the newest checkpoint of a run holds: parameters, optimizer, state of the data."""
    import jax
    import numpy as np
    from orbax.checkpoint import v1 as ocp

    newest = max((run / "checkpoints").iterdir(), key=lambda step: int(step.name))
    path = str(newest.absolute())
    items: Any = ocp.checkpointables_metadata(path).metadata
    # arrays without memory of their own: Orbax takes them for a request of numpy arrays
    like = jax.tree.map(lambda leaf: np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape), dict(items))
    return ocp.load_checkpointables(path, like)


def records(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without what depends on time; a step that is there twice is an error."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [(line["step"], line["kind"]) for line in lines]
    assert len(set(steps)) == len(steps), steps
    return [{name: value for name, value in line.items() if name != "tokens_per_second"} for line in lines]


def assert_same_run(whole: Path, killed: Path) -> None:
    """A run that was killed and resumed equals an uninterrupted one bit for bit; nothing is lost or left behind."""
    assert records(whole) == records(killed)
    for name in ("samples.jsonl", "config.json"):
        assert (whole / name).exists() == (killed / name).exists()
        assert not (whole / name).exists() or (whole / name).read_bytes() == (killed / name).read_bytes()
    kept = [sorted(entry.name for entry in (run / "checkpoints").iterdir()) for run in (whole, killed)]
    assert kept[0] == kept[1]
    assert not [entry for entry in killed.rglob("*") if ".part" in entry.name or "-tmp" in entry.name]
    assert same_arrays(saved_arrays(whole), saved_arrays(killed))


def as_killed(run: Path, to: Path) -> None:
    """Copies a run that goes on as it lies there now: what a kill at this moment would leave."""

    def copy(source: str, target: str) -> None:
        with contextlib.suppress(FileNotFoundError):  # renamed by a save in the background
            shutil.copy2(source, target)

    with contextlib.suppress(shutil.Error):  # a folder, likewise
        shutil.copytree(run, to, copy_function=copy)


def same_arrays(first: object, second: object) -> bool:
    """Whether two trees of arrays are the same bits."""
    import jax
    import numpy as np

    one, other = jax.tree.flatten(first), jax.tree.flatten(second)
    return one[1] == other[1] and all(
        np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in zip(one[0], other[0], strict=True)
    )
