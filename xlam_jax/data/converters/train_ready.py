"""Train-ready rows of ActionStudio: one row an assistant turn, each with the whole context before it.

Raw: {"id": "weather_0---2", "messages", "tools", "chosen", "reject", "output_message"}; `messages` are chat messages
(the system text holds the task instruction and the format instruction), `chosen` is what the model shall write, calls
as "[TOOL_CALLS][{"name", "arguments"}]", `output_message` the same as a message; one of the two is enough. `reject`
(or `rejected`) is what it shall not write.
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
    """Rows of one id that follow each other, each going on where the one before ended, become one trajectory.

    It is that of the longest row; assistant turns that have no row of their own carry no loss. The shorter rows, which
    say nothing more, are told as steps left out. A rejected output becomes a trajectory of its own after the same
    context, with the score 0, and the chosen one has the score 1. Rows in another order (shuffled ones) stay
    trajectories of their own, of which only the last turn carries loss: sort the file by id first.
    """
    for path in paths:
        yield from _merged(path)


@dataclass(frozen=True, slots=True)
class _Open:
    """A trajectory that the next row may go on; `others` are the items that its last row gave besides it."""

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
        made = _Open("" if isinstance(row, InvalidTrajectory) else str(row.get("id")), item, others)
        if held is not None:
            longer = _joined(held, made)
            if longer is None:
                yield from held.items()
            else:
                yield from held.others
                detail = f"row {number} repeats the turns of '{held.id}' and goes on"
                yield Dropped(held.item.path, held.item.row, "repeated-context", detail, "step", held.item.line)
                made = longer
        held = made
    if held is not None:
        yield from held.items()


def _joined(shorter: _Open, longer: _Open) -> _Open | None:
    """The longer trajectory with the loss of the shorter one's turns; None if it does not go on where that ends."""
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
            repairs.append(Repaired("thought-left-out", f"turn {i} has its text in one of two rows only"))
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
    """Whether two rows mean the same turn: ids and loss aside, and one may lack the text beside its calls."""
    if turn.role != other.role or _said(turn) != _said(other):
        return False
    return turn.content == other.content or bool(turn.tool_calls and not (turn.content and other.content))


def _said(turn: Message) -> list[tuple[str, str]]:
    return [(call.name, json.dumps(call.arguments)) for call in turn.tool_calls]


def _convert_row(
    row: dict[str, Any], name: str
) -> Iterator[dict[str, Any] | StepDropped | Repaired | InvalidTrajectory]:
    """The rejected trajectory, if the row has one, and last the chosen one."""
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
        elif (said := _key(output)) is not None and _key(other) == said:
            yield StepDropped("rejected-equals-chosen", "`reject` says what `chosen` says")
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
    """The context and one output, where only the output carries loss."""
    row = context | {"id": identity, "messages": [*context["messages"], output]}
    for item in openai.convert_row(row, identity, ids=False):
        if isinstance(item, dict):
            for turn in item["conversation"][:-1]:
                if turn["role"] == "assistant":
                    turn["loss"] = False
        yield item


def _output(row: dict[str, Any], repairs: list[Repaired]) -> dict[str, Any]:
    """The assistant's turn, as a message. Raises `InvalidTrajectory` where `output_message` and `chosen` differ."""
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
    found, others = _key(parsed) or ("", "")
    if calls != others or (text and found and text != found):
        raise InvalidTrajectory("ambiguous-output", f"`output_message` and `chosen` differ: {chosen}")
    if found and not text:
        repairs.append(Repaired("thought-left-out", "the text beside the calls stands in `chosen` only"))
        message["content"] = parsed["content"]
    return message


def _parsed(text: str) -> dict[str, Any]:
    """What a model wrote, as a message."""
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
    """The text and the calls of an assistant's message, to compare; None if it is no sound one."""
    user = {"role": "user", "content": "q"}
    tools: list[dict[str, Any]] = []
    try:
        for item in openai.convert_row({"messages": [user, message | {"role": "assistant"}]}, "", ids=False):
            if isinstance(item, dict):
                calls = item["conversation"][1].get("tool_calls") or []
                names = {field(field(call, "function", dict), "name", str) for call in field({"c": calls}, "c", list)}
                tools = [{"type": "function", "function": {"name": name}} for name in names]
                turn = parse_trajectory(item | {"tools": tools}).conversation[1]
                return turn.content.strip(), json.dumps(_said(turn))
    except InvalidTrajectory:
        pass
    return None


def _text(message: dict[str, Any]) -> str:
    """What the model shall write for a message in our own form."""
    calls = [call["function"] for call in message.get("tool_calls") or ()]
    content = message.get("content") or ""
    if not calls or not isinstance(content, str):
        return str(content)
    calls = [{"name": call["name"], "arguments": call.get("arguments")} for call in calls]
    return content + TOOL_CALLS + json.dumps(calls, ensure_ascii=False)


def export_row(trajectory: Trajectory) -> Iterator[dict[str, Any] | Lost]:
    """One row for each assistant turn but those whose `loss` is false; source and score have no place in them.

    The text beside calls stands in `chosen` and in `output_message`. Turns after the last row's are lost.
    """
    messages = to_messages(trajectory, reasoning=True)
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
        yield Lost("no-trained-turn", "no assistant turn carries loss, and this format holds only those that do")
        return
    yield from rows
    yield from losses(trajectory, {"rows": rows}, _read_back)


def _read_back(row: dict[str, Any], name: str) -> Iterator[dict[str, Any]]:
    """The trajectory of the rows of an export."""
    held: _Open | None = None
    for each in row["rows"]:
        (item,) = convert_one(Path(), 0, each, _convert_row)
        if isinstance(item, Dropped):
            raise InvalidTrajectory(item.reason, item.detail)
        made = _Open("", item, [])
        joined = made if held is None else _joined(held, made)
        if joined is None:
            raise InvalidTrajectory("rows-do-not-join", f"'{each['id']}' does not go on where the row before ends")
        held = joined
    if held is not None:
        yield to_dict(held.item.trajectory)
