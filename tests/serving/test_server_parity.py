"""What differs between a server and a checkpoint is named: here the server is the checkpoint, changed on purpose."""

import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
from support import Commands

from serving.parity import REQUESTS, TOOLS, Answer, compare, score
from xlam_jax.data.render import render_prompt
from xlam_jax.generate import find_model, named, read_completion
from xlam_jax.models.generation import generate


@pytest.fixture(scope="module")
def model(exported: Path) -> Any:
    found = find_model(exported)
    return found.load(), found.tokenizer


@pytest.fixture(scope="module")
def answer(model: Any) -> Answer:
    """What a server without fault answers to the first request."""
    decoder, tokenizer = model
    prompt = render_prompt(REQUESTS[0], TOOLS, tokenizer)
    [completion] = generate(decoder, [prompt], eos_id=tokenizer.eos_token_id, max_new_tokens=8)
    scores = score(decoder, prompt + completion)
    calls = named(read_completion(completion, tokenizer).calls)
    return Answer(prompt, scores[: len(prompt) - 1], completion, scores[len(prompt) - 1 :], calls)


def kind(model: Any, answer: Answer) -> str | None:
    difference, _ = compare(*model, REQUESTS[0], TOOLS, answer, 2e-3)
    return difference and difference.kind


def test_what_is_equal(model: Any, answer: Answer):
    assert compare(*model, REQUESTS[0], TOOLS, answer, 2e-3) == (None, 0.0)


def test_scores_are_log_probabilities(model: Any, answer: Answer):
    """The greedy token of each place is at least as likely as any other."""
    decoder, _ = model
    last = len(answer.prompt)
    for other in (3, 40, 500):
        assert score(decoder, [*answer.prompt, other])[last - 1] <= answer.logprobs[0]


def test_each_difference_is_named(model: Any, answer: Answer):
    _, tokenizer = model
    text = tokenizer.decode(answer.prompt, skip_special_tokens=False)
    other = tokenizer.encode(text.replace("Oslo", "Rome"), add_special_tokens=False)
    assert kind(model, answer._replace(prompt=other)) == "template"
    long = next(at for at, token in enumerate(answer.prompt) if len(tokenizer.decode([token])) > 1 and at > 5)
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


def test_the_command_against_a_server(commands: Commands, exported: Path, model: Any, answer: Answer):
    """A server that speaks vLLM's words, with the answer of the checkpoint, for each request."""
    decoder, tokenizer = model

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None: ...

        def do_GET(self) -> None:
            self.say({"data": [{"id": "tiny"}]})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.path == "/tokenize":
                return self.say({"tokens": render_prompt(body["messages"], body["tools"], tokenizer)})
            if self.path == "/v1/chat/completions":
                return self.say({"choices": [{"message": {"tool_calls": None}}]})
            prompt = body["prompt"]
            [new] = generate(decoder, [prompt], eos_id=tokenizer.eos_token_id, max_new_tokens=body["max_tokens"])
            scores = score(decoder, prompt + new).tolist()
            told = [None] + [{str(t): {"logprob": s}} for t, s in zip(prompt[1:], scores, strict=False)]
            logprobs = {"token_logprobs": scores[len(prompt) - 1 :]}
            self.say({"choices": [{"token_ids": new, "prompt_logprobs": told, "logprobs": logprobs}]})

        def say(self, value: Any) -> None:
            text = json.dumps(value).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/v1"
    parity = ["serving.parity", "--checkpoint", exported, "--base-url", url, "--max-new-tokens", 4]
    try:
        said = commands.call(*parity).stdout
        assert "request 0: equal" in said
        assert "2 of 2 requests are answered alike" in said
        assert "serves tiny, not other" in commands.fails(*parity, "--model", "other")
    finally:
        server.shutdown()
        server.server_close()
    assert "no answer that can be read" in commands.fails(*parity)
