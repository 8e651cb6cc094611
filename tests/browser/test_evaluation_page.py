"""The report of an evaluation in a real browser: filters and transcripts work, nothing is loaded."""

from pathlib import Path

import pytest
from devtools import Browser
from fake_evaluations import EVIL, write_evaluation

from xlam_jax.evaluate.__main__ import main

pytestmark = pytest.mark.browser

LISTED = '[...document.querySelectorAll("#list button")].map(one => one.firstChild.textContent)'
SHOWN = 'document.getElementById("shown").innerText'


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    out = write_evaluation(tmp_path_factory.mktemp("evaluations") / "react")
    assert main(["--report", "--out", str(out)]) == 0
    return out / "report.html"


def choose(browser: Browser, name: str, value: str) -> None:
    browser.run(
        f'(() => {{ const one = document.getElementById("{name}"); one.value = "{value}"; '
        'one.dispatchEvent(new Event("input")); })()'
    )


def test_filters_and_transcripts(browser, report):
    browser.open(report, 1280)
    assert len(browser.run(LISTED)) == 40
    choose(browser, "outcome", "failure: wrong-answer")
    assert browser.run('document.getElementById("count").textContent') == "16 of 40"
    choose(browser, "group", "hard")
    listed = browser.run(LISTED)
    assert listed == ["q5", "q11", "q17", "q23", "q35"]
    browser.run('document.querySelectorAll("#list button")[1].click()')
    said = browser.run(SHOWN)
    assert "sentence 11" in said
    assert "f1 0.25" in said
    assert 'finish {"answer": "Oslo"}' in said
    assert EVIL in said  # as text
    choose(browser, "outcome", "")
    choose(browser, "group", "")
    choose(browser, "text", "SENTENCE 39")
    assert browser.run(LISTED) == ["q39"]
    browser.run('document.querySelector("#list button").click()')
    assert "no answer within 120 seconds" in browser.run(SHOWN)


@pytest.mark.parametrize("width", [1280, 390])
def test_no_request_and_nothing_sticks_out(browser, report, width):
    browser.open(report, width)
    browser.run('document.querySelector("#list button").click()')
    assert browser.requests() == [report.resolve().as_uri()]
    assert browser.complaints() == []
    assert browser.run("document.title") == "hotpotqa: tiny <b>model</b>, react"
    assert browser.run("document.documentElement.scrollWidth") <= width


def test_many_examples_are_listed_in_parts(browser, tmp_path):
    out = write_evaluation(tmp_path / "many", count=700)
    assert main(["--report", "--out", str(out)]) == 0
    browser.open(out / "report.html", 1280)
    assert len(browser.run(LISTED)) == 301
    assert browser.run(LISTED)[-1] == "400 more"
    browser.run('[...document.querySelectorAll("#list button")].at(-1).click()')
    assert len(browser.run(LISTED)) == 601
