"""The content of the report. tests/browser checks its layout and behavior."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from fake_evaluations import EVIL, example, write_evaluation
from support import Commands

from xlam_jax.evaluate import page, suites
from xlam_jax.evaluate.__main__ import main


class Tables(HTMLParser):
    """The cells of a page's tables, and its scripts."""

    def __init__(self, text: str):
        super().__init__()
        self.rows: list[list[str]] = []
        self.scripts: list[tuple[str | None, str]] = []
        self._tag, self._kind = "", None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self._tag = tag
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag == "script":
            self.scripts.append((dict(attrs).get("type"), ""))

    def handle_endtag(self, tag):
        self._tag = ""

    def handle_data(self, data):
        if self._tag in ("td", "th"):
            self.rows[-1][-1] += data
        if self._tag == "script":
            kind, text = self.scripts[-1]
            self.scripts[-1] = kind, text + data


def test_the_page_is_complete(tmp_path: Path):
    out = write_evaluation(tmp_path / "react")
    write_evaluation(tmp_path / "zero", agent="zero_shot", count=2)
    write_evaluation(tmp_path / "other", suite="webshop", agent="act")
    assert main(["--report", "--out", str(out)]) == 0
    text = (out / "report.html").read_text(encoding="utf-8")
    tables = Tables(text)
    rows = {row[0]: row[1:] for row in tables.rows if row}
    assert rows["easy"] == ["14", "12", "0.6875", "0.5833", "0.5833"]
    assert rows["failure: wrong-answer"] == ["16", "40.0%"]
    assert rows["error: timeout"] == ["4", "10.0%"]
    ours = [row for row in tables.rows if row[0] == "tiny <b>model</b> (this)"]
    assert ours[0][1:] == [
        "0.6250",
        "–",
        "0.6667",
        "–",
        "–",
    ]  # zero-shot from the neighboring folder, ReAct from this one
    assert ours[1][1:] == ["0.6875", "0.5833", "0.6250", "0.5000", "0.6875", "0.5833"]
    assert rows["xLAM-v0.1-r"] == ["0.532", "0.450", "0.547", "0.460", "0.455", "0.360"]
    data = [json.loads(code) for kind, code in tables.scripts if kind == "application/json"]
    assert len(data) == 40
    assert data[3] == {**example(3), "outcome": "failure: wrong-answer"}
    assert EVIL not in text
    assert "4 of 40 examples ended in an error" in text
    assert re.findall(r'(?:src|href)="([^"]*)"', text) == []


def test_unreadable_neighbors_and_broken_summaries(commands: Commands, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Neighboring folders that cannot be read are ignored; a broken summary of the evaluation itself is an error."""
    out = write_evaluation(tmp_path / "react")
    write_evaluation(tmp_path / "zero", agent="zero_shot", count=2)
    read = Path.is_file

    def denied(path: Path) -> bool:
        if path.parent.name == "zero":
            raise PermissionError(13, "Permission denied", str(path))
        return read(path)

    monkeypatch.setattr(Path, "is_file", denied)
    commands.call("xlam_jax.evaluate", "--report", "--out", out)
    (out / "summary.json").write_text("{}")
    assert "summary.json: has no scores" in commands.fails("xlam_jax.evaluate", "--report", "--out", out)


def test_published_tables_fit_the_suites():
    """Our suites can fill each column of each published table."""
    published = json.loads(page.PUBLISHED.read_text(encoding="utf-8"))
    names = suites.names()
    for table in published["tables"]:
        assert {len(row) for row in table["rows"]} == {len(table["columns"]) + 1}, table["title"]
        assert "xLAM-v0.1-r" in [row[0] for row in table["rows"]]
        top = 100 if table.get("percent") else 1
        assert all(value is None or 0 <= value <= top for row in table["rows"] for value in row[1:])
        if table["suite"] in names:
            assert table["columns"][0]["score"]
    assert len(published["tables"]) == 7


def test_no_evaluation(commands: Commands, tmp_path: Path):
    error = commands.fails("xlam_jax.evaluate", "--report", "--out", tmp_path)
    assert "contains no run.json" in error


def test_a_file_of_the_user_is_not_overwritten(commands: Commands, tmp_path: Path):
    out = write_evaluation(tmp_path / "run")
    (out / "report.html").write_text("the user's")
    assert "is not a page of this command; move it away" in commands.fails(
        "xlam_jax.evaluate", "--report", "--out", out
    )
    (out / "report.html").unlink()
    for _ in range(2):
        commands.call("xlam_jax.evaluate", "--report", "--out", out)
