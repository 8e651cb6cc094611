"""Metrics of a run: a line or a panel for people, one JSON line per step, trackers, and a plot of the losses.

`metrics.jsonl` is the record; the other outputs are views of it. Each line is valid JSON: a number that is not finite
is null there, and `not_finite` has its value by path: {"loss": null, …, "not_finite": {"loss": "nan"}}.
"""

import json
import math
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Self

from xlam_jax.enums import REQUEST_MARKS
from xlam_jax.journal import Journal, json_lines, summarize
from xlam_jax.outputs import new_file
from xlam_jax.progress import Progress, Status, duration
from xlam_jax.training.run_folder import METRICS, SAMPLES
from xlam_jax.training.trackers import Trackers, flatten

RATE_WINDOW = 20
"""Steps over which tokens per second, and the first loss in the panel, are averaged."""
Kind = Literal["train", "heldout", "requests"]


class Metrics:
    """Writes the metrics of each step to the run folder.

    Metrics logged after `start` come from a run that was killed: they are removed and logged again, so that no step
    appears twice. With `start` 0 there is no checkpoint, and all are removed.

    A context manager: leaving it ends the trackers, and marks the run as failed after an exception.
    """

    def __init__(
        self,
        run: Path,
        *,
        start: int,
        evaluated: bool = True,
        steps: int,
        places: int,
        progress: Progress,
        log_every: int,
        trackers: Trackers | None = None,
        writes: bool = True,
    ):
        """`evaluated`: whether the evaluation after step `start` is complete; otherwise its metrics are removed.
        `places`: tokens of a batch, padding included. `writes`: whether this host is the one that writes."""
        self._run, self._writes = run, writes
        self._steps, self._places, self._log_every = steps, places, log_every
        self._progress, self._trackers = progress, trackers
        # The time between two records is not that of one step (they are fetched late): a rate needs several steps.
        self._recent: deque[tuple[float, float]] = deque(maxlen=RATE_WINDOW)
        self._losses: deque[float] = deque(maxlen=RATE_WINDOW)
        self._shown: dict[str, str] = {}
        self._status: Status | None = None
        if writes:
            for name in (METRICS, SAMPLES):
                for warning in _keep_until(start, run / name, evaluated):
                    progress.line(f"warning: {warning}")
            for record in read(run):
                self._remember(record)
            self._journal = Journal(run / METRICS, report=progress.line)
        self._clock = time.monotonic()
        self._first = (start, self._clock)

    def record(self, step: int, kind: Kind, values: Mapping[str, Any]) -> None:
        """Records the metrics of a step; values may be nested, by source and by kind of span.

        train: at least loss, grad_norm, tokens, trained_tokens and learning_rate; tokens_per_second and trained_share
        are added. heldout: at least loss and trained_tokens. requests: their number, and the shares parsable,
        schema_valid, right_function and exact.
        """
        if not self._writes:
            return
        if kind == "train":
            values = {**values, **self._rates(values)}
        record = {"step": step, "kind": kind, **values}
        not_finite = {path: str(value) for path, value in flatten(record).items() if not _is_finite(value)}
        written = _nulled(record) | {"not_finite": not_finite} if not_finite else record
        self._journal.append(written, allow_nan=False)
        if self._trackers:
            numbers = {path: value for path, value in flatten(values).items() if isinstance(value, (int, float))}
            self._trackers.log(step, {f"{kind}/{path}": value for path, value in numbers.items()})
        self._remember(record)
        if kind == "train":
            self._status = self._state(step, values)
            self._progress.step(self._status, keep=step % self._log_every == 0 or step == self._steps)
        else:
            describe = _heldout_line if kind == "heldout" else _requests_line
            self._progress.line(f"step {step}/{self._steps}  {describe(values)}")

    def append_samples(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Appends the model's answers to requests to samples.jsonl; each line has its `step`."""
        if self._writes:
            with Journal(self._run / SAMPLES, report=self._progress.line) as samples:
                for line in lines:
                    samples.append(line)

    def exclude(self, seconds: float) -> None:
        """Excludes time that was not spent on steps, such as evaluation, from the rates."""
        self._clock += seconds
        self._first = (self._first[0], self._first[1] + seconds)

    @contextmanager
    def paused(self, what: str) -> Iterator[None]:
        """Wraps work that is not a step, such as `evaluating`: it is shown in the panel and excluded from the rates."""
        began = time.monotonic()
        self._progress.doing(what)
        try:
            yield
        finally:
            self._progress.doing("")
            self.exclude(time.monotonic() - began)

    def close(self, failed: bool = False) -> None:
        """Closes the files, the panel (its last state stays as a line) and the trackers."""
        if not self._writes:
            return
        self._journal.close()
        if self._progress.live:
            self._progress.close()
            if self._status:
                self._progress.line(self._status.line)
                self._status = None
        if self._trackers:
            self._trackers.close(failed)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(failed=kind is not None)

    def _rates(self, values: Mapping[str, Any]) -> dict[str, float]:
        now = time.monotonic()
        self._recent.append((now - self._clock, values["tokens"]))
        self._clock = now
        rate = sum(tokens for _, tokens in self._recent) / max(sum(seconds for seconds, _ in self._recent), 1e-9)
        return {"tokens_per_second": rate, "trained_share": values["trained_tokens"] / self._places}

    def _remember(self, record: Mapping[str, Any]) -> None:
        """Keeps the values of a record that later steps show."""
        kind, loss, exact = record["kind"], record.get("loss"), record.get("exact")
        if kind == "train":
            if loss is not None and _is_finite(loss):
                self._losses.append(loss)
        elif kind == "heldout":
            self._shown["held-out"] = f"{_number(loss)} at {record['step']}"
        elif kind == "requests":
            self._shown["exact"] = f"{_percent(exact)} at {record['step']}"

    def _state(self, step: int, values: Mapping[str, Any]) -> Status:
        taken = step - self._first[0]
        left = (self._steps - step) * (self._clock - self._first[1]) / taken
        mean = sum(self._losses) / len(self._losses) if self._losses else math.nan
        last = _number(values["loss"])
        fields = {
            **_of_pairs(values),
            "": f"{values['tokens_per_second']:,.0f} tok/s",
            "trained": _percent(values["trained_share"]),
            "lr": f"{values['learning_rate']:.2e}",
            "grad norm": f"{values['grad_norm']:.3f}",
        }
        line = f"step {step}/{self._steps}  " + _joined({"loss": last} | fields | {"left": duration(left)})
        shown = {"loss": f"{_number(mean)} (last {last})"} | self._shown | fields
        return Status(step=step, steps=self._steps, left=left, fields=tuple(shown.items()), line=line)


def read(run: Path) -> list[dict[str, Any]]:
    """Reads the records of a run so far. Other lines are skipped; a resumed run removes and reports them."""
    return list(_records(run / METRICS, []))


def _records(path: Path, problems: list[str]) -> Iterator[dict[str, Any]]:
    if not path.exists():
        return
    for at, record in json_lines(path, problems):
        has_step = isinstance(record, dict) and type(record.get("step")) is int
        if has_step and (path.name != METRICS or isinstance(record.get("kind"), str)):
            yield record
        else:
            problems.append(f"line {at} is not a record with a step")


def _keep_until(step: int, path: Path, evaluated: bool) -> list[str]:
    """Removes lines from a file: all lines after `step` (all lines if it is 0), those of the step's evaluation unless
    it was `evaluated`, and unreadable ones. Returns warnings about unreadable lines."""

    def is_kept(record: Mapping[str, Any]) -> bool:
        return record["step"] < step or (record["step"] == step and (evaluated or record.get("kind") == "train"))

    if not path.exists():
        return []
    problems: list[str] = []
    with new_file(path) as kept:
        kept.writelines(json.dumps(record) + "\n" for record in _records(path, problems) if step and is_kept(record))
    return summarize(path, problems, "removed; the other lines are kept")


def _is_finite(value: Any) -> bool:
    return not isinstance(value, float) or math.isfinite(value)


def _nulled(values: Mapping[str, Any]) -> dict[str, Any]:
    """Replaces numbers that are not finite by None."""
    return {
        name: _nulled(value) if isinstance(value, Mapping) else value if _is_finite(value) else None
        for name, value in values.items()
    }


def _number(value: float | None) -> str:
    return "nan" if value is None else f"{value:.4f}"


def _percent(value: float | None) -> str:
    return "nan" if value is None else f"{value:.0%}"


def _joined(fields: Mapping[str, str]) -> str:
    return "  ".join(f"{name} {value}".strip() for name, value in fields.items())


def _of_pairs(values: Mapping[str, Any]) -> dict[str, str]:
    return (
        {"accuracy": _percent(values["accuracy"]), "margin": _number(values["margin"])} if "accuracy" in values else {}
    )


def _heldout_line(values: Mapping[str, Any]) -> str:
    sources = ", ".join(f"{name} {source['loss']:.2f}" for name, source in values.get("sources", {}).items())
    line = f"held-out loss {values['loss']:.4f} over {values['trained_tokens']:,.0f} tokens" + (
        sources and f" ({sources})"
    )
    return "  ".join([line, *([_joined(pairs)] if (pairs := _of_pairs(values)) else [])])


def _requests_line(values: Mapping[str, Any]) -> str:
    shares = _joined({mark.replace("_", " "): _percent(values[mark]) for mark in REQUEST_MARKS})
    return f"{values['requests']} held-out requests  {shares}"


def _has_loss(record: Mapping[str, Any], kind: Kind) -> bool:
    return record["kind"] == kind and record.get("loss") is not None


def plot(run: Path) -> Path:
    """Draws the training and held-out losses; returns the file, `loss.png`."""
    from matplotlib.figure import Figure

    records = read(run)
    pairs = any("accuracy" in record for record in records)
    unit = "per pair" if pairs else "nats per trained token"
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel=f"loss ({unit})", title=run.name)
    train, heldout = (
        [(record["step"], record["loss"]) for record in records if _has_loss(record, kind)]
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
    with new_file(run / "loss.png", "wb") as file:
        figure.savefig(file, format="png")
    return run / "loss.png"
