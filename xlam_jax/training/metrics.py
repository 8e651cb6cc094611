"""What a run tells: lines on the terminal, one JSON line a step, TensorBoard events, and a plot of the losses."""

import json
import sys
import time
from collections import deque
from pathlib import Path
from typing import IO, Any

from tensorboardX import SummaryWriter

METRICS = "metrics.jsonl"
RATE_WINDOW = 20
"""Steps over which tokens a second are averaged."""


def duration(seconds: float) -> str:
    """`1:02:03`, or `2:03` below an hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class Progress:
    """Lines for a log; on a terminal one line that is rewritten, with finished lines above it."""

    def __init__(self, out: IO[str] | None = None):
        self._out = out or sys.stderr
        self._live = self._out.isatty()

    def line(self, text: str) -> None:
        """A line that stays."""
        print(f"\r\x1b[K{text}" if self._live else text, file=self._out, flush=True)

    def step(self, text: str, keep: bool) -> None:
        """The state of the run: rewritten in place on a terminal, and kept when `keep` says so."""
        if keep:
            self.line(text)
        elif self._live:
            print(f"\r\x1b[K{text}", end="", file=self._out, flush=True)


class Metrics:
    """Writes what happens at each step into the run folder.

    Steps after `start`, left by a run that was killed, are taken out of the file: every step stands there once.
    """

    def __init__(self, run: Path, *, start: int, steps: int, progress: Progress, log_every: int):
        self._path = run / METRICS
        self._start, self._steps, self._log_every, self._progress = start, steps, log_every, progress
        kept = [record for record in read(run) if record["step"] <= start]
        part = self._path.with_suffix(".part")
        part.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
        part.replace(self._path)
        self._file = self._path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(run / "tensorboard"), purge_step=start + 1)
        self._clock = time.monotonic()
        # A step's metrics arrive when they are asked for, not when it ends: a rate is only true over several steps.
        self._recent: deque[tuple[float, float]] = deque(maxlen=RATE_WINDOW)
        self._first = (start, self._clock)

    def exclude(self, seconds: float) -> None:
        """Takes time that was not spent on steps (evaluation, compiling) out of the rates."""
        self._clock += seconds
        self._first = (self._first[0], self._first[1] + seconds)

    def step(self, step: int, values: dict[str, float], *, places: int) -> None:
        """Records a step; `places` is the batch's size in tokens, padding included."""
        now = time.monotonic()
        self._recent.append((now - self._clock, values["tokens"]))
        self._clock = now
        rate = sum(tokens for _, tokens in self._recent) / max(sum(seconds for seconds, _ in self._recent), 1e-9)
        share = values["trained_tokens"] / places
        self._write({"step": step, "kind": "train", **values, "tokens_per_second": rate, "trained_share": share})
        left = (self._steps - step) * (now - self._first[1]) / (step - self._first[0])
        self._progress.step(
            f"step {step}/{self._steps}  loss {values['loss']:.4f}  {rate:,.0f} tok/s  trained {share:.0%}  "
            f"lr {values['learning_rate']:.2e}  grad norm {values['grad_norm']:.3f}  left {duration(left)}",
            keep=step % self._log_every == 0 or step == self._steps,
        )

    def heldout(self, step: int, values: dict[str, float]) -> None:
        """Records the held-out loss after a step."""
        self._write({"step": step, "kind": "heldout", **values})
        self._progress.line(
            f"step {step}/{self._steps}  held-out loss {values['loss']:.4f} over {values['trained_tokens']:,.0f} tokens"
        )

    def _write(self, record: dict[str, Any]) -> None:
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        for name, value in record.items():
            if name not in ("step", "kind"):
                self._board.add_scalar(f"{record['kind']}/{name}", value, record["step"])

    def close(self) -> None:
        """Ends the files."""
        self._file.close()
        self._board.close()


def read(run: Path) -> list[dict[str, Any]]:
    """The records of a run so far; a last line that a kill cut short is left out."""
    path = run / METRICS
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def plot(run: Path) -> Path:
    """Draws the training and held-out losses into `loss.png`."""
    from matplotlib.figure import Figure

    records = read(run)
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="loss (nats per trained token)", title=run.name)
    train, heldout = (
        [(record["step"], record["loss"]) for record in records if record["kind"] == kind]
        for kind in ("train", "heldout")
    )
    if train:
        at, losses = zip(*train, strict=True)
        axes.plot(at, losses, linewidth=0.7, alpha=0.3, color="C0", label="train, each step")
        window = max(1, len(losses) // 50)
        means = [sum(losses[max(0, end - window) : end]) / min(window, end) for end in range(1, len(losses) + 1)]
        axes.plot(at, means, color="C0", label=f"train, mean of {window} steps")
    if heldout:
        axes.plot(*zip(*heldout, strict=True), marker="o", linewidth=2, color="C1", label="held-out")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    part = run / "loss.part.png"
    figure.savefig(part)
    return part.replace(run / "loss.png")
