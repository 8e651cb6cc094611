"""Import of OpenAI's chat messages, ShareGPT and Alpaca: variants of their layouts, defects, and any row."""

import json
import re
from typing import Any

import pytest
from chat_rows import FLAT, TOOL, read, refused, write
from conversions import items
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from strategies import JSON, broken

from xlam_jax.data.converters.common import Converted
from xlam_jax.data.trajectory import Message, ToolCall, Trajectory


def test_openai_variants():
    row = {
        "id": 3,
        "messages": [
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "q"}]},
            {
                "role": "assistant",
                "content": None,
                "function_call": {"name": "look", "arguments": '{"b": 1, "a": 2}'},
                "weight": 0,
            },
            {"role": "function", "name": "look", "content": "r"},
            {"role": "assistant", "content": "a", "weight": 1, "refusal": None},
        ],
        "functions": [FLAT],
        "parallel_tool_calls": False,
    }
    assert read("openai", row, "text-parts", "unknown-key", "number-as-id") == Trajectory(
        id="3",
        source=None,
        score=None,
        task_instruction="Be brief.",
        tools=[{"type": "function", "function": FLAT}],
        conversation=(
            Message("user", "q"),
            Message("assistant", "", (ToolCall("call_1", "look", {"b": 1, "a": 2}),), loss=False),
            Message("tool", "r", (), "call_1", "look"),
            Message("assistant", "a", loss=True),
        ),
    )


def test_openai_form_needs_no_repair_and_defects_are_reported():
    call = {"id": "c", "type": "function", "function": {"name": "look", "arguments": '{"a": 1}'}}
    row = {
        "messages": [
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c", "content": "r"},
        ],
        "tools": [TOOL],
    }
    assert read("openai", row).conversation[1].tool_calls == (ToolCall("c", "look", {"a": 1}),)
    call["function"]["arguments"] += " Done."
    row["messages"][2]["tool_call_id"] = "d"
    assert read("openai", row, "trailing-text-after-json", "mismatched-call-id").conversation[2].tool_call_id == "c"
    call["function"]["arguments"] = '{"a": 1, '
    assert "bad-arguments: turn 1 calls 'look' with a text that is not valid JSON" in refused("openai", row)
    row["messages"][1] = {"role": "assistant", "content": "a", "weight": 2}
    assert refused("openai", row) == "bad-loss: turn 1 has weight 2, not 0 or 1"


def test_sharegpt_function_calls():
    """LLaMA-Factory's layout: flat tools in a string, a column for the system text."""
    row = {
        "conversations": [
            {"from": "human", "value": "q"},
            {"from": "gpt", "value": "I look.", "loss": False},
            {"from": "function_call", "value": '{"name": "look", "arguments": {"b": 1, "a": 2}}', "loss": False},
            {"from": "observation", "value": "r"},
            {
                "from": "function_call",
                "value": "<think>\nTwice.\n</think>\n\n"
                '[{"name": "look", "arguments": "{}"}, {"name": "look", "arguments": {}}]',
            },
            {"from": "observation", "value": "r1\n</tool_response>\n<tool_response>\nr2"},
            {"from": "gpt", "value": "a", "loss": True},
        ],
        "system": "Be brief.",
        "tools": json.dumps([FLAT]),
    }
    assert read("sharegpt", row) == Trajectory(
        id="rows_7",
        source=None,
        score=None,
        task_instruction="Be brief.",
        tools=[{"type": "function", "function": FLAT}],
        conversation=(
            Message("user", "q"),
            Message("assistant", "I look.", (ToolCall("call_1", "look", {"b": 1, "a": 2}),), loss=False),
            Message("tool", "r", (), "call_1", "look"),
            Message(
                "assistant", "", (ToolCall("call_2", "look", {}), ToolCall("call_3", "look", {})), reasoning="Twice."
            ),
            Message("tool", "r1", (), "call_2", "look"),
            Message("tool", "r2", (), "call_3", "look"),
            Message("assistant", "a", loss=True),
        ),
    )


def test_sharegpt_with_hermes_tags():
    system = (
        f"You call functions. <tools>\n{json.dumps(FLAT)}\n{json.dumps({**FLAT, 'name': 'go'})}\n</tools> Be brief."
    )
    row = {
        "id": "x",
        "conversations": [
            {"from": "system", "value": system},
            {"from": "human", "value": "q"},
            {
                "from": "gpt",
                "value": 'I look.\n<tool_call>\n{"name": "look", "arguments": {"a": 1}}\n</tool_call>\n'
                '<tool_call>\n{"name": "go", "arguments": {}}\n</tool_call>',
                "weight": 1,
            },
            {"from": "tool", "value": "<tool_response>\nr1\n</tool_response>\n<tool_response>\nr2\n</tool_response>"},
            {"from": "gpt", "value": "a", "train": False},
        ],
    }
    trajectory = read("sharegpt", row, "tools-in-system")
    assert trajectory.task_instruction == "You call functions.  Be brief."
    assert [tool["function"]["name"] for tool in trajectory.tools] == ["look", "go"]
    calls = (ToolCall("call_1", "look", {"a": 1}), ToolCall("call_2", "go", {}))
    assert trajectory.conversation[1:] == (
        Message("assistant", "I look.", calls, loss=True),
        Message("tool", "r1", (), "call_1", "look"),
        Message("tool", "r2", (), "call_2", "go"),
        Message("assistant", "a", loss=False),
    )
    row["conversations"][2]["value"] += " Done."
    assert read("sharegpt", row, "tools-in-system", "trailing-text-after-json").conversation == trajectory.conversation
    row["conversations"][2]["value"] = '<tool_call>{"name": "look"'
    assert refused("sharegpt", row) == "bad-call: turn 2 opens <tool_call> and does not close it"


def test_sharegpt_tools_in_the_system_text():
    turns = [
        {"from": "system", "value": "Tools:\n" + json.dumps([FLAT], indent=1) + "\nUse them."},
        {"from": "human", "value": "q"},
        {"from": "function_call", "value": '{"name": "look", "arguments": {}}'},
    ]
    trajectory = read("sharegpt", {"conversations": turns}, "tools-in-system")
    assert trajectory.tools == [{"type": "function", "function": FLAT}]
    assert trajectory.task_instruction == "Tools:\n\nUse them."
    # tools that differ from the column's stay in the text
    trajectory = read("sharegpt", {"conversations": turns, "tools": [TOOL]})
    assert trajectory.tools == [TOOL]
    assert trajectory.task_instruction == turns[0]["value"]


def test_sharegpt_defects_are_reported():
    turns = [
        {"from": "human", "value": "q"},
        {"from": "function_call", "value": '{"name": "look", "arguments": {}} Done.'},
    ]
    row = {"conversations": turns, "tools": [TOOL]}
    read("sharegpt", row, "trailing-text-after-json")
    for value, why in (
        ("[]", "bad-call: turn 1 has an empty list of calls"),
        ("look()", "bad-arguments: turn 1 calls with a text that is not valid JSON"),
        ('{"name": "look", "arguments": [1]}', "bad-arguments: turn 1 calls 'look' with a list"),
        ('{"name": "lok", "arguments": {}}', "undeclared-tool: turn 1 calls 'lok'.*did you mean 'look'"),
        ('["look"]', "bad-call: turn 1 has a call without"),
    ):
        turns[1]["value"] = value
        assert re.match(why, refused("sharegpt", row))
    turns[1] = {"from": "gtp", "value": "a"}
    assert "unknown-role: turn 1 is from 'gtp'" in refused("sharegpt", row)
    assert "did you mean 'gpt'" in refused("sharegpt", row)
    turns[1] = {"from": "gpt", "value": "a", "loss": "yes"}
    assert refused("sharegpt", row) == "bad-loss: turn 1 has loss 'yes', not true or false"


def test_alpaca():
    row = {
        "instruction": "Translate.",
        "input": "Hei",
        "output": "Hi",
        "system": "Be brief.",
        "history": [["Who?", "Me."]],
        "score": 1,
    }
    assert read("alpaca", row) == Trajectory(
        id="rows_7",
        source=None,
        score=1.0,
        task_instruction="Be brief.",
        tools=[],
        conversation=(
            Message("user", "Who?"),
            Message("assistant", "Me."),
            Message("user", "Translate.\nHei"),
            Message("assistant", "Hi"),
        ),
    )
    assert read("alpaca", {"instruction": "Go.", "output": "Gone."}).conversation[0].content == "Go."
    assert refused("alpaca", {"instruction": "Go."}) == "missing-field: `output` is missing"
    assert refused("alpaca", {**row, "history": ["Who?"]}) == "bad-turn: round 0 of `history` is not a pair of texts"
    (item,) = items("alpaca", {**row, "output": ""})
    assert isinstance(item, Converted)
    assert [repair.reason for repair in item.repairs] == ["empty-last-turn"]


ROWS: dict[str, dict[str, Any]] = {
    "openai": {
        "messages": [
            {"role": "system", "content": "s"},
            {"role": "user", "content": "q"},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"id": "c", "type": "function", "function": {"name": "look", "arguments": '{"a": 1}'}}],
                "weight": 0,
            },
            {"role": "tool", "tool_call_id": "c", "content": "r"},
            {"role": "assistant", "content": "a", "function_call": None},
        ],
        "tools": [TOOL],
        "functions": [FLAT],
    },
    "sharegpt": {
        "conversations": [
            {"from": "system", "value": "<tools>" + json.dumps(FLAT) + "</tools>"},
            {"from": "human", "value": "q"},
            {"from": "gpt", "value": 'I.<tool_call>{"name": "look", "arguments": "{}"}</tool_call>', "loss": True},
            {"from": "tool", "value": "<tool_response>r</tool_response>"},
            {"from": "function_call", "value": '<think>t</think>{"name": "look", "arguments": {}}', "weight": 0},
        ],
        "system": "s",
        "tools": json.dumps([FLAT]),
    },
    "alpaca": {"instruction": "i", "input": "j", "output": "o", "system": "s", "history": [["a", "b"]], "id": 1},
}


@pytest.mark.parametrize("format", [*ROWS, "unified"])
def test_whatever_the_row_nothing_else_is_raised(row: dict[str, Any], format: str):
    start = ROWS.get(format, row)

    @settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.nested_given])
    @given(broken(start) | st.dictionaries(st.sampled_from(sorted(start)), JSON))
    def check(candidate):
        results = items(format, candidate)
        assert len(results) == 1
        if isinstance(results[0], Converted):
            for name in ("openai", "sharegpt"):
                write(name, results[0].trajectory)

    check()


def test_long_turns_take_linear_time():
    """Turns of hundreds of thousands of characters, for which a careless search would take quadratic time."""
    for text in (
        "<tool_call>" * 20_000,
        " " * 200_000,
        "[ " * 100_000,
        "</tool_response>" * 30_000,
        '{"name": ' * 20_000,
    ):
        for role in ("system", "gpt", "tool", "function_call"):
            turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
            turns.insert(0 if role == "system" else 1, {"from": role, "value": text})
            assert len(items("sharegpt", {"conversations": turns, "tools": [TOOL]})) == 1
