"""The report page in a real browser: every plot is drawn and readable on a screen and on a phone; nothing is loaded."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from devtools import Browser, find
from fake_runs import write_run
from PIL import Image

from xlam_jax.report.__main__ import main

pytestmark = pytest.mark.browser

WIDTHS = (1280, 390)
COLOURED = 40
"""Coloured pixels that a drawn plot has at least; axes, grid and text are grey and count for nothing."""
PLOTS = """[...document.querySelectorAll("figure.plot")].map(figure => {
  const box = figure.querySelector("svg").getBoundingClientRect();
  return { caption: figure.querySelector("figcaption").textContent, left: box.left + scrollX, top: box.top + scrollY,
    width: box.width, height: box.height,
    lengths: [...figure.querySelectorAll("path[data-name]")].map(path => path.getAttribute("d").length) };
})"""
TEXTS = """(() => {
  const found = [], range = document.createRange();
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const parent = walker.currentNode.parentElement;
    range.selectNode(walker.currentNode);
    if (walker.currentNode.data.trim() && range.getClientRects().length && !parent.closest("script, style"))
      found.push([parseFloat(getComputedStyle(parent).fontSize), walker.currentNode.data.trim().slice(0, 40)]);
  }
  return found;
})()"""
BEYOND = """(width => [...document.querySelectorAll("body *")].filter(element => {
  const { left, right } = element.getBoundingClientRect();
  return !element.closest(".scroll, pre, svg") && (right > width + .5 || left < -.5);
}).map(element => element.outerHTML.slice(0, 120)))"""
"""What sticks out of the page; called with its width. (A telephone's innerWidth grows with what sticks out.)"""
OVERLAPS = """(() => {
  const found = [];
  for (const frame of document.querySelectorAll(".frame")) {
    const labels = [...frame.querySelectorAll(":scope > span")];
    const boxes = labels.map(label => [label.textContent, label.getBoundingClientRect()]);
    boxes.forEach(([name, a], at) => boxes.slice(at + 1).forEach(([other, b]) => {
      if (a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom) found.push([name, other]);
    }));
  }
  return found;
})()"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, Path]:
    """Pages about one run, a run on pairs, several runs, a run with a spike, and a run that has only just begun."""
    folder = tmp_path_factory.mktemp("pages")
    one = write_run(folder / "one", steps=320, done=300, started=3)
    pairs = write_run(folder / "pairs", steps=150, pairs=True, seed=3)
    long_name = "mixtral-8x7b-lora-r64-every-projection-second-try-with-a-higher-rate"
    other = write_run(folder / long_name, seed=1, peak=None, changes={"train.learning_rate": 1e-4})
    begun = write_run(folder / "begun", steps=1_000_000, done=1)
    runs = {"one": [one], "pairs": [pairs], "several": [one, other, pairs], "begun": [begun]}
    for name, paths in runs.items():
        assert main([*map(str, paths), "--out", str(folder / f"{name}.html")]) == 0
    return {name: folder / f"{name}.html" for name in runs}


def coloured(browser: Browser) -> dict[str, int]:
    """Counts the coloured pixels of each plot on a screenshot of the whole page."""
    pixels = np.asarray(Image.open(io.BytesIO(browser.screenshot())).convert("RGB"))
    counts: dict[str, int] = {}
    for at, plot in enumerate(browser.run(PLOTS)):
        left, top = round(plot["left"]), round(plot["top"])
        area = pixels[top : top + round(plot["height"]), left : left + round(plot["width"])].astype(int)
        assert area.size
        counts[f"{at} {plot['caption']}"] = int((area.max(axis=-1) - area.min(axis=-1) > 40).sum())
    return counts


def empty(browser: Browser, least: int = COLOURED) -> list[str]:
    """Returns the plots that contain no drawing."""
    return [name for name, count in coloured(browser).items() if count < least]


@pytest.mark.parametrize("name", ["one", "pairs", "several", "begun"])
@pytest.mark.parametrize("width", WIDTHS)
def test_a_page_is_drawn_and_readable(browser, pages, name, width):
    browser.open(pages[name], width)
    assert browser.run("[innerWidth, document.compatMode]") == [width, "CSS1Compat"]
    plots = browser.run(PLOTS)
    assert len(plots) >= (10 if name == "begun" else 15)
    for plot in plots:
        assert plot["lengths"], plot["caption"]
        assert min(plot["lengths"]) >= len("M0 0h0"), plot["caption"]
        assert plot["width"] > 0.6 * min(width, 390), plot
        assert plot["height"] > 100, plot
    assert empty(browser, least=2 if name == "begun" else COLOURED) == []  # a single step is drawn as a dot
    assert browser.run("document.documentElement.scrollWidth") <= width
    assert browser.run(f"{BEYOND}({width})") == []
    sizes = browser.run(TEXTS)
    assert len(sizes) > 100
    assert [text for size, text in sizes if size < 12] == []
    assert browser.run(OVERLAPS) == []


@pytest.mark.parametrize("name", ["one", "pairs", "several", "begun"])
def test_no_request_leaves_the_file(browser, pages, name):
    browser.open(pages[name], 1280)
    assert browser.requests() == [pages[name].resolve().as_uri()]
    assert browser.complaints() == []


def test_dark_and_print(browser, pages):
    browser.open(pages["one"], 1280, dark=True)
    shot = np.asarray(Image.open(io.BytesIO(browser.screenshot())).convert("L"))
    assert np.median(shot) < 60
    assert empty(browser) == []
    browser.open(pages["one"], 794, dark=True, media="print")
    shot = np.asarray(Image.open(io.BytesIO(browser.screenshot())).convert("L"))
    assert np.median(shot) > 240
    assert empty(browser) == []


def test_pointing_at_a_plot_tells_its_values(browser, pages):
    browser.open(pages["one"], 1280)
    box: dict[str, Any] = browser.run(
        """(() => { const svg = document.querySelector("figure.plot svg"); svg.scrollIntoView({ block: "center" });
        const { left, top, width, height } = svg.getBoundingClientRect(); return { left, top, width, height }; })()"""
    )
    at = {"x": box["left"] + box["width"] - 1, "y": box["top"] + box["height"] / 2}
    browser.call("Input.dispatchMouseEvent", type="mouseMoved", **at)
    tooltip = browser.run('document.querySelector(".tip").innerText').splitlines()
    legend = browser.run(
        '[...document.querySelectorAll("figure.plot")[0].querySelectorAll("b")].map(b => +b.textContent)'
    )
    assert tooltip[0] == "step 300"
    assert [line.rsplit(" ", 1)[0] for line in tooltip[1:]] == ["train", "held-out"]
    assert [float(line.rsplit(" ", 1)[1]) for line in tooltip[1:]] == pytest.approx(legend, abs=3e-4)
    browser.call("Input.dispatchMouseEvent", type="mouseMoved", x=2, y=2)
    assert browser.run('document.querySelector(".tip").hidden') is True


def test_samples_can_be_narrowed_down(browser, pages):
    browser.open(pages["one"], 1280)
    shown = '[...document.querySelectorAll(".sample")].filter(card => card.getClientRects().length).length'
    exact = browser.run('document.querySelectorAll(".sample[data-exact=yes]").length')
    every = browser.run(shown)
    browser.run('document.querySelector(".filter input").click()')
    assert 0 < exact < every
    assert browser.run(shown) == every - exact


# ---- the checks above can fail --------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", WIDTHS)
def test_an_empty_plot_is_found(browser, pages, width):
    browser.open(pages["one"], width)
    captions = [plot["caption"] for plot in browser.run(PLOTS)]
    for at in (0, len(captions) - 1):
        browser.run(
            f'document.querySelectorAll("figure.plot")[{at}].querySelectorAll("path:not(.grid, .base)").forEach('
            "path => path.setAttribute('d', ''))"
        )
    assert empty(browser) == [f"0 {captions[0]}", f"{len(captions) - 1} {captions[-1]}"]


def test_requests_are_seen(browser, tmp_path):
    """Also requests that the page's policy forbids."""
    body = '<img src="http://127.0.0.1:9/a.png"><script>fetch("http://127.0.0.1:9/b").catch(() => 0)</script>'
    page = tmp_path / "page.html"
    page.write_text(f"<!doctype html><title>x</title>{body}", encoding="utf-8")
    browser.open(page, 1280)
    assert {"http://127.0.0.1:9/a.png", "http://127.0.0.1:9/b"} <= set(browser.requests())


def test_a_script_of_another_is_not_run(browser, pages, tmp_path):
    """Even if the text of a run were interpreted as HTML."""
    page = tmp_path / "page.html"
    text = pages["one"].read_text(encoding="utf-8")
    for code in ("<script>document.title = 'taken'</script>", "<img src=x onerror=\"document.title = 'taken'\">"):
        page.write_text(text.replace("<nav>", f"{code}<nav>"), encoding="utf-8")
        browser.open(page, 1280)
        browser.requests()
        assert browser.run("document.title") == "Run one"
        assert browser.complaints()


def test_small_text_and_wide_pages_are_found(browser, pages):
    browser.open(pages["one"], 390)
    browser.run('document.querySelector(".legend").style.fontSize = "11px"')
    browser.run('document.querySelector("h2").style.width = "500px"')
    assert [text for size, text in browser.run(TEXTS) if size < 12]
    assert browser.run(f"{BEYOND}(390)")
    assert browser.run("document.documentElement.scrollWidth") > 390


def test_a_missing_browser_is_told(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(AssertionError, match="apt-get install chromium"):
        find()
