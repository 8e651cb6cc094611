"""OpenAI chat messages, as in its fine-tuning files.

Raw: {"messages": [{"role", "content", "tool_calls", "tool_call_id", "name", "weight"}, …], "tools": […]}. Arguments
are JSON in a string, `content` is null in turns with calls, and `weight` 0 excludes an assistant turn from the loss.
Also read: the role "developer" (as system), and the older "functions", "function_call" and role "function". The
reasoning of an assistant turn is "reasoning_content" (or "reasoning", "thinking", or content parts of these types).
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

from xlam_jax.data.call_links import answered_calls
from xlam_jax.data.converters.common import (
    Converted,
    Dropped,
    Lost,
    Repaired,
    convert_rows,
    declared_tools,
    field,
    losses,
    take_tools,
    turns_of,
)
from xlam_jax.data.converters.links import link
from xlam_jax.data.messages import modern_turn
from xlam_jax.data.raw_turns import with_call_list
from xlam_jax.data.row_json import decode_arguments
from xlam_jax.data.trajectory import TURN, InvalidTrajectory, Message, Trajectory, to_messages


def convert(paths: list[Path]) -> Iterator[Converted | Dropped]:
    """Converts each row to one trajectory; a system message at the front becomes the task instruction.

    Calls and results without ids, as in the older form, get ids where their pairing is unambiguous.
    """
    return convert_rows(paths, convert_row)


def convert_row(row: dict[str, Any], name: str, ids: bool = True) -> Iterator[dict[str, Any] | Repaired]:
    """Converts one conversation. `id`, `source` and `score`, which some files add, are kept.

    With `ids` False, no ids are added to calls and results.
    """
    rest = {key: value for key, value in row.items() if key not in ("messages", "functions", "id")}
    identity = row.get("id")
    repairs: list[Repaired] = []
    if isinstance(rest.get("tools"), str):
        rest["tools"] = declared_tools(rest["tools"])
    functions = row.get("functions")
    if functions:
        declared = [{"type": "function", "function": function} for function in field(row, "functions", list)]
        if rest.get("tools") and rest["tools"] != declared:
            raise InvalidTrajectory("bad-tools", "`tools` and `functions` declare different tools; keep one of them")
        rest["tools"] = declared
    turns: list[dict[str, Any]] = []
    for i, message in enumerate(turns_of(row, "messages", repairs)):
        turns.append(read_turn(i, message, repairs))
        if turns[-1]["role"] == "system" and not rest.get("tools"):
            rest["tools"] = take_tools(turns, [], repairs)
    turns = link(turns, repairs, ids)
    yield from repairs
    instruction, turns = split_instruction(turns)
    yield {
        "unique_trajectory_id": name if identity is None else identity,
        **rest,
        "task_instruction": instruction,
        "conversation": turns,
    }


def split_instruction(turns: list[dict[str, Any]]) -> tuple[str, list[dict[str, Any]]]:
    """Returns (task instruction, other turns): the text of a system turn at the front that has no other keys."""
    match turns:
        case [{"role": "system", "content": str(text), **others}, *rest] if text and not others.keys() - {TURN}:
            return text, rest
    return "", turns


def read_turn(i: int, message: Any, repairs: list[Repaired]) -> dict[str, Any]:
    """Converts turn `i` of a conversation in OpenAI form to the form of the parser. Raises `InvalidTrajectory`."""
    field(message, "role", str)
    turn = modern_turn(message, f"turn {i}") | {TURN: i}
    if turn.get("weight") is not None:
        weight = turn.pop("weight")
        if weight not in (0, 1):
            raise InvalidTrajectory("bad-loss", f"turn {i} has weight {weight!r}, not 0 or 1")
        turn["loss"] = bool(weight)
    note = lambda reason, detail: repairs.append(Repaired(reason, detail))  # noqa: E731
    turn = with_call_list(i, turn, note)
    calls = turn.get("tool_calls")
    if calls and isinstance(calls, list):
        turn["content"] = "" if turn.get("content") is None else turn["content"]
        turn["tool_calls"] = [_call(i, call, repairs) for call in calls]
    return turn


def _call(i: int, call: Any, repairs: list[Repaired]) -> Any:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return dict(call) if isinstance(call, dict) else call  # the parser reports what is wrong with it
    where = f"turn {i} calls '{function.get('name')}' with"
    arguments = decode_arguments(
        function["arguments"], where, lambda reason, detail: repairs.append(Repaired(reason, detail))
    )
    return {**call, "function": {**function, "arguments": arguments}}


def export_row(trajectory: Trajectory) -> Iterator[dict[str, Any] | Lost]:
    """Yields one row. The format requires ids of calls, which are added; id, source and score are lost."""
    turns = with_ids(trajectory.conversation)
    messages = to_messages(replace(trajectory, conversation=turns))
    for turn, message in zip(turns, messages[len(messages) - len(turns) :], strict=True):
        if turn.role == "assistant" and turn.loss is not None:
            message["weight"] = int(turn.loss)
        if turn.tool_calls:
            message["content"] = turn.content or None
        for call in message.get("tool_calls", ()):
            call["function"]["arguments"] = json.dumps(call["function"]["arguments"], ensure_ascii=False)
    row = {"messages": messages} | ({"tools": trajectory.tools} if trajectory.tools else {})
    yield row
    yield from losses(trajectory, row, convert_row)


def with_ids(conversation: Sequence[Message]) -> list[Message]:
    """Returns the turns with an id in every call, and in every tool result the id of its call."""
    turns = list(conversation)
    used = {call.id for turn in turns for call in turn.tool_calls}
    fresh = (name for name in map("call_{}".format, count(1)) if name not in used)
    for i, turn in enumerate(turns):
        if not turn.tool_calls:
            continue
        calls = tuple(call if call.id is not None else replace(call, id=next(fresh)) for call in turn.tool_calls)
        end = next((j for j in range(i + 1, len(turns)) if turns[j].role != "tool"), len(turns))
        for j, k in enumerate(answered_calls(turn.tool_calls, turns[i + 1 : end]) or (), start=i + 1):
            turns[j] = replace(turns[j], tool_call_id=calls[k].id)
        turns[i] = replace(turn, tool_calls=calls)
    return turns
