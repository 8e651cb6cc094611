import json
import random
import subprocess
import sys
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from xlam_jax.data.trajectory import ToolCall
from xlam_jax.data.wire import TOOL_CALLS, CompletionStream, arguments_json, objects_in, parse_completion


def streamed(pieces: Iterable[str]) -> tuple[str, tuple[ToolCall, ...] | None]:
    """The result for a text that is streamed in these pieces."""
    stream = CompletionStream()
    content = "".join([stream.feed(piece) for piece in pieces])
    _, rest, calls = stream.finish()
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
    for text_read, read in (parse_completion(text), streamed(text), streamed([text[:7], text[7:]])):
        assert text_read == content
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
    """The calls of the arrays up to the end of a text, by trying to read JSON from each bracket on."""
    calls: list[ToolCall] = []
    while True:
        for start in range(len(text)):
            try:
                array = json.loads(text[start:]) if text[start] == "[" else None
            except ValueError:
                continue
            if array is not None:
                break
        else:
            break
        if not array or not all(isinstance(call, dict) and call.keys() == {"name", "arguments"} for call in array):
            break
        calls[:0] = [ToolCall(None, call["name"], call["arguments"]) for call in array]
        text = text[:start]
    return tuple(calls) if calls and '"arguments":' not in text else None


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
    hits = several = 0
    for _ in range(5000):
        text = "".join(random_.choice(parts) for _ in range(random_.randint(1, 6)))
        expected = by_trying(text)
        hits += expected is not None
        several += len(expected or ()) > 1
        assert parse_completion(text)[1] == expected, text
    assert hits > 200
    assert several > 20


F, G = '[{"name": "f", "arguments": {"a": 1}}]', '[{"name": "g", "arguments": {}}]'


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (f"[TOOL_CALLS]{F}[TOOL_CALLS]{G}", ""),
        (f"I look. [TOOL_CALLS]{F}\n[TOOL_CALLS] {G}\n", "I look. "),
        (f"I look.\n{F}\n{G}", "I look."),
        (f"{F}{G}", ""),
        (f"<tool_call>{F}</tool_call>\n<tool_call>{G}</tool_call>", ""),
        (f"<think>Hm [1].</think><tool_call>\n{F}\n</tool_call><tool_call>{G}</tool_call>", "<think>Hm [1].</think>"),
        (f"I look.\n```json\n{F}\n```\n```json\n{G}\n```", "I look."),
        (f"```\n{F}\n```\n\n{G}", ""),
        (f'Oslo is [{{"name": "Oslo"}}].\n{F}\n\n[TOOL_CALLS]```json\n{G}```', 'Oslo is [{"name": "Oslo"}].'),
    ],
)
def test_all_calls_of_several_arrays_come_back(text: str, content: str):
    expected = (content, (ToolCall(None, "f", {"a": 1}), ToolCall(None, "g", {})))
    assert parse_completion(text) == expected
    for size in range(1, 9):
        assert streamed(text[at : at + size] for at in range(0, len(text), size)) == expected


@pytest.mark.parametrize(
    "text",
    [
        f"{F} and {G}",
        f"{F},\n{G}",
        f"{F} Done.",
        f"[TOOL_CALLS]{F} and [TOOL_CALLS]{G}",
        f"[TOOL_CALLS]{F[:-1]}\n[TOOL_CALLS]{G}",
        f"[TOOL_CALLS]{F[:8]}\n[TOOL_CALLS]{G}",
        f"{F[:-1]}\n{G}",
        f"{F}\n{G[:-1]}",
        f'[TOOL_CALLS][{{"name": "f"}}][TOOL_CALLS]{G}',
        f"[TOOL_CALLS] f {G}",
        f'[TOOL_CALLS]f[ARGS]{{"a": 1}}[TOOL_CALLS]{G}',
        f'[TOOL_CALLS]f{{"a": 1}}\n[TOOL_CALLS]{G}',
        f"<tool_call>f(a=1)</tool_call>\n{G}",
        f"[{{'name': 'f', 'arguments': {{}}}}]\n{G}",
        f'[{{"name": "f", "arguments": null}}]\n{G}',
        f'[{{"arguments": null, "name": "f"}}]\n{G}',
        f'[{{"name": "f", "arguments"\n{G}',
        f'<tool_call>{{"name": "f", "arguments": {{}}}}</tool_call>\n<tool_call>{G}</tool_call>',
        f'<tool_call>[{{"name": "f"}}]</tool_call><tool_call>{G}</tool_call>',
        f"<tool_call>{F}\n<tool_call>{G}</tool_call>",
        f"```json\n{F}\n```\nThen:\n```json\n{G}\n```",
        f"```json\n{F}\n{G}\n```",
        f'{{"thought": "", "tool_calls": {F}}}\n{{"thought": "", "tool_calls": {G}}}',
        f'{{"thought": "", "tool_calls": {F}}}\n{G}',
    ],
)
def test_never_some_of_the_calls(text: str):
    assert parse_completion(text) == (text, None)
    for size in range(1, 9):
        assert streamed(text[at : at + size] for at in range(0, len(text), size)) == (text, None)


@pytest.mark.parametrize(
    "thought",
    [
        'The "arguments": key takes an amount.',
        'A call has the keys "name" and "arguments": I write both.',
        'I set "arguments": amount first.',
        "I answer with [TOOL_CALLS] now.",
        "[TOOL_CALLS] is the token before calls.",
        "A <tool_call> tag is not needed.",
    ],
)
def test_a_thought_may_mention_marks_and_keys_of_calls(thought: str):
    """The model is trained on such thoughts next to calls."""
    forms = [f"{thought}[TOOL_CALLS]{F}"] + ([f"{thought}\n{F}"] if TOOL_CALLS not in thought else [])
    for text in forms:
        expected = (thought, (ToolCall(None, "f", {"a": 1}),))
        assert parse_completion(text) == expected
        for size in range(1, 9):
            assert streamed(text[at : at + size] for at in range(0, len(text), size)) == expected


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


def holds_marks(thought: str) -> bool:
    return any(mark in thought for mark in (TOOL_CALLS, "<tool_call>", "</tool_call>", '"arguments":'))


def check_any_chunking(data: st.DataObject) -> None:
    """Calls → text → any pieces → the same thought and calls."""
    form, thought, calls = data.draw(st.sampled_from(FORMS)), data.draw(TEXT), data.draw(SOME_CALLS)
    # a thought that ends with the mark of calls looks like one that is followed by the mark
    assume(form.startswith("v1") or not thought.rstrip().endswith(TOOL_CALLS))
    text = written(
        form, thought, calls, indent=data.draw(st.sampled_from([None, 1])), ensure_ascii=data.draw(st.booleans())
    )
    cuts = sorted(data.draw(st.sets(st.integers(1, max(1, len(text) - 1)), max_size=len(text))))
    pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert "".join(pieces) == text
    expected = parse_completion(text)
    # a thought that holds marks of calls may hold calls that are not read, and then none are
    may_be_none = not form.startswith("v1") and holds_marks(thought)
    assert expected == (thought, tuple(calls)) or (may_be_none and expected == (text, None))
    assert streamed(pieces) == expected
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


def check_several_groups(data: st.DataObject) -> None:
    """All calls of several groups, in their order; none where one of them is broken, or text is between them."""
    groups = data.draw(st.lists(st.tuples(st.sampled_from(FORMS[:-2]), SOME_CALLS), min_size=2, max_size=4))
    texts = [written(form, "", calls, indent=data.draw(st.sampled_from([None, 1]))) for form, calls in groups]
    fault = data.draw(st.sampled_from([None, None, "broken", "between"]))
    if fault:
        at = data.draw(st.integers(0, len(texts) - 2))
        bracket = texts[at].rindex("]")
        texts[at] = texts[at][:bracket] + texts[at][bracket + 1 :] if fault == "broken" else f"{texts[at]} then "
    space = st.sampled_from(["", " ", "\n", "\n\n", "\t"])
    text = data.draw(st.sampled_from(["", "Hm.\n"])) + "".join(one + data.draw(space) for one in texts)
    pieces, rest = [], text
    while rest:
        pieces.append(rest[: data.draw(st.integers(1, 30))])
        rest = rest[len(pieces[-1]) :]
    content, calls = parse_completion(text)
    assert streamed(pieces) == (content, calls)
    if fault:
        assert (content, calls) == (text, None)
    else:
        assert content.strip() == ("Hm." if text.startswith("Hm.") else "")
        assert calls == tuple(call for _, some in groups for call in some)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_several_groups_give_all_calls_or_none(data: st.DataObject):
    check_several_groups(data)


@pytest.mark.slow
@settings(max_examples=10_000, deadline=None)
@given(st.data())
def test_any_several_groups_give_all_calls_or_none_ten_thousand_times(data: st.DataObject):
    check_several_groups(data)


@settings(max_examples=300, deadline=None)
@given(TEXT, st.integers(1, 7))
def test_text_is_never_lost(text: str, size: int):
    content, calls = parse_completion(text)
    assert streamed(text[at : at + size] for at in range(0, len(text), size)) == (content, calls)
    assert calls is not None or content == text or text.strip().startswith(("{", "`", "<"))


def test_content_is_released_as_it_arrives():
    stream = CompletionStream()
    assert [stream.feed(piece) for piece in ("It is ", "3 °C [1", "], [{ }", "] \n", "[", "{", '"name')] == [
        "It is", " 3 °C [1", "], [{ }", "]", "", "", "",
    ]  # fmt: skip
    assert stream.finish() == ("", ' \n[{"name', None)


@pytest.mark.parametrize(
    ("text", "objects"),
    [
        ("", []),
        ("no object, {none} here { }", [{}]),
        ('{"score": 4}' + " " * 80_000, [{"score": 4}]),
        ('The "rating" is {"score": 4}, not {"score": 5}.', [{"score": 4}, {"score": 5}]),
        ('```json\n{"a": {"b": [1, {"c": null}]}, "d": "}{"}\n```', [{"a": {"b": [1, {"c": None}]}, "d": "}{"}]),
        ('[{"a": 1}, {"b": -0.5e3}]', [{"a": 1}, {"b": -500.0}]),
        ('{"reason": "I say {"score": 4}', [{"score": 4}]),
        ('{"a, b}: {"score": 4}', [{"score": 4}]),
        ('{"a": {"score": 1}, "b": [{"score": 2}], oops {"score": 3}', [{"score": 1}, {"score": 2}, {"score": 3}]),
        ('{"a": {"score": 1}, "b": {"c": {"score": 2}, "score"', [{"score": 1}, {"score": 2}]),
        (
            '{"a": 1,} {"a": 01} {"a": NaN} {"a" 1} {a: 1} {\'a\': 1} {"a": +1} {"a": "\n"} {"a": "\\x"} {"b": 2}',
            [{"b": 2}],
        ),
        ('{"a": 1, "a": 2} {"a": 1e999} {"a": "\\ud800"} {"b": "\\u00e9"}', [{"b": "é"}]),
        ('{"a":' * 1000 + "1" + "}" * 1000 + '{"b": 2}', [{"b": 2}]),
    ],
)
def test_objects_in_a_text(text: str, objects: list[Any]):
    assert list(objects_in(text)) == objects


def objects_by_trying(text: str) -> list[Any]:
    """The objects of a text, by trying to read JSON from each brace on."""
    objects, at = [], 0
    while (at := text.find("{", at)) >= 0:
        try:
            value, at = json.JSONDecoder().raw_decode(text, at)
        except ValueError:
            at += 1
        else:
            objects.append(value)
    return objects


UNIQUE = st.recursive(
    st.none() | st.integers() | st.sampled_from(["", "a", "{", "}", '"', "\\", ", ", "[ {"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
    max_leaves=8,
).map(json.dumps)
"""JSON in which no key is repeated."""


@settings(max_examples=500, deadline=None)
@given(st.lists(st.tuples(UNIQUE, st.integers(0, 3), st.sampled_from(["", " ", "\n", " x "])), max_size=5))
def test_objects_are_found_where_trying_every_brace_finds_them(parts: list[tuple[str, int, str]]):
    """In JSON of which some is cut off at its end, with text between."""
    text = "".join((json_ if cut else json_[: len(json_) // 2]) + between for json_, cut, between in parts)
    assert list(objects_in(text)) == objects_by_trying(text)


def test_it_needs_only_the_standard_library():
    code = "import sys, xlam_jax.data.wire; print({'numpy', 'jax', 'transformers', 'pydantic'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
