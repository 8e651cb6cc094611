"""Train-ready rows: one row per trained turn, import, and export and import."""

import json
from collections import Counter
from dataclasses import replace

import pytest
from conversions import export
from hypothesis import given
from xlam_formats import SETTINGS, rows_of, trajectories

from xlam_jax.data.converters.common import Converted, Dropped
from xlam_jax.data.converters.train_ready import convert as convert_train_ready
from xlam_jax.data.parse import parse_trajectory


@SETTINGS
@given(trajectories())
def test_train_ready_holds_all_up_to_the_last_trained_turn(convert, trajectory):
    rows, lost = export("train_ready", trajectory)
    turns = trajectory.conversation
    trained = [i for i, turn in enumerate(turns) if turn.role == "assistant" and turn.loss is not False]
    if not trained:
        assert (rows, lost) == ([], {"no-trained-turn"})
        return
    held = turns[: trained[-1] + 1]
    assert [len(row["messages"]) for row in rows] == [i + bool(trajectory.task_instruction) for i in trained]
    kept, dropped, repairs = convert("train_ready", *rows)
    assert kept == [replace(trajectory, source=None, score=None, conversation=held)]
    assert dropped == [(i, "step", "repeated-context") for i in range(1, len(rows))]
    assert repairs == []
    expected = {f"{key}-not-held" for key in ("source", "score") if getattr(trajectory, key) is not None}
    assert lost == expected | ({"turns-not-held"} if held != turns else set())


def test_bundled_trajectories_come_back_from_train_ready(convert, bundled):
    rows = [row for trajectory in bundled for row in export("train_ready", trajectory)[0]]
    kept, dropped, repairs = convert("train_ready", *rows)
    assert kept == [replace(trajectory, source=None, score=None) for trajectory in bundled]
    assert Counter(reason for _, _, reason in dropped) == {"repeated-context": len(rows) - len(bundled)}
    assert repairs == []


def test_text_of_a_turn_with_calls_is_in_both_outputs(row):
    rows, _ = export("train_ready", parse_trajectory(row))
    assert [each["id"] for each in rows] == ["weather_0---1", "weather_0---2", "weather_0---3"]
    first = row["conversation"][1]
    assert rows[0]["chosen"].startswith(first["content"] + '[TOOL_CALLS][{"name": "get_weather", "arguments": {"city"')
    assert rows[0]["output_message"] == first
    assert rows[1]["chosen"] == "-3 °C 🥶, 12:00."


def test_train_ready_fixture(convert):
    kept, dropped, repairs = convert("train_ready", *rows_of("train_ready"))
    rejected, chosen, alone = kept
    assert (rejected.id, rejected.score, chosen.id, chosen.score) == ("weather_0---1---rejected", 0.0, "weather_0", 1.0)
    assert rejected.conversation[0] == chosen.conversation[0]
    assert [len(each.conversation[1].tool_calls) for each in (rejected, chosen)] == [1, 2]
    assert chosen.task_instruction == "Help with the weather."
    assert [turn.loss for turn in chosen.conversation] == [None] * 5
    assert (alone.id, [turn.loss for turn in alone.conversation]) == ("weather_1", [None, False, None, None])
    assert len(alone.conversation[-1].tool_calls) == 2
    assert (dropped, repairs) == ([(1, "step", "repeated-context")], [])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"chosen": "Oslo."}, "ambiguous-output"),
        ({"output_message": None, "chosen": None}, "missing-field"),
        ({"output_message": None, "chosen": '[TOOL_CALLS][{"name": '}, "bad-call"),
        ({"messages": None}, "missing-field"),
        ({"messages": "{}"}, "missing-field"),
        ({"id": ["x"]}, "bad-value"),
        ({"tools": []}, "undeclared-tool"),
    ],
)
def test_train_ready_defects_are_named(convert, change, reason):
    row = rows_of("train_ready")[0] | {"reject": None} | change
    kept, dropped, _ = convert("train_ready", row)
    assert (kept, dropped) == ([], [(1, "trajectory", reason)])


def test_train_ready_variants(convert):
    first, second, _ = rows_of("train_ready")
    # upstream does not train the text of turns with calls; the next row's context has it
    with_text = json.loads(json.dumps(second))
    with_text["messages"][2]["content"] = "I look."
    del first["output_message"], first["reject"]
    kept, _, repairs = convert("train_ready", first, with_text)
    assert (kept[0].conversation[1].content, repairs) == ("I look.", ["thought-left-out"])
    # a text of messages, calls without the marker, malformed and equal rejects
    plain = first | {"messages": json.dumps(first["messages"]), "chosen": first["chosen"].removeprefix("[TOOL_CALLS]")}
    kept, dropped, repairs = convert(
        "train_ready", plain | {"rejected": '[TOOL_CALLS][{"name": '}, plain | {"reject": plain["chosen"]}
    )
    assert [each.conversation[-1].content for each in kept[:1]] == ['[TOOL_CALLS][{"name": ']
    assert [each.score for each in kept] == [0.0, 1.0, 1.0]
    assert dropped == [(2, "step", "rejected-equals-chosen")]
    assert set(repairs) == {"string-messages"}
    # an invalid reject is dropped alone
    kept, dropped, _ = convert("train_ready", first | {"reject": '[TOOL_CALLS][{"name": "lok", "arguments": {}}]'})
    assert (len(kept), dropped) == (1, [(1, "trajectory", "undeclared-tool")])


def test_rows_that_do_not_continue_stay_separate(convert):
    first, second, _ = rows_of("train_ready")
    del first["reject"]
    kept, dropped, _ = convert("train_ready", second, first)
    assert [[turn.loss for turn in each.conversation if turn.role == "assistant"] for each in kept] == [
        [False, None],
        [None],
    ]
    assert dropped == []
    for key, value in (("tools", []), ("id", "other---2")):
        kept, _, _ = convert("train_ready", first, second | {key: value})
        assert len(kept) == (1 if key == "tools" else 2)
    second["messages"][1]["content"] = "Another question."
    assert len(convert("train_ready", first, second)[0]) == 2


def test_train_ready_streams(tmp_path):
    """One trajectory is out before the file is read to its end."""
    path = tmp_path / "rows.jsonl"
    row = rows_of("train_ready")[2]
    path.write_text(json.dumps(row) + "\n" + json.dumps(row | {"id": "y"}) + "\n" + '{"id": 1', encoding="utf-8")
    items = convert_train_ready([path])
    assert isinstance(next(items), Converted)
    assert [type(item) for item in items] == [Dropped, Converted]
