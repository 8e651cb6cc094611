"""The rows of the table of wire formats, one by one; `test_wire_formats` reads what public templates write."""

import json
import random
from dataclasses import replace
from typing import Any

import pytest
from support import ROOT

from xlam_jax.data.trajectory import ToolCall
from xlam_jax.data.wire import ANY, REASONINGS, WIRE_FORMATS, CompletionStream, Parsed, Wire, wire_format
from xlam_jax.errors import UserError

NUMBER = {"type": "object", "properties": {"a": {"type": "integer"}}}
TOOLS = [{"type": "function", "function": {"name": name, "parameters": NUMBER}} for name in "fg"]
F, G = ToolCall(None, "f", {"a": 1}), ToolCall(None, "g", {})
CALLS = {
    "mistral": ('[TOOL_CALLS]f[ARGS]{"a": 1}', "[TOOL_CALLS]g[ARGS]{}"),
    "hermes": (
        '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>',
        '<tool_call>{"arguments": {}, "name": "g"}</tool_call>',
    ),
    "qwen3_coder": (
        "<tool_call>\n<function=f>\n<parameter=a>\n1\n</parameter>\n</function>\n</tool_call>",
        "<function=g>\n</function>",
    ),
    "glm": ("<tool_call>f\n<arg_key>a</arg_key>\n<arg_value>1</arg_value>\n</tool_call>", "<tool_call>g\n</tool_call>"),
    "llama3_json": ('<|python_tag|>{"name": "f", "parameters": {"a": 1}}', '\n{"name": "g", "parameters": {}}'),
    "pythonic": ("<|tool_call_start|>[f(a=1)]<|tool_call_end|>", "<|python_start|>[g()]<|python_end|>"),
    "deepseek_v3": (
        '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n{"a": 1}\n```<｜tool▁call▁end｜>',
        "<｜tool▁call▁begin｜>function<｜tool▁sep｜>g\n```json\n{}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    ),
    "deepseek_v31": (
        '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>{"a": 1}<｜tool▁call▁end｜>',
        "<｜tool▁call▁begin｜>g<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    ),
}
"""Each format's calls f(a=1) and g()."""


def read(wire: Wire, text: str, tools: list[dict[str, Any]] = TOOLS) -> Parsed:
    """Reads a text whole; checks that it is the same in pieces of any size."""
    parsed = wire.parse(text, tools)
    for size in (1, 2, 3, 5, 8, len(text) + 1):
        stream = CompletionStream(wire, tools)
        content = "".join([stream.feed(text[at : at + size]) for at in range(0, len(text), size)])
        rest = stream.finish()
        assert rest._replace(content=content + rest.content) == parsed
    return parsed


@pytest.mark.parametrize("row", WIRE_FORMATS.values(), ids=lambda row: row.name)
def test_examples_are_read(row):
    assert "\n" not in row.example
    assert row.vllm
    for wire in (Wire(row), ANY):
        assert read(wire, row.example) == Parsed("", "", (F,))


def test_the_docs_list_the_formats():
    page = (ROOT / "docs/serving.md").read_text(encoding="utf-8")
    rows = [line.replace("\\|", "¦").strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| ")]
    listed = [tuple(cell.strip("` ").replace("¦", "|") for cell in row) for row in rows if row[0] in WIRE_FORMATS]
    assert listed == [(row.name, row.example.strip(), row.vllm, row.sglang or "none") for row in WIRE_FORMATS.values()]


def test_an_unknown_format_is_refused():
    assert wire_format("hermes") is WIRE_FORMATS["hermes"]
    with pytest.raises(UserError, match=r"'pythonik' is not a wire format; .*llama3_json.* did you mean 'pythonic'"):
        wire_format("pythonik")


@pytest.mark.parametrize("name", CALLS)
def test_text_around_calls_is_kept(name: str):
    wire, (f, g) = Wire(wire_format(name)), CALLS[name]
    assert read(wire, f) == ("", "", (F,))
    assert read(wire, f + g) == ("", "", (F, G))
    assert read(wire, f"I look. \n\n{f}\n {g}\n") == ("", "I look.", (F, G))
    assert read(wire, f" \n{f}\n\nDone.\n") == ("", "Done.", (F,))
    assert read(wire, f"[1] is:\n  it\n{f} Then \n{g}\nDone. ") == ("", "[1] is:\n  it\nThen\nDone.", (F, G))


@pytest.mark.parametrize("name", CALLS)
def test_all_calls_or_none(name: str):
    """A call that is cut off, or cannot be read, makes the whole text content."""
    wire, (f, g) = Wire(wire_format(name)), CALLS[name]
    first = f.replace("1", "[1", 1) if "{" in f or "(" in f else f.replace("</tool_call>", "")
    for text in (first, first + g, g.strip() + "\n" + first, f + g[: len(g) * 2 // 3]):
        assert read(wire, text) == ("", text, None)
    for end in range(len(f) - 1):
        assert read(wire, f[:end]).calls is None
    for end in range(len(f + g)):
        calls = wire.parse((f + g)[:end], TOOLS).calls
        assert calls in (None, (F,), (F, G))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("hermes", '<tool_call>{"name": "f", "arguments": {"a": 1, "a": 2}}</tool_call>'),
        ("hermes", '<tool_call>{"name": "f", "arguments": "{}"}</tool_call>'),
        ("hermes", '<tool_call>{"name": "f", "arguments": {}, "more": 1}</tool_call>'),
        ("hermes", '<tool_call>{"name": "f"}</tool_call>'),
        ("hermes", '<tool_call>[{"name": "f", "arguments": {}}]</tool_call>'),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"a": NaN}}</tool_call>'),
        ("hermes", '<tool_call><tool_call>{"name": "f", "arguments": {}}</tool_call>'),
        ("hermes", '{"name": "f", "arguments": {}}</tool_call>'),
        ("mistral", '[TOOL_CALLS]f[ARGS]{"a": 1'),
        ("mistral", '[TOOL_CALLS][TOOL_CALLS]f[ARGS]{"a": 1}'),
        ("mistral", '[TOOL_CALLS][{"name": "f", "arguments": {}}]'),
        (
            "qwen3_coder",
            "<tool_call><function=f><parameter=a>1</parameter><parameter=a>2</parameter></function></tool_call>",
        ),
        ("qwen3_coder", "<tool_call><function=f><parameter=a>1</function></tool_call>"),
        ("qwen3_coder", "<tool_call><function=f></function>"),
        ("qwen3_coder", '<tool_call>{"name": "f", "arguments": {}}</tool_call>'),
        ("glm", "<tool_call>f<arg_key>a</arg_key></tool_call>"),
        ("llama3_json", '{"name": "f", "parameters": []}'),
        ("llama3_json", '{"name": "f", "parameters": {}, "more": 1}'),
        ("llama3_json", '{"name": "f", "parameters": {"a": 1, "a": 1}}'),
        ("pythonic", "[f(1)]"),
        ("pythonic", "[f(a=g())]"),
        ("pythonic", "[f(a=1, a=2)]"),
        ("pythonic", "[f(a=b'x')]"),
        ("pythonic", "[f(a='\\ud800')]"),
        ("pythonic", "[f(a=1e999)]"),
        ("pythonic", "[f(a=1]"),
        ("pythonic", "<|tool_call_start|>[f(a=1)]"),
        ("harmony", '<|channel|>commentary to=functions.f<|message|>{"a": 1'),
        ("harmony", "<|channel|>commentary to=functions.f<|message|>[]"),
        ("harmony", "<|channel|>commentary to=python<|message|>{}"),
        ("harmony", '<|channel|>final<|message|>x<|end|>{"a": 1}'),
        ("deepseek_v3", "<｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n{}<｜tool▁call▁end｜>"),
        ("deepseek_v31", "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>[]<｜tool▁call▁end｜>"),
    ],
)
def test_malformed_calls_stay_content(name: str, text: str):
    assert read(Wire(wire_format(name)), text) == ("", text, None)


PROSE = [
    "A <tool_call> tag is not needed.",
    "Wrap it in <tool_call></tool_call>, or `<tool_call>`.",
    "[TOOL_CALLS] is the token before calls, [ARGS] the one after the name.",
    "The key 'arguments' takes an object, as in {'a': 1} or {\"a\": 1}.",
    "Call it as f(a=1), or see [f](https://f.example) and [1].",
    "The tags <function=…> and <parameter=a> belong together; </parameter> ends a value.",
    "A list: [1, 2], a set: {1}, JSON: [{}], and <|python_tag|> in the text.",
    "Between <|tool_call_start|> and <|tool_call_end|> are calls.",
    "<｜tool▁calls▁begin｜> begins calls, <｜tool▁call▁begin｜> one of them.",
    "The channel <|channel|> is not a header.",
    '{"city": "Oslo", "name": "f"}',
    '{"name": "Oslo", "population": 700000}',
]


@pytest.mark.parametrize("prose", PROSE)
def test_prose_may_mention_marks(prose: str):
    for name in (*WIRE_FORMATS, "any"):
        wire = ANY if name == "any" else Wire(wire_format(name))
        assert read(wire, prose) == ("", prose, None)
        if name in CALLS and not prose.startswith("{"):
            assert read(wire, f"{prose}\n{CALLS[name][0]}") == ("", prose, (F,))


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize(
    "form", ["For example `{}` is a call.", "I would write:\n{}\n\nbut I do not.", "Use {}.", "`{}`", "{} and {}"]
)
def test_examples_in_prose_are_not_calls_where_the_format_is_unknown(name: str, form: str):
    text = form.replace("{}", CALLS[name][0])
    assert read(ANY, text) == ("", text, None)


@pytest.mark.parametrize("name", [*CALLS, "array"])
def test_calls_are_read_where_the_format_is_unknown(name: str):
    text = "".join(CALLS[name]) if name in CALLS else json.dumps([{"name": "f", "arguments": {"a": 1}}])
    expected = (F, G) if name in CALLS else (F,)
    assert read(ANY, f"I look.\n{text}") == ("", "I look.", expected)
    assert read(ANY, f"<think>\nHm <tool_call>.\n</think>\n\nI look.\n{text}") == (
        "Hm <tool_call>.",
        "I look.",
        expected,
    )
    for other in CALLS.values():
        mixed = f"{other[0]}\n{text}"
        calls = read(ANY, mixed).calls
        assert calls is None or calls[-len(expected) :] == expected
        assert calls is None or len(calls) == len(expected) + 1


def test_formats_without_marks_need_the_names_of_the_tools():
    for text in ("[f(a=1)]", '{"name": "f", "parameters": {"a": 1}}', "<tool_call>f</tool_call>"):
        assert read(ANY, text).calls is not None
        assert read(ANY, text, []) == ("", text, None)
        assert read(ANY, text.replace("f", "h", 1) if "name" not in text else text.replace('"f"', '"h"')).calls is None


def test_values_come_back_exactly():
    value = {"a": [1, 1.0, -0.0, 10**30, 1e-7, True, None, "é\\n\"'</tool_call>[]{}\n𝄞", {"b": {}}], "ä b": ""}
    text = json.dumps(value, ensure_ascii=False)
    nested: dict[str, Any] = {}
    for _ in range(300):
        nested = {"a": [nested]} if len(nested) else {"a": 1}
    for arguments in (value, nested if json.dumps(nested).count("{") < 190 else value):
        text = json.dumps(arguments)
        for name, written in {
            "mistral": f"[TOOL_CALLS]f[CALL_ID]x1[ARGS]{text}",
            "hermes": f'<tool_call>{{"name": "f", "arguments": {text}, "id": "x1"}}</tool_call>',
            "llama3_json": f'{{"type": "function", "name": "f", "parameters": {text}}}',
            "deepseek_v31": f"<｜tool▁call▁begin｜>f<｜tool▁sep｜>{text}<｜tool▁call▁end｜>",
            "harmony": f"<|channel|>commentary to=functions.f <|constrain|>json<|message|>{text}<|call|>",
        }.items():
            calls = Wire(wire_format(name)).parse(written).calls
            assert calls
            [call] = calls
            assert call.id == ("x1" if name in ("mistral", "hermes") else None)
            assert repr(call.arguments) == repr(arguments)
    calls = Wire(wire_format("pythonic")).parse("[a.f(x='it\\'s', y=[1, True, None, {'b': -0.5}], z=true)]").calls
    assert calls
    assert calls[0] == ToolCall(None, "a.f", {"x": "it's", "y": [1, True, None, {"b": -0.5}], "z": True})


def test_llama_separates_calls_by_semicolons_or_lines():
    f, g = '{"name": "f", "parameters": {"a": 1}}', '{"name": "g", "arguments": {}}'
    wire = Wire(wire_format("llama3_json"))
    for between in ("; ", ";", "\n", " ", "", ";\n<|python_tag|>"):
        assert read(wire, f + between + g) == ("", "", (F, G))
    assert read(wire, f'It is:\n{{"name": "Oslo"}}\n{f}') == ("", 'It is:\n{"name": "Oslo"}', (F,))
    assert read(wire, f'{f}\n{{"name": "Oslo"}}') == ("", '{"name": "Oslo"}', (F,))
    indented = json.dumps([json.loads(f)], indent=2)
    assert read(wire, indented) == ("", indented, None)


def test_harmony_has_channels():
    wire = Wire(wire_format("harmony"))
    text = (
        "<|channel|>analysis<|message|>I look <|x|>.<|end|>"
        "<|start|>assistant<|channel|>commentary<|message|>Wait.<|end|>"
        '<|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json<|message|>{"a": 1}<|call|>'
        "<|start|>assistant to=functions.g<|channel|>commentary json<|message|>{}"
    )
    assert read(wire, text) == ("I look <|x|>.", "Wait.", (F, G))
    assert read(ANY, text) == ("I look <|x|>.", "Wait.", (F, G))
    assert read(wire, "<|channel|>analysis<|message|>I lo") == ("I lo", "", None)
    assert read(wire, "<|channel|>final<|message|>It is <b>.\n") == ("", "It is <b>.\n", None)
    assert read(wire, "It is 3 °C.") == ("", "It is 3 °C.", None)


@pytest.mark.parametrize(
    ("schema", "text", "value"),
    [
        ({"type": "string"}, "5", "5"),
        ({"type": "string"}, " a\n", " a\n"),
        ({"type": "integer"}, "5", 5),
        ({"type": "integer"}, "five", "five"),
        ({"type": "integer"}, "5.5", "5.5"),
        ({"type": "number"}, "5", 5),
        ({"type": "number"}, "1e-07", 1e-07),
        ({"type": "boolean"}, "True", True),
        ({"type": "boolean"}, "false", False),
        ({"type": "boolean"}, "0", "0"),
        ({"type": ["string", "null"]}, "None", None),
        ({"type": ["string", "null"]}, "none", "none"),
        ({"type": "string", "nullable": True}, "null", None),
        ({"type": "array"}, '[1, "a"]', [1, "a"]),
        ({"type": "array"}, "[1,", "[1,"),
        ({"type": "object"}, '{"a": {}}', {"a": {}}),
        ({"type": "object"}, '{"a": 1, "a": 2}', '{"a": 1, "a": 2}'),
        ({"anyOf": [{"type": "string"}, {"type": "integer"}]}, "5", 5),
        ({"anyOf": [{"type": "string"}, {"type": "integer"}]}, '"5"', '"5"'),
        ({"enum": [1, 2]}, "2", 2),
        ({"enum": ["1", "2"]}, "2", "2"),
        ({"const": None}, "null", None),
        ({"$ref": "#/$defs/N"}, "5", 5),
        ({"$ref": "#/$defs/M"}, "5", "5"),
        ({"$ref": "#/$defs/Loop"}, "5", "5"),
        ({"$ref": "https://schema.example"}, "5", "5"),
        ({"description": "anything"}, "5", "5"),
        ({"type": 5, "anyOf": 6, "enum": 7, "$ref": 8}, "5", "5"),
        (True, "5", "5"),
        (None, "5", "5"),
    ],
)
def test_types_come_from_the_schemas(schema: Any, text: str, value: Any):
    parameters = {"properties": {"a": schema}, "$defs": {"N": {"type": "integer"}, "Loop": {"$ref": "#/$defs/Loop"}}}
    tools = [{"type": "function", "function": {"name": "f", "parameters": parameters}}]
    written = {
        "qwen3_coder": f"<tool_call>\n<function=f>\n<parameter=a>\n{text}\n</parameter>\n</function>\n</tool_call>",
        "glm": f"<tool_call>f\n<arg_key>a</arg_key>\n<arg_value>{text}</arg_value>\n</tool_call>",
    }
    for name, call in written.items():
        wire = Wire(wire_format(name))
        assert wire.format.lossy
        assert read(wire, call, tools).calls == (ToolCall(None, "f", {"a": value}),)
        for unknown in ([], [{"function": {"name": "f"}}], [{"name": "f", "parameters": []}], [{}], TOOLS[1:]):
            assert wire.parse(call, unknown).calls == (ToolCall(None, "f", {"a": text}),)
    call = written["glm"]
    assert read(Wire(wire_format("qwen3_coder")), call, [{"name": "f", "parameters": parameters}]).calls is None


def test_strings_between_tags_may_contain_tags():
    value = "x</parameter> y</function></tool_call>\n<tool_call>"
    text = f"<tool_call>\n<function=f>\n<parameter=b>\n{value}\n</parameter>\n</function>\n</tool_call>"
    assert read(Wire(wire_format("qwen3_coder")), text).calls == (ToolCall(None, "f", {"b": value}),)
    value = "\nx</arg_value> y</tool_call>\n"
    text = f"<tool_call>f\n<arg_key>b</arg_key>\n<arg_value>{value}</arg_value>\n</tool_call>"
    assert read(Wire(wire_format("glm")), text).calls == (ToolCall(None, "f", {"b": value}),)


@pytest.mark.parametrize("name", REASONINGS)
def test_reasoning_is_separated(name: str):
    row = REASONINGS[name]
    o, c = row.opening, row.closing
    unknown, opened, closed = (Wire(wire_format("hermes"), row, state) for state in (None, True, False))
    call = CALLS["hermes"][0]
    for wire in (unknown, opened, closed):
        assert read(wire, f"{o}\nHm.\n\nSo.\n{c}\n\nI look.\n{call}") == ("Hm.\n\nSo.", "I look.", (F,))
        assert read(wire, f" \n{o}Hm.{c} I look.") == ("Hm.", " I look.", None)
        assert read(wire, f"{o}\n\n{c}\n\n{call}") == ("", "", (F,))
        assert read(wire, f"{o}Hm. {call} cut o") == (f"Hm. {call} cut o", "", None)
        assert read(wire, f"{o}a{c}b{c}c {o}") == ("a", f"b{c}c {o}", None)
        assert read(wire, f"{o}\n") == ("", "", None)
    for wire in (unknown, opened):
        assert read(wire, f"Hm. {call}\n{c}\n\nI look.\n{call}") == (f"Hm. {call}", "I look.", (F,))
    assert read(opened, f"Hm. {o} and") == (f"Hm. {o} and", "", None)
    assert read(opened, f"Hm. {o} and{c}so") == (f"Hm. {o} and", "so", None)
    for wire in (unknown, closed):
        for text in ("It is 3 °C.", f"The tag {o} opens it, {c} closes it.", f"\n I {o}", "", " \n", o[:-1]):
            assert read(wire, text) == ("", text, None)
    assert read(closed, f"It ends with {c}\n.") == ("", f"It ends with {c}\n.", None)


def test_content_is_released_as_it_arrives():
    stream = CompletionStream(Wire(wire_format("hermes"), REASONINGS["think"], opened=True), TOOLS)
    pieces = ["Hm", ".</thi", "nk>\n", "\nIt is ", "3 °C <b", ">x</b> <tool_", "x> \n", " <tool", "_call>", "x"]
    assert [stream.feed(piece) for piece in pieces] == [
        *("", "", "", "It is", " 3 °C <b", ">x</b>", " <tool_x>", "", "", "")
    ]  # fmt: skip
    assert stream.holding
    assert stream.finish() == ("Hm.", " \n <tool_call>x", None)


def test_any_noise_is_read():
    """Nothing raises, pieces give the same, and without calls nothing is lost."""
    random_ = random.Random(0)
    marks = sorted(
        {piece for calls in CALLS.values() for call in calls for piece in (call, call[:9], call[-9:], call[9:])}
        | {"\n", " ", "{", '"', "]", "x", "\ud800", "<think>", "</think>", "<|channel|>final<|message|>", "<|end|>"}
    )
    wires = [Wire(row, random_.choice([None, *REASONINGS.values()])) for row in WIRE_FORMATS.values()]
    with_calls = 0
    for _ in range(1500):
        text = "".join(random_.choices(marks, k=random_.randint(1, 6)))
        wire = random_.choice([*wires, ANY])
        wire = replace(wire, opened=random_.choice([True, False, None]))
        parsed, size = wire.parse(text, TOOLS), random_.randint(1, 9)
        stream = CompletionStream(wire, TOOLS)
        content = "".join([stream.feed(text[at : at + size]) for at in range(0, len(text), size)])
        rest = stream.finish()
        assert rest._replace(content=content + rest.content) == parsed, (wire, text)
        with_calls += parsed.calls is not None
        if parsed.calls is None and "<|message|>" not in text and wire.reasoning is None:
            assert parsed.content == text
    assert with_calls > 50
