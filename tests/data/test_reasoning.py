"""Reasoning before an answer: read from every spelling into a separate field, and written back."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xlam_jax.data.content import split_reasoning
from xlam_jax.data.converters import exporter, row_converter
from xlam_jax.data.converters.common import Converted, Lost, convert_one
from xlam_jax.data.parse import parse_messages, parse_trajectory
from xlam_jax.data.trajectory import Trajectory, message_to_dict, to_dict, to_messages
from xlam_jax.data.validate import check_row

TOOL = {"type": "function", "function": {"name": "tide", "parameters": {"type": "object", "properties": {}}}}
CALL = {"id": "c1", "type": "function", "function": {"name": "tide", "arguments": "{}"}}
ASK = {"role": "user", "content": "Tide?"}
RESULT = {"role": "tool", "tool_call_id": "c1", "content": "2 m"}


def convert(format: str, row: dict[str, Any], *repairs: str) -> Trajectory:
    convert_row = row_converter(format)
    assert convert_row
    (item,) = convert_one(Path("rows.jsonl"), 1, copy.deepcopy(row), convert_row)
    assert isinstance(item, Converted), item
    assert [repair.reason for repair in item.repairs] == list(repairs)
    return item.trajectory


def messages(**changes: Any) -> dict[str, Any]:
    answer = {"role": "assistant", "content": None, "tool_calls": [CALL]} | changes
    return {"messages": [ASK, answer, RESULT, {"role": "assistant", "content": "2 m"}], "tools": [TOOL]}


THOUGHT = "A tool measures it."


@pytest.mark.parametrize(
    "changes",
    [
        {"reasoning_content": THOUGHT},
        {"reasoning": THOUGHT},
        {"thinking": THOUGHT},
        {"reasoning_content": THOUGHT, "reasoning": THOUGHT},  # servers give both
        {"reasoning": [{"type": "summary_text", "text": THOUGHT}]},
        {"content": [{"type": "thinking", "thinking": THOUGHT, "signature": "x"}]},
        {"content": [{"type": "thinking", "thinking": [{"type": "text", "text": THOUGHT}]}]},
        {"content": [{"type": "reasoning", "text": THOUGHT}]},
        {"content": [{"type": "reasoning", "summary": [{"type": "summary_text", "text": THOUGHT}]}]},
    ],
)
def test_every_spelling_is_kept(changes):
    turn = convert("openai", messages(**changes)).conversation[1]
    assert (turn.reasoning, turn.content, len(turn.tool_calls)) == (THOUGHT, "", 1)


def test_parts_of_text_stay_text():
    parts = [{"type": "thinking", "thinking": THOUGHT}, {"type": "text", "text": "I look."}]
    turn = convert("openai", messages(content=parts), "text-parts").conversation[1]
    assert (turn.reasoning, turn.content) == (THOUGHT, "I look.")
    # reasoning in turns of others and of unknown kinds is dropped and counted
    row = messages(reasoning={"effort": "high"})
    row["messages"][0] = ASK | {"reasoning": THOUGHT}
    trajectory = convert("openai", row, "unknown-key", "unknown-key")
    assert not any(turn.reasoning for turn in trajectory.conversation)


def test_it_comes_back_from_every_form_that_can_hold_it():
    trajectory = convert("openai", messages(reasoning_content=THOUGHT))
    row = to_dict(trajectory)
    assert row["conversation"][1]["reasoning"] == THOUGHT
    assert parse_trajectory(copy.deepcopy(row)) == trajectory
    assert not list(check_row(row))
    (written, *losses) = exporter("openai")(trajectory)
    assert isinstance(written, dict)
    assert written["messages"][1]["reasoning_content"] == THOUGHT
    assert {loss.reason for loss in losses if isinstance(loss, Lost)} == {"id-not-held"}
    assert convert("openai", written | {"id": trajectory.id}) == trajectory
    assert any("reasoning_content" in str(row) for row in exporter("train_ready")(trajectory))
    (written, *losses) = exporter("sharegpt")(trajectory)
    assert isinstance(written, dict)
    assert written["conversations"][1]["value"].startswith(f"<think>\n{THOUGHT}\n</think>\n\n")
    assert {loss.reason for loss in losses if isinstance(loss, Lost)} == {"call-id-not-held"}
    for shorter in (trajectory, replace(trajectory, conversation=trajectory.conversation[:2])):
        assert "reasoning-not-held" in {item.reason for item in exporter("xlam60k")(shorter) if isinstance(item, Lost)}


def test_a_turn_of_reasoning_alone_is_empty():
    row = {"conversation": [ASK, {"role": "assistant", "content": "", "reasoning": THOUGHT}]}
    assert [problem.reason for problem in check_row(row)][-1] == "empty-assistant-turn"


@pytest.mark.parametrize("text", ["<think>{}</think>{}", "\n<think>\n{}\n</think>\n\n{}", "[THINK]{}[/THINK]{}"])
def test_reasoning_at_the_start_of_text_is_moved(text):
    row = messages(content=text.format(THOUGHT, "I look."))
    turn = convert("openai", row, "reasoning-in-text").conversation[1]
    assert (turn.reasoning, turn.content, len(turn.tool_calls)) == (THOUGHT, "I look.", 1)
    turn = convert("openai", messages(content=text.format(THOUGHT, "")), "reasoning-in-text").conversation[1]
    assert (turn.reasoning, turn.content, len(turn.tool_calls)) == (THOUGHT, "", 1)
    both = messages(content=text.format(THOUGHT, "I look."), reasoning_content=f" {THOUGHT}\n")
    assert convert("openai", both, "reasoning-in-text").conversation[1].reasoning == THOUGHT
    turns = [ASK, {"role": "assistant", "content": text.format(THOUGHT, "2 m")}]
    (problem,) = check_row({"unique_trajectory_id": "a", "conversation": turns})
    assert problem.reason == "reasoning-in-text"


def test_text_that_stays_text():
    for text in (
        f"I think <think>{THOUGHT}</think>",  # not at the start
        f"<think>{THOUGHT}",  # not closed
        f"<think>{THOUGHT}</think>",  # nothing else: the turn would be empty
    ):
        turn = parse_trajectory({"conversation": [ASK, {"role": "assistant", "content": text}]}).conversation[1]
        assert (turn.content, turn.reasoning) == (text, "")
    request = parse_messages([ASK, {"role": "assistant", "content": "<think>a</think>b"}, ASK])  # as a server gets it
    assert (request[1].content, request[1].reasoning) == ("<think>a</think>b", "")
    assert split_reasoning("<think></think>b") == ("", "b")


def test_sharegpt_keeps_the_reasoning_of_joined_turns():
    call = {"from": "function_call", "value": '{"name": "tide", "arguments": {}}'}
    answer = {"from": "gpt", "value": f"<think>{THOUGHT}</think>I look."}
    row = {"conversations": [{"from": "human", "value": "Tide?"}, answer, call], "tools": [TOOL]}
    turn = convert("sharegpt", row).conversation[1]
    assert (turn.reasoning, turn.content, len(turn.tool_calls)) == (THOUGHT, "I look.", 1)
    row["conversations"][1] = {"from": "gpt", "value": "I look.", "reasoning_content": THOUGHT}
    assert convert("sharegpt", row).conversation[1] == turn


TURNS = st.lists(
    st.tuples(st.sampled_from(["", THOUGHT, "a\n\nb"]), st.sampled_from(["", "I look.", "x\ny"]), st.booleans()),
    min_size=1,
    max_size=4,
)


@settings(deadline=None, derandomize=True, max_examples=40)
@given(TURNS, st.sampled_from(["openai", "sharegpt", "train_ready"]))
def test_round_trips(turns: list[tuple[str, str, bool]], format: str):
    conversation: list[dict[str, Any]] = []
    for at, (reasoning, content, calls) in enumerate(turns):
        call = CALL | {"id": f"c{at}", "function": {"name": "tide", "arguments": {}}}
        turn = {"role": "assistant", "content": content or ("" if calls else "-"), "reasoning": reasoning}
        conversation += [ASK, turn | {"tool_calls": [call] if calls else []}]
        conversation += [RESULT | {"tool_call_id": f"c{at}"}] if calls else []
    conversation += [ASK, {"role": "assistant", "content": "2 m"}]
    trajectory = parse_trajectory({"unique_trajectory_id": "a", "tools": [TOOL], "conversation": conversation})
    lost = {item.reason for item in exporter(format)(trajectory) if isinstance(item, Lost)}
    assert lost <= {"id-not-held", "call-id-not-held"}
    assert to_messages(trajectory) == [
        {key if key != "reasoning" else "reasoning_content": value for key, value in message_to_dict(turn).items()}
        for turn in trajectory.conversation
    ]
