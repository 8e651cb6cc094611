"""A server's answer is parsed to the same result whole, streamed, by either client, and in an evaluation."""

import asyncio
import contextlib
import json
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
from fake_server import Running, sends, serve
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serving.tools import run_tools
from xlam_jax.client.answers import AnswerStream, MalformedAnswer, read_response
from xlam_jax.client.completion import xLAMChatCompletion, xLAMConfig
from xlam_jax.errors import UserError
from xlam_jax.evaluate.endpoint import Answer, EndpointFault, Model

USER = [{"role": "user", "content": "What time is it?"}]
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": {}}}}
    for name in ("now", "get_weather")
]
OSLO = {"city": "Oslo"}
TEXT = json.dumps(OSLO)


def client(url: str, **config: Any) -> xLAMChatCompletion:
    settings = {"timeout": 5.0, "retries": 0} | config
    return xLAMChatCompletion.from_config(xLAMConfig(base_url=url, model="tiny", **settings))


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with serve(sends({}, [])) as running:
        yield running


@pytest.fixture(scope="module")
def llm(server: Running) -> Iterator[xLAMChatCompletion]:
    with client(server.url, bad_output="mark") as llm:
        yield llm


class Results(NamedTuple):
    """One answer as each code path parses it."""

    choices: list[dict[str, Any]]
    """From the client: completion, stream, acompletion, astream."""
    evaluated: list[Answer | EndpointFault]
    """From an evaluation: whole and streamed."""


def parse_everywhere(llm: xLAMChatCompletion) -> Results:
    *parts, streamed = llm.stream(USER, TOOLS)
    assert isinstance(streamed, dict)
    assert "".join(map(str, parts)) == streamed["choices"][0]["message"]["content"]

    async def ask() -> tuple[list[Any], list[Answer | EndpointFault]]:
        async with llm:
            whole = await llm.acompletion(USER, TOOLS)
            last = [piece async for piece in llm.astream(USER, TOOLS)][-1]
            outcomes: list[Answer | EndpointFault] = []
            for stream in (False, True):
                try:
                    outcomes.append(await Model(llm, stream=stream).chat(USER, TOOLS))
                except EndpointFault as fault:
                    outcomes.append(fault)
        return [whole, last], outcomes

    answers, evaluated = asyncio.run(ask())
    responses = (llm.completion(USER, TOOLS), streamed, *answers)
    return Results([response["choices"][0] for response in responses], evaluated)


def function(arguments: Any, id: Any = "a", name: str = "get_weather") -> dict[str, Any]:
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


def called(*calls: dict[str, Any], content: str = "") -> dict[str, Any]:
    return {"role": "assistant", "content": content, "tool_calls": list(calls)}


def read(arguments: Any, id: str | None = "a", name: str = "get_weather") -> dict[str, Any]:
    return {"name": name, "arguments": arguments, "id": id}


def numbered(*calls: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"tool_calls": [{"index": index} | call]} for index, call in enumerate(calls)]


NO_ARGUMENTS = {"id": "a", "type": "function", "function": {"name": "now"}}
PARTS = [{"type": "thinking", "thinking": [{"type": "text", "text": "Hm."}]}, {"type": "text", "text": "Noon"}]
EXAMPLES: dict[str, tuple[dict[str, Any], list[dict[str, Any]], dict[str, Any]]] = {
    "an object": ({"tool_calls": [function(OSLO)]}, numbered(function(OSLO)), called(read(OSLO))),
    "null": ({"tool_calls": [function(None)]}, numbered(function(None)), called(read({}))),
    "the text null": ({"tool_calls": [function("null")]}, numbered(function("null")), called(read({}))),
    "no arguments": ({"tool_calls": [NO_ARGUMENTS]}, numbered(NO_ARGUMENTS), called(read({}, name="now"))),
    "one id": (
        {"tool_calls": [function(TEXT), function("{}"), function("{}", "a_2")]},
        numbered(function(TEXT), function("{}"), function("{}", "a_2")),
        called(read(OSLO), read({}, "a_3"), read({}, "a_2")),
    ),
    "no ids": (
        {"tool_calls": [function(TEXT, None), function("{}", "")]},
        numbered(function(TEXT, None), function("{}", "")),
        called(read(OSLO, None), read({}, None)),
    ),
    "one id, one index": (
        {"tool_calls": [function(TEXT), function(TEXT), function("{}", name="now")]},
        [
            {"tool_calls": [{"index": 0} | call]}
            for call in (function(TEXT), function(TEXT), function("{}", name="now"))
        ],
        called(read(OSLO), read(OSLO, "a_2"), read({}, "a_3", "now")),
    ),
    "no index": (
        {"tool_calls": [NO_ARGUMENTS | {"id": None}] * 2},
        [{"tool_calls": [NO_ARGUMENTS | {"id": None}]}] * 2,
        called(read({}, None, "now"), read({}, None, "now")),
    ),
    "a number as id": ({"tool_calls": [function(TEXT, 0)]}, numbered(function(TEXT, 0)), called(read(OSLO, "0"))),
    "a flat call": (
        {"tool_calls": [{"name": "get_weather", "arguments": OSLO, "id": "a"}]},
        numbered({"name": "get_weather", "arguments": OSLO, "id": "a"}),
        called(read(OSLO)),
    ),
    "the older function_call": (
        {"content": None, "function_call": {"name": "get_weather", "arguments": TEXT}},
        [
            {"function_call": {"name": "get_weather"}},
            {"function_call": {"arguments": TEXT[:5]}},
            {"function_call": {"arguments": TEXT[5:]}},
        ],
        called(read(OSLO, None)),
    ),
    "a refusal": (
        {"content": None, "refusal": "I won't."},
        [{"refusal": "I w"}, {"refusal": "on't."}],
        {"role": "assistant", "content": "I won't.", "tool_calls": [], "refusal": "I won't."},
    ),
    "a refusal as a part": (
        {"content": [{"type": "refusal", "refusal": "No."}]},
        [{"content": [{"type": "refusal", "refusal": "No."}]}],
        {"role": "assistant", "content": "No.", "tool_calls": [], "refusal": "No."},
    ),
    "parts": (
        {"content": [{"type": "text", "text": "It is "}, {"type": "text", "text": "noon."}]},
        [{"content": [{"type": "text", "text": "It is"}]}, {"content": " noon."}],
        {"role": "assistant", "content": "It is noon.", "tool_calls": []},
    ),
    "reasoning as a part": (
        {"content": PARTS},
        [{"content": PARTS[:1]}, {"content": PARTS[1:]}],
        {"role": "assistant", "content": "Noon", "tool_calls": [], "reasoning": "Hm."},
    ),
    "reasoning under two names": (
        {"content": "Noon", "reasoning": "Hm.", "reasoning_content": "Hm."},
        [{"reasoning": "Hm.", "reasoning_content": "Hm."}, {"content": "Noon"}],
        {"role": "assistant", "content": "Noon", "tool_calls": [], "reasoning": "Hm."},
    ),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_answer_is_parsed_alike_everywhere(name: str, server: Running, llm: xLAMChatCompletion):
    message, deltas, expected = EXAMPLES[name]
    server.answer(sends({"role": "assistant", "content": None} | message, deltas))
    choices, evaluated = parse_everywhere(llm)
    assert choices == [{"message": expected, "finish_reason": "stop"}] * 4
    for answer in evaluated:
        assert isinstance(answer, Answer), answer
        check_evaluated(answer, expected)


def check_evaluated(answer: Answer, message: dict[str, Any]) -> None:
    """Checks that an evaluation's answer equals the client's message, with an id for each call."""
    assert answer.content == message["content"]
    for call, expected in zip(answer.calls, message["tool_calls"], strict=True):
        assert (call.name, call.arguments) == (expected["name"], expected["arguments"])
        assert call.id == (expected["id"] or call.id)
    assert len({call.id for call in answer.calls} - {None}) == len(answer.calls)


@pytest.mark.parametrize("arguments", ["[1]", [1], 5, '{"a": ', {"a": "\ud800"}], ids=ascii)
def test_invalid_arguments_are_an_error_everywhere(arguments: Any, server: Running, llm: xLAMChatCompletion):
    message = {"role": "assistant", "content": None, "tool_calls": [function(arguments)]}
    server.answer(sends(message, numbered(function(arguments))))
    choices, evaluated = parse_everywhere(llm)
    assert choices == choices[:1] * 4
    assert "cannot be read" in choices[0]["error"]
    assert [isinstance(fault, EndpointFault) and fault.kind for fault in evaluated] == ["malformed"] * 2


def test_calls_with_the_same_id_run_and_their_results_are_sent():
    twice = [function("{}", name="now"), function(None, name="now")]
    replies = [sends(called(*twice), []), sends({"role": "assistant", "content": "Noon."}, [])]
    with serve(*replies) as server:
        result = run_tools(client(server.url), USER, [now])
        sent = server.requests[1]["messages"]
    assert (result.content, result.ended) == ("Noon.", "answered")
    ids = [call["id"] for call in sent[1]["tool_calls"]]
    assert len(set(ids)) == 2
    assert [result["tool_call_id"] for result in sent[2:]] == ids


def test_a_refusal_ends_the_loop_and_can_be_sent_back():
    message = {"role": "assistant", "content": None, "refusal": "I won't."}
    with serve(sends(message, [])) as server:
        llm = client(server.url)
        result = run_tools(llm, USER, [now])
        llm.completion([*result.messages, *USER], TOOLS)
        sent = server.requests[1]["messages"]
    assert (result.content, result.ended) == ("I won't.", "refused")
    assert sent[1] == {"role": "assistant", "content": "I won't."}


def now() -> str:
    """The time."""
    return "noon"


@pytest.mark.parametrize("content", [{"a": 1}, [{"type": "image_url", "image_url": "x"}], ["a"], 5, [[]]], ids=str)
def test_content_that_is_not_text_is_malformed(content: Any):
    choice = {"message": {"content": content}, "finish_reason": "stop"}
    with pytest.raises(MalformedAnswer):
        read_response({"choices": [choice]}, "tools", tools=())
    with pytest.raises(MalformedAnswer):
        AnswerStream("tools", tools=()).add({"choices": [{"delta": {"content": content}}]})


TEXTS = st.text(alphabet='ab [{"}],:é\n', max_size=30) | st.sampled_from(
    [f'I look.\n[{{"name": "now", "arguments": {TEXT}}}]', '[TOOL_CALLS][{"name": "now", "arguments": {}}]', "[TOOL_CA"]
)
VALUES = st.dictionaries(st.text(max_size=4), st.text(max_size=6) | st.integers() | st.none(), max_size=3)
ARGUMENTS = st.one_of(VALUES, VALUES.map(json.dumps), st.none(), st.sampled_from(["", "null", " ", '{"a": ', "[1]"]))
CALLS = st.builds(
    function, ARGUMENTS, st.sampled_from(["a", "b", "a_2", None, "", 7]), st.sampled_from(["now", "get_weather"])
)


@st.composite
def pieces(draw: Any, text: str) -> list[str]:
    """Splits a text at random positions."""
    cuts = sorted(draw(st.lists(st.integers(0, len(text)), max_size=4)))
    return [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]


@st.composite
def answers(draw: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Draws a message, and deltas that stream it: texts in pieces, the calls sequential or interleaved by index."""
    content, refusal, reasoning = (draw(st.none() | TEXTS) for _ in range(3))
    calls = draw(st.lists(CALLS, max_size=3))
    legacy = draw(st.none() | CALLS.map(lambda call: call["function"]))
    message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": refusal, "tool_calls": calls or None}
    message |= {"reasoning_content": reasoning, "function_call": legacy}
    deltas: list[dict[str, Any]] = [{"role": "assistant", "content": ""}]
    for key, text in (("reasoning_content", reasoning), ("content", content), ("refusal", refusal)):
        deltas += [{key: piece} for piece in draw(pieces(text or ""))]
    if legacy is not None:
        deltas.append({"function_call": legacy})
    streams = []
    for index, call in enumerate(calls):
        text = call["function"]["arguments"]
        cut = draw(pieces(text)) if isinstance(text, str) else [text]
        repeats = draw(st.booleans())
        first = {"index": index} | call | {"function": call["function"] | {"arguments": cut[0]}}
        rest = [
            {"index": index, "function": {"arguments": piece} | ({"name": call["function"]["name"]} if repeats else {})}
            for piece in cut[1:]
        ]
        streams.append([first, *rest])
    while any(streams):  # deltas of parallel calls may be interleaved
        stream = draw(st.sampled_from([stream for stream in streams if stream]))
        deltas.append({"tool_calls": [stream.pop(0)]})
    return message, deltas


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    answers(), st.sampled_from(["stop", "length", "tool_calls"]), st.booleans(), st.sampled_from(["tools", "xlam_v1"])
)
def test_any_answer_is_the_same_streamed_and_whole(
    answer: tuple[dict[str, Any], list[dict[str, Any]]], finish: str, with_tools: bool, format: str
):
    message, deltas = answer
    whole = read_response(
        {"choices": [{"message": message, "finish_reason": finish}]}, format, () if with_tools else None
    )
    stream = AnswerStream(format, () if with_tools else None)
    text = "".join(stream.add({"choices": [{"index": 0, "delta": delta}]}) for delta in deltas)
    stream.add({"choices": [{"index": 0, "delta": {}, "finish_reason": finish}]})
    finished = stream.finish()
    assert finished is not None
    rest, streamed = finished
    assert streamed == whole
    [choice] = whole["choices"]
    assert text + rest == choice["message"]["content"]
    ids = [call["id"] for call in choice["message"]["tool_calls"] if call["id"] is not None]
    assert len(set(ids)) == len(ids)


@settings(max_examples=10, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(answers())
def test_any_answer_is_the_same_over_http(
    server: Running, llm: xLAMChatCompletion, answer: tuple[dict[str, Any], list[dict[str, Any]]]
):
    server.answer(sends(*answer))
    choices, evaluated = parse_everywhere(llm)
    assert choices == choices[:1] * 4
    message = choices[0]["message"]
    readable = not message["tool_calls"] or "error" not in choices[0]
    for outcome in evaluated:
        assert isinstance(outcome, Answer) == readable
        if isinstance(outcome, Answer):
            check_evaluated(outcome, message)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["choices", "message", "delta", "content", "tool_calls", "function", "index", "id", "name", "arguments"]
            )
            | st.text(max_size=3),
            inner,
            max_size=4,
        )
    ),
    max_leaves=20,
)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(JSON, st.sampled_from(["message", "delta"]))
def test_any_json_from_a_server_is_parsed_or_malformed(value: Any, key: str):
    for sent in (value, {"choices": [{key: value, "finish_reason": "stop"}]}):
        with contextlib.suppress(MalformedAnswer):
            assert read_response(sent, "tools", tools=())["choices"]
        stream = AnswerStream("tools", tools=())
        try:
            stream.add(sent)
        except (MalformedAnswer, UserError):  # the latter: several choices
            continue
        stream.finish()
