"""ShareGPT conversations, also as LLaMA-Factory, AgentInstruct and Hermes write them.

Raw: {"conversations": [{"from", "value", "loss"}, …], "system", "tools", "id"}; `from` is human (user), gpt
(assistant), system, function_call (JSON of one call or of several) or observation (tool, function_response); `tools` is
JSON, mostly in a string, and its tools may lack the wrapper {"type": "function"}. Hermes has the tools in the system
text, inside <tools>, and calls inside <tool_call>. `loss` may also be spelled `train`, or `weight` (0 or 1).
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from converters.trajectories.common import Converted, Dropped, Lost, Repaired, convert_rows, field, losses
from converters.trajectories.links import link
from converters.trajectories.openai import split_instruction
from xlam_jax.data.trajectory import InvalidTrajectory, Trajectory, decode_arguments, parse_json
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
FROM = {"user": "human", "assistant": "gpt", "system": "system", "tool": "observation"}
TOOLS_START = re.compile(r'\[\s*\{\s*"(?:type|name|function)"')


def convert(paths: list[Path]) -> Iterator[Converted | Dropped]:
    """Text right before a function call, of the same turn or a turn of its own, becomes the thought beside the call.

    Calls get ids, and results the ids of their calls, where it is clear which belong together; calls in turns that
    follow each other become one turn. The system column, or else a
    system turn at the front, becomes the task instruction; tools found in it are taken out of the text.
    """
    return convert_rows(paths, convert_row)


def convert_row(row: dict[str, Any], name: str) -> Iterator[dict[str, Any] | Repaired]:
    """Converts one conversation. `source` and `score`, which some files add, are kept."""
    repairs: list[Repaired] = []
    tools = _tools(row.get("tools"))
    turns: list[dict[str, Any]] = []
    if row.get("system"):
        turns.append({"role": "system", "content": field(row, "system", str)})
    for i, message in enumerate(field(row, "conversations", list)):
        _add(turns, i, message, bool(tools), repairs)
        if turns[-1]["role"] == "system":
            found, text = _tools_in(turns[-1]["content"])
            if found and (not tools or tools == found):
                tools, turns[-1]["content"] = found, text
                repairs.append(Repaired("tools-in-system", f"{len(found)} tools are declared in the system text"))
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


def _add(turns: list[dict[str, Any]], i: int, message: Any, tools: bool, repairs: list[Repaired]) -> None:
    """Adds what `message` holds: a turn, several tool results, or calls that join the text before them."""
    role, value = field(message, "from", str), field(message, "value", str)
    if role not in ROLES:
        raise InvalidTrajectory(
            "unknown-role", f"turn {i} is from '{role}', known: {', '.join(ROLES)}{nearest(role[:100], ROLES)}"
        )
    kind = ROLES[role]
    rest = {key: other for key, other in message.items() if key not in ("from", "value", "train", "weight")}
    loss = _loss(i, message)
    if loss is not None:
        rest["loss"] = loss
    if kind == "tool":
        parts = [value]
        if "</tool_response>" in value:
            parts = value.strip().removesuffix("</tool_response>").split("</tool_response>")
            parts = [part.strip().removeprefix("<tool_response>").strip() for part in parts]
        turns.extend({"role": "tool", **rest, "content": part} for part in parts)
        return
    calls: list[dict[str, Any]] | None = None
    if kind == "call":
        thought = ""
        if value.startswith("<think>") and "</think>" in value:
            thought, _, value = value.partition("</think>")
            thought = thought.removeprefix("<think>").strip()
        calls, value = _calls(i, value, repairs), thought
    elif kind == "assistant" and tools and "<tool_call>" in value:
        calls, value = _call_blocks(i, value, repairs)
    turn = {"role": "assistant" if kind == "call" else kind, **rest, "content": value}
    if calls is not None:
        turn["tool_calls"] = calls
        previous = turns[-1] if turns else {}
        same_loss = previous.get("loss") == turn.get("loss")
        if not value and previous.get("role") == "assistant" and "tool_calls" not in previous and same_loss:
            turn["content"] = turns.pop()["content"]
    turns.append(turn)


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

    value = decode_arguments(text, f"turn {i} calls with", note)
    calls = value if isinstance(value, list) else [value]
    if not calls:
        raise InvalidTrajectory("bad-call", f"turn {i} holds an empty list of calls")
    found = []
    for call in calls:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise InvalidTrajectory(
                "bad-call", f'turn {i} has a call without {{"name": …, "arguments": {{…}}}}: {call}'
            )
        arguments = function.get("arguments", function.get("parameters"))
        if isinstance(arguments, str):  # as OpenAI has them
            arguments = decode_arguments(arguments, f"turn {i} calls '{function['name']}' with", note)
        identity = {} if call.get("id") is None else {"id": call["id"]}
        found.append({"type": "function", **identity, "function": {"name": function["name"], "arguments": arguments}})
    return found


def _call_blocks(i: int, text: str, repairs: list[Repaired]) -> tuple[list[dict[str, Any]], str]:
    thought, *blocks = text.split("<tool_call>")
    pairs = [block.partition("</tool_call>") for block in blocks]
    if not all(end for _, end, _ in pairs):
        raise InvalidTrajectory("bad-call", f"turn {i} opens <tool_call> and does not close it")
    prose = "".join(after for _, _, after in pairs).strip()
    if prose:
        repairs.append(Repaired("trailing-text-after-json", f"turn {i} has text after its calls: {prose[:80]!r}"))
    return [call for inside, _, _ in pairs for call in _calls(i, inside, repairs)], thought.rstrip()


def _tools(value: Any) -> list[Any]:
    if isinstance(value, str):
        try:
            value = parse_json(value) if value.strip() else []
        except InvalidTrajectory as invalid:
            raise InvalidTrajectory("bad-tools", f"`tools` is a text that is no JSON: {invalid.detail}") from None
    if value is None:
        return []
    tools = value if isinstance(value, list) else [value]
    return [_wrapped(tool) for tool in tools]


def _wrapped(tool: Any) -> Any:
    flat = isinstance(tool, dict) and "function" not in tool and isinstance(tool.get("name"), str)
    return {"type": "function", "function": tool} if flat else tool


def _tools_in(text: str) -> tuple[list[Any], str]:
    """The tools that a system text declares, and the text without them; the text as it is where it has none."""
    start = text.find("<tools>")
    close = text.find("</tools>", start)
    if start >= 0 and close >= 0:
        inside, end = text[start + len("<tools>") : close].strip(), close + len("</tools>")
        parts = [inside] if inside.startswith("[") else inside.splitlines()
    elif opening := TOOLS_START.search(text):
        start = opening.start()
        try:
            _, end = json.JSONDecoder().raw_decode(text, start)
        except (ValueError, RecursionError):
            return [], text
        parts = [text[start:end]]
    else:
        return [], text
    try:
        tools = [tool for part in parts if part.strip() for tool in _tools(part)]
    except InvalidTrajectory:
        return [], text
    if not tools or not all(isinstance(tool, dict) and "function" in tool for tool in tools):
        return [], text
    return tools, (text[:start] + text[end:]).strip()


def export_row(trajectory: Trajectory) -> Iterator[dict[str, Any] | Lost]:
    """One row, a thought as a gpt turn before its function_call turn; source, score, call ids have no place in it.

    Parallel calls are a JSON list in one turn, their results a turn each, in the order of the calls.
    """
    turns: list[dict[str, Any]] = []
    if trajectory.task_instruction:
        turns.append({"from": "system", "value": trajectory.task_instruction})
    for message in trajectory.conversation:
        flag = {} if message.loss is None else {"loss": message.loss}
        if message.content or not message.tool_calls:
            turns.append({"from": FROM[message.role], "value": message.content, **flag})
        if message.tool_calls:
            calls = [{"name": call.name, "arguments": call.arguments} for call in message.tool_calls]
            value = json.dumps(calls if len(calls) > 1 else calls[0], ensure_ascii=False)
            turns.append({"from": "function_call", "value": value, **flag})
    row: dict[str, Any] = {"id": trajectory.id, "conversations": turns}
    if trajectory.tools:
        row["tools"] = json.dumps(trajectory.tools, ensure_ascii=False)
    yield row
    yield from losses(trajectory, row, convert_row)
