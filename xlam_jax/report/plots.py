"""Curves over steps, as drawings that grow and shrink with the page while their text and strokes do not.

A drawing is an SVG that is stretched over its frame. Its x is the step itself; its y counts from HEIGHT, at the bottom,
up to 0. Labels are text of the page, placed by percent, so they are as readable on a telephone as on paper.
"""

import math
from collections.abc import Iterable, Sequence
from html import escape
from typing import Literal, NamedTuple

import numpy as np

HEIGHT = 10_000
"""Parts of the y axis: what is drawn is true to half of one."""
COLORS = 8
"""Colours of the page; beyond, lines are dashed."""
LOG_FROM = 50.0
"""Where the largest value of the bold curves is so many times the smallest, the axis may be logarithmic."""

MANY = 60
"""Points of a figure beyond which they are small."""

Look = Literal["line", "faint", "points", "target"]


class Line(NamedTuple):
    """A curve: values [n], all finite, after steps [n]."""

    name: str
    steps: np.ndarray
    values: np.ndarray
    color: int = 0
    look: Look = "line"
    """line; points: joined by a thin line; faint: behind the others; target: dotted. The last two are not named."""
    breaks: np.ndarray | None = None
    """[n] bool: no stroke leads to this point."""

    def at(self, places: np.ndarray) -> "Line":
        """The points at these places alone, in order; a break before one that is left out is one before the next."""
        breaks = self.breaks
        if breaks is not None:
            parts = np.cumsum(breaks)[places]
            breaks = np.append(False, parts[1:] != parts[:-1])[: len(parts)]
        return self._replace(steps=self.steps[places], values=self.values[places], breaks=breaks)


def smooth(values: np.ndarray, weights: np.ndarray, window: int) -> np.ndarray:
    """The weighted mean of the `window` values around each; of those that are there at the ends."""
    sums, totals = (np.append(0.0, np.cumsum(one)) for one in (values * weights, weights))
    at = np.arange(len(values))
    low, high = np.maximum(at - (window - 1) // 2, 0), np.minimum(at + window // 2 + 1, len(values))
    return (sums[high] - sums[low]) / np.maximum(totals[high] - totals[low], 1e-300)


def thin(drawn: Line, columns: int) -> Line:
    """At most two points of each of `columns` stretches of equal length: the lowest and the highest, where they are.

    Nothing is averaged away: a spike of one step stays a spike.
    """
    count = len(drawn.steps)
    if count <= 2 * columns:
        return drawn
    first, last = drawn.steps[0], drawn.steps[-1]
    edges = np.searchsorted(drawn.steps, first + (last - first + 1) * np.arange(1, columns) / columns)
    kept = [0, count - 1]
    for low, high in zip(np.append(0, edges), np.append(edges, count), strict=True):
        if low < high:
            part = drawn.values[low:high]
            kept += [int(low + part.argmin()), int(low + part.argmax())]
    return drawn.at(np.unique(kept))


class Axis(NamedTuple):
    """A range of values and its ticks; with `log` all of them as decadic logarithms."""

    low: float
    high: float
    ticks: list[float]
    log: bool = False

    def share(self, values: np.ndarray) -> np.ndarray:
        """Where values lie: 0 at the low end, 1 at the high one."""
        return ((np.log10(values) if self.log else values) - self.low) / (self.high - self.low)


def ticks(low: float, high: float, count: int, *, whole: bool = False) -> list[float]:
    """About `count` round numbers from `low` to `high`: multiples of 1, 2, 2.5 or 5 times a power of ten."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    stride = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * (1 - 1e-9))
    if whole:
        stride = max(1, math.ceil(stride))
    return [at * stride for at in range(math.ceil(low / stride - 1e-9), math.floor(high / stride + 1e-9) + 1)]


def _reach(lines: Sequence[Line]) -> tuple[float, float, str]:
    """The values that the y axis must hold, and what to say of pale steps beyond.

    A few steps far off would press everything else flat: where the farthest of two hundred pale steps take more room
    than all else, they are drawn at the edge and told in words.
    """
    faint = np.concatenate([np.zeros(0), *(one.values for one in lines if one.look == "faint")])
    clear = np.concatenate([one.values for one in lines if one.look != "faint"])
    low, high = (float(limit(np.append(clear, faint))) for limit in (np.min, np.max))
    if not len(faint):
        return low, high, ""
    most = np.append(clear, np.quantile(faint, [0.005, 0.995]))
    inside_low, inside_high = float(most.min()), float(most.max())
    room, beyond, ends = inside_high - inside_low, 0, []
    if inside_low - low > room:
        beyond, ends, low = int((faint < inside_low).sum()), [exact(low)], inside_low
    if high - inside_high > room:
        beyond, ends, high = beyond + int((faint > inside_high).sum()), [*ends, exact(high)], inside_high
    noun = "step lies" if beyond == 1 else "steps lie"
    return low, high, f"{beyond:,} pale {noun} beyond the axis, up to {' and '.join(ends)}" if ends else ""


def y_axis(low: float, high: float, bounds: tuple[float, float] | None = None, *, log: bool = False) -> Axis:
    """The axis from a lowest to a highest value: with some room, and from zero where zero is near."""
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
    """A tick's number in few characters; `largest` is the greatest of its axis."""
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
    """A value in figures that a person reads: four that count."""
    if percent:
        return f"{value:.1%}"
    if value and abs(value) < 1e-3:
        return f"{value:.2e}"
    return f"{value:,.0f}" if abs(value) >= 1e3 else f"{value:.4g}"


def path_data(drawn: Line, axis: Axis) -> str:
    """The curve as SVG path data, whole numbers throughout: `M` absolute, `l` relative; a point is a stroke of length
    zero (`h0`), whose round ends make it a dot."""
    y = np.rint(HEIGHT * (1 - axis.share(drawn.values))).astype(np.int64)
    x = drawn.steps
    if drawn.look == "points":
        return "".join(f"M{a} {b}h0" for a, b in zip(x.tolist(), y.tolist(), strict=True))
    starts = np.zeros(len(x), bool) if drawn.breaks is None else drawn.breaks.copy()
    starts[:1] = True
    parts = []
    for low, high in zip(np.flatnonzero(starts), np.append(np.flatnonzero(starts)[1:], len(x)), strict=True):
        moves = zip(np.diff(x[low:high]).tolist(), np.diff(y[low:high]).tolist(), strict=True)
        relative = " ".join(f"{a} {b}" for a, b in moves)
        parts.append(f"M{x[low]} {y[low]}" + (f"l{relative}" if relative else "h0"))
    return "".join(parts)


def color_class(color: int) -> str:
    """The CSS classes of a colour."""
    return f"c{color % COLORS}" + (" dash" if color // COLORS % 2 else "")


def _svg_line(drawn: Line, axis: Axis) -> str:
    css = f"{drawn.look} {color_class(drawn.color)}"
    if drawn.look == "points" and len(drawn.steps) > MANY:
        css += " many"
    named = f' data-name="{escape(drawn.name)}"' if drawn.look in ("line", "points") else ""
    joined = f'<path class="join {color_class(drawn.color)}" d="{path_data(drawn._replace(look="line"), axis)}"/>'
    joined = joined if drawn.look == "points" and len(drawn.steps) > 1 else ""
    return f'{joined}<path class="{css}"{named} d="{path_data(drawn, axis)}"/>'


def plot(
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
) -> str:
    """Returns the curves as a figure with axes, units and a legend with the last values; nothing where no point is.

    span: first and last step of the x axis. bounds: of the y axis, where they are known. log: logarithmic y axis where
    the values span much. columns: see `thin`.
    """
    lines = [one for one in lines if len(one.steps)]
    if not lines:
        return ""
    lowest, highest, note = _reach(lines)
    clear = [value for one in lines if one.look != "faint" for value in (one.values.min(), one.values.max())]
    axis = y_axis(lowest, highest, bounds, log=log and min(clear) > 0 and max(clear) > LOG_FROM * min(clear))
    drawn = [thin(one, columns) for one in lines]
    drawn = [one._replace(values=one.values.clip(lowest, highest)) if one.look == "faint" else one for one in drawn]
    first, last = span if span[0] < span[1] else (span[0] - 1, span[1])
    x_ticks = ticks(first, last, 4, whole=True)
    x_places = [(100 * (at - first) / (last - first), short(at, last)) for at in x_ticks]
    amounts = [10**at if axis.log else at for at in axis.ticks]
    y_places = [
        (100 * float((at - axis.low) / (axis.high - axis.low)), short(value, max(map(abs, amounts)), percent))
        for at, value in zip(axis.ticks, amounts, strict=True)
    ]
    grid = "".join(f"M{first} {HEIGHT * (1 - at / 100):.0f}H{last}" for at, _ in y_places)
    zero = HEIGHT * axis.high / (axis.high - axis.low)
    base = f"M{first} {zero:.0f}H{last}" if not axis.log and axis.low < 0 < axis.high else f"M{first} {HEIGHT}H{last}"
    told = "; ".join(f"{one.name} {exact(float(one.values[-1]), percent)}" for one in lines if one.look != "faint")
    scale = f"{unit}, logarithmic" if axis.log else unit
    depth = {"faint": 0, "target": 1, "line": 2, "points": 3}
    return "".join(
        [
            f'<figure class="plot{" wide" if wide else ""}" data-low="{axis.low!r}" data-high="{axis.high!r}"'
            f"{' data-log' if axis.log else ''}{' data-percent' if percent else ''}>\n",
            f"<figcaption>{escape(title)} <span>{escape(scale)}{f'; {note}' if note else ''}</span></figcaption>\n",
            '<div class="frame">',
            *(f'<span class="y" style="bottom:{at:.2f}%">{text}</span>' for at, text in y_places),
            *(f'<span class="x" style="left:{at:.2f}%">{text}</span>' for at, text in x_places),
            '<span class="x name">step</span>',
            f'<svg viewBox="{first} 0 {last - first} {HEIGHT}" preserveAspectRatio="none" role="img" '
            f'aria-label="{escape(f"{title}, {scale}, over steps {first} to {last}. Last: {told}")}">',
            f'<path class="grid" d="{grid}"/><path class="base" d="{base}"/>',
            *(_svg_line(one, axis) for one in sorted(drawn, key=lambda one: depth[one.look])),
            "</svg></div>\n",
            _legend(lines, percent),
            "</figure>\n",
        ]
    )


def _legend(lines: Iterable[Line], percent: bool) -> str:
    """Names, looks and last values; the points of a line that is there too stand beside it."""
    items: dict[str, str] = {}
    for one in lines:
        if one.look in ("line", "points"):
            whose, comma, rest = one.name.rpartition(", ")
            beside = bool(comma) and whose in items
            text = (
                f'<span><i class="{one.look} {color_class(one.color)}"></i>{escape(rest if beside else one.name)} '
                f"<b>{exact(float(one.values[-1]), percent)}</b></span>"
            )
            key = whose if beside else one.name
            items[key] = items.get(key, "") + text
    return f'<ul class="legend">{"".join(f"<li>{text}</li>" for text in items.values())}</ul>\n'


STYLE = """
:root { --c0: #0072b2; --c1: #d55e00; --c2: #00875f; --c3: #b0578d; --c4: #c98a00; --c5: #3f9fd8; --c6: #7a5bb0;
  --c7: #7d6a4f; }
.c0 { --c: var(--c0); } .c1 { --c: var(--c1); } .c2 { --c: var(--c2); } .c3 { --c: var(--c3); }
.c4 { --c: var(--c4); } .c5 { --c: var(--c5); } .c6 { --c: var(--c6); } .c7 { --c: var(--c7); }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); gap: 1.6rem 2rem; }
.plot { margin: 0; min-width: 0; break-inside: avoid; }
.plot.wide { grid-column: 1 / -1; }
figcaption { font-weight: 600; margin-bottom: .5rem; } figcaption span { font-weight: 400; color: var(--quiet); }
.frame { position: relative; height: 11rem; margin: 0 .7rem 2.4rem 3.3rem; }
.wide .frame { height: clamp(15rem, 34vw, 22rem); }
.frame svg { position: absolute; inset: 0; width: 100%; height: 100%; max-width: none; overflow: visible; }
.frame path { fill: none; stroke: var(--c); stroke-linejoin: round; stroke-linecap: round;
  vector-effect: non-scaling-stroke; }
.frame .grid { stroke: var(--line); stroke-width: 1; } .frame .base { stroke: var(--quiet); stroke-width: 1; }
.frame .line { stroke-width: 2; } .frame .faint { stroke-width: 1; opacity: .32; }
.frame .points { stroke-width: 6; } .frame .many { stroke-width: 2.5; } .frame .join { stroke-width: 1; opacity: .7; }
.frame .target { stroke-width: 1.5; stroke-dasharray: 1 4; } .frame .dash { stroke-dasharray: 6 4; }
.frame .points.dash { stroke-dasharray: none; }
.frame > span { position: absolute; font-size: 12px; line-height: 1; color: var(--quiet); white-space: nowrap; }
.frame .y { right: 100%; margin-right: .5rem; transform: translateY(50%); }
.frame .x { top: 100%; margin-top: .45rem; transform: translateX(-50%); }
.frame .x.name { right: 0; margin-top: 1.35rem; transform: none; }
.legend { list-style: none; margin: 0 0 0 3.3rem; padding: 0; font-size: 13px; display: flex; flex-wrap: wrap;
  gap: 0 1.1rem; }
.legend li { display: flex; flex-wrap: wrap; gap: 0 .7rem; overflow-wrap: anywhere; }
.legend b { font-weight: 600; font-variant-numeric: tabular-nums; }
.legend i { display: inline-block; width: 1.1rem; margin-right: .4rem; vertical-align: .25em;
  border-top: 2px solid var(--c); }
.legend i.points { width: 7px; height: 7px; border: 0; border-radius: 50%; background: var(--c);
  vertical-align: .05em; }
.legend i.dash { border-top-style: dashed; }
.cursor { position: absolute; top: 0; bottom: 0; width: 0; border-left: 1px solid var(--quiet); pointer-events: none; }
.tip { position: absolute; top: 0; z-index: 1; max-width: 100%; padding: .3rem .6rem; overflow: hidden;
  font-size: 12px; line-height: 1.5; color: var(--ink); background: var(--paper); border: 1px solid var(--line);
  border-radius: 4px; pointer-events: none; white-space: nowrap; }
.tip i { display: inline-block; width: 8px; height: 8px; margin-right: .4rem; border-radius: 50%;
  background: var(--c); }
@media print { .tip, .cursor { display: none; } }
"""

SCRIPT = """
"use strict";
// Shows the values under the pointer. The page is whole without it.
function points(data) {
  const found = [];
  let x = 0, y = 0;
  for (const [, command, rest] of data.matchAll(/([Mlh])([^Mlh]*)/g)) {
    const numbers = rest.match(/-?\\d+/g).map(Number);
    if (command === "h") continue;
    for (let at = 0; at < numbers.length; at += 2) {
      [x, y] = command === "M" ? [numbers[at], numbers[at + 1]] : [x + numbers[at], y + numbers[at + 1]];
      found.push([x, y]);
    }
  }
  return found;
}
function format(value, percent) {
  if (percent) return (100 * value).toFixed(1) + "%";
  const size = Math.abs(value);
  if (size >= 1e3) return Math.round(value).toLocaleString("en");
  return size && size < 1e-3 ? value.toExponential(2) : String(Number(value.toPrecision(4)));
}
for (const figure of document.querySelectorAll("figure.plot")) {
  const frame = figure.querySelector(".frame"), svg = frame.querySelector("svg"), box = svg.viewBox.baseVal;
  const { low, high, log, percent } = figure.dataset;
  let lines, cursor, tip;
  const value = y => {
    const at = Number(low) + (1 - y / box.height) * (high - low);
    return log === undefined ? at : 10 ** at;
  };
  const prepare = () => {
    lines = [...svg.querySelectorAll("path[data-name]")].map(path => ({
      name: path.dataset.name, color: path.getAttribute("class"), points: points(path.getAttribute("d")) }));
    cursor = frame.appendChild(document.createElement("div"));
    tip = frame.appendChild(document.createElement("div"));
    cursor.className = "cursor";
    tip.className = "tip";
  };
  const show = event => {
    if (!lines) prepare();
    const area = svg.getBoundingClientRect();
    const share = Math.min(1, Math.max(0, (event.clientX - area.left) / area.width));
    const step = box.x + share * box.width;
    const near = lines.map(line => ({ line, point: line.points.reduce((best, point) =>
      Math.abs(point[0] - step) < Math.abs(best[0] - step) ? point : best) }));
    const at = near.reduce((best, one) =>
      Math.abs(one.point[0] - step) < Math.abs(best.point[0] - step) ? one : best).point[0];
    tip.textContent = "step " + at.toLocaleString("en");
    for (const { line, point } of near) {
      const row = tip.appendChild(document.createElement("div"));
      const dot = row.appendChild(document.createElement("i"));
      dot.className = line.color.match(/c\\d/)[0];
      row.append(line.name + " " + format(value(point[1]), percent !== undefined));
      if (point[0] !== at) row.append(" (step " + point[0].toLocaleString("en") + ")");
    }
    const left = 100 * (at - box.x) / box.width;
    cursor.style.left = left + "%";
    tip.style.left = left < 50 ? `calc(${left}% + 8px)` : "auto";
    tip.style.right = left < 50 ? "auto" : `calc(${100 - left}% + 8px)`;
    cursor.hidden = tip.hidden = false;
  };
  frame.addEventListener("pointermove", show);
  frame.addEventListener("pointerdown", show);
  frame.addEventListener("pointerleave", () => { if (lines) cursor.hidden = tip.hidden = true; });
}
"""
