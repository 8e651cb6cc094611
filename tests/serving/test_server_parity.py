"""`serving.parity` names the difference between a server and a checkpoint; the fake server alters the checkpoint."""

import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, NamedTuple

import numpy as np
import pytest
from support import Commands

from serving.parity import REQUESTS, TOOLS, Answer, Difference, Server, compare, compare_required_call, score
from xlam_jax.data.completion import named, read_completion
from xlam_jax.data.render import render_prompt
from xlam_jax.generate import find_model
from xlam_jax.models.generation import generate


@pytest.fixture(scope="module")
def model(exported: Path) -> Any:
    checkpoint = find_model(exported)
    return checkpoint.load(), checkpoint.tokenizer


@pytest.fixture(scope="module")
def answer(model: Any) -> Answer:
    """The answer of a correct server to the first request."""
    decoder, tokenizer = model
    prompt = render_prompt(REQUESTS[0], TOOLS, tokenizer)
    [completion] = generate(decoder, [prompt], eos_id=tokenizer.eos_token_id, max_new_tokens=8)
    scores = score(decoder, prompt + completion)
    calls = named(read_completion(completion, tokenizer).calls)
    return Answer(prompt, scores[: len(prompt) - 1], completion, scores[len(prompt) - 1 :], calls)


class Served(NamedTuple):
    """A server, and the requests for chat completions that it received."""

    url: str
    requests: list[dict[str, Any]]


def compared(model: Any, answer: Answer) -> tuple[Difference | None, float]:
    decoder, tokenizer = model
    return compare(decoder, tokenizer, REQUESTS[0], TOOLS, answer, 2e-3)


def kind(model: Any, answer: Answer) -> str | None:
    difference, _ = compared(model, answer)
    return difference and difference.kind


def test_equal_answers_have_no_difference(model: Any, answer: Answer):
    assert compared(model, answer) == (None, 0.0)


def test_scores_are_log_probabilities(model: Any, answer: Answer):
    """The greedy token is at least as likely as any other."""
    decoder, _ = model
    last = len(answer.prompt)
    for other in (3, 40, 500):
        assert score(decoder, [*answer.prompt, other])[last - 1] <= answer.logprobs[0]


def test_each_difference_is_named(model: Any, answer: Answer):
    _, tokenizer = model
    text = tokenizer.decode(answer.prompt, skip_special_tokens=False)
    other = tokenizer.encode(text.replace("Oslo", "Rome"), add_special_tokens=False)
    assert kind(model, answer._replace(prompt=other)) == "template"
    long = next(i for i, token in enumerate(answer.prompt) if len(tokenizer.decode([token])) > 1 and i > 5)
    letters = tokenizer.decode([answer.prompt[long]])
    pieces = [token for letter in letters for token in tokenizer.encode(letter, add_special_tokens=False)]
    split = [*answer.prompt[:long], *pieces, *answer.prompt[long + 1 :]]
    assert tokenizer.decode(split, skip_special_tokens=False) == text
    assert kind(model, answer._replace(prompt=split)) == "tokenizer"
    noise = np.random.default_rng(0).normal(size=answer.prompt_logprobs.shape)
    assert kind(model, answer._replace(prompt_logprobs=answer.prompt_logprobs + noise)) == "weights"
    assert kind(model, answer._replace(prompt_logprobs=answer.prompt_logprobs + np.nan)) == "weights"
    late = answer.logprobs.copy()
    late[-1] += 0.01
    assert kind(model, answer._replace(logprobs=late)) == "numerics"
    assert kind(model, answer._replace(calls=[{"name": "other", "arguments": {}}])) == "parser"


def test_an_unlikely_choice_is_a_difference(model: Any, answer: Answer):
    decoder, tokenizer = model
    unlikely = [answer.completion[0], 3]
    scores = score(decoder, answer.prompt + unlikely)[len(answer.prompt) - 1 :]
    calls = named(read_completion(unlikely, tokenizer).calls)
    assert kind(model, answer._replace(completion=unlikely, logprobs=scores, calls=calls)) == "numerics"


@pytest.fixture
def reads() -> dict[str, Any]:
    """The function that the fake server parses in its required call."""
    return {"name": "get_weather", "arguments": json.dumps({"city": "Oslo"})}


CALL_TEXT = '[{"name": "get_weather", "arguments": {"city": "Oslo"}}]'


@pytest.fixture
def vllm(model: Any, reads: dict[str, Any]) -> Iterator[Served]:
    """A server with vLLM's API that answers with the checkpoint."""
    decoder, tokenizer = model
    requests: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None: ...

        def do_GET(self) -> None:
            self.send_json({"data": [{"id": "tiny"}]})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.path == "/tokenize":
                return self.send_json({"tokens": render_prompt(body["messages"], body["tools"], tokenizer)})
            if self.path == "/v1/chat/completions":
                requests.append(body)
                if body.get("tool_choice") != "required":
                    return self.send_json({"choices": [{"message": {"tool_calls": None}}]})
                tokens = [*tokenizer.encode(CALL_TEXT, add_special_tokens=False), tokenizer.eos_token_id]
                message = {"tool_calls": [{"function": reads}] if reads else []}
                return self.send_json({"choices": [{"message": message, "token_ids": tokens}]})
            prompt = body["prompt"]
            [new] = generate(decoder, [prompt], eos_id=tokenizer.eos_token_id, max_new_tokens=body["max_tokens"])
            scores = score(decoder, prompt + new).tolist()
            prompt_logprobs = [None] + [{str(t): {"logprob": s}} for t, s in zip(prompt[1:], scores, strict=False)]
            logprobs = {"token_logprobs": scores[len(prompt) - 1 :]}
            self.send_json({"choices": [{"token_ids": new, "prompt_logprobs": prompt_logprobs, "logprobs": logprobs}]})

        def send_json(self, value: Any) -> None:
            text = json.dumps(value).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield Served(f"http://127.0.0.1:{server.server_port}/v1", requests)
    finally:
        server.shutdown()
        server.server_close()


def test_the_command_against_a_server(commands: Commands, exported: Path, vllm: Served):
    parity = ["serving.parity", "--checkpoint", exported, "--base-url", vllm.url, "--max-new-tokens", 4]
    output = commands.call(*parity).stdout
    assert "request 0: equal" in output
    assert "answer 2 of 2 requests alike" in output
    assert "serves tiny, not other" in commands.fails(*parity, "--model", "other")


def test_a_call_is_compared_although_the_model_writes_none(commands: Commands, exported: Path, vllm: Served, reads):
    """With the defaults: no answer to the two requests is a call."""
    parity = ["serving.parity", "--checkpoint", exported, "--base-url", vllm.url, "--max-new-tokens", 4]
    output = commands.call(*parity).stdout
    assert "required call: equal" in output
    assert output.endswith("1 calls were compared\n")
    assert [request.get("tool_choice") for request in vllm.requests] == [None, None, "required"]
    assert vllm.requests[2]["max_tokens"] > 4
    reads["arguments"] = "{}"
    output = commands.call(*parity, code=1).stdout
    assert "required call: differs in the parser: the tokens contain" in output
    assert "0 calls were compared" in output


@pytest.mark.parametrize("arguments", ["{}", '{"city": ', {"city": "Rome"}], ids=str)
def test_a_required_call_that_the_server_parses_wrongly(
    model: Any, vllm: Served, reads: dict[str, Any], arguments: Any
):
    reads["arguments"] = arguments
    server = Server(vllm.url, None, 10)
    difference = compare_required_call(server, model[1], REQUESTS[0], TOOLS, 4)
    assert difference is not None
    assert difference.kind == "parser"


def test_an_unreachable_server(commands: Commands, exported: Path):
    parity = ["serving.parity", "--checkpoint", exported, "--base-url", "http://127.0.0.1:9/v1"]
    assert "no valid answer" in commands.fails(*parity)
