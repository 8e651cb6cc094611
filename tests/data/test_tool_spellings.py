"""Tools in system texts and calls in assistant texts: every spelling is read, refused or reported, in every format."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from converters.trajectories.__main__ import convert
from xlam_jax.config import Source
from xlam_jax.data import sources, validate
from xlam_jax.data.converters import row_converter
from xlam_jax.data.converters.common import Converted, Dropped, convert_one
from xlam_jax.data.parse import parse_trajectory
from xlam_jax.data.trajectory import ToolCall, Trajectory, to_dict
from xlam_jax.data.validate import check_row

SETTINGS = settings(max_examples=60, deadline=None, derandomize=True)


def function(name: str, *properties: str) -> dict[str, Any]:
    schema = {"type": "object", "properties": {key: {"type": "string"} for key in properties}}
    return {"name": name, "description": f"Does {name}: 'quoted', true.", "parameters": schema}


TIDE, PORT = function("get_tide", "harbour"), function("find_port", "country")
TOOLS = [{"type": "function", "function": each} for each in (TIDE, PORT)]
TIDE_CALL = {"name": "get_tide", "arguments": {"harbour": "Bergen"}}
HERMES = (
    "You are a function calling AI model. You are provided with function signatures within <tools></tools> XML tags. "
    "Here are the available tools:{} Use the following pydantic model json schema for each tool call you will make: "
    '{{"properties": {{"arguments": {{"title": "Arguments", "type": "object"}}, "name": {{"title": "Name", "type": '
    '"string"}}}}, "required": ["arguments", "name"], "title": "FunctionCall", "type": "object"}} For each function '
    "call return a json object within <tool_call></tool_call> XML tags as follows:\n"
    '<tool_call>\n{{"arguments": <args-dict>, "name": <function-name>}}\n</tool_call>'
)
LINES = "\n".join(map(json.dumps, TOOLS))
DECLARATIONS = {  # name → (system text with {}, replacement for {})
    "hermes": (HERMES, f"<tools> {json.dumps(TOOLS)} </tools>"),
    "qwen": (
        "Be kind.\n\n# Tools\n\nSignatures are within <tools></tools> tags:\n{}\n\nCall.",
        f"<tools>\n{LINES}\n</tools>",
    ),
    "after a mention": (
        "Signatures are within <tools> and </tools>, or in <tools>:\n{}",
        f"<tools>\n{LINES}\n</tools>",
    ),
    "one line": ("{}", f"<tools>{json.dumps(TOOLS[0])} {json.dumps(TOOLS[1])}</tools>"),
    "pretty": ("Tools: {}", "<tools>\n" + ",\n".join(json.dumps(each, indent=2) for each in TOOLS) + "\n</tools>"),
    "fenced": ("Tools: {}", f"<tools>\n```json\n{json.dumps(TOOLS)}\n```\n</tools>"),
    "python list": ("Tools: {}", f"<tools>{TOOLS!r}</tools>"),
    "python lines": ("Tools: {}", f"<tools>\n{TOOLS[0]!r}\n{TOOLS[1]!r}\n</tools>"),
    "flat": ("Tools: {} Go.", f"<tools>{json.dumps([TIDE, PORT])}</tools>"),
    "mistral": ("{}", f"[AVAILABLE_TOOLS]{json.dumps(TOOLS)}[/AVAILABLE_TOOLS]"),
    "toolace": (
        "You are an expert in composing functions. Put calls as [func(a=b)].\n"
        "Here is a list of functions in JSON format that you can invoke:\n{}. \nReturn nothing else.",
        json.dumps([{**TIDE, "required": None}, {**PORT, "required": None}]),
    ),
    "glaive": (
        "SYSTEM: You are a helpful assistant with access to the following functions. Use them if required -\n{}\n",
        json.dumps(TIDE, indent=4) + "\n\n" + json.dumps(PORT, indent=4),
    ),
    "llama": (
        "Given the following functions, please respond with JSON.\n\n{}\n\nNo variables.",
        json.dumps(TOOLS, indent=4),
    ),
    "llama with the form of calls": (
        'Given the following functions, respond in the format {{"name": function name, "parameters": dictionary of '
        "argument name and its value}}.\n\n{}",
        json.dumps(TOOLS, indent=4),
    ),
    "anthropic": (
        "Tools:\n{}",
        json.dumps(
            [
                {"name": e["name"], "description": e["description"], "input_schema": e["parameters"]}
                for e in (TIDE, PORT)
            ]
        ),
    ),
}
CALLS = {  # each names get_tide(harbour="Bergen")
    "hermes": f"<tool_call>\n{json.dumps(TIDE_CALL)}\n</tool_call>",
    "hermes python": f"<tool_call>\n{TIDE_CALL!r}\n</tool_call>",
    "hermes cut": f"<tool_call>\n{json.dumps(TIDE_CALL)}\n",
    "list": json.dumps([TIDE_CALL]),
    "pretty list": json.dumps([TIDE_CALL], indent=2) + "\n",
    "object": json.dumps(TIDE_CALL),
    "python": repr([TIDE_CALL]),
    "fenced": f"```json\n{json.dumps([TIDE_CALL])}\n```",
    "mistral": f"[TOOL_CALLS][{json.dumps(TIDE_CALL)}]",
    "mistral v11": '[TOOL_CALLS]get_tide[ARGS]{"harbour": "Bergen"}',
    "glaive": """<functioncall> {"name": "get_tide", "arguments": '{"harbour": "Bergen"}'} <|endoftext|>""",
    "llama": '{"name": "get_tide", "parameters": {"harbour": "Bergen"}}',
    "llama tag": '<|python_tag|>{"name": "get_tide", "parameters": {"harbour": "Bergen"}}<|eom_id|>',
    "llama function": '<function=get_tide>{"harbour": "Bergen"}</function>',
    "python tag": '<|python_tag|>get_tide.call(harbour="Bergen")',
    "toolace": '[get_tide(harbour="Bergen")]',
    "bare": 'get_tide(harbour="Bergen")',
    "bare fenced": "```tool_code\nget_tide(harbour='Bergen')\n```",
    "openai": json.dumps([{"type": "function", "function": {**TIDE_CALL, "arguments": '{"harbour": "Bergen"}'}}]),
    "openai turn": json.dumps({"tool_calls": [{"type": "function", "function": TIDE_CALL}]}),
    "react": 'Action: get_tide\nAction Input: {"harbour": "Bergen"}',
}
UNREADABLE = {
    "cut": '<tool_call>\n{"name": "get_tide", "arguments": {"harbour": "Ber',
    "no JSON": "<tool_call>\nget_tide Bergen\n</tool_call>",
    "undeclared": '<tool_call>{"name": "get_tides", "arguments": {}}</tool_call>',
    "undeclared list": '[{"name": "get_tides", "arguments": {}}]',
    "undeclared python": "[get_tides(harbour='Bergen')]",
    "list cut": 'I look.\n[{"name": "get_tide", "arguments": {"harbour": "Bergen"}',
    "code": 'calls = [{"name": "get_tide", "arguments": {}}]',
    "text after": '[{"name": "get_tide", "arguments": {}}] That is the call.',
    "list arguments": '[{"name": "get_tide", "arguments": ["Bergen"]}]',
    "a variable": "[get_tide(harbour=town)]",
    "by position": '[get_tide("Bergen", harbour="Bergen")]',
    "twice": '[get_tide(harbour="Bergen", harbour="Oslo")]',
    "evaluated": '[get_tide(harbour=open("x").read())]',
    "unread mark": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_tide",
    "qwen-agent": '✿FUNCTION✿: get_tide\n✿ARGS✿: {"harbour": "Bergen"}',
    "with its result": CALLS["hermes"] + "\n<tool_response>\n{}\n</tool_response>\nIt is high.",
}
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


def items(format: str, row: dict[str, Any]) -> list[Converted | Dropped]:
    convert_row = row_converter(format)
    assert convert_row
    return list(convert_one(Path("rows.jsonl"), 7, row, convert_row))


def read(format: str, row: dict[str, Any]) -> tuple[Trajectory, list[str]]:
    (item,) = items(format, row)
    assert isinstance(item, Converted), item
    return item.trajectory, [repair.reason for repair in item.repairs]


def row_with(text: str, tools: list[dict[str, Any]] = TOOLS) -> dict[str, Any]:
    turns = [{"role": "user", "content": "Tide?"}, {"role": "assistant", "content": text}]
    return {"unique_trajectory_id": "t", "tools": tools, "conversation": turns}


def parsed(text: str) -> tuple[Trajectory, list[str]]:
    reasons: list[str] = []
    return parse_trajectory(row_with(text), repaired=lambda reason, _: reasons.append(reason)), reasons


# Tools in a system text


@pytest.mark.parametrize("place", ["turn", "column", "openai", "alpaca"])
@pytest.mark.parametrize("name", DECLARATIONS)
def test_declared_tools_are_found(name: str, place: str):
    template, declaration = DECLARATIONS[name]
    system = template.format(declaration)
    answer = "High at noon."
    row: dict[str, Any]
    if place == "alpaca":
        row = {"system": system, "instruction": "Tide?", "output": answer}
    elif place == "openai":
        messages = [("system", system), ("user", "Tide?"), ("assistant", answer)]
        row = {"messages": [{"role": role, "content": content} for role, content in messages]}
    else:
        turns = [{"from": "human", "value": "Tide?"}, {"from": "gpt", "value": answer}]
        row = {"system": system, "conversations": turns}
        if place == "turn":
            row = {"conversations": [{"from": "system", "value": system}, *turns]}
    trajectory, reasons = read(place if place in ("openai", "alpaca") else "sharegpt", row)
    nulls = ["null-fields"] if name == "toolace" else []  # its `"required": null`
    assert reasons == ["tools-in-system", *nulls]
    assert [tool["function"]["name"] for tool in trajectory.tools] == ["get_tide", "find_port"]
    assert [tool["function"]["parameters"] for tool in trajectory.tools] == [TIDE["parameters"], PORT["parameters"]]
    assert trajectory.tools[0]["function"]["description"] == TIDE["description"]
    assert trajectory.task_instruction == template.format("").strip()
    assert list(check_row(to_dict(trajectory))) == []


@pytest.mark.parametrize(
    "text",
    [
        'Extract people. Answer with a list such as [{"name": "Alice", "age": 31}] and nothing else.',
        'Describe them: {"name": "Alice", "description": "tall", "age": 31}',
        'Fill {"name": "get_tide", "arguments": {"harbour": "Bergen"}} in.',
        'Calls look like {"type": "function", "function": {"name": "get_tide"}}.',
        'Reply as {"type": "object", "properties": {"name": {"type": "string"}}}, without tools.',
        "Your tools are listed within <tools></tools> tags, if any. <tools>\n</tools>",
        "<tools>[]</tools>",
        "Use the <tools> tag and the </tools> tag.",
        '{"name": "bad" [ {"name": , "parameters"',
    ],
)
def test_what_is_not_a_tool_stays_in_the_text(text: str):
    turns = [{"from": "system", "value": text}, {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    trajectory, reasons = read("sharegpt", {"conversations": turns})
    assert (trajectory.tools, trajectory.task_instruction, reasons) == ([], text, [])


@pytest.mark.parametrize(
    "text",
    [
        '<tools>\n{"name": "get_tide", "description": "Tide", "parameters": {"type": \n</tools>',
        f"<tools>{json.dumps(TIDE)}",
        f"<tools>{json.dumps(TIDE)} or this: {json.dumps(PORT)}</tools>",
        f'<tools>{json.dumps(TIDE)}{{"age": 3}}</tools>',
        "<tools>\nget_tide(harbour: str) -> str\n</tools>",
        "<tools>[{'name': 'get_tide', 'description': 'Tide', 'parameters': dict(type='object')}]</tools>",
        "Here is a list of functions that you can invoke:\n"
        '[{"name": "get_tide", "description": "Tide", "parameters": {"type": "object", "properties": {"x": }}}]',
        f'You have these functions -\n{json.dumps(TIDE)}\n{{"name": "find_port", "description": "P", "parameters": }}',
        json.dumps([TIDE, {"name": "find_port"}]),
        '{"a": [ ' * 10 + f"Functions: {json.dumps(TIDE)}",
        "namespace functions {\n type get_tide = (_: {harbour: string}) => any;\n}",
        '### get_tide\n\nget_tide: Tide. Parameters: [{"name": "harbour"}] Format the arguments as a JSON object.',
    ],
)
def test_declared_tools_that_cannot_be_read_are_refused(text: str):
    turns = [{"from": "system", "value": text}, {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    (item,) = items("sharegpt", {"conversations": turns})
    assert isinstance(item, Dropped)
    assert (item.reason, item.row) == ("unreadable-tools", 7)
    (item,) = items("openai", {"messages": [{"role": "system", "content": text}, *row_with("a")["conversation"]]})
    assert isinstance(item, Dropped)
    assert item.reason == "unreadable-tools"
    row = {**row_with("a", []), "task_instruction": text}
    assert [problem.reason for problem in check_row(row)] == ["unreadable-tools"]
    trajectory, reasons = read("sharegpt", {"conversations": turns, "tools": TOOLS})  # which the row has anyway
    assert (trajectory.task_instruction, reasons) == (text, [])


def test_validate_finds_tools_that_only_the_system_text_has():
    row = {**row_with("a", []), "task_instruction": f"Tools: {json.dumps(TOOLS)}"}
    (problem,) = check_row(row)
    assert (problem.reason, "get_tide, find_port" in problem.detail) == ("tools-in-system", True)


def test_line_separators_in_json_do_not_end_a_line():
    tool = {**TIDE, "description": "Tide\u2028of a harbour\x85."}
    text = f"<tools>\n{json.dumps(tool, ensure_ascii=False)}\n</tools>"
    turns = [{"from": "system", "value": text}, {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    assert read("sharegpt", {"conversations": turns})[0].tools == [{"type": "function", "function": tool}]


WORDS = st.text(alphabet="abc .,:\n'\"()[]{}<>é", max_size=40).filter(lambda text: '"a' not in text)


@SETTINGS
@given(WORDS, WORDS, st.sampled_from(sorted(DECLARATIONS.keys() - {"hermes"})))
def test_a_block_is_found_wherever_it_is(before: str, after: str, name: str):
    _, declaration = DECLARATIONS[name]
    if not declaration.startswith(("<tools>", "[A")):  # without tags, brackets in the prose may enclose it
        before, after = (text.translate(str.maketrans("", "", "[]{}\"'")) for text in (before, after))
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    trajectory, _ = read("sharegpt", {"system": f"{before}{declaration}{after}", "conversations": turns})
    assert [tool["function"]["name"] for tool in trajectory.tools] == ["get_tide", "find_port"]
    assert trajectory.task_instruction == (before + after).strip()


@SETTINGS
@given(WORDS)
def test_text_without_tools_is_not_touched(text: str):
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    trajectory, reasons = read("sharegpt", {"system": text, "conversations": turns})
    assert (trajectory.tools, trajectory.task_instruction, reasons) == ([], text, [])


# Calls in an assistant's text


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


def test_tools_in_openai_form_keep_the_order_of_their_keys():
    row = {"system": f"<tools>{json.dumps(TOOLS)}</tools>", "conversations": [{"from": "human", "value": "Tide?"}]}
    row["conversations"] += [{"from": "gpt", "value": "High."}]
    assert json.dumps(read("sharegpt", row)[0].tools) == json.dumps(TOOLS)


def test_legacy_keys_next_to_the_newer_ones():
    call = {"name": "get_tide", "arguments": "{}"}
    turns: list[dict[str, Any]] = [{"role": "user", "content": "Tide?"}, {"role": "assistant", "function_call": call}]
    for tools in (None, [], TOOLS[:1]):
        trajectory, _ = read("openai", {"messages": turns, "functions": [TIDE], "tools": tools})
        assert trajectory.tools == TOOLS[:1]
        assert len(trajectory.conversation[1].tool_calls) == 1
    for row in (
        {"messages": turns, "functions": [TIDE], "tools": TOOLS[1:]},
        {"messages": [turns[0], turns[1] | {"tool_calls": [{"id": "a", "function": call}]}], "tools": TOOLS},
    ):
        (item,) = items("openai", row)
        assert isinstance(item, Dropped)
        assert item.reason in ("bad-tools", "bad-call")


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


# Hostile text

HOSTILE = [
    *(
        "<tool_call>",
        '<tool_call>{"a": "',
        "<tools> x",
        '{"name": "get_tide", ',
        "[get_tide(",
        "[f(a=1)](",
        '"\\',
        "```json\n",
    ),
    """<functioncall> {"name": "f", "arguments": '{"a": "b's"}'} """,
]
MORE_HOSTILE = [
    *(
        "<tool_call>x",
        "<tool_call>{",
        "<tools>",
        '<tools>{"',
        "[TOOL_CALLS]",
        "<function=f>",
        '{"name": ',
        "[ ",
        "\n",
        "[{(",
    ),
    *(
        '[{"name": "x", "arguments": [',
        "[get_tide(a=[",
        "get_tide(a=1), ",
        "'\\\"",
        "{'name': '",
        'functions {"name": ',
    ),
    "Action: get_tide\nAction Input: ",
    """{"name": "f", "arguments": '{}'}, """,
    """{"name": "get_tide", "arguments": {}} x """,
    '{"name": "x", "description": "", "parameters": {"properties": {}}} ',
]


@pytest.mark.parametrize("unit", HOSTILE)
def test_long_texts_take_linear_time(unit: str):
    """A search in quadratic time would take hours here."""
    text = unit * (500_000 // len(unit))
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    assert len(items("sharegpt", {"system": text, "conversations": turns})) == 1
    assert len(items("unified", row_with(text))) == 1


@pytest.mark.slow
@pytest.mark.parametrize("unit", [*HOSTILE, *MORE_HOSTILE])
@pytest.mark.parametrize("front", ["", "<functioncall>", '"', "<tools>"])
def test_more_long_texts_take_linear_time(unit: str, front: str):
    text = front + unit * (1_000_000 // len(unit))
    list(check_row(row_with(text)))
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": text}]
    for row in (
        {"system": text, "conversations": [turns[0], {"from": "gpt", "value": "a"}]},
        {"conversations": turns, "tools": TOOLS},
    ):
        assert len(items("sharegpt", row)) == 1
