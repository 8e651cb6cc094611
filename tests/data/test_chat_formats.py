"""The unified trajectory itself, OpenAI's chat messages, ShareGPT and Alpaca: import, and export and import."""

import json
import re
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st
from strategies import JSON, broken

from xlam_jax.data.call_links import answered_calls
from xlam_jax.data.converters import exporter, row_converter
from xlam_jax.data.converters.common import Converted, Dropped, Lost, convert_one
from xlam_jax.data.parse import parse_trajectory
from xlam_jax.data.trajectory import InvalidTrajectory, Message, ToolCall, Trajectory, system_text, to_dict

SETTINGS = settings(max_examples=80, deadline=None, derandomize=True)
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
FLAT = {"name": "look", "description": "Looks.", "parameters": {"type": "object", "properties": {"b": {}, "a": {}}}}


def items(format: str, row: dict[str, Any]) -> list[Converted | Dropped]:
    convert_row = row_converter(format)
    assert convert_row
    return list(convert_one(Path("rows.jsonl"), 7, row, convert_row))


def read(format: str, row: dict[str, Any], *repairs: str) -> Trajectory:
    """Converts a row that gives one trajectory, after exactly these repairs."""
    (item,) = items(format, row)
    assert isinstance(item, Converted), item
    assert [repair.reason for repair in item.repairs] == list(repairs), item.repairs
    return item.trajectory


def refused(format: str, row: dict[str, Any]) -> str:
    (item,) = items(format, row)
    assert isinstance(item, Dropped), item
    assert (item.path, item.row) == (Path("rows.jsonl"), 7)
    return f"{item.reason}: {item.detail}"


def write(format: str, trajectory: Trajectory) -> tuple[dict[str, Any], set[str]]:
    """Exports to one row; returns (row as read from a file, reasons of losses)."""
    exported = list(exporter(format)(trajectory))
    (row,) = [item for item in exported if isinstance(item, dict)]
    text = json.dumps(row, ensure_ascii=False, allow_nan=False)
    return json.loads(text), {item.reason for item in exported if isinstance(item, Lost)}


# Strategies for trajectories

PLAIN = st.text(alphabet="abc 1\n.é🥶", min_size=1, max_size=12).filter(str.strip)
TRICKY = st.sampled_from(
    [
        "<think>x</think>y",
        '<tool_call>{"name": "look", "arguments": {}}</tool_call>',
        "a</tool_response>b",
        "<tools>[" + json.dumps(FLAT) + "]</tools>",
        json.dumps([FLAT]),
        '{"name": "look", "arguments": {}}',
        " padded ",
        "",
        "[TOOL_CALLS]",
    ]
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)
ARGUMENTS = st.dictionaries(st.text(max_size=3), VALUES, max_size=3)
NAMES = st.sampled_from(["look", "go-to", "名前"])


@st.composite
def trajectories(draw, tricky: bool) -> Trajectory:
    """A canonical trajectory. Without `tricky` it is like most data: each call has a result and an id."""
    text = PLAIN | TRICKY if tricky else PLAIN
    flag = st.sampled_from([None, True, False])
    turns: list[Message] = []
    if tricky:
        turns += [Message("system", draw(text), loss=draw(flag)) for _ in range(draw(st.integers(0, 2)))]
    number = 0
    for _ in range(draw(st.integers(1, 3))):
        turns.append(Message("user", draw(text), loss=draw(flag) if tricky else None))
        for _ in range(draw(st.integers(0, 2))):
            calls = []
            for _ in range(draw(st.integers(1, 3))):
                number += 1
                calls.append(ToolCall(f"call_{number}", draw(NAMES), draw(ARGUMENTS)))
            turns.append(Message("assistant", draw(st.just("") | text), tuple(calls), loss=draw(flag)))
            results = [Message("tool", draw(text), (), call.id, call.name) for call in calls]
            if tricky:
                turns[-1] = replace(
                    turns[-1], tool_calls=tuple(_without_id(call, draw(st.integers(0, 3))) for call in calls)
                )
                with_id = {call.id for call in turns[-1].tool_calls}
                results = [
                    replace(result, tool_call_id=result.tool_call_id if result.tool_call_id in with_id else None)
                    for result in results
                ]
                results = draw(st.permutations(results))[: draw(st.integers(0, 3))]
            turns.extend(results)
        if draw(st.booleans()) or turns[-1].role == "user":
            turns.append(Message("assistant", draw(PLAIN), loss=draw(flag)))
    tools = [
        {"type": "function", "function": {"name": name, "description": draw(text)}}
        for name in ("名前", "look", "go-to")
    ]
    trajectory = Trajectory(
        id=draw(PLAIN),
        source=draw(st.none() | PLAIN),
        score=draw(st.none() | st.floats(-5, 5)),
        task_instruction=draw(st.just("") | text),
        tools=tools,
        conversation=tuple(turns),
    )
    try:
        return parse_trajectory(to_dict(trajectory))
    except InvalidTrajectory:  # results without ids, whose order is ambiguous
        reject()


def _without_id(call: ToolCall, choice: int) -> ToolCall:
    return replace(call, id=None) if choice == 0 else call


def aspect_of(trajectory: Trajectory, aspect: str) -> Any:
    """One aspect of the turns, without system turns."""
    turns = [turn for turn in trajectory.conversation if turn.role != "system"]
    return {
        "turns": [turn.role for turn in turns],
        "text": [turn.content for turn in turns],
        "calls": [[(call.name, json.dumps(call.arguments)) for call in turn.tool_calls] for turn in turns],
        "loss": [turn.loss for turn in turns if turn.role == "assistant"],
        "links": _links(turns),
        "names": [turn.name for turn in turns],
    }[aspect]


def _links(turns: list[Message]) -> list[tuple[int, int]]:
    """For each result (turn, call) that it answers; the ids themselves do not matter."""
    links = []
    for i, turn in enumerate(turns):
        results = list(takewhile(lambda turn: turn.role == "tool", turns[i + 1 :])) if turn.tool_calls else []
        links += [(i, k) for k in answered_calls(turn.tool_calls, results) or ()]
    return links


def expected_losses(trajectory: Trajectory, *keys: str) -> set[str]:
    return {f"{key}-not-held" for key in keys if getattr(trajectory, key) is not None}


# Export and import


@SETTINGS
@given(trajectories(tricky=True))
def test_openai_holds_all_but_id_source_and_score(trajectory):
    row, lost = write("openai", trajectory)
    assert row.keys() == {"messages", "tools"}
    assert all(call["id"] for message in row["messages"] for call in message.get("tool_calls", ()))
    assert all(message["tool_call_id"] for message in row["messages"] if message["role"] == "tool")
    back = read("openai", row)
    assert system_text(back.task_instruction, back.conversation) == system_text(
        trajectory.task_instruction, trajectory.conversation
    )
    assert json.dumps(back.tools) == json.dumps(trajectory.tools)
    for aspect in ("turns", "text", "calls", "loss", "names", "links"):
        assert aspect_of(back, aspect) == aspect_of(trajectory, aspect)
    turns = trajectory.conversation
    flagged = {"loss-flag-not-held"} if any(t.role == "user" and t.loss is not None for t in turns) else set()
    flagged |= {"system-flags-not-held"} if any(t.role == "system" and t.loss is not None for t in turns) else set()
    assert lost == expected_losses(trajectory, "id", "source", "score") | flagged


@SETTINGS
@given(trajectories(tricky=False))
def test_sharegpt_holds_all_but_source_and_score(trajectory):
    row, lost = write("sharegpt", trajectory)
    assert lost == expected_losses(trajectory, "source", "score")
    assert read("sharegpt", row) == replace(trajectory, source=None, score=None)


@SETTINGS
@given(trajectories(tricky=True))
def test_sharegpt_reports_its_losses(trajectory):
    row, lost = write("sharegpt", trajectory)
    results = items("sharegpt", row)
    if "not-read-back" in lost:
        assert isinstance(results[0], Dropped)
        return
    assert isinstance(results[0], Converted)
    back = results[0].trajectory
    lost -= expected_losses(trajectory, "source", "score")
    reasons_of = {
        "turns": {"turns-not-held"},
        "text": {"turns-not-held", "text-not-held"},
        "calls": {"turns-not-held", "calls-not-held"},
        "loss": {"turns-not-held", "loss-flag-not-held"},
    }
    for aspect, reasons in reasons_of.items():
        assert (aspect_of(back, aspect) == aspect_of(trajectory, aspect)) or lost & reasons, aspect
    if not lost:
        assert aspect_of(back, "links") == aspect_of(trajectory, "links")
        assert back.id == trajectory.id
        assert json.dumps(back.tools) == json.dumps(trajectory.tools)


@pytest.mark.parametrize("format", ["openai", "sharegpt"])
def test_bundled_trajectories_come_back(bundled, format):
    for trajectory in bundled:
        row, lost = write(format, trajectory)
        assert lost == expected_losses(trajectory, *(["id"] if format == "openai" else []), "source", "score")
        row["id"] = trajectory.id
        assert read(format, row) == replace(trajectory, source=None, score=None)


def test_unified_rows_come_back_as_they_are(bundled):
    for trajectory in bundled:
        row = to_dict(trajectory)
        assert json.dumps(to_dict(read("unified", row))) == json.dumps(row)


def test_unified_mends(row):
    del row["unique_trajectory_id"]
    row["conversation"][1]["tool_calls"][1]["function"]["arguments"] = "{}"
    assert read("unified", row, "string-arguments").id == "rows_7"


# Layouts of other tools


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


def test_calls_without_ids_are_linked_by_name():
    calls = (ToolCall(None, "look", {}), ToolCall(None, "go", {}), ToolCall("call_1", "look", {}))
    turns = (
        Message("user", "q"),
        Message("assistant", "", calls[:2]),
        Message("tool", "r", name="go"),
        Message("assistant", "", calls[2:]),
    )
    tools = [TOOL, {"type": "function", "function": {"name": "go"}}]
    row, lost = write("openai", Trajectory("t", None, None, "", tools, turns))
    assert lost == {"id-not-held"}
    assert [[call["id"] for call in turn["tool_calls"]] for turn in row["messages"][1::2]] == [
        ["call_2", "call_3"],
        ["call_1"],
    ]
    assert row["messages"][2]["tool_call_id"] == "call_3"


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


def test_sharegpt_says_what_it_cannot_hold():
    calls = (ToolCall("x", "look", {}), ToolCall("y", "look", {"a": 1}))
    turns = (
        Message("user", "q"),
        Message("assistant", "", calls),
        Message("tool", "2", (), "y"),
        Message("tool", "1", (), "x"),
        Message("assistant", "I think."),
        Message("assistant", "", (ToolCall("z", "look", {}),)),
    )
    trajectory = parse_trajectory(to_dict(Trajectory("t", None, None, "", [TOOL], turns)))
    row, lost = write("sharegpt", trajectory)
    assert lost == {"turns-not-held"}
    assert [turn["value"] for turn in row["conversations"] if turn["from"] == "observation"] == ["1", "2"]
    _, lost = write("sharegpt", replace(trajectory, conversation=turns[:2]))
    assert lost == {"call-id-not-held"}
    system = replace(trajectory, conversation=turns[:2], task_instruction=json.dumps([FLAT]), tools=[])
    assert "tools-not-held" in write("sharegpt", system)[1] or "not-read-back" in write("sharegpt", system)[1]


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
