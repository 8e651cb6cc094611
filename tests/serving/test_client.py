"""Tests the client against a real server in a thread."""

import asyncio
import json
import re
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from fake_server import Reply, answers, call, events, hangs_up, never, refuses, says, serve
from support import ROOT, deadline

from xlam_jax.client.completion import BadOutput, ServerError, xLAMChatCompletion, xLAMConfig
from xlam_jax.data.formats.xlam_v1 import INSTRUCTIONS, TASK_INSTRUCTION
from xlam_jax.errors import UserError

USER = [{"role": "user", "content": "Weather in Oslo?"}]
TOOL = {
    "name": "get_weather",
    "description": "Current weather",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
CALLS = [call("get_weather", {"city": "Oslo"}, "a"), call("get_weather", {}, "b")]
PARSED = [
    {"name": "get_weather", "arguments": {"city": "Oslo"}, "id": "a"},
    {"name": "get_weather", "arguments": {}, "id": "b"},
]
WIRE = '[{"name": "get_weather", "arguments": {"city": "Oslo"}}, {"name": "get_weather", "arguments": {}}]'
FROM_TEXT = [parsed | {"id": None} for parsed in PARSED]


def client(url: str, **config: Any) -> xLAMChatCompletion:
    settings: dict[str, Any] = {"timeout": deadline(5.0)} | config
    return xLAMChatCompletion.from_config(xLAMConfig(base_url=url, model="tiny", **settings))


def by_completion(llm: xLAMChatCompletion, *request: Any, **options: Any) -> dict[str, Any]:
    return llm.completion(*request, **options)


def by_stream(llm: xLAMChatCompletion, *request: Any, **options: Any) -> dict[str, Any]:
    *pieces, answer = llm.stream(*request, **options)
    assert isinstance(answer, dict)
    if answer["choices"][0]["message"]["tool_calls"] or "error" not in answer["choices"][0]:
        assert "".join(map(str, pieces)) == answer["choices"][0]["message"]["content"]
    return answer


def by_acompletion(llm: xLAMChatCompletion, *request: Any) -> dict[str, Any]:
    async def ask() -> dict[str, Any]:
        async with llm:
            return await llm.acompletion(*request)

    return asyncio.run(ask())


def by_astream(llm: xLAMChatCompletion, *request: Any) -> dict[str, Any]:
    async def ask() -> dict[str, Any]:
        async with llm:
            pieces: AsyncIterator[Any] = llm.astream(*request)
            *_, answer = [piece async for piece in pieces]
            return answer

    return asyncio.run(ask())


Ask = Callable[..., dict[str, Any]]
WAYS: list[Ask] = [by_completion, by_stream, by_acompletion, by_astream]
every_way = pytest.mark.parametrize("ask", WAYS)
two_ways = pytest.mark.parametrize("ask", [by_completion, by_astream])


@every_way
@pytest.mark.parametrize(
    ("reply", "content", "calls", "finish"),
    [
        (says("It is 3 °C."), "It is 3 °C.", [], "stop"),
        (says("I look.", CALLS, "tool_calls"), "I look.", PARSED, "tool_calls"),
        (says(None, CALLS, "tool_calls"), "", PARSED, "tool_calls"),
        (says(f"I look.\n{WIRE}"), "I look.", FROM_TEXT, "stop"),  # a server without a tool parser
        (says('A person: {"name": "Bo"}, [{"a": 1}]'), 'A person: {"name": "Bo"}, [{"a": 1}]', [], "stop"),
        (says("It is", finish="length"), "It is", [], "length"),
    ],
    ids=["text", "calls", "only-calls", "calls-in-text", "json-in-text", "cut-off-text"],
)
def test_answers(ask: Ask, reply: Reply, content: str, calls: list[Any], finish: str):
    with serve(reply) as server:
        choice = ask(client(server.url), USER, [TOOL])["choices"][0]
    message = {"role": "assistant", "content": content, "tool_calls": calls}
    assert choice == {"message": message, "finish_reason": finish}


@every_way
def test_answers_of_a_model_of_format_v1(ask: Ask):
    written = json.dumps({"thought": "I look.", "tool_calls": json.loads(WIRE)})
    with serve(says(written), says('{"thought": "3 °C.", "tool_calls": []}'), says("It is 3 °C.")) as server:
        llm = client(server.url, format="xlam_v1", bad_output="mark")
        choices = [ask(llm, USER, [TOOL])["choices"][0] for _ in range(3)]
    assert choices[0]["message"] == {"role": "assistant", "content": "I look.", "tool_calls": FROM_TEXT}
    assert choices[1]["message"] == {"role": "assistant", "content": "3 °C.", "tool_calls": []}
    assert "It is 3 °C." in choices[2]["error"]
    assert ["error" in choice for choice in choices] == [False, False, True]
    [sent] = server.requests[0]["messages"]
    assert set(server.requests[0]) <= {"messages", "model", "temperature", "stream"}
    assert sent["role"] == "user"
    assert f"[BEGIN OF TASK INSTRUCTION]\n{TASK_INSTRUCTION}\n[END" in sent["content"]
    assert '"parameters": {"city": {"type": "string"}}' in sent["content"]
    assert INSTRUCTIONS[0] in sent["content"]


README_MESSAGES = [
    {"role": "system", "content": "You are a helpful assistant."},
    {"role": "user", "content": "What's the weather like in New York?"},
    {
        "role": "assistant",
        "content": "To get the weather information for New York, I'll need to use the get_weather function.",
        "tool_calls": {"name": "get_weather", "arguments": '{"location": "New York", "unit": "fahrenheit"}'},
    },
    {"role": "tool", "name": "get_weather", "content": '{"temperature": 72, "description": "Partly cloudy"}'},
    {"role": "user", "content": "Now, search for the weather in San Francisco."},
]
"""A conversation in the format of xLAM's own client: one flat call, no ids."""


@pytest.mark.parametrize("ask", [by_completion, by_stream])
def test_without_tools_text_like_calls_is_content(ask: Any):
    text = f"[TOOL_CALLS]{WIRE}\n"
    with serve(says(text), says(text)) as server:
        answers = [ask(client(server.url), USER), ask(client(server.url), USER, [TOOL], tool_choice="none")]
    for answer in answers:
        [choice] = answer["choices"]
        assert choice["message"] == {"role": "assistant", "content": text, "tool_calls": []}
        assert "error" not in choice


@pytest.mark.parametrize("ask", [by_completion, by_stream])
def test_a_mixture_of_valid_and_malformed_calls_is_bad_output(ask: Any):
    text = f"[TOOL_CALLS]{WIRE[:-1]}[TOOL_CALLS]{WIRE}"
    with serve(says(text)) as server:
        answer = ask(client(server.url, bad_output="mark"), USER, [TOOL])
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": text, "tool_calls": []}
    assert "cannot be read" in answer["choices"][0]["error"]


def test_flat_tools_and_calls_are_sent_in_openai_format():
    with serve(says("fine")) as server:
        client(server.url).completion(README_MESSAGES, tools=[TOOL, {"type": "function", "function": TOOL}][:1], seed=7)
        client(server.url).completion(README_MESSAGES, tools=[{"type": "function", "function": TOOL}], temperature=1)
    first, second = server.requests
    assert first["tools"] == second["tools"] == [{"type": "function", "function": TOOL}]
    assert (first["model"], first["temperature"], first["seed"], second["temperature"]) == ("tiny", 0.0, 7, 1)
    assert [message["role"] for message in first["messages"]] == ["system", "user", "assistant", "tool", "user"]
    [sent] = first["messages"][2]["tool_calls"]
    assert sent["type"] == "function"
    assert json.loads(sent["function"]["arguments"]) == {"location": "New York", "unit": "fahrenheit"}
    assert first["messages"][3]["tool_call_id"] == sent["id"]


@pytest.mark.parametrize("format", ["tools", "xlam_v1"])
def test_results_are_sent_in_the_order_of_their_calls(format: str):
    """Formats without ids match results to calls by position."""
    message = {"role": "assistant", "content": "", "tool_calls": CALLS}
    results = [{"role": "tool", "tool_call_id": id, "content": f"result {id}"} for id in ("b", "a")]
    with serve(says('{"thought": "Fine.", "tool_calls": []}')) as server:
        client(server.url, format=format).completion([*USER, message, *results], [TOOL])
    sent = json.dumps(server.requests[0]["messages"])
    assert sent.index("result a") < sent.index("result b")


def test_an_answer_can_be_appended_to_the_history():
    with serve(says("I look.", CALLS, "tool_calls"), says("3 °C.")) as server:
        llm = client(server.url)
        message = llm.completion(USER, [TOOL])["choices"][0]["message"]
        results = [{"role": "tool", "tool_call_id": call["id"], "content": "3"} for call in message["tool_calls"]]
        llm.completion([*USER, message, *results], [TOOL])
    sent = server.requests[1]["messages"][1]["tool_calls"]
    assert [(call["id"], json.loads(call["function"]["arguments"])) for call in sent] == [
        ("a", {"city": "Oslo"}),
        ("b", {}),
    ]


def test_a_history_of_format_v1():
    with serve(says('{"thought": "", "tool_calls": []}')) as server:
        client(server.url, format="xlam_v1", bad_output="mark", task_instruction="Do it.", format_instruction="So.") \
            .completion(README_MESSAGES, [TOOL])  # fmt: skip
    text = server.requests[0]["messages"][0]["content"]
    assert text.startswith("You are a helpful assistant.\n\n[BEGIN OF TASK INSTRUCTION]\nDo it.\n")
    assert "[BEGIN OF FORMAT INSTRUCTION]\nSo.\n" in text
    steps = json.loads(re.findall(r"\[BEGIN OF HISTORY STEPS\]\n(.*)\n\[END", text)[0])
    assert steps[0]["tool_calls"] == [
        {"name": "get_weather", "arguments": {"location": "New York", "unit": "fahrenheit"}}
    ]
    assert steps[0]["user_input"] == README_MESSAGES[-1]["content"]


@two_ways
@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        (says(""), "is empty"),
        (says(None, finish="length"), "is empty (cut off at max_tokens)"),
        (says(" \n\t\n", finish="length"), "is empty (cut off"),
        (says("", [call("get_weather", '{"city": ')], "length"), "cannot be read"),
        (says("", [call("get_weather", '["Oslo"]')]), "cannot be read"),
        (says('[{"name": "get_weather", "argum', finish="length"), 'cannot be read: \'[{"name": "get_weather", "argum'),
        (says('[TOOL_CALLS]get_weather{"city"'), "cannot be read"),
        (says('[{"name": "get_weather", "arguments": {"city": "Oslo"}'), "cannot be read"),
    ],
    ids=["empty", "cut-empty", "blank", "cut-arguments", "list", "cut-array", "token", "malformed"],
)
def test_bad_output_is_never_an_empty_success(ask: Ask, reply: Reply, expected: str):
    with serve(reply) as server:
        with pytest.raises(BadOutput, match=re.escape(expected)) as raised:
            ask(client(server.url), USER, [TOOL])
        marked = ask(client(server.url, bad_output="mark"), USER, [TOOL])
    assert expected in marked["choices"][0]["error"]
    assert raised.value.answer == marked


@two_ways
@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        (refuses(500, "boom"), "answered 500: boom"),
        (
            refuses(400, "This model's maximum context length is 2048 tokens, however you requested 4000 tokens"),
            "maximum context length is 2048 tokens, however you requested 4000 tokens; shorten the conversation",
        ),
        (answers(400, "nope", "text/plain"), "answered 400: nope"),
        (refuses(404, "The model `tiny` does not exist."), "does not exist.; base_url must end in /v1"),
        (answers(401, "{}"), "answered 401: "),
        (hangs_up, "is the server running?"),
    ],
    ids=["500", "400-over-length", "400-text", "404", "401", "nothing"],
)
def test_servers_that_refuse(ask: Ask, reply: Reply, expected: str):
    with serve(reply) as server, pytest.raises(ServerError) as error:
        ask(client(server.url, retries=0), USER, [TOOL])
    assert expected in str(error.value)
    assert server.url in str(error.value)


@two_ways
@pytest.mark.parametrize(
    "reply",
    [
        answers(200, "<html>It works!</html>", "text/html"),
        answers(200, "{oops"),
        answers(200, "[1]"),
        answers(200, "{}"),
        answers(200, '"hello"'),
        answers(200, '{"choices": [{"message": 3}]}'),
        answers(200, '{"choices": [{"message": {"content": ["x"]}}]}'),
        answers(200, ""),
    ],
    ids=["html", "no-json", "list", "no-choices", "text", "no-message", "parts", "empty"],
)
def test_garbage_is_a_server_error(ask: Ask, reply: Reply):
    with serve(reply) as server, pytest.raises(ServerError) as error:
        ask(client(server.url, retries=0), USER, [TOOL])
    assert server.url in str(error.value)


@pytest.mark.parametrize("ask", [by_stream, by_astream])
@pytest.mark.parametrize(
    "reply",
    [
        events([{"content": "It is"}], None),
        events([{"content": "It is"}], None, cut=True),
        events([{"tool_calls": [{"index": 0} | CALLS[0]]}], None),
        answers(200, 'data: {"error": {"message": "the engine died", "code": 500}}\n\n', "text/event-stream"),
        answers(200, "data: {oops\n\n", "text/event-stream"),
        answers(200, "data: [1]\n\n", "text/event-stream"),
    ],
    ids=["ends", "cut", "ends-in-calls", "error-event", "no-json", "list"],
)
def test_a_stream_that_breaks_off(ask: Ask, reply: Reply):
    with serve(reply) as server, pytest.raises(ServerError) as error:
        ask(client(server.url, retries=0), USER, [TOOL])
    assert server.url in str(error.value)


@two_ways
def test_overload_and_failure_are_retried(ask: Ask):
    with serve(refuses(503, "busy"), refuses(429, "busy"), says("fine")) as server:
        answer = ask(client(server.url, retries=2), USER)
        assert answer["choices"][0]["message"]["content"] == "fine"
    assert len(server.requests) == 3
    with serve(refuses(400, "no"), says("fine")) as server, pytest.raises(ServerError):
        ask(client(server.url, retries=2), USER)


@two_ways
def test_time_out(ask: Ask):
    with serve(never) as server, pytest.raises(ServerError, match=r"no answer within 0\.2 seconds"):
        ask(client(server.url, retries=0, timeout=0.2), USER)


@pytest.mark.nightly
@two_ways
def test_time_out_in_real_time(ask: Ask):
    with serve(never) as server:
        start = time.monotonic()
        with pytest.raises(ServerError):
            ask(client(server.url, retries=0, timeout=0.2), USER)
        assert 0.2 <= time.monotonic() - start < 5


def test_an_unreachable_server():
    with serve(says("x")) as server:
        url = server.url
    with pytest.raises(ServerError, match="cannot be reached"):
        client(url, retries=0).completion(USER)


def test_models_lists_the_names():
    with serve(says("x")) as server:
        assert client(server.url).models() == ["tiny"]


@pytest.mark.parametrize(
    ("messages", "tools", "options", "expected"),
    [
        ([], None, {}, "malformed"),
        ([{"role": "robot", "content": "x"}], None, {}, "robot"),
        (USER, [{"description": "no name"}], {}, "name"),
        (USER, None, {"stream": True}, r"call stream\(\)"),
    ],
    ids=["none", "role", "tool", "stream"],
)
def test_malformed_requests_are_not_sent(messages: Any, tools: Any, options: Any, expected: str):
    with serve(says("x")) as server, pytest.raises(UserError, match=expected):
        client(server.url).completion(messages, tools, **options)
    assert server.requests == []


def test_importing_the_client_loads_no_large_package():
    code = (
        "import sys, xlam_jax.client.completion; print({'jax', 'numpy', 'openai', 'torch', 'vllm'} & set(sys.modules))"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert process.stdout.strip() == "set()"


def test_streamed_calls_with_the_same_index_stay_separate():
    pieces = [{"tool_calls": [{"index": 0, "id": id, "function": {"name": "now", "arguments": ""}}]} for id in "ab"]
    with serve(
        events([*pieces, {"tool_calls": [{"index": 0, "function": {"arguments": '{"x": 1}'}}]}], "stop")
    ) as server:
        *_, last = client(server.url).stream(USER, [TOOL])
    assert isinstance(last, dict)
    calls = [(call["id"], call["arguments"]) for call in last["choices"][0]["message"]["tool_calls"]]
    assert calls == [("a", {}), ("b", {"x": 1})]
