"""HotpotQA: its metrics against recorded scores, and the lookup of pages."""

import asyncio
import json
import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from support import ROOT, Commands

from xlam_jax.data.trajectory import ToolCall
from xlam_jax.errors import UserError
from xlam_jax.evaluate import _http
from xlam_jax.evaluate.corpus import Local, Wikipedia
from xlam_jax.evaluate.endpoint import EndpointFault
from xlam_jax.evaluate.suite import Options, Task
from xlam_jax.evaluate.suites.hotpotqa import HotpotQA, Reading, exact_match, f1

FIXTURES = ROOT / "tests/evaluate/fixtures"
PAGES = [
    ("Oslo", "Oslo is the capital of Norway. It is on a fjord! Mr. Smith lived there. It has 700,000 people. "
     "It is old. The Oslo Opera House is in Oslo."),
    ("Oslo (song)", "Oslo is a song."),
    ("Bergen", "Bergen is a city in Norway with a fish market."),
]  # fmt: skip


def test_recorded_scores_are_recomputed():
    """The scores are equal bit for bit."""
    rows = [json.loads(line) for line in (FIXTURES / "hotpotqa_scored.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(rows) > 50
    for row in rows:
        assert (exact_match(row["pred"], row["gt"]), f1(row["pred"], row["gt"])) == (row["em"], row["f1"]), row


@pytest.mark.parametrize(
    ("answer", "gold", "em", "score"),
    [
        ("The Eiffel-Tower!", "eiffeltower", True, 1.0),
        ("yes", "Yes.", True, 1.0),
        ("yes, it is", "yes", False, 0.0),  # no partial score for yes
        ("no", "no one", False, 0.0),
        ("noanswer", "no answer", False, 0.0),
        ("the a an", "", True, 0.0),
        ("Barack Obama", "Barack Hussein Obama", False, 0.8),
        ("b a b", "b", False, 2 * 0.5 / 1.5),
    ],
)
def test_metrics(answer: str, gold: str, em: bool, score: float):
    assert exact_match(answer, gold) == em
    assert f1(answer, gold) == pytest.approx(score)


def observe(corpus: Any, actions: Sequence[tuple[str, str]], answer: str = "Norway") -> list[str]:
    """Returns the observations of the actions."""

    async def read() -> list[str]:
        environment = Reading(corpus)
        await environment.reset(Task("1", {"question": "Which?", "answer": answer}))
        return [(await environment.step(ToolCall(None, name, {"x": text}))).observation for name, text in actions]

    return asyncio.run(read())


def test_observations():
    observations = observe(
        Local.of(PAGES),
        [("lookup", "x"), ("search", "oslo"), ("lookup", "OSLO"), ("lookup", "OSLO"), ("lookup", "OSLO"),
         ("lookup", "ice"), ("search", "the fish market of Norway"), ("search", ""),
         ("search", '"()* AND'), ("finish", "Norway")],
    )  # fmt: skip
    assert observations[0] == "No page is open; search one first."
    assert observations[1].startswith("Oslo is the capital of Norway. It is on a fjord! Mr.")
    assert "Opera" not in observations[1]
    assert observations[2] == "(1 of 2) Oslo is the capital of Norway."
    assert observations[3] == "(2 of 2) The Oslo Opera House is in Oslo."
    assert observations[4] == "No more results."
    assert observations[5] == "The page does not contain 'ice'."
    assert observations[6] == "There is no page 'the fish market of Norway'. Similar: Bergen, Oslo."
    assert observations[7].startswith("There is no page ''")
    assert observations[8].startswith("There is no page")


def test_a_corpus_as_a_file(commands: Commands, tmp_path: Path):
    """JSONL, its conversion, and a user's database without an index give the same pages, but not similar titles."""
    lines: list[dict[str, Any]] = [{"title": title, "text": text} for title, text in PAGES[:2]]
    lines.append({"title": PAGES[2][0], "text": ["Bergen is a city", " in Norway with a fish market."]})
    (tmp_path / "pages.jsonl").write_text("".join(json.dumps(page) + "\n" for page in lines), encoding="utf-8")
    commands.call("xlam_jax.evaluate.corpus", "--pages", tmp_path / "pages.jsonl", "--out", tmp_path / "pages.sqlite")
    plain = sqlite3.connect(tmp_path / "plain.sqlite")
    plain.execute("CREATE TABLE pages(title, text)")
    plain.executemany("INSERT INTO pages VALUES (?, ?)", PAGES)
    plain.commit()
    plain.close()
    for name, similar in (("pages.jsonl", "Oslo (song)"), ("pages.sqlite", "Oslo (song)"), ("plain.sqlite", "None")):
        corpus = Local.open(tmp_path / name)
        observations = observe(corpus, [("search", "BERGEN"), ("search", "a song")])
        assert observations[0] == PAGES[2][1]
        assert similar in observations[1]
        corpus.close()
    error = commands.fails(
        "xlam_jax.evaluate.corpus", "--pages", tmp_path / "pages.jsonl", "--out", tmp_path / "pages.sqlite"
    )
    assert "exists" in error
    (tmp_path / "bad.jsonl").write_text('{"titel": "x", "text": ""}\n', encoding="utf-8")
    with pytest.raises(UserError, match=r"bad.jsonl:1: the page has no 'title'; did you mean 'titel'"):
        Local.open(tmp_path / "bad.jsonl")
    sqlite3.connect(tmp_path / "empty.sqlite").execute("CREATE TABLE x(y)").connection.close()
    with pytest.raises(UserError, match="has no table pages"):
        Local.open(tmp_path / "empty.sqlite")


def test_questions_that_contain_pages(tmp_path: Path):
    """In the form of HotpotQA's files."""
    row = {
        "_id": "a",
        "question": "?",
        "answer": "Norway",
        "level": "hard",
        "context": [["Oslo", ["Oslo is.", " It was."]]],
    }
    (tmp_path / "dev.json").write_text(json.dumps([row]), encoding="utf-8")
    suite = HotpotQA(Options(data=tmp_path / "dev.json"))
    assert [(task.id, task.group) for task in suite.tasks()] == [("a", "hard")]
    assert observe(suite._corpus, [("search", "oslo")]) == ["Oslo is. It was."]
    suite.close()
    (tmp_path / "none.json").write_text(json.dumps([{"question": "?", "answer": "x"}]), encoding="utf-8")
    with pytest.raises(UserError, match="the question has no pages"):
        HotpotQA(Options(data=tmp_path / "none.json"))
    with pytest.raises(UserError, match="--data is missing"):
        HotpotQA(Options())


class MediaWiki:
    """The queries of api.php that the corpus uses, in format version 2."""

    def __init__(self):
        self.requests: list[dict[str, str]] = []

    async def fetch(self, url: str, form: Any = None, **_: Any) -> tuple[str, str]:
        from urllib.parse import parse_qsl, urlsplit

        query = dict(parse_qsl(urlsplit(url).query))
        self.requests.append(query)
        if query.get("list") == "search":
            return url, json.dumps({"query": {"search": [{"title": "Oslo"}]}})
        page = (
            {"title": "Oslo", "extract": "Oslo is."} if query["titles"] == "oslo" else {"title": "x", "missing": True}
        )
        return url, json.dumps({"query": {"pages": [page]}}) if query["titles"] != "broken" else "<html>"


def test_a_live_wikipedia(monkeypatch: pytest.MonkeyPatch):
    wiki = MediaWiki()
    monkeypatch.setattr(_http, "fetch", wiki.fetch)
    corpus = Wikipedia("http://wiki/w/api.php")
    assert observe(corpus, [("search", "oslo"), ("search", "osslo")]) == [
        "Oslo is.", "There is no page 'osslo'. Similar: Oslo."
    ]  # fmt: skip
    assert wiki.requests[0]["redirects"] == "1"
    with pytest.raises(EndpointFault, match=r"is not a MediaWiki api.php") as caught:
        observe(corpus, [("search", "broken")])
    assert caught.value.kind == "environment"
