"""Seal-Tools: queries with their (parallel) calls, and a pool of 4076 tools in tool.jsonl.

Raw: {"id", "query", "calling": [{"api", "parameters", "responses": ["API_call_0", …]}, …]} a line; the tools,
{"api_name", "api_description", "field", "parameters": {name: {"type", "description"}}, "required"}.
"""

import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from converters.trajectories.common import Dropped, as_declared, call, convert_rows, field, json_schema, read_rows, tool
from xlam_jax.data.trajectory import InvalidTrajectory, Trajectory
from xlam_jax.errors import UserError

DISTRACTORS = 2  # tools of the same field that are declared but not called


def convert(paths: list[Path]) -> Iterator[Trajectory | Dropped]:
    """Each row becomes a user turn and one assistant turn with all calls; two more tools of the field are declared.

    Rows whose arguments name the result of another call ("API_call_0") are dropped: no such result was recorded. The
    tools are read from tool.jsonl, given in `paths` or beside the first of them; raises `UserError` without it.
    """
    rows = [path for path in paths if path.name != "tool.jsonl"]
    pool = next((path for path in paths if path.name == "tool.jsonl"), paths[0].with_name("tool.jsonl"))
    if not pool.is_file():
        raise UserError(f"{pool}: not found; Seal-Tools keeps its tools in tool.jsonl, give it too")
    tools: dict[str, dict[str, Any]] = {}
    fields: dict[str, list[str]] = {}
    for number, row in read_rows(pool):
        if isinstance(row, InvalidTrajectory) or not isinstance(row.get("api_name"), str):
            raise UserError(f"{pool}:{number}: no tool; every line is an object with `api_name`")
        tools[row["api_name"]] = row
        fields.setdefault(_field(row), []).append(row["api_name"])
    return convert_rows(rows, lambda row, name: _convert_row(row, name, tools, fields))


def _convert_row(
    row: dict[str, Any], name: str, tools: dict[str, dict[str, Any]], fields: dict[str, list[str]]
) -> Iterator[dict[str, Any]]:
    identity = row.get("id", name)
    schemas: dict[str, dict[str, Any]] = {}
    calls: list[dict[str, Any]] = []
    for number, item in enumerate(field(row, "calling", list), start=1):
        api, arguments = field(item, "api", str), field(item, "parameters", dict)
        if re.search(r"API_call_\d+", str(arguments)):
            raise InvalidTrajectory("refers-to-earlier-result", f"'{api}' is called with {arguments}")
        if api not in tools:
            raise InvalidTrajectory("undeclared-tool", f"'{api}' is not in tool.jsonl")
        schemas.setdefault(api, _schema(tools[api]))
        properties = schemas[api]["function"]["parameters"]["properties"]
        calls.append(
            call(number, api, {key: as_declared(value, properties.get(key, {})) for key, value in arguments.items()})
        )
    if not calls:
        raise InvalidTrajectory("no-assistant-turn", "the row holds no call")
    choice = random.Random(f"seal_tools {identity}")  # of the row, so that other rows do not change it
    others = [other for other in fields[_field(tools[next(iter(schemas))])] if other not in schemas]
    declared = [
        *schemas.values(),
        *(_schema(tools[other]) for other in choice.sample(others, min(DISTRACTORS, len(others)))),
    ]
    choice.shuffle(declared)
    yield {
        "unique_trajectory_id": f"seal_tools_{identity}",
        "source": "seal_tools",
        "tools": declared,
        "conversation": [
            {"role": "user", "content": field(row, "query", str)},
            {"role": "assistant", "content": "", "tool_calls": calls},
        ],
    }


def _field(row: dict[str, Any]) -> str:
    return str(row.get("field", "")).partition("/")[0]


def _schema(row: dict[str, Any]) -> dict[str, Any]:
    parameters = field(row, "parameters", dict)
    properties = {
        key: json_schema(value["type"])[0] | {"description": value["description"]} for key, value in parameters.items()
    }
    return tool(row["api_name"], row["api_description"], properties, row["required"])
