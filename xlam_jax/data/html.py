"""Pages that hold everything they show: no script, no style and no picture from elsewhere."""

import hashlib
import os
from base64 import b64encode
from collections.abc import Callable, Iterable
from html import escape
from io import StringIO
from pathlib import Path
from typing import Any

STYLE = """
:root { --ink: #1a1a1a; --paper: #fff; --line: #ddd; --quiet: #666; }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 2rem auto;
  max-width: 70rem; padding: 0 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .7rem; border-bottom: 1px solid var(--line); text-align: right; }
th:first-child, td:first-child { text-align: left; }
svg { max-width: 100%; height: auto; }
"""
KIND_COLORS = {
    "prompt": "#bbbbbb",
    "thought": "#e69f00",
    "tool_call": "#0072b2",
    "arguments": "#56b4e9",
    "answer": "#009e73",
    "eos": "#cc79a7",
}
"""A colour for each kind of span, told apart by the colour-blind too (Okabe and Ito, 2008)."""


def page(title: str, body: Iterable[str], style: str = "", script: str = "", generator: str = "") -> Iterable[str]:
    """Yields a page in parts; `body` is HTML.

    The browser is told to load nothing and to run no script but `script`. `generator` says what wrote the page.
    """
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    if script:
        policy += f"; script-src 'sha256-{b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
    yield f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>\n'
    yield f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
    if generator:
        yield generator_mark(generator)
    yield f'<meta name="viewport" content="width=device-width"><style>{STYLE}{style}</style></head><body>\n'
    yield f"<h1>{escape(title)}</h1>\n"
    yield from body
    if script:
        yield f"<script>{script}</script>\n"
    yield "</body></html>\n"


def generator_mark(generator: str) -> str:
    """What stands in the head of a page that `generator` wrote."""
    return f'<meta name="generator" content="{escape(generator)}">\n'


def table(header: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """Returns a table of texts and numbers."""
    lines = ["<table><tr>" + "".join(f"<th>{escape(name)}</th>" for name in header) + "</tr>"]
    lines += ["<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows]
    return "\n".join(lines) + "</table>\n"


def figure(draw: Callable[[Any], None], width: float = 10.0, height: float = 4.0, name: str = "") -> str:
    """Returns what `draw(axes)` draws, as SVG. `name` tells the ids of one picture from those of another."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    picture = Figure(figsize=(width, height), layout="constrained")
    axes = picture.add_subplot()
    strong_then_pale = [*range(0, 20, 2), *range(1, 20, 2)]
    axes.set_prop_cycle(color=mpl.colormaps["tab20"](strong_then_pale))
    draw(axes)
    text = StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.family": "sans-serif"}):
        picture.savefig(text, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    svg = text.getvalue()
    return f"<figure>{svg[svg.index('<svg') :]}</figure>\n"


def write(path: Path, parts: Iterable[str]) -> None:
    """Writes a text in parts; the file appears only when it is whole. Half a surrogate pair, which JSON can hold and
    UTF-8 can't, is written \\ud800."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("w", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
            file.writelines(parts)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
