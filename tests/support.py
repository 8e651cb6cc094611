"""Helpers shared by tests, except fixtures: starting commands, reading runs, comparing arrays."""

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
HASTILY = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "XLA_FLAGS": "--xla_cpu_use_fusion_emitters=false"}
"""Tiny models take far longer to compile than to run: four times less without the expensive passes. The variable
XLA_OPTIMIZED, which the nightly tests set, keeps these passes."""
COMPILER: dict[str, Any] = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "0", "XLA_FLAGS": ""}
"""The real passes of the compiler."""


def deadline(seconds: float) -> float:
    """Returns the time limit for something that should take at most `seconds`: exactly that in `make test-nightly`,
    which needs an idle machine; otherwise long enough for a busy machine, so that only hangs fail."""
    return seconds if "REAL_DEADLINES" in os.environ else 20 * seconds


def wait_until(condition: Callable[[], object], *, within: float = 60) -> None:
    """Returns as soon as a condition holds; fails if it does not hold within a `deadline`."""
    until = time.monotonic() + deadline(within)
    while not condition():
        assert time.monotonic() < until, "it did not come to pass in time"
        time.sleep(0.01)


class Watched(io.StringIO):
    """Records what is written to it, and runs an action when a certain text appears."""

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
        Returns its stderr. The command must not end before."""
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
        """Runs it to its end, for at most `limit` seconds, and checks the exit code."""
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
        """Runs a command to its end inside this process, which saves its imports.

        `at` maps texts of its stderr to actions that run when they are written, while the command waits.
        """
        argv = [module, *map(str, arguments)]
        program = importlib.import_module(module)
        if hasattr(program, "__path__"):  # a package
            program = importlib.import_module(f"{module}.__main__")
        out, err = io.StringIO(), Watched(at or {})
        terminates = signal.getsignal(signal.SIGTERM)
        with (
            contextlib.chdir(folder),
            # without this, a training run restarts itself
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
    """Fails if the body needs more CPU time of this thread; the load of the machine and other threads do not matter.

    A body that is too slow runs to its end: an exception raised by a signal could occur in a finalizer, or in pytest.
    """
    begin = time.thread_time()
    yield
    took = time.thread_time() - begin
    assert took <= seconds, f"took {took:.1f} seconds of CPU time, more than {seconds:g}"


def train_losses(run: Path) -> dict[int, float]:
    """Returns the loss of each step of a run; a step that occurs twice is an error."""
    losses: dict[int, float] = {}
    for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        if record["kind"] == "train":
            assert record["step"] not in losses
            losses[record["step"]] = record["loss"]
    return losses


def saved_arrays(run: Path) -> Any:
    """Returns everything in the newest checkpoint of a run: parameters, optimizer, position in the data."""
    import jax
    import numpy as np
    from orbax.checkpoint import v1 as ocp

    newest = max((run / "checkpoints").iterdir(), key=lambda step: int(step.name))
    path = str(newest.absolute())
    items: Any = ocp.checkpointables_metadata(path).metadata
    # abstract arrays, which Orbax restores as numpy arrays
    like = jax.tree.map(lambda leaf: np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape), dict(items))
    return ocp.load_checkpointables(path, like)


def records(run: Path) -> list[dict[str, Any]]:
    """Returns the lines of metrics.jsonl without values that depend on time; a step that occurs twice is an error."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [(line["step"], line["kind"]) for line in lines]
    assert len(set(steps)) == len(steps), steps
    return [{name: value for name, value in line.items() if name != "tokens_per_second"} for line in lines]


def assert_same_run(whole: Path, killed: Path) -> None:
    """Checks that a run that was killed and resumed equals an uninterrupted one bit for bit, without lost or extra
    files."""
    assert records(whole) == records(killed)
    for name in ("samples.jsonl", "config.json"):
        assert (whole / name).exists() == (killed / name).exists()
        assert not (whole / name).exists() or (whole / name).read_bytes() == (killed / name).read_bytes()
    kept = [sorted(entry.name for entry in (run / "checkpoints").iterdir()) for run in (whole, killed)]
    assert kept[0] == kept[1]
    assert not [entry for entry in killed.rglob("*") if ".part" in entry.name or "-tmp" in entry.name]
    assert same_arrays(saved_arrays(whole), saved_arrays(killed))


def as_killed(run: Path, to: Path) -> None:
    """Copies a run in progress in its current state, as a kill at this moment would leave it."""

    def copy(source: str, target: str) -> None:
        with contextlib.suppress(FileNotFoundError):  # renamed by a save in the background
            shutil.copy2(source, target)

    with contextlib.suppress(shutil.Error):  # a folder, likewise
        shutil.copytree(run, to, copy_function=copy)


def same_arrays(first: object, second: object) -> bool:
    """Returns whether two trees of arrays have the same bits."""
    import jax
    import numpy as np

    one, other = jax.tree.flatten(first), jax.tree.flatten(second)
    return one[1] == other[1] and all(
        np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in zip(one[0], other[0], strict=True)
    )
