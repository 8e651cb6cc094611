"""Answers, kinds of faults, and the retries of requests."""

import asyncio
import json
import socket
import time
from typing import Any

import pytest
from fake_server import Handler, Reply, answers, call, events, hangs_up, never, refuses, says, serve
from support import deadline, wait_until

from xlam_jax.errors import UserError
from xlam_jax.evaluate.endpoint import KINDS, Answer, EndpointFault, Model

ASK = [{"role": "user", "content": "Weather in Oslo?"}]
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
CALL = says("I look.", [call("weather", {})], "tool_calls")


def chat(url: str, tools: list[dict[str, Any]] | None = None, **settings: Any) -> Answer:
    async def ask() -> Answer:
        async with Model.connect(url, "tiny", **{"timeout": deadline(5.0), "retries": 0, **settings}) as model:
            return await model.chat(ASK, tools)

    return asyncio.run(ask())


def fault(*replies: Reply, **settings: Any) -> tuple[EndpointFault, int]:
    """Returns the fault, and the number of requests."""
    with serve(*replies) as server:
        with pytest.raises(EndpointFault) as caught:
            chat(server.url, [TOOL], **settings)
        wait_until(lambda: server.requests)  # with a short timeout the client ends before the server has counted
        count = len(server.requests)
    assert caught.value.kind in KINDS
    assert caught.value.messages == ASK
    return caught.value, count


def cut_body(handler: Handler, request: dict[str, Any]) -> None:
    """Sends less than the content-length that it declares."""
    handler.send_response(200)
    handler.send_header("content-type", "application/json")
    handler.send_header("content-length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"choices": [')
    handler.close_connection = True


BAD_CALL = says(None, [call("weather", '{"city": ')], "tool_calls")
TOO_LONG = refuses(400, "This model's maximum context length is 2048 tokens, you asked for 3000.")
CUT = events([{"content": "It is"}], None, cut=True)


@pytest.mark.parametrize(
    ("reply", "kind", "settings", "requests"),
    [
        (never, "timeout", {"timeout": 0.2}, 1),
        (refuses(429, "slow down"), "rate-limited", {"retries": 1}, 2),
        (refuses(500, "CUDA error"), "server-error", {"retries": 1}, 2),
        (refuses(503, "loading"), "server-error", {}, 1),
        (TOO_LONG, "over-length", {"retries": 2}, 1),
        (refuses(400, "bad tool schema in context of x"), "bad-request", {}, 1),
        (refuses(400, "unknown parameter"), "bad-request", {"retries": 2}, 1),
        (hangs_up, "broken-stream", {"retries": 1}, 2),
        (cut_body, "broken-stream", {}, 1),
        (CUT, "broken-stream", {"stream": True, "retries": 1}, 2),
        (events([{"content": "It is"}], None), "broken-stream", {"stream": True}, 1),
        (BAD_CALL, "malformed", {"retries": 1}, 2),
        (BAD_CALL, "malformed", {"stream": True}, 1),
        (answers(200, "{}"), "malformed", {"retries": 1}, 2),
        (answers(200, "<html>a proxy's page</html>", "text/html"), "malformed", {}, 1),
        (answers(200, '{"choices": [{', "application/json"), "malformed", {}, 1),
        (answers(200, "[" * 100_000, "application/json"), "malformed", {}, 1),
        (events([{"content": 5}], "stop"), "malformed", {"stream": True}, 1),
        (events([{"tool_calls": {"index": 0}}], "stop"), "malformed", {"stream": True}, 1),
        (events([{"tool_calls": [{"index": 0, "function": "a"}]}], "stop"), "malformed", {"stream": True}, 1),
        (
            events([{"tool_calls": [{"index": 0, "function": {"arguments": {"a": 1}}}]}], "stop"),
            "malformed",
            {"stream": True},
            1,
        ),
    ],
)
def test_faults(reply: Reply, kind: str, settings: dict[str, Any], requests: int):
    error, count = fault(reply, **settings)
    assert error.kind == kind, error
    assert count == requests


def test_refused():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    with pytest.raises(EndpointFault, match="cannot be reached") as caught:
        chat(url)
    assert caught.value.kind == "refused"


@pytest.mark.parametrize("status", [401, 403, 404])
def test_permanent_failures_end_the_run(status: int):
    with serve(refuses(status, "no")) as server, pytest.raises(UserError, match=str(status)):
        chat(server.url)


@pytest.mark.parametrize(
    ("replies", "stream"),
    [
        ((refuses(500, "x"), refuses(429, "x"), CALL), False),
        ((hangs_up, cut_body, CALL), False),
        ((BAD_CALL, answers(200, "{}"), CALL), False),
        ((CUT, BAD_CALL, CALL), True),
    ],
)
def test_temporary_faults_are_retried(replies: tuple[Reply, ...], stream: bool):
    with serve(*replies) as server:
        answer = chat(server.url, [TOOL], retries=2, stream=stream)
        assert len(server.requests) == 3
    assert answer.calls[0].name == "weather"


def test_retry_after():
    times: list[float] = []

    def later(handler: Handler, request: dict[str, Any]) -> None:
        times.append(time.monotonic())
        handler.send_response(429)
        handler.send_header("retry-after", "1")
        handler.send_header("content-length", "0")
        handler.end_headers()

    def now(handler: Handler, request: dict[str, Any]) -> None:
        times.append(time.monotonic())
        CALL(handler, request)

    with serve(later, now) as server:
        chat(server.url, retries=1)
    assert times[1] - times[0] > 0.95  # without the header the pause is at most half a second


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("reply", "content"),
    [
        (says('[{"name": "weather", "arguments": {'), '[{"name": "weather", "arguments": {'),
        (says("I do not know."), "I do not know."),
        (says("", finish="length"), ""),
        (says(None), ""),
    ],
    ids=["half-a-call", "text", "nothing-long", "nothing"],
)
def test_unparsable_texts_are_answers(reply: Reply, content: str, stream: bool):
    with serve(reply) as server:
        answer = chat(server.url, [TOOL], stream=stream)
        assert len(server.requests) == 1
    assert answer.content == content
    assert answer.calls == ()
    assert answer.message == {"role": "assistant", "content": content}


def test_calls_in_text_and_duplicate_ids():
    with serve(says(json.dumps([{"name": "weather", "arguments": {}}] * 2))) as server:
        answer = chat(server.url, [TOOL])
    assert [call_.name for call_ in answer.calls] == ["weather"] * 2
    assert len({call_.id for call_ in answer.calls}) == 2
    twice = says(None, [call("weather", {}), call("weather", {})], "tool_calls")
    with serve(twice) as server:
        answer = chat(server.url, [TOOL])
    assert len({call_["id"] for call_ in answer.message["tool_calls"]}) == 2


def test_requests_are_greedy():
    with serve(CALL) as server:
        chat(server.url)
        chat(server.url, temperature=0.7, seed=3, max_tokens=9)
        greedy, sampled = server.requests
    assert greedy["temperature"] == 0
    assert "seed" not in greedy
    assert (sampled["temperature"], sampled["seed"], sampled["max_tokens"]) == (0.7, 3, 9)
