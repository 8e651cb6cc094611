"""The FastChat worker between a fake vLLM server and a fake controller. test_vllm.py tests it with FastChat itself."""

import json
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import pytest
from fake_server import Handler, Running, answers, events, refuses, says, serve
from support import Commands, wait_until

from serving.fastchat_worker import Worker, post, running
from xlam_jax.errors import UserError

ANSWER = 'I look.\n[{"name": "get_weather", "arguments": {"city": "Oslo"}}]'
TURNS = [
    {"role": "system", "content": "Be brief: {really}."},
    {"role": "user", "content": ": Weather in Oslo?\nuser: and Bergen"},
    {"role": "assistant", "content": ""},
    {"role": "user", "content": " again"},
]


def vllm(handler: Handler, request: dict[str, Any]) -> None:
    """Replies as vLLM would: counts words as tokens, and always sends the same answer."""
    if handler.path == "/tokenize":
        contents = [message["content"] for message in request.get("messages", ())]
        text = " ".join(contents) if "messages" in request else request["prompt"]
        handler.send(200, json.dumps({"count": len(text.split()), "max_model_len": 64}))
    elif handler.path == "/v1/completions":
        handler.send_response(200)
        handler.send_header("content-type", "text/event-stream")
        handler.send_header("transfer-encoding", "chunked")
        handler.end_headers()
        for text, finish in (("on", None), ("wards", "length")):
            scores = {"tokens": [text], "token_logprobs": [-1.0], "top_logprobs": None, "text_offset": [0]}
            choice = {"index": 0, "text": text, "finish_reason": finish, "logprobs": scores}
            handler.send_event(json.dumps({"id": "1", "object": "text_completion", "choices": [choice]}))
        handler.send_event("[DONE]")
        handler.wfile.write(b"0\r\n\r\n")
    else:
        says(ANSWER, finish="stop")(handler, request)


def joined(template: dict[str, Any], messages: list[dict[str, str]]) -> str:
    """Joins messages into a prompt as FastChat does for the template's separator style."""
    assert template["sep_style"] == 2
    system = next((message["content"] for message in messages if message["role"] == "system"), "")
    text = template["system_template"].format(system_message=system) + template["sep"]
    names: dict[str, str] = dict(zip(("user", "assistant"), template["roles"], strict=True))
    turns = [message for message in messages if message["role"] != "system"]
    for turn in [*turns, {"role": "assistant", "content": ""}]:
        text += names[turn["role"]] + (f": {turn['content']}{template['sep2']}" if turn["content"] else ":")
    return text


@contextmanager
def controller(exist: bool = True) -> Iterator[Running]:
    def reply(handler: Handler, request: dict[str, Any]) -> None:
        request["path"] = handler.path
        handler.send(200, json.dumps({"exist": exist} if handler.path.endswith("beat") else None))

    with serve(reply) as fake:
        yield fake


@pytest.fixture
def port() -> int:
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture
def model() -> Iterator[Running]:
    with serve(vllm) as fake:
        yield fake


@pytest.fixture
def worker(model: Running, port: int) -> Iterator[str]:
    with controller() as fake:
        address = f"http://127.0.0.1:{port}"
        with running(Worker(model.url, address, fake.url.removesuffix("/v1")), "127.0.0.1", port):
            assert fake.requests == [
                {
                    "path": "/register_worker",
                    "worker_name": address,
                    "check_heart_beat": True,
                    "worker_status": {"model_names": ["tiny"], "speed": 1, "queue_length": 0},
                    "multimodal": False,
                }
            ]
            yield address


def fetch_template(worker: str) -> dict[str, Any]:
    return post(f"{worker}/worker_get_conv_template", {"model": "tiny"})["conv"]


@pytest.mark.parametrize("turns", [TURNS, TURNS[1:], TURNS[:2], [{"role": "user", "content": ""}]])
def test_a_conversation_reaches_the_model_unchanged(turns: list[dict[str, str]], worker: str, model: Running):
    params = {"model": "tiny", "prompt": joined(fetch_template(worker), turns), "temperature": 0.0, "max_new_tokens": 9,
              "top_k": 5, "stop": [], "echo": False, "logprobs": None, "stop_token_ids": None}  # fmt: skip
    answer = post(f"{worker}/worker_generate", params)
    assert (answer["text"], answer["error_code"], answer["finish_reason"]) == (ANSWER, 0, "stop")
    request = model.requests[-1]
    assert request.pop("messages") == turns
    assert request == {"model": "tiny", "temperature": 0.0, "max_tokens": 9, "top_k": 5, "stream": True,
                       "stream_options": {"include_usage": True}}  # fmt: skip
    words = sum(len(turn["content"].split()) for turn in turns)
    assert post(f"{worker}/count_token", {"prompt": params["prompt"]}) == {"count": words, "error_code": 0}
    assert post(f"{worker}/model_details", {"model": "tiny"}) == {"context_length": 64}


def test_each_item_of_a_stream_extends_the_previous_one(worker: str):
    params = {"model": "tiny", "prompt": joined(fetch_template(worker), TURNS), "temperature": 0.5, "stop": ["x"]}
    body = urllib.request.Request(f"{worker}/worker_generate_stream", json.dumps(params).encode())
    with urllib.request.urlopen(body) as answer:
        pieces = [json.loads(piece) for piece in answer.read().split(b"\0") if piece]
    texts = [piece["text"] for piece in pieces]
    assert all(after.startswith(before) for before, after in pairwise(texts))
    assert len(set(texts)) > 5
    assert (texts[-1], pieces[-1]["finish_reason"]) == (ANSWER, "stop")
    assert all(piece["finish_reason"] is None for piece in pieces[:-1])


def test_a_text_without_turns_is_completed(worker: str, model: Running):
    answer = post(f"{worker}/worker_generate", {"model": "tiny", "prompt": "user: go", "echo": True, "logprobs": 1})
    assert (answer["text"], answer["finish_reason"]) == ("onwards", "length")
    assert answer["logprobs"]["tokens"] == ["on", "wards"]
    assert {"prompt": "user: go", "echo": True, "logprobs": 1}.items() <= model.requests[-1].items()
    assert post(f"{worker}/count_token", {"prompt": "user: go"})["count"] == 2


@pytest.mark.parametrize(
    ("reply", "code", "message"),
    [
        (refuses(400, "longer than the maximum context length of 64"), 40303, "longer than"),
        (refuses(429, "slow down"), 42903, "slow down"),
        (refuses(500, "out of memory"), 50001, "the model's server failed: out of memory"),
        (answers(200, "<html>", "text/html"), 50001, "broke off after 0 characters"),
        (events([{"content": "abc"}], None), 50001, "broke off after 3 characters"),
    ],
)
def test_errors_of_the_server_are_reported(reply: Any, code: int, message: str, port: int):
    with serve(reply) as model, controller() as fake:
        address = f"http://127.0.0.1:{port}"
        with running(Worker(model.url, address, fake.url.removesuffix("/v1")), "127.0.0.1", port):
            answer = post(
                f"{address}/worker_generate", {"model": "tiny", "prompt": joined(fetch_template(address), TURNS)}
            )
            assert answer["error_code"] == code
            assert message in answer["text"]


def test_the_worker_registers_again_with_a_restarted_controller(model: Running, port: int):
    with controller(exist=False) as fake:
        worker = Worker(model.url, f"http://127.0.0.1:{port}", fake.url.removesuffix("/v1"), beat=0.05)
        with running(worker, "127.0.0.1", port):
            wait_until(lambda: len(fake.requests) >= 4)
    paths = [request["path"] for request in fake.requests]
    assert paths[:4] == ["/register_worker", "/receive_heart_beat"] * 2


def test_a_worker_address_of_another_server(model: Running, port: int):
    with controller() as fake:
        started = running(Worker(model.url, fake.url, fake.url.removesuffix("/v1")), "127.0.0.1", port)
        with pytest.raises(UserError, match="does not lead to this worker"):
            started.__enter__()


def test_invalid_addresses(commands: Commands, model: Running, port: int):
    unused = ("--controller-address", f"http://127.0.0.1:{port}")
    error = commands.run("serving.fastchat_worker", "--base-url", model.url, *unused, code=2).stderr
    assert "no controller of FastChat answers there" in error
    assert "fastchat.serve.controller" in error
    with controller() as fake:
        options = ("--controller-address", fake.url.removesuffix("/v1"), "--port", port)
        command = ("serving.fastchat_worker", "--base-url", f"http://127.0.0.1:{port}/v1", *options)
        assert "is the server running?" in commands.run(*command, code=2).stderr
    error = commands.run("serving.fastchat_worker", code=2).stderr
    assert "--base-url" in error
    assert "--model" in error
