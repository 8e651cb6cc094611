"""Matplotlib figures as inline SVG."""

from collections.abc import Callable
from io import StringIO
from typing import Any

from markupsafe import Markup


def draw_svg(draw: Callable[[Any], None], *, width: float = 10.0, height: float = 4.0, name: str = "") -> Markup:
    """Returns what `draw(axes)` draws, as an `<svg>` element.

    width, height: in inches. name: makes the element ids of this figure differ from those of others on the page.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    strong_then_pale = [*range(0, 20, 2), *range(1, 20, 2)]
    axes.set_prop_cycle(color=mpl.colormaps["tab20"](strong_then_pale))
    draw(axes)
    text = StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.family": "sans-serif"}):
        figure.savefig(text, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    svg = text.getvalue()
    return Markup(svg[svg.index("<svg") :])
