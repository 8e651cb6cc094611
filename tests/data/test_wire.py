import json
import random
import subprocess
import sys
import time
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from xlam_jax.data.trajectory import ToolCall
from xlam_jax.data.wire import TOOL_CALLS, CompletionStream, arguments_json, calls_schema, parse_completion


def streamed(pieces: Iterable[str]) -> tuple[str, tuple[ToolCall, ...] | None]:
    """What comes out when a text comes in these pieces."""
    stream = CompletionStream()
    content = "".join([stream.feed(piece) for piece in pieces])
    rest, calls = stream.finish()
    return content + rest, calls


CALLS = (ToolCall(None, "f", {"a": [{"b": "]}\n"}]}), ToolCall(None, "g", {}))
WIRE = json.dumps([{"name": call.name, "arguments": call.arguments} for call in CALLS])


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (WIRE, ""),
        ("[TOOL_CALLS]" + WIRE, ""),
        ("[TOOL_CALLS] " + WIRE, ""),
        ("thought\n" + WIRE, "thought"),
        ("thought\n\n" + WIRE, "thought\n"),
        ("thought[TOOL_CALLS]" + WIRE, "thought"),
        ("a [{ b\n[TOOL_CALLS]" + WIRE, "a [{ b\n"),
        ("thought\n" + json.dumps(json.loads(WIRE), indent=2) + "\n", "thought"),
        ('a "quote and \\" [[{"name": \n' + WIRE, 'a "quote and \\" [[{"name": '),
        (json.dumps({"thought": "why?", "tool_calls": json.loads(WIRE)}), "why?"),
        (json.dumps({"tool_calls": json.loads(WIRE), "thought": ""}, indent=1), ""),
        (json.dumps({"tool_calls": json.loads(WIRE)}), ""),
        (f"```json\n{WIRE}\n```", ""),
        (f"I look.\n```json\n{WIRE}\n```\n", "I look."),
        (f"I look. ```{WIRE}```", "I look."),
        (f"[TOOL_CALLS]```json\n{WIRE}\n```", ""),
        (f"I look.<tool_call>{WIRE}</tool_call>", "I look."),
        (f"<think>I look.</think>{WIRE}", "<think>I look.</think>"),
        (f"```\nx = [1]\n```\n{WIRE}", "```\nx = [1]\n```"),
        ("```json\n" + json.dumps({"thought": "why?", "tool_calls": json.loads(WIRE)}) + "\n```", "why?"),
    ],
)
def test_completions_parse_to_content_and_calls(text, content):
    assert parse_completion(text) == (content, CALLS)
    for size in range(1, 9):
        assert streamed(text[at : at + size] for at in range(0, len(text), size)) == (content, CALLS)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Oslo: 3 °C [1]",
        "[]",
        "[TOOL_CALLS][]",
        WIRE[:-1],
        WIRE + " Done.",
        WIRE + "\n```",
        WIRE + "</tool_call>",
        f"```json\n{WIRE}\n``` Done.",
        f"<tool_call>{WIRE}\n```",
        '[{"name": "f"}]',
        '[{"name": "f", "arguments": "{}"}]',
        '[{"name": "f", "arguments": {}, "extra": 1}]',
        '[{"name": "f", "arguments": {"a": NaN}}, 1]',
        "[TOOL_CALLS]f{}",
        "[{" * 2000,
        '[{"a": ' + "[" * 100_000,
        '{"thought": "x"}',
        '{"thought": "x", "tool_calls": ' + WIRE + ', "more": 1}',
        '{"thought": null, "tool_calls": []}',
        '{"thought": "x", "tool_calls": [{"name": "f"}]}',
    ],
)
def test_malformed_calls_stay_content(text):
    assert parse_completion(text) == (text, None)
    assert streamed([text]) == (text, None)
    assert streamed(text[:2000]) == (text[:2000], None)


def weather(*cities: str) -> list[tuple[str, dict[str, Any]]]:
    return [("weather", {"city": city, "unit": "F"}) for city in cities]


def wire(calls: list[tuple[str, dict[str, Any]]]) -> str:
    return json.dumps([{"name": name, "arguments": arguments} for name, arguments in calls], ensure_ascii=False)


@pytest.mark.parametrize(
    ("form", "content", "calls"),
    [
        ("No tool here.", "No tool here.", []),
        ("{}", "", weather("Rome")),
        ("{}", "", weather("Rome", "Oslo")),
        ("<think>Hm.</think>{}", "<think>Hm.</think>", weather("Rome")),
        ("Hm.\n```json\n{}\n```", "Hm.", weather("Rome")),
        ("```json\n{}\n```", "", weather("Rome")),
        ("Hm.[TOOL_CALLS]{}", "Hm.", weather("Rome")),
        ("[TOOL_CALLS]{}", "", weather("Rome")),
        ("Hm.<tool_call>{}</tool_call>", "Hm.", weather("Rome")),
        ("{}", "", weather("東京", "Zürich")),
        ("{}", "", [("a", {}), ("b", {"x": 1})]),
        ("{}", "", [("a", {"x": 1}), ("b", {})]),
    ],
)
def test_the_cases_of_vllms_own_xlam_parser(form: str, content: str, calls: list[tuple[str, dict[str, Any]]]):
    """What vLLM 0.32 tests its `xlam` parser with (tests/tool_parsers/test_xlam_tool_parser.py), whole and streamed."""
    text = form.format(wire(calls))
    for found, read in (parse_completion(text), streamed(text), streamed([text[:7], text[7:]])):
        assert found == content
        assert [(call.name, call.arguments) for call in read or ()] == calls
        assert all("\\u" not in arguments_json(call) for call in read or ())


def test_parsing_never_raises_on_noise():
    random_ = random.Random(0)
    for _ in range(2000):
        cut = "".join(random_.choice([*WIRE, "[TOOL_CALLS]", "\\", "\ud800", '"name"']) for _ in range(30))
        text = WIRE[: random_.randrange(len(WIRE))] + cut
        assert streamed(text) == parse_completion(text)


def test_the_object_without_calls_is_text():
    assert parse_completion('{"thought": "It is 3 °C.", "tool_calls": []}') == ("It is 3 °C.", None)


def by_trying(text: str) -> tuple[ToolCall, ...] | None:
    """The calls up to the end of a text, by trying to read JSON from each bracket on."""
    for start in range(len(text)):
        if text[start] != "[":
            continue
        try:
            found = json.loads(text[start:])
        except ValueError:
            continue
        if found and all(isinstance(call, dict) and call.keys() == {"name", "arguments"} for call in found):
            return tuple(ToolCall(None, call["name"], call["arguments"]) for call in found)
        return None
    return None


def test_calls_are_found_where_trying_every_bracket_finds_them():
    random_ = random.Random(1)
    parts = [
        '[{"name": "f", "arguments": {"a": "',
        '"}}]',
        '[{"name": "g", "arguments": {}}]',
        "[",
        "]",
        '"',
        "\\",
        "{",
        "x ",
    ]
    hits = 0
    for _ in range(5000):
        text = "".join(random_.choice(parts) for _ in range(random_.randint(1, 6)))
        expected = by_trying(text)
        hits += expected is not None
        assert parse_completion(text)[1] == expected, text
    assert hits > 200


@pytest.mark.parametrize(
    "piece",
    ["[{", '[{"name":', '[{"', "]", '"]', "\\", '[{"name": "f", "arguments": {}}] ', "{", "[", "[ ", "``", " "],
)
def test_long_noise_is_parsed_in_linear_time(piece):
    """Trying each bracket in turn takes minutes for this, and hours for ten times as much."""
    text = piece * (1_000_000 // len(piece)) + "]"
    start = time.process_time()
    assert parse_completion(text) == (text, None)
    assert streamed(text[at : at + 20] for at in range(0, len(text), 20)) == (text, None)
    assert time.process_time() - start < 20


NAMES = st.sampled_from(["name", "arguments", "thought", "tool_calls", "f", "get_weather"]) | st.text(max_size=4)
TEXT = st.lists(
    st.sampled_from(
        [*'[]{}",:\\`< \n\taé𝄞', "```", "```json", "<tool_call>", "</tool_call>", TOOL_CALLS, '[{"name": "f"']
    )
    | st.text(max_size=3)
).map("".join)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=6,
)
SOME_CALLS = st.lists(
    st.builds(ToolCall, st.none(), NAMES, st.dictionaries(NAMES, VALUES, max_size=3)), min_size=1, max_size=4
)
FORMS = (
    "bare", "token", "token and space", "json fence", "fence", "tool_call", "fence after token", "v1", "v1 in a fence"
)  # fmt: skip


def written(form: str, thought: str, calls: Iterable[ToolCall], **style: Any) -> str:
    """Calls as a model writes them."""
    array = [{"name": call.name, "arguments": call.arguments} for call in calls]
    if form.startswith("v1"):
        text = json.dumps({"thought": thought, "tool_calls": array}, **style)
        return text if form == "v1" else f"```json\n{text}\n```"
    text = json.dumps(array, **style)
    line = "\n" if thought else ""
    return (
        thought
        + {
            "bare": f"{line}{text}",
            "token": f"{TOOL_CALLS}{text}",
            "token and space": f"{TOOL_CALLS} {text}",
            "json fence": f"{line}```json\n{text}\n```",
            "fence": f"{line}```\n{text}\n```",
            "tool_call": f"{line}<tool_call>{text}</tool_call>",
            "fence after token": f"{TOOL_CALLS}```\n{text}\n```",
        }[form]
    )


def check_any_chunking(data: st.DataObject) -> None:
    """Calls → text → any pieces → the same thought and calls."""
    form, thought, calls = data.draw(st.sampled_from(FORMS)), data.draw(TEXT), data.draw(SOME_CALLS)
    # a thought that ends with the mark of calls can't be told from one that is followed by it
    assume(form.startswith("v1") or not thought.rstrip().endswith(TOOL_CALLS))
    text = written(
        form, thought, calls, indent=data.draw(st.sampled_from([None, 1])), ensure_ascii=data.draw(st.booleans())
    )
    cuts = sorted(data.draw(st.sets(st.integers(1, max(1, len(text) - 1)), max_size=len(text))))
    pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert "".join(pieces) == text
    assert parse_completion(text) == (thought, tuple(calls))
    assert streamed(pieces) == (thought, tuple(calls))
    assert [json.loads(arguments_json(call)) for call in calls] == [call.arguments for call in calls]
    # cut off before the end, nothing is lost
    part = text[: data.draw(st.integers(0, len(text)))]
    assert streamed(part) == parse_completion(part)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_chunking_gives_the_same_calls(data: st.DataObject):
    check_any_chunking(data)


@pytest.mark.slow
@settings(max_examples=10_000, deadline=None)
@given(st.data())
def test_any_chunking_gives_the_same_calls_ten_thousand_times(data: st.DataObject):
    check_any_chunking(data)


@settings(max_examples=300, deadline=None)
@given(TEXT, st.integers(1, 7))
def test_text_is_never_lost(text: str, size: int):
    content, calls = parse_completion(text)
    assert streamed(text[at : at + size] for at in range(0, len(text), size)) == (content, calls)
    assert calls is not None or content == text or text.strip().startswith(("{", "`", "<"))


def test_content_is_given_out_as_it_comes():
    stream = CompletionStream()
    assert [stream.feed(piece) for piece in ("It is ", "3 °C [1", "], [{ }", "] \n", "[", "{", '"name')] == [
        "It is", " 3 °C [1", "], [{ }", "]", "", "", "",
    ]  # fmt: skip
    assert stream.finish() == (' \n[{"name', None)


def test_the_schema_of_calls_takes_calls_of_the_tools_and_nothing_else():
    city = {"type": "object", "properties": {"city": {"$ref": "#/$defs/city"}}, "required": ["city"]}
    tools = [
        {"type": "function", "function": {"name": "f", "parameters": city | {"$defs": {"city": {"enum": ["Oslo"]}}}}},
        {"type": "function", "function": {"name": "g"}},
    ]
    schema = calls_schema(tools)
    Draft202012Validator.check_schema(schema)
    fits = Draft202012Validator(schema).is_valid
    assert fits([{"name": "f", "arguments": {"city": "Oslo"}}, {"name": "g", "arguments": {}}])
    for wrong in ([], [{"name": "f", "arguments": {"city": "Rome"}}], [{"name": "g", "arguments": {}, "id": 1}], [{}]):
        assert not fits(wrong)
    assert not fits([{"name": "h", "arguments": {}}])
    assert not Draft202012Validator(calls_schema(tools, at_most=1)).is_valid([{"name": "g", "arguments": {}}] * 2)
    other = {"name": "h", "parameters": city | {"$defs": {"city": {"enum": ["Rome"]}}}}
    with pytest.raises(ValueError, match="'h' defines"):
        calls_schema([*tools, {"type": "function", "function": other}])


def test_it_needs_only_the_standard_library():
    code = "import sys, xlam_jax.data.wire; print({'numpy', 'jax', 'transformers', 'pydantic'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
