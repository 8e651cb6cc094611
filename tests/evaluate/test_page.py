"""The page of an evaluation: what it says is what the records say, and nothing in it comes from elsewhere."""

import json
from pathlib import Path

import pytest
from fake_evaluation import EVIL, write_evaluation
from report_page import Page
from support import Commands

from xlam_jax.errors import UserError
from xlam_jax.evaluate.page import published, write_page


@pytest.fixture
def page(tmp_path: Path) -> Page:
    folder = write_evaluation(tmp_path / "run")
    write_page(folder, folder / "report.html")
    return Page((folder / "report.html").read_text(encoding="utf-8"))


def test_scores_are_those_of_the_records(page: Page):
    # of 120, 12 are errors, 36 right, and 72 score a quarter
    assert "50.0% f1 33.3% em 33.3% accuracy" in page.text
    assert "easy 36 of 40" in page.text
    assert "12 of 120 examples ended in an error and are in no score (timeout 12)" in page.text
    assert "5 of 125 examples have not been asked" in page.text
    assert "wrong-answer failure 72" in page.text
    assert "tiny <b>" in page.text


def test_ours_stand_beside_the_published_scores_where_they_belong(page: Page):
    """An agent has its own column; groups have theirs."""
    assert "tiny <b> (this run) – – 0.500 – –" in page.text
    assert "xLAM-v0.1-r 0.5492" not in page.text
    assert "xLAM-v0.1-r 0.549 0.478 0.502 0.558 0.503" in page.text
    assert "Easy, F1 Score" in page.text


def test_records_stand_in_the_page_as_data_that_cannot_end_it(page: Page):
    scripts = [attributes for tag, attributes in page.tags if tag == "script"]
    assert [one.get("type") for one in scripts] == ["application/json", None]
    assert EVIL not in page.source
    assert not [tag for tag, _ in page.tags if tag == "img"]
    [policy] = [given["content"] for tag, given in page.tags if given.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'")
    text = page.source.partition('id="records">')[2].partition("</script>")[0]
    held = json.loads(text)
    assert len(held["records"]) == 120
    assert held["records"][1]["messages"][1][1] == EVIL
    assert held["records"][2]["messages"][3][1].endswith("(30,000 more characters)")
    assert held["records"][0]["messages"][2] == ["assistant", "", 'search({"entity": "E0"})']


def test_published_tables_are_whole():
    known = published()
    assert {table["suite"] for table in known["tables"]} == {"webshop", "hotpotqa", "toolbench", "mint", "tool_query"}
    for table in known["tables"]:
        assert len(table["ours"]) == len(table["columns"])
        assert all(len(row) == 1 + len(table["columns"]) for row in table["rows"]), table["title"]


def test_other_folders_and_other_files_are_left_alone(tmp_path: Path, commands: Commands):
    said = commands.fails("xlam_jax.evaluate.__main__", "--report", "--out", tmp_path)
    assert f"{tmp_path}: no run.json there" in said
    folder = write_evaluation(tmp_path / "run", examples=2)
    (folder / "report.html").write_text("mine")
    with pytest.raises(UserError, match="no page of this command"):
        write_page(folder, folder / "report.html")
    (folder / "report.html").unlink()
    assert "report: " in commands.call("xlam_jax.evaluate.__main__", "--report", "--out", folder).stdout
    commands.call("xlam_jax.evaluate.__main__", "--report", "--out", folder)
