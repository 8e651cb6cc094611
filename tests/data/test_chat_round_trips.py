"""Trajectories written as rows of OpenAI, ShareGPT or the unified format are read back, and losses are reported."""

import json
from dataclasses import replace
from itertools import takewhile
from typing import Any

import pytest
from chat_rows import FLAT, TOOL, read, write
from conversions import items
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from strategies import ARGUMENTS, PLAIN

from xlam_jax.data.call_links import answered_calls
from xlam_jax.data.converters.common import Converted, Dropped
from xlam_jax.data.parse import parse_trajectory
from xlam_jax.data.trajectory import InvalidTrajectory, Message, ToolCall, Trajectory, system_text, to_dict

SETTINGS = settings(max_examples=80, deadline=None, derandomize=True)
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
