"""Curves over steps, laid out as figures that scale with the page while text and line widths keep their size.

A figure is an SVG that is stretched over its frame. Its x coordinate is the step; its y coordinate runs from HEIGHT at
the bottom to 0 at the top. Labels are text of the page, placed by percent, and stay readable on a phone and on paper.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

import numpy as np

HEIGHT = 10_000
"""Units of the y axis; values are rounded to one unit."""
COLORS = 8
"""Number of colors; further curves repeat them with dashed lines."""
LOG_FROM = 50.0
"""The y axis may be logarithmic if the largest value of the bold curves is more than this many times the smallest."""
MANY = 60
"""A curve of more points than this has small ones."""

Look = Literal["faint", "target", "line", "points"]
LOOKS: tuple[Look, ...] = ("faint", "target", "line", "points")
"""In drawing order, back to front."""
NAMED: tuple[Look, ...] = ("line", "points")
"""The looks that appear in the legend."""


class Line(NamedTuple):
    """A curve: finite values, float64 [n], after increasing steps, int64 [n]."""

    name: str
    steps: np.ndarray
    values: np.ndarray
    color: int = 0
    look: Look = "line"
    """line; points: dots joined by a thin line; faint: pale, behind the others; target: dotted."""
    breaks: np.ndarray | None = None
    """bool [n]: the curve is interrupted before this point."""

    def at(self, places: np.ndarray) -> "Line":
        """Returns the points at increasing indices, or where a mask is True. A break before a removed point moves to
        the next one that is kept."""
        breaks = self.breaks
        if breaks is not None:
            parts = np.cumsum(breaks)[places]
            breaks = np.append(False, parts[1:] != parts[:-1])[: len(parts)]
        return self._replace(steps=self.steps[places], values=self.values[places], breaks=breaks)


def smooth(values: np.ndarray, weights: np.ndarray, window: int) -> np.ndarray:
    """Returns the weighted mean of the `window` values around each value; of fewer at both ends. All arrays are [n]."""
    sums, totals = (np.append(0.0, np.cumsum(column)) for column in (values * weights, weights))
    at = np.arange(len(values))
    low, high = np.maximum(at - (window - 1) // 2, 0), np.minimum(at + window // 2 + 1, len(values))
    return (sums[high] - sums[low]) / np.maximum(totals[high] - totals[low], 1e-300)


def thin(line: Line, columns: int) -> Line:
    """Keeps the lowest and the highest point of each of `columns` intervals of equal length, and both ends.

    Nothing is averaged: a spike of one step stays a spike.
    """
    count = len(line.steps)
    if count <= 2 * columns:
        return line
    first, last = line.steps[0], line.steps[-1]
    edges = np.searchsorted(line.steps, first + (last - first + 1) * np.arange(1, columns) / columns)
    kept = [0, count - 1]
    for low, high in zip(np.append(0, edges), np.append(edges, count), strict=True):
        if low < high:
            part = line.values[low:high]
            kept += [int(low + part.argmin()), int(low + part.argmax())]
    return line.at(np.unique(kept))


class Axis(NamedTuple):
    """The range of an axis and its ticks; with `log`, all are base-10 logarithms."""

    low: float
    high: float
    ticks: list[float]
    log: bool = False

    def share(self, values: np.ndarray) -> np.ndarray:
        """Returns the position of values along the axis: 0 at the low end, 1 at the high end."""
        return ((np.log10(values) if self.log else values) - self.low) / (self.high - self.low)


def ticks(low: float, high: float, count: int, *, whole: bool = False) -> list[float]:
    """Returns about `count` round numbers from `low` to `high`: multiples of 1, 2, 2.5 or 5 times a power of ten.

    whole: integers only.
    """
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    stride = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * (1 - 1e-9))
    if whole:
        stride = max(1, math.ceil(stride))
    return [at * stride for at in range(math.ceil(low / stride - 1e-9), math.floor(high / stride + 1e-9) + 1)]


def _visible_range(lines: Sequence[Line]) -> tuple[float, float, str]:
    """Returns the lowest and highest value that the y axis must show, and a note on pale points beyond.

    A few outliers would flatten everything else: if the outermost 0.5 % of the pale points at one end take more room
    than all other values, they are drawn at the edge and described in the note.
    """
    faint = np.concatenate([np.zeros(0), *(line.values for line in lines if line.look == "faint")])
    bold = np.concatenate([line.values for line in lines if line.look != "faint"])
    low, high = (float(limit(np.append(bold, faint))) for limit in (np.min, np.max))
    if not len(faint):
        return low, high, ""
    inside = np.append(bold, np.quantile(faint, [0.005, 0.995]))
    inside_low, inside_high = float(inside.min()), float(inside.max())
    room, beyond, ends = inside_high - inside_low, 0, []
    if inside_low - low > room:
        beyond, ends, low = int((faint < inside_low).sum()), [exact(low)], inside_low
    if high - inside_high > room:
        beyond, ends, high = beyond + int((faint > inside_high).sum()), [*ends, exact(high)], inside_high
    noun = "step is" if beyond == 1 else "steps are"
    return low, high, f"{beyond:,} pale {noun} beyond the axis, up to {' and '.join(ends)}" if ends else ""


def y_axis(low: float, high: float, bounds: tuple[float, float] | None = None, *, log: bool = False) -> Axis:
    """Returns the axis for values from `low` to `high`, with a margin, and starting at zero if zero is near.

    bounds: the exact limits, where they are known. log: a logarithmic axis, if `low` is positive.
    """
    if log and low > 0:
        low, high = math.log10(low), math.log10(high)
        room = 0.03 * (high - low)
        low, high = low - room, high + room
        decades = [float(at) for at in range(math.ceil(low), math.floor(high) + 1)]
        if len(decades) < 3:
            fine = (at + math.log10(factor) for at in range(math.floor(low), math.ceil(high)) for factor in (1, 2, 5))
            decades = [at for at in fine if low <= at <= high]
        return Axis(low, high, decades[:: -(-len(decades) // 6)], log=True)
    if bounds is not None:
        low, high = bounds
    elif high - low <= 1e-9 * max(abs(low), abs(high)):
        low, high = min(low, 0.0), max(high, 0.0) or 1.0
    if bounds is None:
        if 0 < low < 0.4 * high:
            low = 0.0
        room = 0.04 * (high - low)
        low, high = low - (room if low else 0), high + room
    return Axis(low, high, ticks(low, high, 6))


def short(value: float, largest: float, percent: bool = False) -> str:
    """Returns a tick label in few characters; `largest` is the largest absolute value on its axis."""
    if percent:
        return f"{100 * value:.4g} %"
    for size, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if largest >= size:
            return f"{value / (1e3 if suffix == 'k' else size):.6g}{suffix if value else ''}"
    if largest < 1e-2 and value:
        mantissa, exponent = f"{value:.3e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:,.0f}" if abs(value) >= 1e3 else f"{value:.6g}"


def exact(value: float, percent: bool = False) -> str:
    """Returns a value with four significant digits."""
    if percent:
        return f"{value:.1%}"
    if value and abs(value) < 1e-3:
        return f"{value:.2e}"
    return f"{value:,.0f}" if abs(value) >= 1e3 else f"{value:.4g}"


def path_data(line: Line, axis: Axis) -> str:
    """Returns a curve as SVG path data in whole numbers, `M` absolute and `l` relative.

    A point is a stroke of length zero (`h0`), which its round ends make a dot.
    """
    y = np.rint(HEIGHT * (1 - axis.share(line.values))).astype(np.int64)
    x = line.steps
    if line.look == "points":
        return "".join(f"M{a} {b}h0" for a, b in zip(x.tolist(), y.tolist(), strict=True))
    starts = np.zeros(len(x), bool) if line.breaks is None else line.breaks.copy()
    starts[:1] = True
    parts = []
    for low, high in zip(np.flatnonzero(starts), np.append(np.flatnonzero(starts)[1:], len(x)), strict=True):
        moves = zip(np.diff(x[low:high]).tolist(), np.diff(y[low:high]).tolist(), strict=True)
        relative = " ".join(f"{a} {b}" for a, b in moves)
        parts.append(f"M{x[low]} {y[low]}" + (f"l{relative}" if relative else "h0"))
    return "".join(parts)


def color_class(color: int) -> str:
    """Returns the CSS classes of a color index; from COLORS on, colors repeat with dashed lines."""
    return f"c{color % COLORS}" + (" dash" if color // COLORS % 2 else "")


# ---- figures --------------------------------------------------------------------------------------------------------


class Stroke(NamedTuple):
    """An SVG path. The script shows the values of paths that have the name of a curve."""

    css: str
    data: str
    name: str | None = None


class Label(NamedTuple):
    """A tick label: its place along the axis, in percent, and its text."""

    place: float
    text: str


class LegendEntry(NamedTuple):
    """A curve in the legend, with its last value."""

    css: str
    name: str
    value: str


class Plot(NamedTuple):
    """A figure, as `plots.html.jinja` draws it."""

    title: str
    scale: str
    """Unit and kind of the y axis."""
    note: str
    """Points that are beyond the axis; empty if there are none."""
    description: str
    """For readers who cannot see the figure."""
    axis: Axis
    span: tuple[int, int]
    """First and last step of the x axis."""
    x_labels: list[Label]
    y_labels: list[Label]
    grid: str
    base: str
    """Path data of the grid and of the base line."""
    strokes: list[Stroke]
    """In drawing order."""
    legend: list[list[LegendEntry]]
    """One list per entry: a curve, and the held-out points of the same curve."""
    percent: bool
    wide: bool
    height: int = HEIGHT


def make_plot(
    title: str,
    unit: str,
    lines: Sequence[Line],
    span: tuple[int, int],
    *,
    percent: bool = False,
    bounds: tuple[float, float] | None = None,
    log: bool = False,
    columns: int = 150,
    wide: bool = False,
) -> Plot | None:
    """Lays out curves as a figure with axes, units and a legend; None if there is no point to draw.

    span: first and last step of the x axis. percent: show values (0 to 1) as percentages. bounds: limits of the y axis,
    where they are known. log: use a logarithmic y axis if the values range widely. columns: see `thin`. wide: use the
    full width of the page.
    """
    lines = [line for line in lines if len(line.steps)]
    if not lines:
        return None
    bold = [line for line in lines if line.look != "faint"]
    low, high, note = _visible_range(lines)
    extremes = [value for line in bold for value in (line.values.min(), line.values.max())]
    axis = y_axis(low, high, bounds, log=log and min(extremes) > 0 and max(extremes) > LOG_FROM * min(extremes))
    first, last = span if span[0] < span[1] else (span[0] - 1, span[1])
    scale = f"{unit}, logarithmic" if axis.log else unit
    last_values = "; ".join(f"{line.name} {exact(float(line.values[-1]), percent)}" for line in bold)
    y_labels = _y_labels(axis, percent)
    return Plot(
        title=title,
        scale=scale,
        note=note,
        description=f"{title}, {scale}, over steps {first} to {last}. Last: {last_values}",
        axis=axis,
        span=(first, last),
        x_labels=[
            Label(100 * (at - first) / (last - first), short(at, last)) for at in ticks(first, last, 4, whole=True)
        ],
        y_labels=y_labels,
        grid="".join(f"M{first} {HEIGHT * (1 - label.place / 100):.0f}H{last}" for label in y_labels),
        base=f"M{first} {_base_line(axis):.0f}H{last}",
        strokes=_strokes(lines, axis, columns, (low, high)),
        legend=_legend(lines, percent),
        percent=percent,
        wide=wide,
    )


def _y_labels(axis: Axis, percent: bool) -> list[Label]:
    values = [10**at if axis.log else at for at in axis.ticks]
    largest = max(map(abs, values), default=0.0)
    return [
        Label(100 * float((at - axis.low) / (axis.high - axis.low)), short(value, largest, percent))
        for at, value in zip(axis.ticks, values, strict=True)
    ]


def _base_line(axis: Axis) -> float:
    """Returns y of the base line: zero if it is inside the axis, else the bottom."""
    if axis.log or not axis.low < 0 < axis.high:
        return HEIGHT
    return HEIGHT * axis.high / (axis.high - axis.low)


def _strokes(lines: Iterable[Line], axis: Axis, columns: int, limits: tuple[float, float]) -> list[Stroke]:
    """Returns the paths of thinned curves, back to front; pale ones are cut off at `limits`."""
    strokes: list[Stroke] = []
    for line in sorted(lines, key=lambda line: LOOKS.index(line.look)):
        thinned = thin(line, columns)
        if line.look == "faint":
            thinned = thinned._replace(values=thinned.values.clip(*limits))
        color, css = color_class(line.color), line.look
        if line.look == "points" and len(thinned.steps) > 1:
            strokes.append(Stroke(f"join {color}", path_data(thinned._replace(look="line"), axis)))
        if line.look == "points" and len(thinned.steps) > MANY:
            color += " many"
        name = line.name if line.look in NAMED else None
        strokes.append(Stroke(f"{css} {color}", path_data(thinned, axis), name))
    return strokes


def _legend(lines: Iterable[Line], percent: bool) -> list[list[LegendEntry]]:
    """Returns names, looks and last values; points named "CURVE, …" share the entry of CURVE, if that is drawn."""
    items: dict[str, list[LegendEntry]] = {}
    for line in lines:
        if line.look in NAMED:
            curve, comma, rest = line.name.rpartition(", ")
            shared = bool(comma) and curve in items
            entry = LegendEntry(
                f"{line.look} {color_class(line.color)}",
                rest if shared else line.name,
                exact(float(line.values[-1]), percent),
            )
            items.setdefault(curve if shared else line.name, []).append(entry)
    return list(items.values())
