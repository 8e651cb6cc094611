"""The sections of the page: figures, tables, samples and configs. Empty ones are omitted."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from xlam_jax import config as configs
from xlam_jax.enums import REQUEST_MARKS
from xlam_jax.pages.plots import Plot, exact
from xlam_jax.report import samples
from xlam_jax.report.figures import Quantity, Report, by_objective, loss
from xlam_jax.report.mixture import Mixture, make_mixtures
from xlam_jax.report.runs import Run
from xlam_jax.report.samples import Card

KIND_LABELS = {"eos": "end of the turn", "tool_call": "tool call"}


class HeatCell(NamedTuple):
    """A number in a heat table."""

    text: str
    heat: float | None
    """Intensity of the cell's color in percent; None for an empty cell."""


class HeatTable(NamedTuple):
    """A table in which larger numbers have stronger colors."""

    caption: str
    header: list[str]
    rows: list[tuple[str, list[HeatCell]]]


class Configuration(NamedTuple):
    """The configs of the runs."""

    header: list[str]
    """Empty unless several configs are compared."""
    rows: list[list[str]]
    """The fields that differ, with their value in each run."""
    texts: list[tuple[str, str]]
    """Each run's name and config.yaml."""


@dataclass(frozen=True, kw_only=True)
class Section:
    """A section of the page; `report.html.jinja` shows its parts in this order."""

    title: str
    plots: list[tuple[str, list[Plot]]] = field(default_factory=list)
    """Groups of figures, each with a heading or ""."""
    heat_tables: list[HeatTable] = field(default_factory=list)
    note: str = ""
    mixtures: list[Mixture] = field(default_factory=list)
    samples: list[Card] = field(default_factory=list)
    samples_note: str = ""
    configuration: Configuration | None = None

    @property
    def link(self) -> tuple[str, str]:
        """The anchor and the title."""
        return self.title.lower().replace(" ", "-"), self.title

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to show."""
        parts = (self.heat_tables, self.note, self.mixtures, self.samples, self.configuration)
        return not any(plots for _, plots in self.plots) and not any(parts)


def make_sections(report: Report) -> list[Section]:
    """Returns the sections that have something to show, in the order of the page."""
    sections = [
        _losses(report),
        _preferences(report),
        _by_source(report),
        _by_kind(report),
        _requests(report),
        Section(title="Mixture", mixtures=make_mixtures(report)),
        _optimization(report),
        _speed(report),
        _samples(report),
        Section(title="Configuration", configuration=_configuration(report.runs)),
    ]
    return [section for section in sections if not section.is_empty]


def _group(*plots: Plot | None, heading: str = "") -> tuple[str, list[Plot]]:
    return heading, [plot for plot in plots if plot]


def _unit(objective: str) -> str:
    return "nats per trained token" if objective == "sft" else "per pair"


def _losses(report: Report) -> Section:
    groups = by_objective(report.runs)
    plots = [
        report.plot(
            "Loss" if len(groups) == 1 else f"Loss, {objective}",
            _unit(objective),
            loss(),
            runs=runs,
            log=True,
            columns=500,
            wide=True,
        )
        for objective, runs in groups.items()
    ]
    return Section(title="Losses", plots=[_group(*plots)])


def _preferences(report: Report) -> Section:
    def both(key: str, label: str = "") -> Quantity:
        return Quantity(label, train=(key,), heldout=(key,))

    rewards = both("rewards_chosen", "chosen"), both("rewards_rejected", "rejected")
    log_p = both("log_p_chosen", "chosen"), both("log_p_rejected", "rejected")
    accuracy = "pairs with a positive margin"
    plots = [
        *report.plot_group("Rewards", "β × log ratio", *rewards),
        report.plot("Margin", "chosen − rejected reward", both("margin")),
        report.plot("Accuracy", accuracy, both("accuracy"), percent=True, bounds=(0, 1)),
        *report.plot_group("Log-probability", "nats", *log_p),
        report.plot("KL to the reference", "nats", both("kl")),
    ]
    return Section(title="Preferences", plots=[_group(*plots)])


def _by_source(report: Report) -> Section:
    objectives = by_objective(report.runs)
    groups = []
    for objective, runs in objectives.items():
        names = dict.fromkeys(name for run in runs for name in run.sources())
        plots = [report.plot(name, _unit(objective), loss("sources", name), runs=runs, log=True) for name in names]
        shown = len(objectives) > 1 and any(plots)
        groups.append(_group(*plots, heading=objective if shown else ""))
    return Section(title="Losses by source", plots=groups)


def _by_kind(report: Report) -> Section:
    runs = [run for run in report.runs if run.heldout.names("kinds")]
    kinds = list(dict.fromkeys(kind for run in runs for kind in run.heldout.names("kinds")))
    plots = [
        report.plot(
            KIND_LABELS.get(kind, kind),
            _unit("sft"),
            loss("kinds", kind, label="held-out", train=False),
            runs=runs,
            log=True,
        )
        for kind in kinds
    ]
    tables = [_kinds_by_source(report, run, kinds) for run in runs]
    return Section(
        title="Held-out losses by kind of span",
        plots=[_group(*plots)],
        heat_tables=[table for table in tables if table],
    )


def _kinds_by_source(report: Report, run: Run, kinds: list[str]) -> HeatTable | None:
    """Returns the last held-out losses: a row per source, a column per kind; None if there are none by kind."""
    last = len(run.heldout.steps) - 1
    rows = []
    for source in run.heldout.names("sources"):
        values = [run.heldout.get("sources", source, "kinds", kind, "loss")[last] for kind in kinds]
        rows.append((source, [run.heldout.get("sources", source, "loss")[last], *values]))
    if not any(np.isfinite(values[1:]).any() for _, values in rows):
        return None
    largest = float(max(value for _, values in rows for value in values if np.isfinite(value)) or 1.0)
    name = "" if report.single else f"{run.name}, "
    return HeatTable(
        caption=f"{name}step {run.heldout.steps[last]:,}: held-out loss, nats per trained token",
        header=["source", "all", *(KIND_LABELS.get(kind, kind) for kind in kinds)],
        rows=[(source, [_heat_cell(float(value), largest) for value in values]) for source, values in rows],
    )


def _heat_cell(value: float, largest: float) -> HeatCell:
    return HeatCell(exact(value), 40 * value / largest) if np.isfinite(value) else HeatCell("–", None)


def _requests(report: Report) -> Section:
    shares = [Quantity(mark.replace("_", " "), requests=(mark,)) for mark in REQUEST_MARKS]
    counts = [
        f"{numbers[-1]:,.0f}" if report.single else f"{run.name} {numbers[-1]:,.0f}"
        for run in report.runs
        if len(numbers := run.requests.get("requests")) and np.isfinite(numbers[-1])
    ]
    return Section(
        title="Answers to held-out requests",
        plots=[_group(*report.plot_group("Requests", "share", *shares, percent=True, bounds=(0, 1)))],
        note=f"Requests at the last evaluation: {', '.join(counts)}." if counts else "",
    )


def _optimization(report: Report) -> Section:
    has_router = any(np.nan_to_num(run.train.get("aux_loss")).any() for run in report.runs)
    router = Quantity("", train=("aux_loss",), heldout=("aux_loss",))
    plots = [
        report.plot("Learning rate", "", Quantity("rate", ("learning_rate",), smooth=False)),
        report.plot("Gradient norm", "before clipping", Quantity("norm", ("grad_norm",)), log=True),
        report.plot("Router’s load balance", "top-k is even", router) if has_router else None,
    ]
    return Section(title="Optimization", plots=[_group(*plots)])


def _flops(run: Run) -> float | None:
    """Returns FLOP per token and device."""
    flops, devices = run.number("flops_per_token"), run.number("devices")
    return flops / devices if flops and devices else None


def _utilisation(run: Run) -> float | None:
    """Returns the model FLOPs utilization per token/s of the run, as a fraction of a device's peak."""
    peak, flops = run.number("peak_flops_per_device"), _flops(run)
    return flops / peak if peak and flops else None


def _teraflops(run: Run) -> float | None:
    """Returns TFLOP per token and device, of runs whose peak is unknown."""
    flops = _flops(run)
    return flops * 1e-12 if flops and _utilisation(run) is None else None


def _speed(report: Report) -> Section:
    rate = ("tokens_per_second",)
    memory = Quantity("peak", ("memory",), factor=lambda run: 1e-9, smooth=False)
    plots = [
        report.plot("Throughput", "tokens per second", Quantity("tokens/s", rate)),
        report.plot("Model-FLOPs utilisation", "of peak", Quantity("MFU", rate, factor=_utilisation), percent=True),
        report.plot("Achieved", "TFLOP/s per device; peak unknown", Quantity("achieved", rate, factor=_teraflops)),
        report.plot("Memory", "GB per device, peak", memory),
        report.plot("Trained tokens", "of a batch", Quantity("trained", ("trained_share",)), percent=True),
    ]
    return Section(title="Speed and memory", plots=[_group(*plots)])


def _samples(report: Report) -> Section:
    shown = [(run.name, run_samples) for run, run_samples in zip(report.runs, report.samples, strict=True)]
    hidden = [f"{name} {run_samples.hidden:,}" for name, run_samples in shown if run_samples.hidden]
    note = f"The first {samples.REQUESTS} requests are shown, not the rest ({', '.join(hidden)})." if hidden else ""
    return Section(title="Samples", samples=samples.make_cards(shown), samples_note=note)


def _configuration(runs: Sequence[Run]) -> Configuration:
    compared = [run for run in runs if run.config]
    header: list[str] = []
    rows: list[list[str]] = []
    if len(compared) > 1:
        fields = [dict(configs.flatten(run.config)) for run in compared if run.config]
        names = dict.fromkeys(name for values in fields for name in values)
        header = ["field", *(run.name for run in compared)]
        rows = [
            [name, *(_text(values, name) for values in fields)]
            for name in names
            if name != "output_dir" and len({_text(values, name) for values in fields}) > 1
        ]
    return Configuration(header, rows, [(run.name, run.config_text) for run in runs])


def _text(fields: dict[str, Any], name: str) -> str:
    return str(fields[name]) if name in fields else "–"
