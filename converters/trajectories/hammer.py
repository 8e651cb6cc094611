"""Hammer, and xlam-function-calling-60k, whose shape it has.

Raw: {"query", "tools", "answers"}; tools are flat with Python type spellings, tools and answers may be JSON in strings.
Hammer's query may be a list of turns: "agent" talks, "assistant" calls (a JSON array in a code fence), "tool" answers,
and the last turn ends in "Generate API Request:".
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from converters.trajectories.common import Dropped, as_declared, call, convert_rows, field, json_schema, tool
from xlam_jax.data.trajectory import InvalidTrajectory, Trajectory, parse_json

REQUEST = "Generate API Request:"


def convert(paths: list[Path]) -> Iterator[Trajectory | Dropped]:
    """The answers become one assistant turn, with what the agent said right before them as its text.

    Earlier assistant turns of a dialogue carry no loss: each of them is the answer of a row of its own.
    """
    return convert_rows(paths, _convert_row)


def _convert_row(row: dict[str, Any], name: str) -> Iterator[dict[str, Any]]:
    raw_tools, answers = _list(row, "tools"), _list(row, "answers")
    # sources that flag required parameters flag all of them; else a parameter without default is required
    flagged = any("required" in parameter for raw in raw_tools for parameter in _parameters(raw).values())
    tools = [_tool(raw, flagged) for raw in raw_tools]
    properties = {item["function"]["name"]: item["function"]["parameters"]["properties"] for item in tools}
    query = row.get("query")
    dialogue = [{"role": "user", "content": query}] if isinstance(query, str) else query
    if not isinstance(dialogue, list) or not dialogue:
        raise InvalidTrajectory("missing-field", f"`query` is a {type(query).__name__}, not text or a list of turns")
    turns: list[dict[str, Any]] = []
    number = 0

    def add_calls(items: list[Any]) -> None:
        nonlocal number
        calls = []
        for item in items:
            number += 1
            tool_name, arguments = field(item, "name", str), field(item, "arguments", dict)
            schemas = properties.get(tool_name, {})
            calls.append(
                call(
                    number,
                    tool_name,
                    {key: as_declared(value, schemas.get(key, {})) for key, value in arguments.items()},
                )
            )
        if not (turns and turns[-1]["role"] == "assistant" and "tool_calls" not in turns[-1]):
            turns.append({"role": "assistant", "content": ""})
        turns[-1]["tool_calls"] = calls

    for i, message in enumerate(dialogue):
        role, content = field(message, "role", str), field(message, "content", str)
        content = content.removesuffix(REQUEST).rstrip() if i == len(dialogue) - 1 else content
        if role == "assistant":
            calls = parse_json(content.strip("`"))
            if not isinstance(calls, list):
                raise InvalidTrajectory("bad-call", f"turn {i}: {content}")
            add_calls(calls)
        elif role == "agent" and turns and turns[-1]["role"] == "assistant" and "tool_calls" not in turns[-1]:
            turns[-1]["content"] += "\n" + content
        else:
            turns.append({"role": "assistant" if role == "agent" else role, "content": content})
    if answers:
        add_calls(answers)
    for turn in turns[:-1]:
        if turn["role"] == "assistant":
            turn["loss"] = False
    yield {
        "unique_trajectory_id": f"hammer_{row.get('id', name)}",
        "source": "hammer",
        "tools": tools,
        "conversation": turns,
    }


def _list(row: dict[str, Any], key: str) -> list[Any]:
    value = row.get(key)
    value = parse_json(value) if isinstance(value, str) else value
    if not isinstance(value, list):
        raise InvalidTrajectory("missing-field", f"`{key}` is missing or a {type(value).__name__}")
    return value


def _parameters(raw: Any) -> dict[str, dict[str, Any]]:
    if not isinstance(raw, dict):
        raise InvalidTrajectory("tool-without-name", f"a tool is a {type(raw).__name__}, not an object")
    parameters = raw.get("parameters") or {}
    if not isinstance(parameters, dict) or not all(isinstance(value, dict) for value in parameters.values()):
        raise InvalidTrajectory("bad-tools", f"`parameters` of '{raw.get('name')}' are no objects")
    return parameters


def _tool(raw: dict[str, Any], flagged: bool) -> dict[str, Any]:
    properties: dict[str, Any] = {}
    required: list[str] = []
    for key, parameter in _parameters(raw).items():
        schema, optional = json_schema(str(parameter.get("type", "")))
        if parameter.get("description"):
            schema["description"] = parameter["description"]
        if parameter.get("default") not in (None, ""):
            schema["default"] = as_declared(parameter["default"], schema)
        properties[key] = schema
        if parameter.get("required") is True if flagged else not optional and "default" not in parameter:
            required.append(key)
    return tool(field(raw, "name", str), str(raw.get("description", "")), properties, required)
