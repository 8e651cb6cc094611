"""The runs at a glance: how far each one is, its main numbers and its setup."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from xlam_jax.config import Config
from xlam_jax.pages.plots import color_class, exact
from xlam_jax.report.figures import Report, curves, loss, window
from xlam_jax.report.runs import Run


class Value(NamedTuple):
    """A number in large type, its name, and a detail in small type."""

    text: str
    label: str
    detail: str


class Card(NamedTuple):
    """The overview of a run."""

    name: str
    css: str
    progress: float
    """Fraction of the planned steps, 0 to 1."""
    values: list[Value]
    facts: list[tuple[str, str]]
    """Names and texts."""


def make_cards(report: Report) -> list[Card]:
    """Returns a card per run."""
    return [
        Card(run.name, color_class(index), _progress(run), list(_values(run)), list(_facts(run)))
        for index, run in enumerate(report.runs)
    ]


def _steps_done(run: Run) -> int:
    return int(run.train.steps[-1]) if len(run.train.steps) else 0


def _progress(run: Run) -> float:
    done = _steps_done(run)
    planned = run.planned or done
    return min(1.0, done / planned) if planned else 0.0


def _values(run: Run) -> Iterator[Value]:
    for line in curves(run, loss(), ("train", 0), ("held-out", 0)):
        if not len(line.values):
            continue
        last, detail = exact(float(line.values[-1])), ""
        if line.look == "points":
            best = int(line.values.argmin())
            detail = f"lowest {exact(float(line.values[best]))}, step {line.steps[best]:,}"
        elif line.look == "line" and window(run) > 1:
            detail = f"mean of the last {window(run) // 2 + 1:,} steps"
        if line.look in ("line", "points"):
            yield Value(last, f"{line.name} loss", detail)
    for label, column in (
        ("held-out accuracy", run.heldout.get("accuracy")),
        ("exact calls", run.requests.get("exact")),
    ):
        if (finite := column[np.isfinite(column)]).size:
            yield Value(exact(float(finite[-1]), percent=True), label, "")


def _facts(run: Run) -> Iterator[tuple[str, str]]:
    yield from _time_facts(run)
    total, trainable = run.number("parameters"), run.number("trainable_parameters")
    if total:
        share = "" if trainable is None else f", of which {_amount(trainable)} ({trainable / total:.2%}) train"
        yield "parameters", _amount(total) + (", all train" if trainable == total else share)
    if run.config:
        yield "training", _describe_training(run.config)
    if run.number("devices"):
        yield "devices", f"{run.number('devices'):.0f} × {run.about.get('device_kind', 'unknown')}"
    trained, real = (float(np.nansum(run.train.get(name))) for name in ("trained_tokens", "tokens"))
    if real:
        yield "tokens seen", f"{_amount(real)}, of which {_amount(trained)} trained"


def _time_facts(run: Run) -> Iterator[tuple[str, str]]:
    from xlam_jax.progress import duration

    done, planned = _steps_done(run), run.planned
    yield "steps", f"{done:,} of {planned:,}" if planned else f"{done:,}"
    finished = planned is not None and done >= planned
    yield "state", "finished" if finished else f"unfinished; last record {run.written:%Y-%m-%d %H:%M} UTC"
    rate = run.train.get("tokens_per_second")
    seconds = np.nansum(run.train.get("tokens") / np.where(rate > 0, rate, np.nan))
    if seconds:
        yield "time in steps", f"about {duration(float(seconds))}"
    started = run.about.get("started")
    if isinstance(started, list) and started:
        times = [str(time).replace("T", " ").removesuffix("+00:00") for time in started]
        yield "started", f"{times[0]} UTC"
        if times[1:]:
            yield f"continued {_times(len(times) - 1)}", ", ".join(times[1:])


def _times(count: int) -> str:
    return "once" if count == 1 else "twice" if count == 2 else f"{count} times"


def _amount(value: float) -> str:
    for size, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g} {suffix}"
    return f"{value:.0f}"


def _describe_training(config: Config) -> str:
    objective = "SFT" if config.objective.kind == "sft" else f"{config.objective.kind}, β {config.objective.beta:g}"
    method = {"full": "all parameters", "lora": "LoRA", "qlora": "QLoRA"}[config.train.trainable]
    if config.train.trainable != "full":
        method += f" rank {config.lora.rank} on {', '.join(config.lora.targets)}"
    return f"{objective}, {method}, {config.train.optimizer}"
