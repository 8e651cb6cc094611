"""The next call: recorded conversations up to a turn that calls tools, and how near an answer comes to that turn.

Nothing is random: which trajectories and which of their turns are asked for follows from hashes of their ids, so the
same held-out data give the same requests in every run, and fewer requests are the beginning of more.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
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
    """A conversation that a model is to continue with calls."""

    source: str
    id: str
    """The trajectory's."""
    turn: int
    """The assistant turn that is asked for, an index into the trajectory's conversation."""
    messages: list[dict[str, Any]]
    """What is before it, in OpenAI form, system text in front."""
    tools: list[dict[str, Any]]
    expected: tuple[ToolCall, ...]
    """The recorded calls, at least one."""


class Prompted(NamedTuple):
    """A request and the tokens that it is asked with."""

    request: Request
    prompt: list[int]


class Prompts(NamedTuple):
    """Requests that can be asked, and why others cannot."""

    asked: list[Prompted]
    left_out: Counter[str]
    """Reason → requests: too-long, not-representable."""


class Score(NamedTuple):
    """How near an answer's calls come to those recorded. Calls of one turn are parallel: their order does not count."""

    parsable: bool
    """There is a call."""
    schema_valid: bool
    """Each call names a declared tool, and its arguments satisfy that tool's JSON Schema."""
    right_function: bool
    """The same functions are called, each as often as recorded."""
    exact: bool
    """The same calls: names and arguments are equal as JSON (1 equals 1.0, and not true), ids don't count."""


class Answer(NamedTuple):
    """What a model answered to a request."""

    request: Request
    completion: Completion
    score: Score

    def record(self, step: int) -> dict[str, Any]:
        """The line of samples.jsonl."""
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
    """The turns that can be asked for: they call tools, are worth learning (no `loss: false`), and answer the user or
    a tool."""
    conversation = trajectory.conversation
    return [
        at
        for at, turn in enumerate(conversation)
        if turn.tool_calls and turn.loss is not False and conversation[at - 1].role in ("user", "tool")
    ]


def request(source: str, trajectory: Trajectory, turn: int) -> Request:
    """Asks for one of a trajectory's `turns`."""
    conversation = trajectory.conversation
    messages = to_messages(replace(trajectory, conversation=conversation[:turn]))
    return Request(source, trajectory.id, turn, messages, trajectory.tools, conversation[turn].tool_calls)


def requests(samples: Iterable[tuple[str, Trajectory]]) -> Iterator[Request]:
    """One request of each trajectory that has one, from the sources in turn; `samples` are (source, trajectory).

    A source's trajectories come in the order of hashes of their ids, whatever theirs was; another hash chooses the
    turn.
    """
    by_source: dict[str, list[Trajectory]] = {}
    for source, trajectory in samples:
        by_source.setdefault(source, []).append(trajectory)
    for source, trajectories in by_source.items():
        trajectories.sort(key=lambda one: (_hash("order", source, one.id), one.id))

    def asked(source: str) -> Iterator[Request]:
        for trajectory in by_source[source]:
            if possible := turns(trajectory):
                yield request(source, trajectory, possible[_hash("turn", source, trajectory.id) % len(possible)])

    for one in chain.from_iterable(zip_longest(*map(asked, by_source))):
        if one is not None:
            yield one


def _hash(*names: str) -> int:
    return random_integer("\0".join(names))


def prompts(
    requests: Iterable[Request], tokenizer: "PreTrainedTokenizerFast", format: str, *, longest: int, count: int
) -> Prompts:
    """Renders the first `count` requests that can be asked: by the format's rules, with at most `longest` tokens.

    The tokens are those that training reads before the turn. `longest` should leave room for the answer in the model's
    positions.
    """
    from xlam_jax.data.render import render_prompt  # who asks a server needs no tokenizer

    asked: list[Prompted] = []
    left_out: Counter[str] = Counter()
    for one in requests:
        if len(asked) == count:
            break
        try:
            prompt = render_prompt(one.messages, one.tools, tokenizer, format)
        except UserError:  # the same message for each of them would help nobody
            left_out["not-representable"] += 1
            continue
        if len(prompt) > longest:
            left_out["too-long"] += 1
        else:
            asked.append(Prompted(one, prompt))
    return Prompts(asked, left_out)


def answer(
    asked: Sequence[Prompted],
    generate: Callable[[list[list[int]]], list[list[int]]],
    tokenizer: "PreTrainedTokenizerFast",
    stops: Collection[int] | None = None,
) -> list[Answer]:
    """Lets a model answer; `generate` gives the new tokens of each prompt, up to and with one of the tokens `stops`
    (as in `read_completion`) where it came."""
    answers = []
    for one, new in zip(asked, generate([one.prompt for one in asked]), strict=True):
        completion = read_completion(new, tokenizer, stops)
        answers.append(Answer(one.request, completion, score(one.request, completion.calls)))
    return answers


def score(request: Request, calls: Sequence[ToolCall] | None) -> Score:
    """Compares an answer's calls with the recorded ones; None, and no call, is an answer that could not be parsed."""
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
    """The number of requests and, if there is one, each share of them (0 to 1) by the name of the score's field."""
    if not scores:
        return {"requests": 0}
    shares = {name: sum(each) / len(scores) for name, *each in zip(Score._fields, *scores, strict=True)}
    return {"requests": len(scores), **shares}
