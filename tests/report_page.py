"""Parses a report page: the plotted curves as numbers."""

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple

import numpy as np

from xlam_jax.pages.plots import HEIGHT

VOID = {"meta", "br", "img", "link", "input"}


class Curve(NamedTuple):
    """A path of a figure. `starts` counts its strokes: one, and one more after each gap."""

    steps: list[int]
    values: list[float]
    starts: int
    resolution: float
    """How far a value may be from what was drawn (a ratio on a logarithmic axis)."""


class Figure(NamedTuple):
    """A figure: its caption, named curves, curves without a name, and the legend's text."""

    caption: str
    curves: dict[str, Curve]
    unnamed: dict[str, list[Curve]]
    """By the first CSS class: faint, join, target."""
    legend: str
    log: bool


class Page(HTMLParser):
    """A page's tags, attributes, text and figures."""

    def __init__(self, text: str):
        super().__init__()
        self.source = text
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.scripts: list[str] = []
        self.figures: dict[str, Figure] = {}
        self._texts: list[str] = []
        self._open: list[str] = []
        self._figure: dict[str, list] = {}
        self.feed(text)
        self.close()
        assert not self._open, f"never closed: {self._open}"

    @property
    def text(self) -> str:
        """All visible text."""
        return " ".join(" ".join(self._texts).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = {name: value or "" for name, value in attrs}
        self.tags.append((tag, attributes))
        if tag == "figure":
            self._figure = {"attributes": [attributes], "paths": [], "caption": [], "legend": []}
        if tag == "path" and attributes["class"].split()[0] not in ("grid", "base"):
            self._figure["paths"].append(attributes)
        if tag not in VOID and tag != "path":
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self._open, f"</{tag}> closes nothing"
        assert self._open.pop() == tag
        if tag == "figure":
            figure = _figure(**self._figure)
            assert figure.caption not in self.figures, f"two figures {figure.caption!r}"
            self.figures[figure.caption] = figure

    def handle_data(self, data: str) -> None:
        if "script" in self._open:
            self.scripts.append(data)
        elif "style" not in self._open:
            self._texts.append(data)
            for tag, part in (("figcaption", "caption"), ("ul", "legend")):
                if "figure" in self._open and tag in self._open:
                    self._figure[part].append(data)


def _figure(
    attributes: list[dict[str, str]], paths: list[dict[str, str]], caption: list[str], legend: list[str]
) -> Figure:
    low, high, log = float(attributes[0]["data-low"]), float(attributes[0]["data-high"]), "data-log" in attributes[0]
    curves: dict[str, Curve] = {}
    unnamed: dict[str, list[Curve]] = {}
    for path in paths:
        curve = _curve(path["d"], low, high, log)
        if "data-name" in path:
            assert path["data-name"] not in curves
            curves[path["data-name"]] = curve
        else:
            unnamed.setdefault(path["class"].split()[0], []).append(curve)
    return Figure("".join(caption).strip(), curves, unnamed, " ".join("".join(legend).split()), log)


def _curve(data: str, low: float, high: float, log: bool) -> Curve:
    steps: list[int] = []
    shares: list[float] = []
    x = y = 0
    for command, rest in re.findall(r"([Mlh])([-\d ]*)", data):
        numbers = [int(number) for number in rest.split()]
        if command == "h":
            assert numbers == [0]
            continue
        for dx, dy in zip(numbers[::2], numbers[1::2], strict=True):
            x, y = (dx, dy) if command == "M" else (x + dx, y + dy)
            steps.append(x)
            shares.append(1 - y / HEIGHT)
    values = low + (high - low) * np.array(shares)
    half = 0.500001 * (high - low) / HEIGHT
    return Curve(steps, (10**values if log else values).tolist(), data.count("M"), 10**half - 1 if log else half)


def read(path: Path) -> Page:
    """Parses the page in a file."""
    return Page(path.read_text(encoding="utf-8"))
