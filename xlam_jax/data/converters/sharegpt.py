"""ShareGPT conversations, also in the layouts of LLaMA-Factory, AgentInstruct and Hermes.

Raw: {"conversations": [{"from", "value", "loss"}, …], "system", "tools", "id"}. `from` is human (user), gpt
(assistant), system, function_call (JSON of one or several calls) or observation (tool, function_response); turns may
also be {"role", "content", "tool_calls"}. `tools` is JSON, mostly in a string; its tools may lack the wrapper {"type":
"function"}. Hermes, Qwen, ToolACE and glaive have tools in the system text, and calls in the assistant's text. `loss`
may also be spelled `train`, or `weight` (0 or 1). Reasoning is `<think>…</think>` in front of text or calls.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from xlam_jax.data import text_calls
from xlam_jax.data.content import split_reasoning
from xlam_jax.data.converters import openai
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
from xlam_jax.data.converters.openai import split_instruction
from xlam_jax.data.embedded import value_at
from xlam_jax.data.raw_turns import unflattened
from xlam_jax.data.row_json import decode_arguments, parse_json
from xlam_jax.data.trajectory import REASONING_KEYS, TURN, InvalidTrajectory, Trajectory
from xlam_jax.errors import nearest

ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
    "function_call": "call",
    "observation": "tool",
    "tool": "tool",
    "function_response": "tool",
}
CALLS = ("tool_calls", "function_call")
FROM = {"user": "human", "assistant": "gpt", "system": "system", "tool": "observation"}


def convert(paths: list[Path]) -> Iterator[Converted | Dropped]:
    """Converts conversations; text directly before a call, in its turn or the previous one, is the call's thought.

    Calls get ids, and results the ids of their calls, where their pairing is unambiguous. Calls in consecutive turns
    are joined to one turn. The system column, or else a system turn at the front, becomes the task instruction; tools
    that it declares are removed from the text.
    """
    return convert_rows(paths, convert_row)


def convert_row(row: dict[str, Any], name: str) -> Iterator[dict[str, Any] | Repaired]:
    """Converts one conversation. `source` and `score`, which some files add, are kept."""
    repairs: list[Repaired] = []
    tools = [_wrapped(tool) for tool in declared_tools(row.get("tools"))]
    turns: list[dict[str, Any]] = []
    if row.get("system"):
        turns.append({"role": "system", "content": field(row, "system", str)})
        tools = take_tools(turns, tools, repairs)
    for i, message in enumerate(turns_of(row, "conversations", repairs)):
        _add(turns, i, message, tools, repairs)
        if turns[-1]["role"] == "system":
            tools = take_tools(turns, tools, repairs)
    turns = link(turns, repairs)
    instruction, turns = split_instruction(turns)
    identity = row.get("id")
    yield from repairs
    yield {
        **{key: value for key, value in row.items() if key not in ("conversations", "system", "id")},
        "unique_trajectory_id": name if identity is None else identity,
        "task_instruction": instruction,
        "tools": tools,
        "conversation": turns,
    }


def _add(turns: list[dict[str, Any]], i: int, message: Any, tools: list[Any], repairs: list[Repaired]) -> None:
    """Adds the content of `message` to `turns`: a turn, several tool results, or calls, which join the text before."""
    if isinstance(message, dict) and "from" not in message and "role" in message:  # a chat message
        if not isinstance(message.get("content"), str):
            turns.append(_chat_turn(i, message, message.get("content"), repairs))
            return
        message = {"from": message["role"], "value": message["content"], **_without(message, "role", "content")}
    role, value = field(message, "from", str), field(message, "value", str)
    if role not in ROLES:
        raise InvalidTrajectory(
            "unknown-role", f"turn {i} is from '{role}'; known: {', '.join(ROLES)}{nearest(role[:100], ROLES)}"
        )
    if any(message.get(key) for key in CALLS):
        turns.append(_chat_turn(i, message, value, repairs))
        return
    kind = ROLES[role]
    rest = {**_without(message, "from", "value", "train", "weight"), TURN: i}
    loss = _loss(i, message)
    if loss is not None:
        rest["loss"] = loss
    if kind == "tool":
        turns.extend({"role": "tool", **rest, "content": part} for part in _results(i, value, turns, repairs))
        return
    calls: list[dict[str, Any]] | None = None
    if kind in ("call", "assistant") and (parts := split_reasoning(value)) and parts[1]:
        reasoning, value = parts
        rest |= {"reasoning": reasoning} if reasoning else {}
    if kind == "call":
        calls, value = _calls(i, value, repairs), ""
    elif kind == "assistant" and tools:
        calls, value = _text_calls(i, value, tools, repairs)
    turn = {"role": "assistant" if kind == "call" else kind, **rest, "content": value}
    if calls is not None:
        turn["tool_calls"] = calls
        previous = turns[-1] if turns else {}
        same_loss = previous.get("loss") == turn.get("loss")
        bare = not value and not any(turn.get(key) for key in REASONING_KEYS)
        if bare and previous.get("role") == "assistant" and "tool_calls" not in previous and same_loss:
            turn |= {key: text for key, text in turns.pop().items() if key in ("content", *REASONING_KEYS)}
    turns.append(turn)


def _without(message: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in message.items() if key not in keys}


def _chat_turn(i: int, message: dict[str, Any], content: Any, repairs: list[Repaired]) -> dict[str, Any]:
    """Converts a turn with `tool_calls`, whose items may lack the wrapper {"type": "function"}."""
    role = field(message, "from" if "from" in message else "role", str)
    kind = ROLES.get(role, role)
    loss = _loss(i, message)
    turn = {
        **_without(message, "from", "value", "train", "weight"),
        "role": "assistant" if kind == "call" else kind,
        "content": content,
        **({} if loss is None else {"loss": loss}),
    }
    calls = turn.get("tool_calls")
    if isinstance(calls, list):
        turn["tool_calls"] = [_wrapped(call) for call in calls]
    turn = openai.read_turn(i, turn, repairs)
    calls = turn.get("tool_calls") or []
    for call in calls if isinstance(calls, list) else [calls]:
        if not isinstance(_name(call), str):
            raise InvalidTrajectory("bad-call", f'turn {i} has a call without {{"name": …, "arguments": …}}: {call}')
    return turn


def _results(i: int, value: str, turns: list[dict[str, Any]], repairs: list[Repaired]) -> list[str]:
    """The results in a turn: within Hermes' tags, or ToolACE's list of {"name", "results"} for parallel calls."""
    if "</tool_response>" in value:
        parts = value.strip().removesuffix("</tool_response>").split("</tool_response>")
        return [part.strip().removeprefix("<tool_response>").strip() for part in parts]
    names = [call["function"]["name"] for call in turns[-1].get("tool_calls", ())] if turns else []
    if len(names) > 1 and value.lstrip().startswith("["):
        try:
            results = parse_json(value)
        except InvalidTrajectory:
            return [value]
        named = [str(item.get("name")) if isinstance(item, dict) and len(item) == 2 else "" for item in results]
        if named != names and len(set(names)) == len(names) and set(named) == set(names) and len(named) == len(names):
            results = [results[named.index(name)] for name in names]
            named = names
        if named == names:
            repairs.append(Repaired("results-in-one-turn", f"turn {i} has the results of {len(names)} calls"))
            return [json.dumps([item], ensure_ascii=False) for item in results]
    return [value]


def _loss(i: int, message: dict[str, Any]) -> Any:
    for key in ("loss", "train", "weight"):
        value = message.get(key)
        if value is not None:
            if value not in (0, 1):
                raise InvalidTrajectory("bad-loss", f"turn {i} has {key} {value!r}, not true or false")
            return bool(value)
    return None


def _calls(i: int, text: str, repairs: list[Repaired]) -> list[dict[str, Any]]:
    def note(reason: str, detail: str) -> None:
        repairs.append(Repaired(reason, detail))

    value = _literal(text)
    if value is None:
        value = decode_arguments(text, f"turn {i} calls with", note)
    else:
        note("python-literals", f"turn {i} calls with Python literals instead of JSON")
    calls = value if isinstance(value, list) else [value]
    if not calls:
        raise InvalidTrajectory("bad-call", f"turn {i} has an empty list of calls")
    normalized = []
    for call in calls:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise InvalidTrajectory(
                "bad-call", f'turn {i} has a call without {{"name": …, "arguments": {{…}}}}: {call}'
            )
        arguments = function.get("arguments", function.get("parameters"))
        if isinstance(arguments, str):  # as in OpenAI form
            arguments = decode_arguments(arguments, f"turn {i} calls '{function['name']}' with", note)
        identity = {} if call.get("id") is None else {"id": call["id"]}
        named = {"name": function["name"], "arguments": arguments}
        normalized.append({"type": "function", **identity, "function": named})
    return normalized


def _literal(text: str) -> Any:
    """The value of a text that is a Python list or dict but not JSON; None for other text."""
    text = text.strip()
    if text[:1] not in ("[", "{") or "'" not in text:
        return None
    try:
        parse_json(text)
    except InvalidTrajectory:
        try:
            value, end = value_at(text, 0)
        except ValueError:
            return None
        return value if end == len(text) else None
    return None


def _text_calls(
    i: int, text: str, tools: list[Any], repairs: list[Repaired]
) -> tuple[list[dict[str, Any]] | None, str]:
    """Returns (calls in an assistant's text or None, text before them).

    This format itself writes calls in <tool_call>: such a call that cannot be read raises `InvalidTrajectory`.
    """
    names = {name: None for tool in tools if isinstance(name := _name(tool), str)}  # an ordered set
    written = text_calls.find_calls(text, names, f"turn {i}")
    is_native = written is not None and written.style == "<tool_call>"
    if written is None or (written.problem and not is_native):
        return None, text  # the parser reports problems
    if written.problem and not written.calls:
        raise InvalidTrajectory("bad-call", f"turn {i} {written.problem}")
    repairs += [Repaired(reason, detail) for reason, detail in written.repairs]
    if not is_native:
        repairs.append(Repaired("call-in-text", f"turn {i} calls {written.calls[0].name} in its text, {text[-80:]!r}"))
    return [
        {
            "type": "function",
            **({} if call.id is None else {"id": call.id}),
            "function": {"name": call.name, "arguments": call.arguments},
        }
        for call in written.calls
    ], written.thought


def _name(item: Any) -> Any:
    """The name of a tool, or of a call, in OpenAI form."""
    function = item.get("function") if isinstance(item, dict) else None
    return function.get("name") if isinstance(function, dict) else None


def _wrapped(item: Any) -> Any:
    """A tool or call in OpenAI form; flat ones are valid in this format, so their conversion is not a repair."""
    return unflattened(item, "item", lambda reason, detail: None)


def export_row(trajectory: Trajectory) -> Iterator[dict[str, Any] | Lost]:
    """Yields one row, with a thought as a gpt turn before its function_call turn; source, score, call ids are lost.

    Parallel calls are a JSON list in one turn, and each of their results is a turn, in the order of the calls.
    """
    turns: list[dict[str, Any]] = []
    if trajectory.task_instruction:
        turns.append({"from": "system", "value": trajectory.task_instruction})
    for message in trajectory.conversation:
        flag = {} if message.loss is None else {"loss": message.loss}
        reasoning = f"<think>\n{message.reasoning}\n</think>\n\n" if message.reasoning else ""
        if message.content or not message.tool_calls:
            turns.append({"from": FROM[message.role], "value": reasoning + message.content, **flag})
            reasoning = ""
        if message.tool_calls:
            calls = [{"name": call.name, "arguments": call.arguments} for call in message.tool_calls]
            value = json.dumps(calls if len(calls) > 1 else calls[0], ensure_ascii=False)
            turns.append({"from": "function_call", "value": reasoning + value, **flag})
    row: dict[str, Any] = {"id": trajectory.id, "conversations": turns}
    if trajectory.tools:
        row["tools"] = json.dumps(trajectory.tools, ensure_ascii=False)
    yield row
    yield from losses(trajectory, row, convert_row)
