"""Checks that a server answers like a checkpoint: `python -m serving.parity --checkpoint DIR --base-url URL`.

Sends the same requests through JAX and through the server, and reports the first difference:

    template    the server renders a different prompt
    tokenizer   the prompt has the same text and different tokens
    weights     the log-probabilities of the prompt's tokens differ (median)
    numerics    a log-probability, or a greedily chosen token, differs by more than the tolerance
    parser      the tokens are the same, and the server parses different calls
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from xlam_jax.cli import Parser, add_server, number, positive, run
from xlam_jax.client import ServerError, to_openai
from xlam_jax.client.answers import MalformedAnswer, read_response
from xlam_jax.client.completion import resolve_key
from xlam_jax.data.messages import parse_request
from xlam_jax.data.trajectory import InvalidTrajectory
from xlam_jax.errors import UserError, check_address

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from xlam_jax.models.decoder import Decoder

TOLERANCE = {"float32": 2e-3, "bfloat16": 0.15, "float16": 0.05}
"""dtype of the weights → tolerance of a token's log-probability, for the rounding of a different summation order."""
REQUESTS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "What is the weather in Oslo?"}],
    [{"role": "system", "content": "Answer in one word."}, {"role": "user", "content": "Is “{x}” JSON?"}],
]
REQUIRED_TOKENS = 256
"""Minimum number of new tokens for an answer that must be a call."""
# the arguments have bounded length, so that a constrained call always ends
TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather of a city.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "enum": ["Oslo", "Rome"]}},
                "required": ["city"],
            },
        },
    }
]


class Answer(NamedTuple):
    """The server's greedy answer to one request."""

    prompt: list[int]
    """Token ids of the prompt, P of them."""
    prompt_logprobs: np.ndarray
    """[P - 1], log-probabilities in nats of the prompt's tokens except the first."""
    completion: list[int]
    """Token ids of the answer, N of them."""
    logprobs: np.ndarray
    """[N], log-probabilities in nats of the completion's tokens."""
    calls: list[dict[str, Any]]
    """Name and arguments of each call that the server parsed."""


class Difference(NamedTuple):
    """The first difference between the server and the checkpoint."""

    kind: str
    """template, tokenizer, weights, numerics or parser."""
    detail: str


class Server:
    """A vLLM server: OpenAI's API, and vLLM's endpoint for the tokens of a prompt."""

    def __init__(self, base_url: str, model: str | None, timeout: float, api_key: str | None = None):
        """`model`: name on the server; None: the first. `timeout`: seconds. Raises `ServerError` without an answer."""
        check_address("--base-url", base_url)
        self._url = base_url.rstrip("/")
        self._root = self._url.removesuffix("/v1")
        self._timeout, self._headers = timeout, {"Authorization": f"Bearer {resolve_key(api_key)}"}
        listed = self._ask("GET", f"{self._url}/models", None)
        models = listed.get("data") if isinstance(listed, dict) else None
        entries = models if isinstance(models, list) else []
        names = [entry.get("id") for entry in entries if isinstance(entry, dict)]
        if not names or (model is not None and model not in names):
            raise ServerError(
                f"{base_url}: serves {', '.join(map(str, names)) or 'no model'}, not {model}; set --model"
            )
        self.model = model or names[0]

    def answer(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]], tokens: int) -> Answer:
        """Returns the greedy answer of at most `tokens` tokens. Raises `ServerError` if the server is not vLLM."""
        try:
            return self._answer(messages, tools, tokens)
        except (KeyError, TypeError, IndexError, ValueError, AttributeError) as error:
            raise ServerError(
                f"{self._url}: the answer lacks a field of vLLM's ({type(error).__name__}: {error}); the comparison "
                "needs token ids and log-probabilities of the prompt, which other servers don't return: set --base-url "
                "to a vLLM server"
            ) from None

    def _answer(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]], tokens: int) -> Answer:
        chat = {"model": self.model, "messages": messages, "tools": tools}
        prompt = self._ask("POST", f"{self._root}/tokenize", chat | {"add_generation_prompt": True})["tokens"]
        plain = {"model": self.model, "temperature": 0, "max_tokens": tokens, "skip_special_tokens": False}
        choice = self._ask(
            "POST",
            f"{self._url}/completions",
            plain | {"prompt": prompt, "logprobs": 0, "prompt_logprobs": 0, "return_token_ids": True},
        )["choices"][0]
        _, calls = self._chat(chat | {"temperature": 0, "max_tokens": tokens})
        scored = zip(prompt[1:], choice["prompt_logprobs"][1:], strict=True)
        return Answer(
            prompt,
            np.array([candidates[str(token)]["logprob"] for token, candidates in scored]),
            choice["token_ids"],
            np.array(choice["logprobs"]["token_logprobs"], dtype=float),
            calls,
        )

    def required_call(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]], tokens: int
    ) -> tuple[list[int], list[dict[str, Any]]]:
        """Requests an answer that must be one call. Returns its token ids, and the calls that the server parsed."""
        sent, calls = self._chat(
            {
                "model": self.model,
                "messages": messages,
                "tools": tools,
                "tool_choice": "required",
                "parallel_tool_calls": False,
                "temperature": 0,
                "max_tokens": tokens,
                "return_token_ids": True,
            }
        )
        if not isinstance(new := sent.get("token_ids"), list):
            raise ServerError(f"{self._url}: does not report the tokens of chat completions; is a vLLM server there?")
        return new, calls

    def _chat(self, request: dict[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Returns the first choice of a chat completion as the server sent it, and its calls."""
        url = f"{self._url}/chat/completions"
        sent = self._ask("POST", url, request)
        try:
            message = read_response(sent, "tools", None)["choices"][0]["message"]
        except MalformedAnswer as error:
            raise ServerError(f"{url}: {error}") from None
        return sent["choices"][0], [{key: call[key] for key in ("name", "arguments")} for call in message["tool_calls"]]

    def _ask(self, method: str, url: str, body: Any) -> Any:
        import httpx2

        try:
            response = httpx2.request(method, url, json=body, headers=self._headers, timeout=self._timeout)
            if response.status_code != 200:
                raise ServerError(f"{url}: {response.status_code}: {response.text[:300]}")
            return response.json()
        except (httpx2.HTTPError, ValueError) as error:
            raise ServerError(f"{url}: no valid answer ({error}); is a vLLM server there?") from None


def compare(
    model: "Decoder",
    tokenizer: "PreTrainedTokenizerFast",
    messages: list[dict[str, Any]],
    tools: list[dict[str, Any]],
    answer: Answer,
    tolerance: float,
) -> tuple[Difference | None, float]:
    """Compares a server's answer with the checkpoint's.

    Returns the first difference, or None, and the largest difference of log-probabilities in nats (infinity if the
    prompts differ).
    """
    from xlam_jax.data.render import end_tokens, render_prompt
    from xlam_jax.models.generation import generate

    ours = render_prompt(messages, tools, tokenizer)
    if ours != answer.prompt:
        return _compare_prompts(tokenizer, ours, answer.prompt), float("inf")
    scores = score(model, ours + answer.completion)
    deviations = np.abs(scores - np.concatenate([answer.prompt_logprobs, answer.logprobs]))
    worst, largest = int(deviations.argmax()), float(deviations.max())
    in_prompt = deviations[: len(ours) - 1]
    if not np.median(in_prompt) <= tolerance:  # also true for NaN
        detail = f"the prompt's tokens differ by {np.median(in_prompt):.3g} in log-probability (median)"
        return Difference("weights", f"{detail}, {tolerance:g} is allowed; does it serve this checkpoint?"), largest
    if not largest <= tolerance:
        token = (ours + answer.completion)[worst + 1]
        detail = f"token {worst + 1} ({tokenizer.decode([token])!r}) differs by {largest:.3g} in log-probability"
        return Difference("numerics", f"{detail}, {tolerance:g} is allowed"), largest
    [completion] = generate(model, [ours], eos_id=end_tokens(tokenizer), max_new_tokens=len(answer.completion))
    index = _first_difference(completion, answer.completion)
    if index is not None:
        # Both choices are correct if the two tokens are about equally likely.
        gap = score(model, [*ours, *completion[: index + 1]])[-1] - scores[len(ours) - 1 + index]
        if gap > 2 * tolerance:
            detail = f"new token {index}: JAX chooses {tokenizer.decode([completion[index]])!r}, the server"
            return Difference(
                "numerics", f"{detail} {tokenizer.decode([answer.completion[index]])!r}, {gap:.3g} less likely"
            ), largest
    return compare_calls(tokenizer, answer.completion, answer.calls, tools), largest


def compare_calls(
    tokenizer: "PreTrainedTokenizerFast",
    completion: list[int],
    calls: list[dict[str, Any]],
    tools: Sequence[dict[str, Any]],
) -> Difference | None:
    """Compares the calls that the server parsed with those that this project parses in the same tokens."""
    from xlam_jax.data.completion import named, read_completion

    ours = named(read_completion(completion, tokenizer, tools=tools).calls)
    if ours == calls:
        return None
    texts = [json.dumps(parsed, ensure_ascii=False) for parsed in (ours, calls)]
    return Difference("parser", f"the tokens contain {texts[0]}, the server parses {texts[1]}")


def compare_required_call(
    server: Server,
    tokenizer: "PreTrainedTokenizerFast",
    messages: list[dict[str, Any]],
    tools: list[dict[str, Any]],
    tokens: int,
) -> Difference | None:
    """Requests an answer that must be a call, and compares the calls that the server parses with ours.

    For models that call no tool unasked. Returns the difference, also for an answer without a call; None if they are
    equal. The answer has at most max(`tokens`, REQUIRED_TOKENS) tokens.
    """
    completion, calls = server.required_call(messages, tools, max(tokens, REQUIRED_TOKENS))
    difference = compare_calls(tokenizer, completion, calls, tools)
    if difference is None and not calls:
        text = tokenizer.decode(completion)
        wrote = f"with tool_choice required the server wrote {text[-100:]!r}, which contains no call"
        return Difference("parser", f"{wrote}; use tools with bounded arguments, or raise --max-new-tokens")
    return difference


def _first_difference(left: Sequence[Any], right: Sequence[Any]) -> int | None:
    """Returns the first index at which two sequences differ, None if one is a prefix of the other."""
    return next((index for index, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), None)


def _compare_prompts(tokenizer: "PreTrainedTokenizerFast", ours: Sequence[int], served: Sequence[int]) -> Difference:
    """Returns the first difference of two different prompts: of their tokens if their texts are equal."""
    texts = [str(tokenizer.decode(list(ids), skip_special_tokens=False)) for ids in (ours, served)]
    if texts[0] == texts[1]:
        index = _first_difference(ours, served)
        index = min(len(ours), len(served)) if index is None else index
        return Difference(
            "tokenizer",
            f"token {index}: JAX has {list(ours[index : index + 5])}, the server {list(served[index : index + 5])}",
        )
    index = _first_difference(*texts)
    index = min(map(len, texts)) if index is None else index
    around = [text[max(0, index - 20) : index + 20] for text in texts]
    return Difference(
        "template", f"character {index} of the prompt: JAX writes {around[0]!r}, the server {around[1]!r}"
    )


def score(model: "Decoder", tokens: Sequence[int]) -> np.ndarray:
    """Computes the log-probability of each token given those before it.

    `tokens`: T token ids. Returns [T - 1] float32 in nats, without the first token.
    """
    import jax
    import jax.numpy as jnp

    from xlam_jax.training.objectives import token_log_probabilities

    length = -(-len(tokens) // 128) * 128  # padding limits the number of compiled lengths
    padded = np.zeros((1, length + 1), np.int32)
    padded[0, : len(tokens)] = tokens
    mask = np.arange(length)[None] < len(tokens) - 1

    @jax.jit
    def log_probabilities(tokens_BT: jax.Array, labels_BT: jax.Array, mask_BT: jax.Array) -> jax.Array:
        positions_BT = jnp.arange(tokens_BT.shape[1])[None]
        hidden_BTD, _, _ = model(tokens_BT, positions_BT, jnp.ones_like(tokens_BT))
        return token_log_probabilities(hidden_BTD, model.head_VD(), labels_BT, mask_BT)[0]

    return np.asarray(log_probabilities(padded[:, :-1], padded[:, 1:], mask))[0, : len(tokens) - 1]


def main() -> int:
    """The command line."""
    parser = Parser(
        prog="python -m serving.parity", description="Compare a server's answers with those of the checkpoint in JAX."
    )
    parser.add_argument("--checkpoint", type=Path, required=True, help="Hugging Face folder, run folder or step folder")
    add_server(parser, model="optional", timeout=300.0)
    parser.add_argument("--messages", type=Path, help="JSON: a list of messages, or a list of such lists")
    parser.add_argument("--tools", type=Path, help="JSON: a list of tool schemas in OpenAI's format")
    parser.add_argument(
        "--max-new-tokens", type=positive, default=32, metavar="N", help="tokens of an answer (default: 32)"
    )
    parser.add_argument(
        "--tolerance", type=number(0), help="tolerance of log-probabilities in nats (default: by the weights' dtype)"
    )
    arguments = parser.parse_args()

    from xlam_jax.documents import read_json
    from xlam_jax.generate import find_model

    requests = _requests(arguments.messages)
    tools = TOOLS if arguments.tools is None else read_json(arguments.tools)
    checkpoint = find_model(arguments.checkpoint)
    server = Server(arguments.base_url, arguments.model, arguments.timeout, arguments.api_key)
    answers = [server.answer(messages, tools, arguments.max_new_tokens) for messages in requests]
    model = checkpoint.load()
    tolerance = TOLERANCE[np.dtype(model.dtype).name] if arguments.tolerance is None else arguments.tolerance
    failed = compared = 0
    for index, (messages, answer) in enumerate(zip(requests, answers, strict=True)):
        difference, largest = compare(model, checkpoint.tokenizer, messages, tools, answer, tolerance)
        counts = f"{len(answer.prompt)} prompt tokens, {len(answer.completion)} new, {len(answer.calls)} calls"
        if difference is None:
            compared += len(answer.calls)
            print(f"request {index}: equal ({counts}; log-probabilities within {largest:.2g})")
        else:
            failed += 1
            print(f"request {index}: differs in the {difference.kind}: {difference.detail} ({counts})")
    print(f"JAX and {arguments.base_url} answer {len(requests) - failed} of {len(requests)} requests alike")
    if not compared and tools:
        difference = compare_required_call(server, checkpoint.tokenizer, requests[0], tools, arguments.max_new_tokens)
        failed += difference is not None
        compared += difference is None
        print(f"required call: {'equal' if difference is None else f'differs in the parser: {difference.detail}'}")
    print(f"{compared} calls were compared" + ("" if tools else "; without tools there are none"))
    return 1 if failed else 0


def _requests(path: Path | None) -> list[list[dict[str, Any]]]:
    """Loads the conversations of a file in OpenAI's format; without a file, returns REQUESTS."""
    from xlam_jax.generate import conversations

    if path is None:
        return REQUESTS
    try:
        return [to_openai(parse_request(messages)) for messages in conversations(path)]
    except InvalidTrajectory as invalid:
        raise UserError(f"{path}: a conversation is malformed: {invalid.detail}") from None


if __name__ == "__main__":
    run(main)
