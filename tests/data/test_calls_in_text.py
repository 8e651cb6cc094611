"""Calls in assistant texts: every spelling is read, refused or reported, in every format; prose is not a call."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from conversions import items
from hypothesis import given
from hypothesis import strategies as st
from tool_spellings import CALLS, DECLARATIONS, SETTINGS, TIDE, TIDE_CALL, TOOLS, UNREADABLE, read, row_with

from converters.trajectories.__main__ import convert
from xlam_jax.config import Source
from xlam_jax.data import sources, validate
from xlam_jax.data.converters.common import Dropped
from xlam_jax.data.parse import parse_trajectory
from xlam_jax.data.trajectory import ToolCall, Trajectory, to_dict
from xlam_jax.data.validate import check_row

PROSE = [
    "I can call get_tide for you; get_tide() takes a harbour.",
    "A call is written within <tool_call></tool_call> tags; the `<tool_call>` tag comes first.",
    '[{"name": "Bo", "age": 5}]',
    '{"name": "Bo", "description": "tall", "age": 5}',
    json.dumps(TIDE),  # the tool itself
    json.dumps(TOOLS, indent=1),
    "See [get_tide(harbour)](https://example.org/get_tide) or [1] {x}.",
    "[laughs (quietly)] x[0](1) [a(b)]",
    'The tool\'s name is "get_tide": it needs {"harbour": "…"}.',
    '```python\nprint(get_tide(harbour="Bergen"))\n```',
    'For example `{"type": "function", "function": {"name": "get_tide"}}` forces it.',
    "Action: I ask the harbour master.",
    "[TOOL_CALLS] is a control token.",
    "x = [get_tide(harbour='Bergen')]",
    "[get_tide('x')](https://example.org)",
]


def parsed(text: str) -> tuple[Trajectory, list[str]]:
    reasons: list[str] = []
    return parse_trajectory(row_with(text), repaired=lambda reason, _: reasons.append(reason)), reasons


@pytest.mark.parametrize("name", CALLS)
def test_calls_in_a_text_become_tool_calls(name: str):
    for thought in ("", "I look it up.\n"):
        if thought and name.startswith("bare"):
            continue
        trajectory, reasons = parsed(thought + CALLS[name])
        turn = trajectory.conversation[1]
        assert [(call.name, call.arguments) for call in turn.tool_calls] == [("get_tide", {"harbour": "Bergen"})]
        assert turn.content == thought.strip()
        assert reasons == ["call-in-text"]
    row = row_with(CALLS[name])
    row["conversation"] += [{"role": "tool", "content": "3 m"}, {"role": "assistant", "content": "3 m."}]
    assert [problem.reason for problem in check_row(row)] == ["call-in-text"]


@pytest.mark.parametrize(
    "text",
    [
        "".join(
            f"<tool_call>\n{json.dumps(c)}\n</tool_call>\n" for c in (TIDE_CALL, {"name": "find_port", "arguments": {}})
        ),
        f'<tool_call>[{json.dumps(TIDE_CALL)}, {{"name": "find_port"}}]</tool_call>',
        f'{json.dumps(TIDE_CALL)}; {{"name": "find_port", "parameters": {{}}}}',
        f"[TOOL_CALLS]get_tide[ARGS]{json.dumps(TIDE_CALL['arguments'])}[TOOL_CALLS]find_port{{}}",
        "[get_tide(harbour='Bergen'), find_port()]",
        'get_tide(harbour="Bergen")\nfind_port()',
        '<tool_call><function=get_tide>{"harbour": "Bergen"}</function></tool_call><function=find_port></function>',
    ],
)
def test_several_calls_in_a_text(text: str):
    turn = parsed(text)[0].conversation[1]
    assert [(call.name, call.arguments) for call in turn.tool_calls] == [
        ("get_tide", {"harbour": "Bergen"}),
        ("find_port", {}),
    ]


def test_a_thought_within_the_object_is_kept():
    text = json.dumps({"thought": "Look.", "tool_calls": [TIDE_CALL]})
    assert parsed(text)[0].conversation[1].content == "Look."
    assert parsed("Well.\n" + text)[0].conversation[1].content == "Well.\nLook."


def test_quotes_names_and_values_of_real_files():
    text = """<functioncall> {"name": "find_port", "arguments": '{"country": "John's \\n land"}'}"""
    assert parsed(text)[0].conversation[1].tool_calls[0].arguments == {"country": "John's \n land"}
    tools = [{"type": "function", "function": {"name": name}} for name in ("Market Trends API", "sea.Tide/Get")]
    text = '[Market Trends API(trend-type="a, (b", is new=true, top=[1, -2.5, {"x": null}]), sea.Tide/Get(from="x")]'
    calls = parse_trajectory(row_with(text, tools)).conversation[1].tool_calls
    assert [(call.name, call.arguments) for call in calls] == [
        ("Market Trends API", {"trend-type": "a, (b", "is new": True, "top": [1, -2.5, {"x": None}]}),
        ("sea.Tide/Get", {"from": "x"}),
    ]


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.floats(-1e9, 1e9) | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@SETTINGS
@given(
    # a null argument that is not declared is padding, and is removed
    st.dictionaries(
        st.from_regex(r"[a-z_][a-z0-9_]{0,5}", fullmatch=True),
        VALUES.filter(lambda value: value is not None),
        max_size=3,
    ),
    st.integers(0, 5),
)
def test_whatever_the_arguments_they_are_read(arguments: dict[str, Any], spelling: int):
    call = {"name": "get_tide", "arguments": arguments}
    text = [
        json.dumps([call]),
        json.dumps(call, ensure_ascii=False),
        repr([call]),
        f"<tool_call>{json.dumps(call)}</tool_call>",
        f"<tool_call>{call!r}</tool_call>",
        f"[get_tide({', '.join(f'{key}={value!r}' for key, value in arguments.items())})]",
    ][spelling]
    trajectory, reasons = parsed("Look.\n" + text)
    assert trajectory.conversation[1].tool_calls == (ToolCall(None, "get_tide", arguments),)
    assert (trajectory.conversation[1].content, reasons) == ("Look.", ["call-in-text"])


@pytest.mark.parametrize("name", UNREADABLE)
def test_what_is_meant_as_a_call_and_is_not_read_is_reported(name: str):
    row = row_with(UNREADABLE[name])
    trajectory, reasons = parsed(UNREADABLE[name])
    assert (to_dict(trajectory), reasons) == (row, [])
    (problem,) = check_row(row)
    assert problem.reason == "call-in-text"
    assert problem.detail.startswith("the text of turn 1 ")
    row["conversation"].append({"role": "tool", "content": "3 m"})  # the row is refused anyway
    assert {"call-in-text", "bad-role-order"} <= {problem.reason for problem in check_row(row)}


@pytest.mark.parametrize("text", PROSE)
def test_prose_is_not_a_call(text: str):
    for tools in (TOOLS, []):
        assert list(check_row(row_with(text, tools))) == []
        assert to_dict(parse_trajectory(row_with(text, tools))) == row_with(text, tools)


def test_without_tools_a_marked_call_is_reported():
    (problem,) = check_row(row_with(CALLS["hermes"], []))
    assert (problem.reason, "declared tools: none" in problem.detail) == ("call-in-text", True)
    assert list(check_row(row_with(CALLS["list"], []))) == []  # a task may ask for such JSON


def test_a_call_in_the_text_of_a_turn_with_tool_calls_is_reported():
    row = row_with("Look: " + CALLS["hermes"])
    row["conversation"][1]["tool_calls"] = [{"type": "function", "function": TIDE_CALL}]
    (problem,) = check_row(row)
    assert problem.reason == "call-in-text"
    assert len(parse_trajectory(row).conversation[1].tool_calls) == 1


def test_only_the_assistants_text_is_read():
    row = row_with("Well?")
    row["conversation"][0]["content"] = CALLS["hermes"]
    assert list(check_row(row)) == []


def test_files_report_calls_in_text(tmp_path: Path, write_jsonl):
    """By converters, validate and training, by reason and line."""
    rows = [row_with("High."), row_with(CALLS["glaive"]), row_with(UNREADABLE["cut"])]
    for number, row in enumerate(rows):
        row["unique_trajectory_id"] = str(number)
    path = write_jsonl(*rows)
    report = convert("unified", [path], tmp_path / "out.jsonl")
    assert (report["repaired"]["call-in-text"]["rows"], report["left"]["call-in-text"]["rows"]) == (
        [f"{path}:2"],
        [f"{path}:3"],
    )
    out = io.StringIO()
    validate.run([path], out)
    assert [line.partition(": the text")[0].split(": turn")[0] for line in out.getvalue().splitlines()] == [
        f"{path}:2: call-in-text",
        f"{path}:3: call-in-text",
    ]
    repairs_of_rows = [item.repairs for item in sources.read(Source(name="s", files=[str(path)]))]
    assert [[repair.reason for repair in repairs] for repairs in repairs_of_rows] == [
        [],
        ["call-in-text"],
        ["left-call-in-text"],
    ]
    openai = write_jsonl({"messages": rows[2]["conversation"], "tools": TOOLS}, name="openai.jsonl")
    assert "call-in-text" in convert("openai", [openai], tmp_path / "openai.out.jsonl")["left"]


def test_calls_that_are_only_considered_are_not_made():
    thinking = f"<think>\nPerhaps {CALLS['hermes']}? No.\n</think>"
    trajectory, _ = parsed(f"{thinking}\n\n{CALLS['hermes'].replace('Bergen', 'Oslo')}")
    turn = trajectory.conversation[1]
    assert [call.arguments for call in turn.tool_calls] == [{"harbour": "Oslo"}]
    assert (turn.content, turn.reasoning) == ("", f"Perhaps {CALLS['hermes']}? No.")
    trajectory, reasons = parsed(f"{thinking}\nNo tool is needed.")
    assert not trajectory.conversation[1].tool_calls
    assert reasons == ["reasoning-in-text"]


@pytest.mark.parametrize("name", CALLS)
def test_parallel_calls_in_the_text_of_separate_turns_become_one_turn(name: str):
    """Else the second call would get the results of both."""
    row = row_with(CALLS[name])
    row["conversation"] += [
        {"role": "assistant", "content": CALLS[name].replace("Bergen", "Oslo")},
        {"role": "tool", "content": "3 m"},
        {"role": "tool", "content": "2 m"},
        {"role": "assistant", "content": "3 and 2."},
    ]
    reasons: list[str] = []
    trajectory = parse_trajectory(row, repaired=lambda reason, _: reasons.append(reason))
    assert [turn.role for turn in trajectory.conversation] == ["user", "assistant", "tool", "tool", "assistant"]
    assert [call.arguments["harbour"] for call in trajectory.conversation[1].tool_calls] == ["Bergen", "Oslo"]
    assert reasons == ["call-in-text", "call-in-text", "parallel-calls-as-turns"]


# ShareGPT's own


@pytest.mark.parametrize("name", sorted(CALLS))
def test_sharegpt_links_calls_in_text_to_their_results(name: str):
    turns = [
        {"from": "human", "value": "Tide?"},
        {"from": "gpt", "value": CALLS[name]},
        {"from": "tool", "value": "3 m"},
        {"from": "gpt", "value": "3 m."},
    ]
    trajectory, reasons = read("sharegpt", {"conversations": turns, "tools": json.dumps([TIDE])})
    call = trajectory.conversation[1].tool_calls[0]
    assert (call.name, call.arguments) == ("get_tide", {"harbour": "Bergen"})
    assert trajectory.conversation[2].tool_call_id == call.id is not None
    assert reasons == ([] if name.startswith("hermes") else ["call-in-text"])


def test_sharegpt_reads_role_and_content():
    turns: list[dict[str, Any]] = [
        {"role": "system", "content": f"Tools: {json.dumps([TIDE])}"},
        {"role": "user", "content": [{"type": "text", "text": "Tide?"}]},
        {"role": "assistant", "content": None, "tool_calls": [TIDE_CALL], "loss": False},
        {"role": "tool", "content": "3 m"},
        {"role": "assistant", "content": CALLS["toolace"], "weight": 1},
        {"role": "observation", "content": "3 m"},
        {"role": "gpt", "content": "3 m."},
    ]
    trajectory, reasons = read("sharegpt", {"conversations": turns})
    assert reasons == ["tools-in-system", "call-in-text", "text-parts"]
    assert [turn.role for turn in trajectory.conversation] == ["user", *("assistant", "tool") * 2, "assistant"]
    assert [call.id for turn in trajectory.conversation for call in turn.tool_calls] == ["call_1", "call_2"]
    assert [turn.loss for turn in trajectory.conversation] == [None, False, None, True, None, None]
    assert trajectory.conversation[0].content == "Tide?"
    for calls in ("x", [3], [{"name": 3}], {"name": 3}):
        turns[2]["tool_calls"] = calls
        (item,) = items("sharegpt", {"conversations": turns})
        assert isinstance(item, Dropped)
        assert item.reason == "bad-call"


def test_toolace_results_of_parallel_calls_in_one_turn():
    results = [{"name": "get_tide", "results": {"m": 3}}, {"name": "find_port", "results": ["Bergen"]}]
    turns = [
        {"from": "user", "value": "Tide?"},
        {"from": "assistant", "value": "[get_tide(harbour='Bergen'), find_port(country='NO')]"},
        {"from": "tool", "value": json.dumps(results)},
        {"from": "assistant", "value": "3 m."},
    ]
    row = {"system": DECLARATIONS["toolace"][0].format(DECLARATIONS["toolace"][1]), "conversations": turns}
    trajectory, reasons = read("sharegpt", row)
    assert reasons == ["tools-in-system", "call-in-text", "results-in-one-turn", "null-fields"]
    calls = trajectory.conversation[1].tool_calls
    assert [(turn.tool_call_id, json.loads(turn.content)) for turn in trajectory.conversation[2:4]] == [
        (call.id, [result]) for call, result in zip(calls, results, strict=True)
    ]
    assert list(check_row(to_dict(trajectory))) == []
    turns[2]["value"] = json.dumps(results[::-1])  # their names show which is whose
    assert read("sharegpt", row)[0] == trajectory
    turns[2]["value"] = json.dumps([results[0], results[0]])
    assert len(read("sharegpt", row)[0].conversation) == 4


def test_sharegpt_function_calls_as_python_literals():
    turns = [{"from": "human", "value": "Tide?"}, {"from": "function_call", "value": repr(TIDE_CALL)}]
    trajectory, reasons = read("sharegpt", {"conversations": turns, "tools": [TIDE]})
    assert trajectory.conversation[1].tool_calls[0].arguments == {"harbour": "Bergen"}
    assert reasons == ["python-literals"]


def test_sharegpt_refuses_its_own_calls_where_they_cannot_be_read():
    turns = [{"from": "human", "value": "Tide?"}, {"from": "gpt", "value": "Look.\n" + UNREADABLE["cut"]}]
    (item,) = items("sharegpt", {"conversations": turns, "tools": [TIDE]})
    assert isinstance(item, Dropped)
    assert (item.reason, item.detail) == ("bad-call", "turn 1 opens <tool_call> and does not close it")
    turns[1]["value"] = UNREADABLE["undeclared"]
    (item,) = items("sharegpt", {"conversations": turns, "tools": [TIDE]})
    assert isinstance(item, Dropped)
    assert item.reason == "undeclared-tool"
