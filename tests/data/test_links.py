"""Links of calls and results: parallel calls in separate turns, results in another order, missing ids."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xlam_jax.data.converters import row_converter
from xlam_jax.data.converters.common import Converted, Dropped, convert_one
from xlam_jax.data.formats.xlam_v1 import user_message
from xlam_jax.data.parse import parse_messages, parse_trajectory
from xlam_jax.data.render import chat_template, render_all, render_prompt
from xlam_jax.data.tokenizer import load_tokenizer
from xlam_jax.data.trajectory import InvalidTrajectory, Trajectory, to_dict
from xlam_jax.data.validate import check_row

SETTINGS = settings(max_examples=40, deadline=None, derandomize=True)
NAMES = ("depth", "tide", "wind")
PARAMETERS = {"type": "object", "properties": {"at": {"type": "string"}}}
FLAT = [{"name": name, "description": "Measures.", "parameters": PARAMETERS} for name in NAMES]
TOOLS = [{"type": "function", "function": tool} for tool in FLAT]


def convert(format: str, row: dict[str, Any]) -> Converted | Dropped:
    convert_row = row_converter(format)
    assert convert_row
    (item,) = convert_one(Path("rows.jsonl"), 1, copy.deepcopy(row), convert_row)
    return item


def summary(trajectory: Trajectory) -> list[tuple[str, str, list[tuple[str, str]]]]:
    """(role, text, [(name, place)] of the calls) of each turn."""
    return [
        (turn.role, turn.content, [(call.name, call.arguments.get("at", "")) for call in turn.tool_calls])
        for turn in trajectory.conversation
    ]


def flat_call(name: str, at: str) -> dict[str, Any]:
    return {"name": name, "arguments": json.dumps({"at": at})}


CALLS = [("tide", "Bergen"), ("tide", "Bodø"), ("wind", "Oslo")]
RESULTS = ["3 m", "2 m", "9 m/s"]
EXPECTED = [
    ("user", "Tides and wind?", []),
    ("assistant", "", CALLS),
    *(("tool", result, []) for result in RESULTS),
    ("assistant", "Calm.", []),
]


def by_turns(format: str, results: list[str], thoughts: tuple[str, ...] = ("", "", "")) -> dict[str, Any]:
    """The conversation with one call per turn, in ShareGPT, the older OpenAI form or unified rows."""
    if format == "sharegpt":
        calls = [
            turn
            for thought, call in zip(thoughts, CALLS, strict=True)
            for turn in (
                *([{"from": "gpt", "value": thought}] if thought else []),
                {"from": "function_call", "value": json.dumps(flat_call(*call))},
            )
        ]
        turns = [
            {"from": "human", "value": "Tides and wind?"},
            *calls,
            *({"from": "observation", "value": result} for result in results),
            {"from": "gpt", "value": "Calm."},
        ]
        return {"id": "t", "conversations": turns, "tools": json.dumps(FLAT)}
    ask, end = {"role": "user", "content": "Tides and wind?"}, {"role": "assistant", "content": "Calm."}
    if format == "openai":
        calls = [
            {"role": "assistant", "content": thought or None, "function_call": flat_call(*call)}
            for thought, call in zip(thoughts, CALLS, strict=True)
        ]
        answers = [
            {"role": "function", "name": name, "content": result}
            for (name, _), result in zip([*CALLS, CALLS[0]], results, strict=False)
        ]
        return {"id": "t", "messages": [ask, *calls, *answers, end], "functions": FLAT}
    calls = [
        {"role": "assistant", "content": thought, "tool_calls": [{"type": "function", "function": flat_call(*call)}]}
        for thought, call in zip(thoughts, CALLS, strict=True)
    ]
    answers = [{"role": "tool", "content": result} for result in results]
    return {"unique_trajectory_id": "t", "tools": TOOLS, "conversation": [ask, *calls, *answers, end]}


every_format = pytest.mark.parametrize("format", ["sharegpt", "openai", "unified"])


@every_format
def test_calls_in_separate_turns_become_one_turn(format):
    item = convert(format, by_turns(format, RESULTS))
    assert isinstance(item, Converted), item
    assert summary(item.trajectory) == EXPECTED
    assert [repair.reason for repair in item.repairs].count("parallel-calls-as-turns") == 2
    ids = [call.id for call in item.trajectory.conversation[1].tool_calls]
    assert [turn.tool_call_id for turn in item.trajectory.conversation[2:5]] == ids
    if format != "unified":  # a unified row need not have ids, and gains none
        assert len({*ids, None}) == 4


@every_format
def test_thoughts_of_joined_turns_are_paragraphs(format):
    item = convert(format, by_turns(format, RESULTS, ("Two tides.", "", "And the wind.")))
    assert isinstance(item, Converted), item
    assert item.trajectory.conversation[1].content == "Two tides.\n\nAnd the wind."


@every_format
@pytest.mark.parametrize("results", [RESULTS[:1], RESULTS[:2], [*RESULTS, "x"]])
def test_separate_calls_are_refused_where_their_results_are_ambiguous(format, results):
    item = convert(format, by_turns(format, results))
    assert isinstance(item, Dropped)
    assert item.reason == "ambiguous-parallel-calls"
    assert f"call 3 tools in separate turns, and {len(results)} results follow" in item.detail


def test_calls_a_turn_each_with_ids_need_not_all_have_results():
    row = by_turns("unified", RESULTS[:2])
    for at, turn in enumerate(row["conversation"][1:4]):
        turn["tool_calls"][0]["id"] = f"c{at}"
    row["conversation"][4]["tool_call_id"], row["conversation"][5]["tool_call_id"] = "c2", "c0"
    item = convert("unified", row)
    assert isinstance(item, Converted), item
    assert [turn.content for turn in item.trajectory.conversation if turn.role == "tool"] == ["2 m", "3 m"]
    assert {"parallel-calls-as-turns", "results-out-of-order"} <= {repair.reason for repair in item.repairs}


def test_turns_that_differ_in_loss_cannot_be_joined():
    row = by_turns("unified", RESULTS)
    row["conversation"][2]["loss"] = False
    item = convert("unified", row)
    assert isinstance(item, Dropped)
    assert item.reason == "bad-loss"
    row["conversation"][1]["loss"] = row["conversation"][3]["loss"] = False
    item = convert("unified", row)
    assert isinstance(item, Converted)
    assert item.trajectory.conversation[1].loss is False


def test_calls_that_are_answered_one_by_one_stay_turns():
    turns = [{"from": "human", "value": "q"}]
    for at in range(2):
        turns += [
            {"from": "function_call", "value": json.dumps(flat_call("tide", str(at)))},
            {"from": "observation", "value": f"r{at}"},
        ]
    item = convert("sharegpt", {"conversations": turns, "tools": FLAT})
    assert isinstance(item, Converted)
    assert (len(item.trajectory.conversation), item.repairs) == (5, ())


def test_legacy_calls_can_be_written_by_mistrals_own_format():
    """Its results need the ids of their calls, and the older form has none."""
    item = convert("openai", by_turns("openai", RESULTS))
    assert isinstance(item, Converted)
    tokenizer = load_tokenizer("mistral:v3")
    (rendered, *_) = render_all(item.trajectory, tokenizer, "native")
    text = tokenizer.decode(rendered.input_ids)
    assert [text.count(f'"0000call{at}"') for at in (1, 2, 3)] == [2, 2, 2]


def test_generated_ids_are_new_and_names_determine_the_order():
    calls = [{"name": "tide", "arguments": {}}, {"name": "wind", "arguments": {}}]
    messages = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "tool_calls": [{"id": "call_2", "type": "function", "function": calls[0]}]},
        {"role": "tool", "tool_call_id": "call_2", "content": "r0"},
        {"role": "assistant", "tool_calls": [{"type": "function", "function": call} for call in calls]},
        {"role": "function", "name": "wind", "content": "r2"},
        {"role": "function", "name": "tide", "content": "r1"},
    ]
    item = convert("openai", {"messages": messages, "tools": TOOLS})
    assert isinstance(item, Converted), item
    turns = item.trajectory.conversation
    ids = [call.id for turn in turns for call in turn.tool_calls]
    assert len(set(ids)) == 3
    assert ids[0] == "call_2"
    assert [(turn.content, turn.tool_call_id) for turn in turns if turn.role == "tool"] == [
        (f"r{at}", id) for at, id in enumerate(ids)
    ]


# ---- order of results ----------------------------------------------------------------------------------------------


@st.composite
def mixed_up(draw) -> list[dict[str, Any]]:
    """Messages with calls whose results come in any order, some without ids, some with names, some missing."""
    messages: list[dict[str, Any]] = []
    linked = draw(st.booleans())
    for step in range(draw(st.integers(1, 2))):
        messages.append({"role": "user", "content": "q"})
        calls, results = [], []
        for at in range(draw(st.integers(1, 3))):
            name, id = draw(st.sampled_from(NAMES)), f"call{step}{at:04}"
            call = {"type": "function", "function": {"name": name, "arguments": {}}}
            result = {"role": "tool", "content": f"r{at}"}
            calls.append(call | draw(st.sampled_from([{"id": id}, {"id": id} if linked else {}])))
            others = [] if linked else [{"tool_call_id": "elsewhere"}, {}]
            result |= draw(st.sampled_from([{"tool_call_id": id}, *others]))
            results.append(result | draw(st.sampled_from([{}, {"name": name}])))
        messages.append({"role": "assistant", "content": draw(st.sampled_from(["", "t"])), "tool_calls": calls})
        messages += draw(st.permutations(results))[: draw(st.sampled_from([3, 3, 1]))]
    return [*messages, {"role": "user", "content": "end"}]


@pytest.fixture(scope="module")
def mistral():
    return load_tokenizer("mistral:v3")


@pytest.mark.parametrize("format", ["xlam", "xlam_v1", "native"])
def test_results_are_rendered_in_the_order_of_their_calls_as_by_the_saved_template(format, mistral):
    """Whatever the order in which a client sends them."""
    template = chat_template(mistral, format)
    different = 0

    @SETTINGS
    @given(mixed_up())
    def holds(messages):
        nonlocal different
        try:
            turns = parse_messages(copy.deepcopy(messages))
        except InvalidTrajectory:
            return
        if format == "native":  # it cannot write text and calls together, and its results have ids
            for message in messages:
                message["content"] = "" if message.get("tool_calls") else message["content"]
            if any(
                sent.get("tool_call_id") not in ids(messages) - {None} for sent in messages if sent["role"] == "tool"
            ):
                return
        ours = render_prompt(copy.deepcopy(messages), TOOLS, mistral, format)
        assert ours == mistral.apply_chat_template(messages, tools=TOOLS, chat_template=template, return_dict=False), (
            messages
        )
        sent = [message["content"] for message in messages if message["role"] == "tool"]
        different += sent != [turn.content for turn in turns if turn.role == "tool"]

    holds()
    assert different > 3


def ids(messages: list[dict[str, Any]]) -> set[str | None]:
    return {call.get("id") for message in messages for call in message.get("tool_calls", ())}


SWAPPED = [
    {"role": "user", "content": "Tides?"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {"type": "function", "id": f"c{at}", "function": {"name": "tide", "arguments": {"at": place}}}
            for at, place in enumerate(("Bergen", "Bodø"))
        ],
    },
    {"role": "tool", "tool_call_id": "c1", "content": "2 m"},
    {"role": "tool", "tool_call_id": "c0", "content": "3 m"},
    {"role": "assistant", "content": "3 m and 2 m."},
]


@pytest.mark.parametrize("format", ["xlam", "xlam_v1"])
def test_each_result_stands_where_its_call_does(format, tokenizer):
    trajectory = parse_trajectory({"tools": TOOLS, "conversation": copy.deepcopy(SWAPPED)})
    *_, last = render_all(trajectory, tokenizer, format)
    text = tokenizer.decode(last.input_ids)
    assert text.index("Bergen") < text.index("Bodø") < text.index("3 m") < text.index("2 m")
    v1 = user_message(TOOLS, parse_messages(copy.deepcopy(SWAPPED[:4])))
    assert '"next_observation": ["3 m", "2 m"]' in v1
    assert "results-out-of-order" in {
        problem.reason for problem in check_row({"conversation": SWAPPED, "tools": TOOLS})
    }
    assert not {problem.reason for problem in check_row(to_dict(trajectory))} - {"missing-trajectory-id"}
