"""Curves of the metrics of runs, and the figures that show them."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from xlam_jax.pages import plots
from xlam_jax.pages.plots import Line, Plot
from xlam_jax.report.runs import Keys, Run
from xlam_jax.report.samples import Samples

INTERVALS = 50
"""A bold curve averages over one part in this many of its run."""


class Quantity(NamedTuple):
    """A quantity to draw: columns of a run's tables, times a factor."""

    label: str
    train: Keys | None = None
    """Column of the training records."""
    heldout: Keys | None = None
    """Column of the held-out evaluations."""
    requests: Keys | None = None
    """Column of the evaluations on held-out requests."""
    weight: Keys | None = None
    """Column of the training records that weights the mean over steps."""
    factor: Callable[[Run], float | None] = lambda run: 1.0
    """Multiplies all values; None if a run does not have the quantity."""
    smooth: bool = True
    """Draw steps pale and their mean bold; otherwise the steps alone."""


def loss(*path: str, label: str = "", train: bool = True) -> Quantity:
    """Returns a loss, per trained token or per pair. `path`: its place in a record, such as ("sources", "webshop")."""
    tokens = (*path, "tokens") if path else ("trained_tokens",)
    return Quantity(label, (*path, "loss") if train else None, (*path, "loss"), weight=tokens)


def window(run: Run) -> int:
    """Returns the number of steps that a bold curve averages over."""
    return max(1, len(run.train.steps) // INTERVALS)


def curves(run: Run, quantity: Quantity, train: tuple[str, int], heldout: tuple[str, int]) -> list[Line]:
    """Returns the curves of a quantity in a run; none if the run does not have it.

    train, heldout: names and colors of the curves.
    """
    factor = quantity.factor(run)
    if factor is None:
        return []
    lines = []
    if quantity.train:
        lines += _train_curves(run, quantity, factor, *train)
    for path, table in ((quantity.heldout, run.heldout), (quantity.requests, run.requests)):
        if path:
            points = Line(heldout[0], table.steps, factor * table.get(*path), heldout[1], "points")
            lines.append(points.at(np.isfinite(points.values)))
    return lines


def _train_curves(run: Run, quantity: Quantity, factor: float, name: str, color: int) -> list[Line]:
    assert quantity.train
    table = run.train
    steps = Line(name, table.steps, factor * table.get(*quantity.train), color, "line", table.breaks)
    weights = table.get(*quantity.weight) if quantity.weight else np.ones(len(table.steps))
    finite = np.isfinite(steps.values)
    steps, weights = steps.at(finite), np.nan_to_num(weights[finite], nan=1.0)
    if not quantity.smooth or window(run) == 1 or not len(steps.steps):
        return [steps]
    mean = steps._replace(values=plots.smooth(steps.values, weights, window(run)))
    return [steps._replace(look="faint"), mean]


class Report:
    """The runs of a page, with their samples."""

    def __init__(self, runs: Sequence[Run], samples: Sequence[Samples]):
        self.runs, self.samples = runs, samples
        self.single = len(runs) == 1
        steps = np.concatenate([table.steps for run in runs for table in (run.train, run.heldout, run.requests)])
        self.span = int(steps.min()), int(steps.max())

    def plot(
        self, title: str, unit: str, *quantities: Quantity, runs: Sequence[Run] | None = None, **options: Any
    ) -> Plot | None:
        """Returns one figure: all quantities of a single run, or one quantity of several runs; None if it is empty.

        runs: the runs to draw; by default all. options: those of `plots.make_plot`.
        """
        names = [run.name for run in self.runs]
        lines = []
        for run in self.runs if runs is None else runs:
            for index, quantity in enumerate(quantities):
                if self.single and len(quantities) == 1:
                    curve, points = (quantity.label or "train", 0), ("held-out", 1)
                else:  # colors 0 and 1 are those of train and held-out
                    curve = (quantity.label, index + 2) if self.single else (run.name, names.index(run.name))
                    points = f"{curve[0]}, held-out", curve[1]
                lines += curves(run, quantity, curve, curve if quantity.train is None else points)
        return plots.make_plot(title, unit, lines, self.span, **options)

    def plot_group(self, title: str, unit: str, *quantities: Quantity, **options: Any) -> list[Plot | None]:
        """Returns related quantities: in one figure for a single run, in one figure each for several runs."""
        if self.single:
            return [self.plot(title, unit, *quantities, **options)]
        return [self.plot(f"{title}: {quantity.label}", unit, quantity, **options) for quantity in quantities]


def by_objective(runs: Iterable[Run]) -> dict[str, list[Run]]:
    """Groups runs by the loss that they minimize: losses of different groups cannot be compared."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.objective, []).append(run)
    return groups
