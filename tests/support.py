"""What tests share that is no fixture: starting commands, reading runs, comparing arrays."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


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

    def run(self, module: str, *arguments: object, code: int = 0, **extra: str) -> subprocess.CompletedProcess[str]:
        """Runs it to its end and checks the exit code."""
        process = self.start(module, *arguments, **extra)
        out, err = process.communicate(timeout=600)
        assert process.returncode == code, f"exit {process.returncode}\n{out}\n{err}"
        return subprocess.CompletedProcess(process.args, code, out, err)

    def fails(self, module: str, *arguments: object, **extra: str) -> str:
        """Runs a command that must end with code 2, one message and no traceback; returns the message."""
        result = self.run(module, *arguments, code=2, **extra)
        assert "Traceback" not in result.stderr
        message = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
        assert len(message) == 1, result.stderr
        return result.stderr[result.stderr.index("error: ") :]


def train_losses(run: Path) -> dict[int, float]:
    """Step → loss of a run; a step that stands there twice is an error."""
    losses: dict[int, float] = {}
    for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        if record["kind"] == "train":
            assert record["step"] not in losses
            losses[record["step"]] = record["loss"]
    return losses


def same_arrays(first: object, second: object) -> bool:
    """Whether two trees of arrays are the same bits."""
    import jax
    import numpy as np

    one, other = jax.tree.flatten(first), jax.tree.flatten(second)
    return one[1] == other[1] and all(
        np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in zip(one[0], other[0], strict=True)
    )
