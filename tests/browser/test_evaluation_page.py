"""An evaluation's page in a real browser: opened, narrowed down, a transcript read; no request leaves the file."""

from pathlib import Path

import pytest
from devtools import Browser
from fake_evaluation import EVIL, write_evaluation

from xlam_jax.evaluate.page import write_page

pytestmark = pytest.mark.browser

LISTED = '[...document.querySelectorAll("#list details b")].map(one => one.textContent)'


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    folder = write_evaluation(tmp_path_factory.mktemp("evaluation") / "run")
    write_page(folder, folder / "report.html")
    return folder / "report.html"


def choose(browser: Browser, label: str, value: str) -> None:
    browser.run(
        f"""(() => {{ const select = document.querySelector('select[aria-label="{label}"]');
        select.value = {value!r}; select.dispatchEvent(new Event("change")); }})()"""
    )


@pytest.mark.parametrize("width", [1280, 390])
def test_examples_are_narrowed_down_and_read(browser: Browser, page: Path, width: int):
    browser.open(page, width)
    assert browser.run("document.title") == "hotpotqa: tiny <b>"
    assert browser.run("document.documentElement.scrollWidth") <= width
    assert browser.run('document.getElementById("count").textContent') == "120 of 120 examples"
    assert len(browser.run(LISTED)) == 50
    browser.run('document.querySelector(".pages button:last-of-type").click()')
    assert browser.run(LISTED)[0] == "q50"
    choose(browser, "all scores", "error")
    assert browser.run(LISTED) == [f"q{at}" for at in range(9, 120, 10)]
    choose(browser, "all scores", "")
    choose(browser, "all groups", "medium")
    choose(browser, "all failures", "wrong-answer")
    assert browser.run(LISTED)[:3] == ["q1", "q4", "q7"]
    browser.run(
        """(() => { const words = document.querySelector("input[type=search]");
        words.value = "Needle112"; words.dispatchEvent(new Event("input")); })()"""
    )
    assert browser.run(LISTED) == ["q112"]
    browser.run('document.querySelector("#list summary").click()')
    browser.run("new Promise(requestAnimationFrame)")
    said = browser.run('[...document.querySelectorAll("#list .said")].map(one => one.innerText.trim())')
    assert [text.split("\n")[0] for text in said] == [
        "system",
        "user",
        "assistant",
        "tool search",
        "assistant",
        "details",
    ]
    assert 'search({"entity": "E112"})' in said[2]
    assert browser.run("document.documentElement.scrollWidth") <= width


def test_a_model_s_words_are_text(browser: Browser, page: Path):
    browser.open(page, 1280)
    browser.run('[...document.querySelectorAll("#list summary")][1].click()')
    browser.run("new Promise(requestAnimationFrame)")
    assert EVIL in browser.run('[...document.querySelectorAll("#list .said .text")].map(one => one.textContent)')
    assert browser.run("document.title") == "hotpotqa: tiny <b>"
    assert browser.run('document.querySelectorAll("img").length') == 0
    assert browser.requests() == [page.resolve().as_uri()]
    assert browser.complaints() == []
