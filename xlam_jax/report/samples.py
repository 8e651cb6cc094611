"""Answers to held-out requests, compared with the recorded calls."""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from xlam_jax.data.schemas import hashable
from xlam_jax.enums import REQUEST_MARKS
from xlam_jax.journal import json_lines, summarize
from xlam_jax.pages.plots import color_class
from xlam_jax.report.runs import is_step
from xlam_jax.training.run_folder import SAMPLES

REQUESTS = 40
"""Number of requests of a run that are shown: the first of its samples.jsonl."""
ANSWERS = 10
"""Number of a run's answers to a request that are shown: the first, the last, and evenly spaced ones in between."""
LONGEST = {"message": 3_000, "conversation": 12_000, "answer": 2_000, "value": 400}
"""Maximum number of characters of a text that are shown."""

Key = tuple[str, str, str]
"""Source, trajectory and turn, which identify a request."""


class Answer(NamedTuple):
    """A run's answer to a request after a step."""

    calls: list[Any]
    content: str
    text: str
    """The generated text, before it was parsed."""
    cut: bool
    """Whether it reached eval.max_new_tokens."""
    marks: dict[str, bool]


class Request(NamedTuple):
    """A held-out request, and the answers to it by step."""

    messages: list[Any]
    expected: list[Any]
    answers: dict[int, Answer]


class Samples(NamedTuple):
    """A run's requests."""

    requests: dict[Key, Request]
    hidden: int
    """Number of requests beyond the first REQUESTS."""


class Line(NamedTuple):
    """A line of a call: its name, or an argument. `removed` was recorded, `added` was answered, `kept` is in both."""

    key: str | None = None
    kept: str | None = None
    removed: str | None = None
    added: str | None = None
    note: str = ""


class AnswerView(NamedTuple):
    """An answer, as the page shows it."""

    run: str
    """The run's name, where it is shown."""
    css: str
    step: int
    marks: list[tuple[str, bool]]
    content: str
    calls: list[list[Line]]
    raw: str
    """The generated text, if it could not be parsed."""
    cut: bool


class RunAnswers(NamedTuple):
    """A run's answers to a request: the last one, and those after earlier steps, latest first."""

    last: AnswerView
    earlier: list[AnswerView]
    hidden: int
    """Number of answers that are not shown."""


class Card(NamedTuple):
    """A request with the answers of all runs, as the page shows it."""

    exact: bool
    """Whether the last answer of each run has exactly the recorded calls."""
    source: str
    trajectory: str
    turn: str
    question: str
    """The last user message."""
    message_count: int
    messages: list[tuple[str, str]]
    """Roles and texts."""
    hidden_messages: int
    recorded: list[list[Line]]
    runs: list[RunAnswers]


# ---- reading --------------------------------------------------------------------------------------------------------


def read(run: Path, warnings: list[str]) -> Samples:
    """Reads RUN/samples.jsonl, if there is one. Adds its problems to `warnings`."""
    path = run / SAMPLES
    requests: dict[Key, Request] = {}
    hidden: set[Key] = set()
    problems: list[str] = []
    if not path.exists():
        return Samples({}, 0)
    for line, record in json_lines(path, problems):
        if not isinstance(record, dict) or not is_step(record.get("step")):
            problems.append(f"line {line} is not a sample with a step")
            continue
        key = (str(record.get("source")), str(record.get("id")), str(record.get("turn", "?")))
        if key not in requests:
            if len(requests) >= REQUESTS:
                hidden.add(key)
                continue
            requests[key] = Request(_list(record.get("messages")), _list(record.get("expected")), {})
        answers = requests[key].answers
        if record["step"] in answers:
            problems.append(f"line {line} repeats the answer to a request after step {record['step']:,}")
            continue
        answers[record["step"]] = _read_answer(record)
    warnings += summarize(path, problems)
    return Samples(requests, len(hidden))


def _read_answer(record: dict[str, Any]) -> Answer:
    return Answer(
        calls=_list(record.get("calls")),
        content=_shorten(record.get("content"), "answer"),
        text=_shorten(record.get("text"), "answer"),
        cut=record.get("finish_reason") == "length",
        marks={mark: record[mark] is True for mark in REQUEST_MARKS if mark in record},
    )


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _shorten(value: Any, kind: str) -> str:
    """Returns a text, or any other value as JSON, cut to the maximum length of its kind."""
    text = "" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    more = len(text) - LONGEST[kind]
    return text if more <= 0 else f"{text[: LONGEST[kind]]} … ({more:,} more characters)"


# ---- cards ----------------------------------------------------------------------------------------------------------


def make_cards(runs: Sequence[tuple[str, Samples]]) -> list[Card]:
    """Returns a card per request. `runs`: names and samples of the runs."""
    keys = dict.fromkeys(key for _, samples in runs for key in samples.requests)
    return [_make_card(key, runs) for key in keys]


def _make_card(key: Key, runs: Sequence[tuple[str, Samples]]) -> Card:
    requests = [
        (index, name, samples.requests[key]) for index, (name, samples) in enumerate(runs) if key in samples.requests
    ]
    first = requests[0][2]
    source, trajectory, turn = key
    messages = list(_conversation(first.messages))
    return Card(
        exact=all(request.answers[max(request.answers)].marks.get("exact") for _, _, request in requests),
        source=source,
        trajectory=trajectory,
        turn=turn,
        question=_last_user_message(first.messages),
        message_count=len(first.messages),
        messages=messages,
        hidden_messages=len(first.messages) - len(messages),
        recorded=_compare_calls(first.expected, first.expected),
        runs=[
            _run_answers(request, name if len(runs) > 1 else "", color_class(index))
            for index, name, request in requests
        ],
    )


def _last_user_message(messages: Iterable[Any]) -> str:
    contents = [
        message.get("content") for message in messages if isinstance(message, dict) and message.get("role") == "user"
    ]
    return _shorten(contents[-1], "message") if contents else "(no user message)"


def _conversation(messages: Iterable[Any]) -> Iterator[tuple[str, str]]:
    """Yields roles and texts, up to the maximum length of a conversation."""
    remaining = LONGEST["conversation"]
    for message in messages:
        message = message if isinstance(message, dict) else {"content": message}
        text = _shorten(message.get("content"), "message")
        if calls := message.get("tool_calls"):
            text += ("\n" if text else "") + _shorten([_function(call) for call in _list(calls)], "message")
        remaining -= len(text)
        if remaining < 0:
            return
        yield str(message.get("role", "?")), text


def _function(call: Any) -> Any:
    return call.get("function", call) if isinstance(call, dict) else call


def _run_answers(request: Request, run: str, css: str) -> RunAnswers:
    steps = sorted(request.answers)
    shown = steps
    if len(steps) > ANSWERS:
        shown = sorted({steps[round(index * (len(steps) - 1) / (ANSWERS - 1))] for index in range(ANSWERS)})
    return RunAnswers(
        last=_answer_view(request, shown[-1], run, css),
        earlier=[_answer_view(request, step, "", css) for step in shown[-2::-1]],
        hidden=len(steps) - len(shown),
    )


def _answer_view(request: Request, step: int, run: str, css: str) -> AnswerView:
    answer = request.answers[step]
    return AnswerView(
        run=run,
        css=css,
        step=step,
        marks=[(mark.replace("_", " "), good) for mark, good in answer.marks.items()],
        content=answer.content,
        calls=_compare_calls(request.expected, answer.calls),
        raw="" if answer.marks.get("parsable", True) else answer.text,
        cut=answer.cut,
    )


# ---- differences between calls --------------------------------------------------------------------------------------


def pair(expected: list[Any], calls: list[Any]) -> list[tuple[Any, Any]]:
    """Matches calls with expected ones: equal calls first, then calls of the same function, then the rest in order.

    Returns pairs in the order of `expected`, then of `calls`; None for the counterpart of an unmatched call.
    """
    free = list(range(len(calls)))
    partner: dict[int, int] = {}
    rules: tuple[Callable[[Any, Any], bool], ...] = (
        same,
        lambda left, right: _name(left) == _name(right),
        lambda left, right: True,
    )
    for matches in rules:
        for position, call in enumerate(expected):
            match = next((index for index in free if position not in partner and matches(call, calls[index])), None)
            if match is not None:
                partner[position] = match
                free.remove(match)
    pairs = [(call, calls[partner[index]] if index in partner else None) for index, call in enumerate(expected)]
    return pairs + [(None, calls[index]) for index in free]


def same(left: Any, right: Any) -> bool:
    """Returns whether two values are equal in JSON, as in the score of an answer: 1 and 1.0 are, 1 and true are not."""
    return hashable(left) == hashable(right)


def _compare_calls(expected: list[Any], calls: list[Any]) -> list[list[Line]]:
    return [_compare_call(left, right) for left, right in pair(expected, calls)]


def _compare_call(expected: Any, call: Any) -> list[Line]:
    """Returns a line for the name, and one per argument."""
    if call is None:
        rest = [Line(removed=_argument(*item)) for item in _arguments(expected).items()]
        return [Line(removed=_name(expected), note="not called"), *rest]
    if expected is None:
        rest = [Line(added=_argument(*item)) for item in _arguments(call).items()]
        return [Line(added=_name(call), note="not expected"), *rest]
    before, after = _arguments(expected), _arguments(call)
    lines = [_change(_name(expected), _name(call))]
    for key in dict.fromkeys([*before, *after]):
        if key not in after:
            lines.append(Line(removed=_argument(key, before[key]), note="missing"))
        elif key not in before:
            lines.append(Line(added=_argument(key, after[key]), note="not expected"))
        else:
            left, right = _value(before[key]), _value(after[key])
            line = Line(kept=right) if same(before[key], after[key]) else Line(removed=left, added=right)
            lines.append(line._replace(key=key or None))
    return lines


def _change(before: str, after: str) -> Line:
    return Line(kept=after) if before == after else Line(removed=before, added=after)


def _name(call: Any) -> str:
    return str(call.get("name")) if isinstance(call, dict) else _shorten(call, "value")


def _arguments(call: Any) -> dict[str, Any]:
    arguments = call.get("arguments") if isinstance(call, dict) else None
    return arguments if isinstance(arguments, dict) else {} if arguments is None else {"": arguments}


def _argument(key: str, value: Any) -> str:
    return f"{key}: {_value(value)}" if key else _value(value)


def _value(value: Any) -> str:
    return _shorten(json.dumps(value, ensure_ascii=False), "value")
