"""Answers to held-out requests: what was asked, what was recorded, what each run said, and where they differ."""

import json
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from xlam_jax.data.schemas import hashable
from xlam_jax.enums import REQUEST_MARKS as MARKS
from xlam_jax.journal import json_lines, summarize
from xlam_jax.report.plots import color_class
from xlam_jax.report.runs import is_step
from xlam_jax.training.run_folder import SAMPLES

REQUESTS = 40
"""Requests of a run that are kept: the first of its samples.jsonl."""
ANSWERS = 10
"""Steps of a run whose answers to a request are shown: the first and the last, the others evenly between."""
LONGEST = {"message": 3_000, "conversation": 12_000, "answer": 2_000, "value": 400}
"""Characters that are shown of a text."""

Key = tuple[str, str, str]
"""Source, trajectory and turn: what tells one request from another."""


class Answer(NamedTuple):
    """What a run said to a request after a step."""

    calls: list[Any]
    content: str
    text: str
    """All that was generated, as it came."""
    cut: bool
    """It reached eval.max_new_tokens."""
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
    """Requests beyond the first REQUESTS."""


def read(run: Path, warnings: list[str]) -> Samples:
    """Reads RUN/samples.jsonl; what is wrong with it is told in `warnings`."""
    path = run / SAMPLES
    requests: dict[Key, Request] = {}
    hidden: set[Key] = set()
    problems: list[str] = []
    if not path.exists():
        return Samples({}, 0)
    for at, record in json_lines(path, problems):
        if not isinstance(record, dict) or not is_step(record.get("step")):
            problems.append(f"line {at} is no sample with a step")
            continue
        key = (str(record.get("source")), str(record.get("id")), str(record.get("turn", "?")))
        if key not in requests:
            if len(requests) >= REQUESTS:
                hidden.add(key)
                continue
            requests[key] = Request(_list(record.get("messages")), _list(record.get("expected")), {})
        answers = requests[key].answers
        if record["step"] in answers:
            problems.append(f"line {at} answers a request a second time after step {record['step']:,}")
            continue
        answers[record["step"]] = Answer(
            calls=_list(record.get("calls")),
            content=_text(record.get("content"), "answer"),
            text=_text(record.get("text"), "answer"),
            cut=record.get("finish_reason") == "length",
            marks={mark: record[mark] is True for mark in MARKS if mark in record},
        )
    warnings += summarize(path, problems)
    return Samples(requests, len(hidden))


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _text(value: Any, kind: str) -> str:
    """A text, or any other value as JSON, no longer than its kind may be."""
    text = "" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    more = len(text) - LONGEST[kind]
    return text if more <= 0 else f"{text[: LONGEST[kind]]} … ({more:,} more characters)"


def cards(runs: Sequence[tuple[str, Samples]]) -> Iterator[str]:
    """Yields a card a request: the last user message, the conversation, the expected calls, and each run's answers."""
    keys = dict.fromkeys(key for _, samples in runs for key in samples.requests)
    for key in keys:
        asked = [
            (at, name, samples.requests[key]) for at, (name, samples) in enumerate(runs) if key in samples.requests
        ]
        request = asked[0][2]
        exact = all(one.answers[max(one.answers)].marks.get("exact") for _, _, one in asked)
        source, trajectory, turn = key
        yield f'<article class="sample" data-exact="{"yes" if exact else "no"}">\n'
        yield f"<h3>{escape(source)} <span>{escape(trajectory)}, turn {escape(turn)}</span></h3>\n"
        yield f'<blockquote class="text">{escape(_last_user_message(request.messages))}</blockquote>\n'
        yield f"<details><summary>the whole conversation: {len(request.messages)} messages</summary>\n"
        yield from _conversation(request.messages)
        yield "</details>\n"
        yield f'<div class="answers"><div><h4>recorded</h4>{_calls(request.expected, request.expected)}</div>\n'
        for at, run, one in asked:
            yield f"<div>{''.join(_answers(one, run if len(runs) > 1 else '', at))}</div>\n"
        yield "</div></article>\n"


def _last_user_message(messages: Iterable[Any]) -> str:
    said = [
        message.get("content") for message in messages if isinstance(message, dict) and message.get("role") == "user"
    ]
    return _text(said[-1], "message") if said else "(no user message)"


def _conversation(messages: Sequence[Any]) -> Iterator[str]:
    left = LONGEST["conversation"]
    for at, message in enumerate(messages):
        message = message if isinstance(message, dict) else {"content": message}
        text = _text(message.get("content"), "message")
        if calls := message.get("tool_calls"):
            text += ("\n" if text else "") + _text([_function(call) for call in _list(calls)], "message")
        left -= len(text)
        if left < 0:
            yield f'<p class="quiet">… and {len(messages) - at} more messages</p>\n'
            return
        role = escape(str(message.get("role", "?")))
        yield f'<div class="message"><b>{role}</b><div class="text">{escape(text)}</div></div>\n'


def _function(call: Any) -> Any:
    return call.get("function", call) if isinstance(call, dict) else call


def _answers(request: Request, run: str, color: int) -> Iterator[str]:
    """A run's last answer, and those before it."""
    steps = sorted(request.answers)
    if len(steps) > ANSWERS:
        chosen = sorted({steps[round(at * (len(steps) - 1) / (ANSWERS - 1))] for at in range(ANSWERS)})
    else:
        chosen = steps
    yield _answer(request, chosen[-1], run, color)
    if earlier := chosen[-2::-1]:
        hidden = len(steps) - len(chosen)
        rest = f", {hidden} not shown" if hidden else ""
        yield f"<details><summary>after earlier steps: {len(earlier)} answers{rest}</summary>\n"
        for step in earlier:
            yield _answer(request, step, "", color)
        yield "</details>\n"


def _answer(request: Request, step: int, run: str, color: int) -> str:
    answer = request.answers[step]
    marks = " ".join(
        f'<span class="{"good" if good else "bad"}">{"✓" if good else "✗"} {mark.replace("_", " ")}</span>'
        for mark, good in answer.marks.items()
    )
    whose = f'<i class="dot {color_class(color)}"></i>{escape(run)}, ' if run else ""
    parts = [f'<div class="answer"><h4><b>{whose}step {step:,}</b> {marks}</h4>\n']
    if answer.content:
        parts.append(f'<div class="text">{escape(answer.content)}</div>\n')
    parts.append(_calls(request.expected, answer.calls))
    if answer.text and not answer.marks.get("parsable", True):
        parts.append(f'<div class="text raw">{escape(answer.text)}</div>\n')
    if answer.cut:
        parts.append('<p class="quiet">cut at eval.max_new_tokens</p>\n')
    return "".join(parts) + "</div>\n"


def _calls(expected: list[Any], got: list[Any]) -> str:
    """The calls that were made, each beside the one that was expected; what differs is struck out or underlined."""
    if not expected and not got:
        return '<p class="quiet">no call</p>\n'
    return "".join(_call(one, other) for one, other in pair(expected, got))


def pair(expected: list[Any], got: list[Any]) -> list[tuple[Any, Any]]:
    """Which call stands for which: equal ones first, then those of one function, then the rest in order; None where one
    has no counterpart. In the order of `expected`, then of `got`."""
    free = list(range(len(got)))
    partner: dict[int, int] = {}
    for alike in (same, lambda one, other: _name(one) == _name(other), lambda one, other: True):
        for at, one in enumerate(expected):
            found = next((index for index in free if at not in partner and alike(one, got[index])), None)
            if found is not None:
                partner[at] = found
                free.remove(found)
    pairs = [(one, got[partner[at]] if at in partner else None) for at, one in enumerate(expected)]
    return pairs + [(None, got[index]) for index in free]


def same(one: Any, other: Any) -> bool:
    """Whether two values are the same in JSON, as the score of an answer has it: 1 and 1.0, but not 1 and true."""
    return hashable(one) == hashable(other)


def _name(call: Any) -> str:
    return str(call.get("name")) if isinstance(call, dict) else _text(call, "value")


def _arguments(call: Any) -> dict[str, Any]:
    arguments = call.get("arguments") if isinstance(call, dict) else None
    return arguments if isinstance(arguments, dict) else {} if arguments is None else {"": arguments}


def _call(expected: Any, got: Any) -> str:
    """One call: its name, and an argument a line."""
    if got is None:
        lines = [f"<del>{_code(_name(expected))}</del> <em>not called</em>"]
        lines += [f"<del>{_code(_argument(*item))}</del>" for item in _arguments(expected).items()]
    elif expected is None:
        lines = [f"<ins>{_code(_name(got))}</ins> <em>not asked for</em>"]
        lines += [f"<ins>{_code(_argument(*item))}</ins>" for item in _arguments(got).items()]
    else:
        lines = [_changed(_name(expected), _name(got))]
        before, after = _arguments(expected), _arguments(got)
        for key in dict.fromkeys([*before, *after]):
            if key not in after:
                lines.append(f"<del>{_code(_argument(key, before[key]))}</del> <em>left out</em>")
            elif key not in before:
                lines.append(f"<ins>{_code(_argument(key, after[key]))}</ins> <em>not asked for</em>")
            else:
                equal = same(before[key], after[key])
                one, other = _text_of(before[key]), _text_of(after[key])
                value = _code(other) if equal else f"<del>{_code(one)}</del> <ins>{_code(other)}</ins>"
                lines.append(f"{_code(key)}: {value}" if key else value)
    first, *rest = lines
    return f'<div class="call"><div>{first}</div>{"".join(f"<div>{line}</div>" for line in rest)}</div>\n'


def _changed(one: str, other: str) -> str:
    return _code(other) if one == other else f"<del>{_code(one)}</del> <ins>{_code(other)}</ins>"


def _argument(key: str, value: Any) -> str:
    return f"{key}: {_text_of(value)}" if key else _text_of(value)


def _text_of(value: Any) -> str:
    return _text(json.dumps(value, ensure_ascii=False), "value")


def _code(text: str) -> str:
    return f"<code>{escape(text)}</code>"


STYLE = """
.sample { border-top: 1px solid var(--line); padding: .8rem 0 1rem; break-inside: avoid; }
.sample h3 { font-size: 1rem; margin: 0 0 .3rem; } .sample h3 span { font-weight: 400; color: var(--quiet); }
.answers { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); gap: 0 2rem; }
.answers > * { min-width: 0; }
.sample h4 { display: flex; flex-wrap: wrap; align-items: center; gap: 0 .7rem; margin: .7rem 0 .3rem;
  font-size: 13px; }
.sample h4 span { font-weight: 400; }
.sample blockquote { margin: .3rem 0; padding-left: .8rem; border-left: 3px solid var(--line); max-height: 12rem;
  overflow-y: auto; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate; }
.raw { font: 13px/1.5 ui-monospace, monospace; padding: .3rem .6rem; background: var(--shade); border-radius: 4px; }
.message { display: grid; grid-template-columns: 5.5rem 1fr; gap: .2rem .8rem; font-size: 13px; padding: .25rem 0; }
.message b { font-weight: 400; color: var(--quiet); } .message .text { min-width: 0; }
.call { margin: .2rem 0; padding-left: .8rem; border-left: 3px solid var(--line); font-size: 13px; line-height: 1.55;
  overflow-wrap: anywhere; unicode-bidi: isolate; }
.call > div:not(:first-child) { padding-left: 1.2rem; } .call > div:first-child code { font-weight: 600; }
code { font: 13px/1.55 ui-monospace, monospace; white-space: pre-wrap; }
del { color: var(--bad); } ins { color: var(--good); text-underline-offset: 3px; } em { color: var(--quiet); }
.good { color: var(--good); } .bad { color: var(--bad); }
.dot { display: inline-block; width: 9px; height: 9px; border-radius: 50%; background: var(--c); margin-right: .4rem; }
"""
