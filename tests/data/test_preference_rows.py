"""Preference rows as TRL, OpenAI and LLaMA-Factory write them."""

import copy
import json
from typing import Any

import pytest

from xlam_jax.config import Source
from xlam_jax.data import sources
from xlam_jax.data.pair import Pair
from xlam_jax.data.trajectory import InvalidTrajectory
from xlam_jax.data.validate import validate

FLAT = {"name": "tide", "description": "Tide.", "parameters": {"type": "object", "properties": {}}}
TOOL = {"type": "function", "function": FLAT}
ASK, NO = {"role": "user", "content": "Tide?"}, {"role": "assistant", "content": "No idea."}
SYSTEM = {"role": "system", "content": "Be brief."}
CALL = {"type": "function", "id": "c1", "function": {"name": "tide", "arguments": {}}}
LOOK = {"role": "assistant", "content": "", "tool_calls": [CALL]}
IN_TEXT = LOOK | {"tool_calls": [CALL | {"function": {"name": "tide", "arguments": "{}"}}]}
BARE = LOOK | {"tool_calls": [{"type": "function", "function": {"name": "tide", "arguments": {}}}]}
TURNS = [{"from": "human", "value": "Tide?"}]
FROM_CALL = {"from": "function_call", "value": '{"name": "tide", "arguments": {}}'}
FROM_NO = {"from": "gpt", "value": "No idea."}
LAYOUTS: dict[str, dict[str, Any]] = {
    "ours": {"conversation": [SYSTEM, ASK], "chosen": [LOOK], "rejected": [NO], "tools": [TOOL]},
    "trl": {"prompt": [SYSTEM, ASK], "chosen": [BARE], "rejected": [NO], "tools": [TOOL]},
    "trl, tools in a text": {"prompt": [SYSTEM, ASK], "chosen": [LOOK], "rejected": [NO], "tools": json.dumps([TOOL])},
    "trl without a prompt": {"chosen": [SYSTEM, ASK, LOOK], "rejected": [SYSTEM, ASK, NO], "tools": [TOOL]},
    "openai": {
        "input": {"messages": [SYSTEM, ASK], "tools": [TOOL], "parallel_tool_calls": None},
        "preferred_output": [IN_TEXT],
        "non_preferred_output": [NO],
    },
    "llama-factory": {
        "conversations": TURNS,
        "chosen": FROM_CALL,
        "rejected": FROM_NO,
        "system": "Be brief.",
        "tools": json.dumps([FLAT]),
    },
}  # fmt: skip


def pairs(path: Any) -> list[sources.Item]:
    return list(sources.read(Source(name="p", files=[str(path)], format="pairs")))


def sides(pair: Any) -> Any:
    assert isinstance(pair, Pair), pair
    return [
        (
            [
                *([("system", side.task_instruction, [])] if side.task_instruction else []),
                *((turn.role, turn.content, [call.name for call in turn.tool_calls]) for turn in side.conversation),
            ],
            side.tools,
        )
        for side in (pair.chosen, pair.rejected)
    ]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_pair(layout, write_jsonl):
    (item,) = pairs(write_jsonl(LAYOUTS[layout]))
    before = [("system", "Be brief.", []), ("user", "Tide?", [])]
    chosen, rejected = [*before, ("assistant", "", ["tide"])], [*before, ("assistant", "No idea.", [])]
    assert sides(item.trajectory) == [(chosen, [TOOL]), (rejected, [TOOL])]
    assert {repair.reason for repair in item.repairs} <= {"string-tools"}
    assert isinstance(item.trajectory, Pair)
    assert item.trajectory.id == "rows:1"


def test_texts_and_scores(write_jsonl):
    """As UltraFeedback and alpaca-like ranking rows have them."""
    trl = {"prompt": "Hi?", "chosen": "Hello.", "rejected": "Go.", "score_chosen": 9.0, "score_rejected": 2.0}
    whole = trl | {side: [ASK | {"content": "Hi?"}, NO | {"content": trl[side]}] for side in ("chosen", "rejected")}
    alpaca = {"instruction": "Hi?", "input": "", "chosen": "Hello.", "rejected": "Go."}
    items = pairs(write_jsonl(trl, whole, alpaca))
    expected = [[("user", "Hi?", []), ("assistant", text, [])] for text in ("Hello.", "Go.")]
    for item in items:
        assert [turns for turns, _ in sides(item.trajectory)] == expected
        assert item.repairs == ()
    scores = [(item.trajectory.chosen.score, item.trajectory.rejected.score) for item in items]  # pyright: ignore
    assert scores == [(9.0, 2.0), (9.0, 2.0), (None, None)]


def test_repairs_of_the_prompt_are_reported_once(write_jsonl):
    history = [ASK, IN_TEXT, {"role": "tool", "tool_call_id": "other", "content": "2 m"}]
    row = {"prompt": history, "chosen": [NO], "rejected": [LOOK], "tools": [TOOL], "note": "x"}
    (item,) = pairs(write_jsonl(row))
    assert sorted(repair.reason for repair in item.repairs) == ["mismatched-call-id", "unknown-key"]
    assert isinstance(item.trajectory, Pair)
    assert item.trajectory.chosen.conversation[1].loss is False  # the prompt's turns are not trained


@pytest.mark.parametrize(
    ("changes", "reason", "detail"),
    [
        ({"chosen": [NO]}, "equal-sides", "chosen equals rejected"),
        ({"prompt": 3}, "missing-field", "chosen: `role`"),
        ({"chosen": [LOOK | {"tool_calls": [{"function": {"name": "wave"}}]}]}, "undeclared-tool", "chosen: turn 2"),
        ({"chosen": [SYSTEM, ASK | {"content": "?"}, LOOK]}, "first-differs-at-a-user-or-tool-turn", "differ at"),
    ],
)
def test_invalid_pairs_have_a_reason(changes, reason, detail, write_jsonl):
    path = write_jsonl(copy.deepcopy(LAYOUTS["trl"]) | changes)
    (item,) = pairs(path)
    assert isinstance(item.trajectory, InvalidTrajectory)
    assert (item.trajectory.reason, detail in item.trajectory.detail) == (reason, True), item.trajectory
    assert reason in {finding.reason for findings in validate(path) for finding in findings}


def test_columns(tmp_path):
    """As the `datasets` library writes them, with padding."""
    from datasets import Dataset

    for number, (layout, row) in enumerate(LAYOUTS.items()):
        text = json.dumps(row).replace('"arguments": {}', '"arguments": {"at": "Oslo"}')
        text = text.replace('"properties": {}', '"properties": {"at": {"type": "string"}}')
        path = tmp_path / f"{number}.parquet"
        Dataset.from_list([json.loads(text)]).to_parquet(str(path))
        (item,) = pairs(path)
        assert sides(item.trajectory)[0][0][-1] == ("assistant", "", ["tide"]), layout
