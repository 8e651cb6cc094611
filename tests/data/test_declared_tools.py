"""Tools in system texts: every spelling is found or refused, in every format; other text stays as it is."""

import json
from typing import Any

import pytest
from conversions import items
from hypothesis import given
from hypothesis import strategies as st
from tool_spellings import DECLARATIONS, PORT, SETTINGS, TIDE, TOOLS, read, row_with

from xlam_jax.data.converters.common import Dropped
from xlam_jax.data.trajectory import to_dict
from xlam_jax.data.validate import check_row


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
