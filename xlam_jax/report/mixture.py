"""The realised mixture of a run: the share of each source, next to its target."""

from typing import NamedTuple

import numpy as np

from xlam_jax.pages import plots
from xlam_jax.pages.plots import Line, Plot, color_class
from xlam_jax.report.figures import Report, window
from xlam_jax.report.runs import Run, number

SMALLEST_WINDOW = 20
"""Shares of the sources are averaged over at least this many steps: a single step has few trajectories."""


class Share(NamedTuple):
    """A source in the table of a mixture."""

    name: str
    css: str
    amount: str
    """Trained tokens or pairs seen."""
    realised: float
    realised_text: str
    target: float | None
    target_text: str
    passes: str
    """Passes over the source."""


class Mixture(NamedTuple):
    """The table and the figure of a run's mixture."""

    heading: str
    """The run's name, if there are several."""
    unit: str
    rows: list[Share]
    plot: Plot | None


def targets(run: Run) -> dict[str, float]:
    """Returns each source's target share of trained tokens (SFT) or pairs; empty if it is not known.

    run.json contains the target share of trajectories; the mean number of trained tokens of a source's trajectories
    turns it into a share of tokens.
    """
    sources = run.about.get("sources")
    shares: dict[str, float] = {}
    for name, source in sources.items() if isinstance(sources, dict) else ():
        facts = source if isinstance(source, dict) else {}
        share, trajectories, tokens = (
            number(facts.get(key)) for key in ("target_share", "trajectories", "trained_tokens")
        )
        if share is None or not trajectories or tokens is None:
            return {}
        shares[name] = share * (tokens / trajectories if run.objective == "sft" else 1.0)
    total = sum(shares.values())
    return {name: share / total for name, share in shares.items()} if total else {}


def make_mixtures(report: Report) -> list[Mixture]:
    """Returns the mixture of each run that has records of sources."""
    mixtures = [_make_mixture(report, run) for run in report.runs]
    return [mixture for mixture in mixtures if mixture]


def _make_mixture(report: Report, run: Run) -> Mixture | None:
    names = [name for name in run.sources() if np.isfinite(run.train.get("sources", name, "tokens")).any()]
    if not names:
        return None
    tokens_SN = np.stack([np.nan_to_num(run.train.get("sources", name, "tokens")) for name in names])
    wanted = targets(run)
    unit = "trained tokens" if run.objective == "sft" else "pairs"
    steps = max(window(run), min(SMALLEST_WINDOW, len(run.train.steps)))
    plot = plots.make_plot(
        "Realised share" if report.single else f"Realised share, {run.name}",
        f"of the {unit} in {steps:,} steps; dotted: target",
        _share_curves(run, names, tokens_SN, wanted, steps),
        report.span,
        percent=True,
    )
    return Mixture(
        heading="" if report.single else run.name, unit=unit, rows=_make_rows(run, names, tokens_SN, wanted), plot=plot
    )


def _share_curves(
    run: Run, names: list[str], tokens_SN: np.ndarray, wanted: dict[str, float], steps: int
) -> list[Line]:
    weights = np.ones(tokens_SN.shape[1])
    total = np.maximum(plots.smooth(tokens_SN.sum(axis=0), weights, steps), 1e-300)
    ends = run.train.steps[[0, -1]]
    lines = []
    for index, name in enumerate(names):
        share = plots.smooth(tokens_SN[index], weights, steps) / total
        lines.append(Line(name, run.train.steps, share, index, "line", run.train.breaks))
        if name in wanted and len(run.train.steps) > 1:
            lines.append(Line(f"{name}, target", ends, np.repeat(wanted[name], 2), index, "target"))
    return lines


def _make_rows(run: Run, names: list[str], tokens_SN: np.ndarray, wanted: dict[str, float]) -> list[Share]:
    size_key = "trained_tokens" if run.objective == "sft" else "trajectories"
    tokens_S = tokens_SN.sum(axis=1)
    realised_S = tokens_S / max(tokens_SN.sum(), 1.0)
    rows = []
    for index, name in enumerate(names):
        # `targets` is empty unless all of run.json's sources are well formed
        size = number(run.about["sources"].get(name, {}).get(size_key)) if wanted else None
        target = wanted.get(name)
        rows.append(
            Share(
                name=name,
                css=color_class(index),
                amount=f"{tokens_S[index]:,.0f}",
                realised=float(realised_S[index]),
                realised_text=f"{realised_S[index]:.1%}",
                target=target,
                target_text="–" if target is None else f"{target:.1%}",
                passes=f"{tokens_S[index] / size:.2f}" if size else "–",
            )
        )
    return rows
