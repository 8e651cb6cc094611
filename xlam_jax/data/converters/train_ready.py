"""Train-ready rows of ActionStudio: one row per assistant turn, each with the complete context before it.

Raw: {"id": "weather_0---2", "messages", "tools", "chosen", "reject", "output_message"}. `messages` are chat messages
(the system text has the task instruction and the format instruction). `chosen` is the desired output as text, with
calls as "[TOOL_CALLS][{"name", "arguments"}]", and `output_message` is the same as a message; one of the two is enough.
`reject` (or `rejected`) is an undesired output.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from xlam_jax.data.converters import openai
from xlam_jax.data.converters.common import (
    Converted,
    Dropped,
    Lost,
    Repaired,
    StepDropped,
    convert_one,
    field,
    losses,
)
from xlam_jax.data.parse import parse_trajectory
from xlam_jax.data.row_json import parse_json
from xlam_jax.data.rows import read_rows
from xlam_jax.data.trajectory import InvalidTrajectory, Message, Trajectory, to_dict, to_messages

TOOL_CALLS = "[TOOL_CALLS]"
CHOSEN_SCORE, REJECTED_SCORE = 1.0, 0.0


def convert(paths: list[Path]) -> Iterator[Converted | Dropped]:
    """Joins consecutive rows of one id, each of which continues the one before, to one trajectory.

    It is the trajectory of the longest row; assistant turns without a row have `loss: false`. The shorter rows, which
    have no further content, are reported as dropped steps. A rejected output becomes a separate trajectory after the
    same context, with the score 0; the chosen one then has the score 1. Rows in another order (shuffled rows) become
    separate trajectories in which only the last turn is trained: sort the file by id first.
    """
    for path in paths:
        yield from _merged(path)


@dataclass(frozen=True, slots=True)
class _Open:
    """A trajectory that the next row may continue; `others` are the other items of its last row."""

    id: str
    item: Converted
    others: list[Converted | Dropped]

    def items(self) -> Iterator[Converted | Dropped]:
        yield from self.others
        yield self.item


def _merged(path: Path) -> Iterator[Converted | Dropped]:
    held: _Open | None = None
    for number, line, row, padded in read_rows(path):
        *others, item = convert_one(path, number, row, _convert_row, padded, line)
        if not isinstance(item, Converted):
            yield from (*others, item)
            continue
        current = _Open("" if isinstance(row, InvalidTrajectory) else str(row.get("id")), item, others)
        if held is not None:
            longer = _joined(held, current)
            if longer is None:
                yield from held.items()
            else:
                yield from held.others
                detail = f"row {number} repeats the turns of '{held.id}' and continues"
                yield Dropped(held.item.path, held.item.row, "repeated-context", detail, "step", held.item.line)
                current = longer
        held = current
    if held is not None:
        yield from held.items()


def _joined(shorter: _Open, longer: _Open) -> _Open | None:
    """The longer trajectory with the `loss` of the shorter one's turns; None if it does not continue the latter."""
    before, after = shorter.item.trajectory, longer.item.trajectory
    turns = list(after.conversation)
    if before.id != after.id or len(before.conversation) >= len(turns):
        return None
    if before.task_instruction != after.task_instruction or json.dumps(before.tools) != json.dumps(after.tools):
        return None
    repairs = list(longer.item.repairs)
    for i, turn in enumerate(before.conversation):
        if not _same(turn, turns[i]):
            return None
        if turn.content != turns[i].content:
            repairs.append(Repaired("thought-left-out", f"only one of two rows has the text of turn {i}"))
        turns[i] = replace(
            turns[i],
            content=turns[i].content or turn.content,
            loss=turn.loss,
            reasoning=turns[i].reasoning or turn.reasoning,
        )
    score = after.score if before.score is None else before.score
    trajectory = replace(after, score=score, conversation=tuple(turns))
    return replace(longer, item=replace(longer.item, trajectory=trajectory, repairs=tuple(repairs)))


def _same(turn: Message, other: Message) -> bool:
    """Whether two turns are equal, apart from ids and loss; of turns with calls, one may lack its text."""
    if turn.role != other.role or _call_keys(turn) != _call_keys(other):
        return False
    return turn.content == other.content or bool(turn.tool_calls and not (turn.content and other.content))


def _call_keys(turn: Message) -> list[tuple[str, str]]:
    return [(call.name, json.dumps(call.arguments)) for call in turn.tool_calls]


def _convert_row(
    row: dict[str, Any], name: str
) -> Iterator[dict[str, Any] | StepDropped | Repaired | InvalidTrajectory]:
    """Yields the rejected trajectory, if the row has one, and then the chosen one."""
    identity = name if row.get("id") is None else row["id"]
    if not isinstance(identity, str | int):
        raise InvalidTrajectory("bad-value", f"`id` of the row is text, got a {type(identity).__name__}")
    base, separator, number = str(identity).rpartition("---")
    context = {key: value for key, value in row.items() if key in ("tools", "source", "score")}
    messages = row.get("messages")
    repairs: list[Repaired] = []
    if isinstance(messages, str):
        messages = parse_json(messages)
        repairs.append(Repaired("string-messages", "`messages` is JSON in a text"))
    context["messages"] = field({"messages": messages}, "messages", list)
    output = _output(row, repairs)
    rejected = row.get("reject") if row.get("reject") is not None else row.get("rejected")
    if rejected:
        context["score"] = CHOSEN_SCORE
        other = _parsed(rejected) if isinstance(rejected, str) else rejected
        if not isinstance(other, dict):
            yield InvalidTrajectory("bad-rejected", f"`reject` is a {type(rejected).__name__}, not text or a message")
        elif (output_key := _key(output)) is not None and _key(other) == output_key:
            yield StepDropped("rejected-equals-chosen", "`reject` equals `chosen`")
        else:
            other = other | {"role": "assistant"}
            try:
                yield from _conversation(context | {"score": REJECTED_SCORE}, f"{identity}---rejected", other)
            except InvalidTrajectory as invalid:
                yield invalid
    yield from repairs
    yield from _conversation(context, base if separator and number.isdecimal() else str(identity), output)


def _conversation(
    context: dict[str, Any], identity: str, output: dict[str, Any]
) -> Iterator[dict[str, Any] | Repaired]:
    """Converts the context and one output to a trajectory in which only the output is trained."""
    row = context | {"id": identity, "messages": [*context["messages"], output]}
    for item in openai.convert_row(row, identity, ids=False):
        if isinstance(item, dict):
            for turn in item["conversation"][:-1]:
                if turn["role"] == "assistant":
                    turn["loss"] = False
        yield item


def _output(row: dict[str, Any], repairs: list[Repaired]) -> dict[str, Any]:
    """Returns the assistant's turn as a message. Raises `InvalidTrajectory` if `output_message` and `chosen` differ."""
    chosen, message = row.get("chosen"), row.get("output_message")
    if not isinstance(message, dict):
        parsed = _parsed(field(row, "chosen", str))
        if TOOL_CALLS in row["chosen"] and "tool_calls" not in parsed:
            raise InvalidTrajectory("bad-call", f"`chosen` has no list of calls after {TOOL_CALLS}: {row['chosen']}")
        return parsed
    message = {"role": "assistant"} | message
    if not isinstance(chosen, str) or _key(message) is None or chosen == _text(message):
        return message
    parsed = _parsed(chosen)
    text, calls = _key(message) or ("", "")
    chosen_text, chosen_calls = _key(parsed) or ("", "")
    if calls != chosen_calls or (text and chosen_text and text != chosen_text):
        raise InvalidTrajectory("ambiguous-output", f"`output_message` and `chosen` differ: {chosen}")
    if chosen_text and not text:
        repairs.append(Repaired("thought-left-out", "only `chosen` has the text of the turn with calls"))
        message["content"] = parsed["content"]
    return message


def _parsed(text: str) -> dict[str, Any]:
    """Parses a model's output to a message."""
    from xlam_jax.data.wire import parse_completion

    content, calls = parse_completion(text)
    message: dict[str, Any] = {"role": "assistant", "content": content}
    if calls:
        message["tool_calls"] = [
            {"type": "function"}
            | ({} if call.id is None else {"id": call.id})
            | {"function": {"name": call.name, "arguments": call.arguments}}
            for call in calls
        ]
    return message


def _key(message: dict[str, Any]) -> tuple[str, str] | None:
    """Returns (text, calls) of an assistant's message, for comparison; None if it is invalid."""
    user = {"role": "user", "content": "q"}
    tools: list[dict[str, Any]] = []
    try:
        for item in openai.convert_row({"messages": [user, message | {"role": "assistant"}]}, "", ids=False):
            if isinstance(item, dict):
                calls = item["conversation"][1].get("tool_calls") or []
                names = {field(field(call, "function", dict), "name", str) for call in field({"c": calls}, "c", list)}
                tools = [{"type": "function", "function": {"name": name}} for name in names]
                turn = parse_trajectory(item | {"tools": tools}).conversation[1]
                return turn.content.strip(), json.dumps(_call_keys(turn))
    except InvalidTrajectory:
        pass
    return None


def _text(message: dict[str, Any]) -> str:
    """Returns the desired output, as text, for a message in OpenAI form."""
    calls = [call["function"] for call in message.get("tool_calls") or ()]
    content = message.get("content") or ""
    if not calls or not isinstance(content, str):
        return str(content)
    calls = [{"name": call["name"], "arguments": call.get("arguments")} for call in calls]
    return content + TOOL_CALLS + json.dumps(calls, ensure_ascii=False)


def export_row(trajectory: Trajectory) -> Iterator[dict[str, Any] | Lost]:
    """Yields one row per assistant turn without `loss: false`, then a `Lost` for each part that the rows do not keep.

    Lost are for example source, score, and turns after the last trained one; if no turn is trained, there is only a
    `Lost`. `chosen` and `output_message` both have the text of a turn with calls.
    """
    messages = to_messages(trajectory)
    first = len(messages) - len(trajectory.conversation)
    rows: list[dict[str, Any]] = []
    number = 0
    for at, turn in enumerate(trajectory.conversation, start=first):
        if turn.role != "assistant":
            continue
        number += 1
        if turn.loss is False:
            continue
        rows.append(
            {
                "id": f"{trajectory.id}---{number}",
                "messages": messages[:at],
                "tools": trajectory.tools,
                "chosen": _text(messages[at]),
                "output_message": messages[at] | ({} if turn.loss is None else {"loss": turn.loss}),
            }
        )
    if not rows:
        yield Lost("no-trained-turn", "no assistant turn is trained, and this format has rows of trained turns only")
        return
    yield from rows
    yield from losses(trajectory, {"rows": rows}, _read_back)


def _read_back(row: dict[str, Any], name: str) -> Iterator[dict[str, Any]]:
    """Converts the rows of an export to their trajectory."""
    held: _Open | None = None
    for exported in row["rows"]:
        (item,) = convert_one(Path(), 0, exported, _convert_row)
        if isinstance(item, Dropped):
            raise InvalidTrajectory(item.reason, item.detail)
        current = _Open("", item, [])
        joined = current if held is None else _joined(held, current)
        if joined is None:
            raise InvalidTrajectory("rows-do-not-join", f"'{exported['id']}' does not continue the row before it")
        held = joined
    if held is not None:
        yield to_dict(held.item.trajectory)
