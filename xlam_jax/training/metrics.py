"""What a run tells: lines or a panel for people, one JSON line a step for machines, trackers, and a plot of the losses.

`metrics.jsonl` is the record; everything else shows it. Each line is valid JSON: a number that is not finite is null
there, and `not_finite` says by its path what it was: {"loss": null, …, "not_finite": {"loss": "nan"}}.
"""

import json
import math
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Self

from xlam_jax.journal import Journal, json_lines, summarize
from xlam_jax.outputs import new_file
from xlam_jax.progress import Progress, Status, duration
from xlam_jax.training.trackers import METRICS, Trackers, flat

SAMPLES = "samples.jsonl"
RATE_WINDOW = 20
"""Steps over which tokens a second, and the loss that is shown first, are averaged."""
Kind = Literal["train", "heldout", "requests"]


class Metrics:
    """Writes what happens at each step into the run folder.

    What stands there of steps after `start` is left by a run that was killed and comes again: it is taken out, so that
    every step stands there once. With `start` 0 nothing was saved, and everything is.

    A context manager: leaving it ends the trackers, which on an error are told that the run failed.
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
        """`evaluated`: whether the evaluation after step `start` is complete; else what is there of it is removed.
        `places`: tokens of a batch, padding included. `writes`: whether this host is the one that writes."""
        self._run, self._writes = run, writes
        self._steps, self._places, self._log_every = steps, places, log_every
        self._progress, self._trackers = progress, trackers
        # A step's metrics arrive when they are asked for, not when it ends: a rate is only true over several steps.
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
        """Records what became known after a step; values may be nested, by source and by kind of span.

        train: at least loss, grad_norm, tokens, trained_tokens and learning_rate; tokens_per_second and trained_share
        are added. heldout: at least loss and trained_tokens. requests: their number, and the shares parsable,
        schema_valid, right_function and exact.
        """
        if not self._writes:
            return
        if kind == "train":
            values = {**values, **self._rates(values)}
        record = {"step": step, "kind": kind, **values}
        not_finite = {path: str(value) for path, value in flat(record).items() if not _is_finite(value)}
        written = _nulled(record) | {"not_finite": not_finite} if not_finite else record
        self._journal.append(written, allow_nan=False)
        if self._trackers:
            numbers = {path: value for path, value in flat(values).items() if isinstance(value, (int, float))}
            self._trackers.log(step, {f"{kind}/{path}": value for path, value in numbers.items()})
        self._remember(record)
        if kind == "train":
            self._status = self._state(step, values)
            self._progress.step(self._status, keep=step % self._log_every == 0 or step == self._steps)
        else:
            tell = _heldout_line if kind == "heldout" else _requests_line
            self._progress.line(f"step {step}/{self._steps}  {tell(values)}")

    def append_samples(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Appends what the model answered to requests to samples.jsonl; each line has its `step`."""
        if self._writes:
            with Journal(self._run / SAMPLES, report=self._progress.line) as samples:
                for line in lines:
                    samples.append(line)

    def exclude(self, seconds: float) -> None:
        """Takes time that was not spent on steps (evaluation, compiling) out of the rates."""
        self._clock += seconds
        self._first = (self._first[0], self._first[1] + seconds)

    @contextmanager
    def paused(self, what: str) -> Iterator[None]:
        """Around what is no step, such as `evaluating`: named in the panel, and taken out of the rates."""
        began = time.monotonic()
        self._progress.doing(what)
        try:
            yield
        finally:
            self._progress.doing("")
            self.exclude(time.monotonic() - began)

    def close(self, failed: bool = False) -> None:
        """Ends the files, the panel (its last state stays as a line) and the trackers."""
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
        """Keeps what later steps show of it."""
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
    """The records of a run so far. Lines that are no records are skipped; a resumed run removes and reports them."""
    return list(_records(run / METRICS, []))


def _records(path: Path, problems: list[str]) -> Iterator[dict[str, Any]]:
    if not path.exists():
        return
    for at, record in json_lines(path, problems):
        known = isinstance(record, dict) and type(record.get("step")) is int
        if known and (path.name != METRICS or isinstance(record.get("kind"), str)):
            yield record
        else:
            problems.append(f"line {at} is not a record with a step")


def _keep_until(step: int, path: Path, evaluated: bool) -> list[str]:
    """Removes the lines after a step from a file, all of them where the step is 0, those of the step's evaluation
    where that is not complete (`evaluated`), and those that can't be read. Returns a warning of the latter."""

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
    """The same with None where a number is not finite."""
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
    sources = ", ".join(f"{name} {of['loss']:.2f}" for name, of in values.get("sources", {}).items())
    told = f"held-out loss {values['loss']:.4f} over {values['trained_tokens']:,.0f} tokens" + (
        sources and f" ({sources})"
    )
    return "  ".join([told, *([_joined(pairs)] if (pairs := _of_pairs(values)) else [])])


def _requests_line(values: Mapping[str, Any]) -> str:
    names = ("parsable", "schema_valid", "right_function", "exact")
    shares = _joined({name.replace("_", " "): _percent(values[name]) for name in names})
    return f"{values['requests']} held-out requests  {shares}"


def plot(run: Path) -> Path:
    """Draws the training and held-out losses into `loss.png`."""
    from matplotlib.figure import Figure

    records = read(run)
    pairs = any("accuracy" in record for record in records)
    unit = "a pair" if pairs else "nats per trained token"
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel=f"loss ({unit})", title=run.name)
    train, heldout = (
        [(one["step"], one["loss"]) for one in records if one["kind"] == kind and one.get("loss") is not None]
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
