"""Does a server answer as the checkpoint does? `python -m serving.parity --checkpoint DIR --base-url URL`.

The same requests go through JAX and through the server, and the first thing that differs is named:

    template    the server writes another prompt
    tokenizer   it writes the same text in other tokens
    weights     it gives the prompt's own tokens other probabilities
    numerics    its probabilities, or its choices, drift by more than the tolerance
    parser      it writes the same tokens, and reads other calls in them
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from xlam_jax.cli import Parser, add_server, number, positive, run
from xlam_jax.client import ServerError, to_openai
from xlam_jax.client.answers import MalformedAnswer, read_response
from xlam_jax.client.completion import checked_key
from xlam_jax.data.messages import parse_request
from xlam_jax.data.trajectory import InvalidTrajectory
from xlam_jax.errors import UserError, check_address

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from xlam_jax.models.decoder import Decoder

TOLERANCE = {"float32": 2e-3, "bfloat16": 0.15, "float16": 0.05}
"""Of a token's log-probability, by the dtype of the weights: what another order of the sums makes of it."""
REQUESTS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "What is the weather in Oslo?"}],
    [{"role": "system", "content": "Answer in one word."}, {"role": "user", "content": "Is “{x}” JSON?"}],
]
REQUIRED_TOKENS = 256
"""At least so many new tokens for an answer that the server is made to write as a call."""
# the arguments are bounded: a model that is made to write a call comes to its end
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
    """What the server makes of one request."""

    prompt: list[int]
    prompt_logprobs: np.ndarray
    """Of the prompt's tokens but the first."""
    completion: list[int]
    logprobs: np.ndarray
    """Of the completion's tokens."""
    calls: list[dict[str, Any]]


class Difference(NamedTuple):
    """The first thing that differs."""

    kind: str
    told: str


class Server:
    """vLLM's addresses beside OpenAI's: what it makes of a text, and how likely it finds each token."""

    def __init__(self, base_url: str, model: str | None, timeout: float, api_key: str | None = None):
        """`model`: the first that is served, where it is None. Raises `ServerError` when nobody answers."""
        check_address("--base-url", base_url)
        self._url = base_url.rstrip("/")
        self._root = self._url.removesuffix("/v1")
        self._timeout, self._headers = timeout, {"Authorization": f"Bearer {checked_key(api_key)}"}
        listed = self._ask("GET", f"{self._url}/models", None)
        models = listed.get("data") if isinstance(listed, dict) else None
        names = [one.get("id") for one in models or () if isinstance(one, dict)] if isinstance(models, list) else []
        if not names or (model is not None and model not in names):
            raise ServerError(
                f"{base_url}: serves {', '.join(map(str, names)) or 'no model'}, not {model}; give --model"
            )
        self.model = model or names[0]

    def answer(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]], tokens: int) -> Answer:
        """Its greedy answer. Raises `ServerError` where the server does not answer as vLLM does."""
        try:
            return self._answer(messages, tools, tokens)
        except (KeyError, TypeError, IndexError, ValueError, AttributeError) as error:
            raise ServerError(
                f"{self._url}: answers without what a server of vLLM gives ({type(error).__name__}: {error}); token "
                "ids and log-probabilities of the prompt are compared, which others lack: give vLLM's address"
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
            np.array([each[str(token)]["logprob"] for token, each in scored]),
            choice["token_ids"],
            np.array(choice["logprobs"]["token_logprobs"], dtype=float),
            calls,
        )

    def required_call(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]], tokens: int
    ) -> tuple[list[int], list[dict[str, Any]]]:
        """The tokens of an answer that has to be one call, and the calls that the server reads in them."""
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
        """The first choice of a chat completion as it was sent, and its calls."""
        url = f"{self._url}/chat/completions"
        sent = self._ask("POST", url, request)
        try:
            message = read_response(sent, "tools", with_tools=False)["choices"][0]["message"]
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
            raise ServerError(f"{url}: no answer that can be read ({error}); is a vLLM server there?") from None


def compare(
    model: "Decoder",
    tokenizer: "PreTrainedTokenizerFast",
    messages: list[dict[str, Any]],
    tools: list[dict[str, Any]],
    answer: Answer,
    tolerance: float,
) -> tuple[Difference | None, float]:
    """The first difference between a server's answer and the checkpoint's, and the largest of log-probabilities."""
    from xlam_jax.data.render import end_tokens, render_prompt
    from xlam_jax.models.generation import generate

    ours = render_prompt(messages, tools, tokenizer)
    if ours != answer.prompt:
        return _of_prompts(tokenizer, ours, answer.prompt), float("inf")
    scores = score(model, ours + answer.completion)
    off = np.abs(scores - np.concatenate([answer.prompt_logprobs, answer.logprobs]))
    worst, largest = int(off.argmax()), float(off.max())
    in_prompt = off[: len(ours) - 1]
    if not np.median(in_prompt) <= tolerance:  # nor is what is no number
        told = f"the prompt's own tokens differ by {np.median(in_prompt):.3g} in log-probability (median)"
        return Difference("weights", f"{told}, {tolerance:g} is allowed; does it serve this checkpoint?"), largest
    if not largest <= tolerance:
        token = (ours + answer.completion)[worst + 1]
        told = f"token {worst + 1} ({tokenizer.decode([token])!r}) differs by {largest:.3g} in log-probability"
        return Difference("numerics", f"{told}, {tolerance:g} is allowed"), largest
    [mine] = generate(model, [ours], eos_id=end_tokens(tokenizer), max_new_tokens=len(answer.completion))
    at = next((i for i, (a, b) in enumerate(zip(mine, answer.completion, strict=False)) if a != b), None)
    if at is not None:
        # Both are right where the two tokens are as likely as one another.
        other = score(model, [*ours, *mine[: at + 1]])[-1] - scores[len(ours) - 1 + at]
        if other > 2 * tolerance:
            told = f"new token {at}: JAX takes {tokenizer.decode([mine[at]])!r}, the server"
            return Difference(
                "numerics", f"{told} {tokenizer.decode([answer.completion[at]])!r}, {other:.3g} less likely"
            ), largest
    return compare_calls(tokenizer, answer.completion, answer.calls), largest


def compare_calls(
    tokenizer: "PreTrainedTokenizerFast", completion: list[int], calls: list[dict[str, Any]]
) -> Difference | None:
    """How the calls that the server read in an answer's tokens differ from those that are in them."""
    from xlam_jax.data.completion import named, read_completion

    ours = named(read_completion(completion, tokenizer).calls)
    if ours == calls:
        return None
    texts = [json.dumps(each, ensure_ascii=False) for each in (ours, calls)]
    return Difference("parser", f"the tokens hold {texts[0]}, the server reads {texts[1]}")


def compare_required_call(
    server: Server,
    tokenizer: "PreTrainedTokenizerFast",
    messages: list[dict[str, Any]],
    tools: list[dict[str, Any]],
    tokens: int,
) -> Difference | None:
    """The same for an answer that the server makes a call: without any call the parser would not be compared."""
    completion, calls = server.required_call(messages, tools, max(tokens, REQUIRED_TOKENS))
    difference = compare_calls(tokenizer, completion, calls)
    if difference is None and not calls:
        text = tokenizer.decode(completion)
        wrote = f"with tool_choice required the server wrote {text[-100:]!r}, which contains no call"
        return Difference("parser", f"{wrote}; give tools with bounded arguments, or more --max-new-tokens")
    return difference


def _of_prompts(tokenizer: "PreTrainedTokenizerFast", ours: Sequence[int], theirs: Sequence[int]) -> Difference:
    texts = [str(tokenizer.decode(list(ids), skip_special_tokens=False)) for ids in (ours, theirs)]
    if texts[0] == texts[1]:
        at = next(
            (i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs))
        )
        return Difference(
            "tokenizer", f"token {at}: JAX has {list(ours[at : at + 5])}, the server {list(theirs[at : at + 5])}"
        )
    at = next((i for i, (a, b) in enumerate(zip(*texts, strict=False)) if a != b), min(map(len, texts)))
    around = [text[max(0, at - 20) : at + 20] for text in texts]
    return Difference("template", f"character {at} of the prompt: JAX writes {around[0]!r}, the server {around[1]!r}")


def score(model: "Decoder", tokens: Sequence[int]) -> np.ndarray:
    """The log-probability of each token but the first, after those before it."""
    import jax
    import jax.numpy as jnp

    from xlam_jax.training.objectives import token_log_probabilities

    length = -(-len(tokens) // 128) * 128  # few programs are compiled for many lengths
    padded = np.zeros((1, length + 1), np.int32)
    padded[0, : len(tokens)] = tokens
    counted = np.arange(length)[None] < len(tokens) - 1

    @jax.jit
    def scored(tokens_BT: jax.Array, labels_BT: jax.Array, counted_BT: jax.Array) -> jax.Array:
        positions_BT = jnp.arange(tokens_BT.shape[1])[None]
        hidden_BTD, _, _ = model(tokens_BT, positions_BT, jnp.ones_like(tokens_BT))
        return token_log_probabilities(hidden_BTD, model.head_VD(), labels_BT, counted_BT)[0]

    return np.asarray(scored(padded[:, :-1], padded[:, 1:], counted))[0, : len(tokens) - 1]


def main() -> int:
    """The command line."""
    parser = Parser(
        prog="python -m serving.parity", description="Compares a server's answers with those of the checkpoint in JAX."
    )
    parser.add_argument("--checkpoint", type=Path, required=True, help="Hugging Face folder, run folder or step folder")
    add_server(parser, model="optional", timeout=300.0)
    parser.add_argument("--messages", type=Path, help="JSON: a list of messages, or a list of such lists")
    parser.add_argument("--tools", type=Path, help="JSON: a list of tool schemas in OpenAI form")
    parser.add_argument("--max-new-tokens", type=positive, default=32, metavar="N")
    parser.add_argument("--tolerance", type=number(0), help="of log-probabilities (default: by the weights' dtype)")
    arguments = parser.parse_args()

    from xlam_jax.documents import read_json
    from xlam_jax.generate import find_model

    requests = _requests(arguments.messages)
    tools = TOOLS if arguments.tools is None else read_json(arguments.tools)
    found = find_model(arguments.checkpoint)
    server = Server(arguments.base_url, arguments.model, arguments.timeout, arguments.api_key)
    answers = [server.answer(messages, tools, arguments.max_new_tokens) for messages in requests]
    model = found.load()
    tolerance = TOLERANCE[np.dtype(model.dtype).name] if arguments.tolerance is None else arguments.tolerance
    failed = compared = 0
    for at, (messages, answer) in enumerate(zip(requests, answers, strict=True)):
        difference, largest = compare(model, found.tokenizer, messages, tools, answer, tolerance)
        told = f"{len(answer.prompt)} prompt tokens, {len(answer.completion)} new, {len(answer.calls)} calls"
        if difference is None:
            compared += len(answer.calls)
            print(f"request {at}: equal ({told}; log-probabilities within {largest:.2g})")
        else:
            failed += 1
            print(f"request {at}: differs in the {difference.kind}: {difference.told} ({told})")
    print(f"{len(requests) - failed} of {len(requests)} requests are answered alike by JAX and {arguments.base_url}")
    if not compared and tools:
        difference = compare_required_call(server, found.tokenizer, requests[0], tools, arguments.max_new_tokens)
        failed += difference is not None
        compared += difference is None
        print(f"required call: {'equal' if difference is None else f'differs in the parser: {difference.told}'}")
    print(f"{compared} calls were compared" + ("" if tools else "; without tools there are none"))
    return 1 if failed else 0


def _requests(path: Path | None) -> list[list[dict[str, Any]]]:
    """The conversations of a file, in the form in which servers and templates take them; without one, our own."""
    from xlam_jax.generate import conversations

    if path is None:
        return REQUESTS
    try:
        return [to_openai(parse_request(messages)) for messages in conversations(path)]
    except InvalidTrajectory as invalid:
        raise UserError(f"{path}: a conversation is malformed: {invalid.detail}") from None


if __name__ == "__main__":
    run(main)
