"""Next-call evaluation: the model answers a recorded conversation that is cut before a turn with tool calls, and its
calls are compared with those of the turn.

Nothing is random: hashes of the ids select the trajectories and their turns. The same held-out data give the same
requests in every run, and a shorter list of requests is a prefix of a longer one.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain, zip_longest
from typing import TYPE_CHECKING, Any, NamedTuple

from xlam_jax.data.codec import to_json
from xlam_jax.data.completion import Completion, named, read_completion
from xlam_jax.data.schemas import compiled, hashable
from xlam_jax.data.trajectory import ToolCall, Trajectory, to_messages
from xlam_jax.digest import random_integer
from xlam_jax.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class Request(NamedTuple):
    """A conversation that a model has to continue with calls."""

    source: str
    id: str
    """The id of the trajectory."""
    turn: int
    """Index of the requested assistant turn in the trajectory's conversation."""
    messages: list[dict[str, Any]]
    """The messages before that turn, in OpenAI form; the task instruction is the first, if there is one."""
    tools: list[dict[str, Any]]
    expected: tuple[ToolCall, ...]
    """The recorded calls, at least one."""


class Prompted(NamedTuple):
    """A request and the token ids of its prompt."""

    request: Request
    prompt: list[int]


class Prompts(NamedTuple):
    """Requests that can be sent to the model, and the number of dropped requests."""

    prompted: list[Prompted]
    dropped: Counter[str]
    """Reason (too-long, not-representable) → number of requests."""


class Score(NamedTuple):
    """Comparison of an answer's calls with the recorded ones. The calls of a turn are parallel: any order is right."""

    parsable: bool
    """There is at least one call."""
    schema_valid: bool
    """Each call names a declared tool, and its arguments satisfy that tool's JSON Schema."""
    right_function: bool
    """The same functions are called, each as often as recorded."""
    exact: bool
    """The same calls: names and arguments are equal as JSON (1 equals 1.0, but not true). Ids are ignored."""


class ScoredAnswer(NamedTuple):
    """A model's answer to a request, and its score."""

    request: Request
    completion: Completion
    score: Score

    def record(self, step: int) -> dict[str, Any]:
        """Returns the row for samples.jsonl; `step` is the optimizer step."""
        request, completion = self.request, self.completion
        return {
            "step": step,
            "source": request.source,
            "id": request.id,
            "turn": request.turn,
            "messages": request.messages,
            "expected": named(request.expected),
            "content": completion.content,
            "calls": named(completion.calls),
            "text": completion.text,
            "finish_reason": completion.finish_reason,
            **self.score._asdict(),
        }


def turns(trajectory: Trajectory) -> list[int]:
    """Returns the indices of turns that can be requested: they call tools, contribute to the loss (no `loss: false`),
    and follow a turn of the user or a tool."""
    conversation = trajectory.conversation
    return [
        index
        for index, turn in enumerate(conversation)
        if turn.tool_calls and turn.loss is not False and conversation[index - 1].role in ("user", "tool")
    ]


def request(source: str, trajectory: Trajectory, turn: int) -> Request:
    """Returns the request for one of a trajectory's `turns`."""
    conversation = trajectory.conversation
    messages = to_messages(replace(trajectory, conversation=conversation[:turn]))
    return Request(source, trajectory.id, turn, messages, trajectory.tools, conversation[turn].tool_calls)


def requests(samples: Iterable[tuple[str, Trajectory]]) -> Iterator[Request]:
    """Yields one request per trajectory that has one, from the sources in turn; `samples` are (source, trajectory).

    Trajectories of a source are sorted by hashes of their ids, whatever the order of `samples`. Another hash selects
    the turn.
    """
    by_source: dict[str, list[Trajectory]] = {}
    for source, trajectory in samples:
        by_source.setdefault(source, []).append(trajectory)
    for source, trajectories in by_source.items():
        trajectories.sort(key=lambda trajectory: (_hash("order", source, trajectory.id), trajectory.id))

    def from_source(source: str) -> Iterator[Request]:
        for trajectory in by_source[source]:
            if candidates := turns(trajectory):
                yield request(source, trajectory, candidates[_hash("turn", source, trajectory.id) % len(candidates)])

    for item in chain.from_iterable(zip_longest(*map(from_source, by_source))):
        if item is not None:
            yield item


def _hash(*names: str) -> int:
    return random_integer("\0".join(names))


def prompts(
    requests: Iterable[Request], tokenizer: "PreTrainedTokenizerFast", format: str, *, longest: int, count: int
) -> Prompts:
    """Renders the first `count` requests that the format can represent in at most `longest` tokens.

    The tokens equal those before the turn in training. `longest` should be small enough for prompt and answer to fit
    into the model's context.
    """
    from xlam_jax.data.render import render_prompt  # evaluations of a server need no tokenizer

    prompted: list[Prompted] = []
    dropped: Counter[str] = Counter()
    for request in requests:
        if len(prompted) == count:
            break
        try:
            prompt = render_prompt(request.messages, request.tools, tokenizer, format)
        except UserError:  # counted instead of reported, as the message would be the same for many requests
            dropped["not-representable"] += 1
            continue
        if len(prompt) > longest:
            dropped["too-long"] += 1
        else:
            prompted.append(Prompted(request, prompt))
    return Prompts(prompted, dropped)


def answer(
    prompted: Sequence[Prompted],
    generate: Callable[[list[list[int]]], list[list[int]]],
    tokenizer: "PreTrainedTokenizerFast",
    format: str | None = None,
) -> list[ScoredAnswer]:
    """Returns a model's scored answers.

    `generate` maps prompts to new token ids, with the end token if the model generated one. `format`: as in
    `read_completion`.
    """
    answers = []
    for item, new in zip(prompted, generate([item.prompt for item in prompted]), strict=True):
        completion = read_completion(new, tokenizer, format=format, tools=item.request.tools)
        answers.append(ScoredAnswer(item.request, completion, score(item.request, completion.calls)))
    return answers


def score(request: Request, calls: Sequence[ToolCall] | None) -> Score:
    """Compares an answer's calls with the recorded ones; None or no calls mean that the answer cannot be parsed."""
    if not calls:
        return Score(False, False, False, False)
    parameters = {tool["function"]["name"]: tool["function"].get("parameters") for tool in request.tools}
    return Score(
        parsable=True,
        schema_valid=all(call.name in parameters and _fits(call, parameters[call.name]) for call in calls),
        right_function=Counter(call.name for call in calls) == Counter(call.name for call in request.expected),
        exact=_counted(calls) == _counted(request.expected),
    )


def _fits(call: ToolCall, parameters: Any) -> bool:
    return next(compiled(to_json(parameters)).check(call.arguments), None) is None


def _counted(calls: Sequence[ToolCall]) -> Counter[Any]:
    return Counter((call.name, hashable(call.arguments)) for call in calls)


def summarize(scores: Sequence[Score]) -> dict[str, float]:
    """Returns the number of requests and, if there are any, the fraction (0 to 1) that meets each field of `Score`."""
    if not scores:
        return {"requests": 0}
    fractions = {name: sum(values) / len(scores) for name, *values in zip(Score._fields, *scores, strict=True)}
    return {"requests": len(scores), **fractions}
