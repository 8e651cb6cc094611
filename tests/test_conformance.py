"""The conformance benchmark: our own column has no defects, and the comparison and its tables show those of others."""

import json
import sys
from typing import Any

import pytest
from support import ROOT

sys.path.append(str(ROOT / "benchmarks"))  # its modules import each other as scripts do

import _conformance_table as table
import conformance
from _conformance_compare import Defect, Turn, compare, turns
from _conformance_expected import TEMPLATES, Expected
from _conformance_rows import END, ROWS


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> dict[str, tuple[Any, dict[str, Expected]]]:
    """The tokenizer of each template, and what is expected of each row."""
    folder = tmp_path_factory.mktemp("jobs")
    return {template: conformance.write_job(template, folder / template) for template in TEMPLATES}


def test_thirty_rows():
    assert len({row.name for row in ROWS}) == len(ROWS) == 30


def test_our_tokens_masks_and_parses_are_right(written, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(conformance, "write_job", lambda template, _: written[template])
    monkeypatch.setattr(sys, "argv", ["conformance.py", "--peers", "", "--out", str(tmp_path)])
    conformance.main()
    results = json.loads((tmp_path / "conformance.json").read_text(encoding="utf-8"))["xlam_jax"]["results"]
    defects = [defect for rows in results.values() for actual in rows.values() for defect in actual]
    assert defects == []
    assert [len(rows) for rows in results.values()] == [30, 30]
    assert "| xlam_jax | this tree | 0 of 30 rows with defects | 0 of 30 rows with defects |" in capsys.readouterr().out


def test_expected_answers_end_with_the_end_token(written):
    for tokenizer, expected in written.values():
        end = tokenizer.convert_tokens_to_ids(END)
        for right in expected.values():
            trained = turns(right.sequences)
            assert len(trained) == len(right.turns)
            assert all(turn.answer[-1] == end and end not in turn.answer[:-1] for turn in trained)


CONTEXT, ANSWER = [1, 2, 3], [10, 11, 12, 13]


@pytest.mark.parametrize(
    ("actual", "kinds"),
    [
        ([Turn(CONTEXT, ANSWER)], []),
        ([], ["not trained"]),
        ([Turn(CONTEXT, ANSWER[:-1])], ["not trained"]),
        ([Turn(CONTEXT[:-1], [3, *ANSWER])], ["also trained"]),
        ([Turn(CONTEXT, [*ANSWER, 14])], ["trained past the end"]),
        ([Turn(CONTEXT, ANSWER), Turn([1], [2])], ["also trained"]),
        ([Turn([1, 2, 4], ANSWER)], ["other prompt"]),
        ([Turn(CONTEXT, [10, 11, 99, 13])], ["other answer"]),
    ],
)
def test_compare_names_the_difference(actual, kinds):
    assert [defect.kind for defect in compare([Turn(CONTEXT, ANSWER)], actual, str)] == kinds


def test_compare_finds_changed_arguments():
    texts = {1: '<tool_call>\n{"name": "f", "arguments": {"a": 1}}', 2: "\n</tool_call>"}
    texts[3] = texts[1].replace('{"a": 1}', '"{\\"a\\": 1}"')
    defects = compare([Turn([], [1, 2])], [Turn([], [3, 2])], lambda ids: "".join(texts[id] for id in ids))
    assert [defect.kind for defect in defects] == ["arguments changed"]


def test_turns_are_the_trained_runs_with_all_before_them():
    assert turns([([1, 2, 3, 4], [False, True, False, True])]) == [Turn([1], [2]), Turn([1, 2, 3], [4])]


def test_tables_show_defects_and_failed_installations():
    defect = Defect("also trained", 1, "", "|\n", [], [5])
    columns = {
        "good": {"version": "1", "results": {"t": {"a": [], "b": []}, "u": {"a": [], "b": []}}},
        "bad": {"version": "2", "results": {"t": {"a": [defect], "b": [defect]}, "u": {"a": [], "b": [defect]}}},
        "partly": {"version": "3", "results": {"t": {"a": [], "b": []}}, "error": "ERROR: killed"},
        "absent": {"version": "4", "results": {}, "error": "ERROR: no wheel"},
    }
    lines = table.render(columns, ["a", "b"], ["t", "u"]).splitlines()
    assert "| good | 1 | 0 of 2 rows with defects | 0 of 2 rows with defects |" in lines
    assert "| bad | 2 | 2 of 2 rows with defects | 1 of 2 rows with defects |" in lines
    assert "| partly | 3 | 0 of 2 rows with defects | not run: ERROR: killed |" in lines
    assert "| absent | 4 | not run: ERROR: no wheel | not run: ERROR: no wheel |" in lines
    assert "| 1 | a | ✓ | also trained / ✓ | ✓ / not run |" in lines
    assert "| 2 | b | ✓ | also trained | ✓ / not run |" in lines
    assert "| t | also trained |  | `\\|⏎` | 1, 2 |" in lines
