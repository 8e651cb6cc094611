"""Seal-Tools: queries with their (parallel) calls, and a pool of 4076 tools in tool.jsonl.

Raw: lines {"id", "query", "calling": [{"api", "parameters", "responses": ["API_call_0", …]}, …]}; tools are
{"api_name", "api_description", "field", "parameters": {name: {"type", "description"}}, "required"}.
"""

import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from xlam_jax.data.converters.common import (
    Converted,
    Dropped,
    Repaired,
    call,
    convert_rows,
    declared_arguments,
    field,
    json_schema,
    tool,
)
from xlam_jax.data.rows import place, read_rows
from xlam_jax.data.trajectory import InvalidTrajectory
from xlam_jax.errors import UserError

DISTRACTORS = 2  # number of tools of the same field that are declared but not called


def convert(paths: list[Path]) -> Iterator[Converted | Dropped]:
    """Converts each row to a user turn and one assistant turn with all calls; declares two more tools of the field.

    Rows whose arguments refer to the result of another call ("API_call_0") are dropped, because results were not
    recorded. The tools are read from tool.jsonl, which is one of `paths` or in the folder of the first. Raises
    `UserError` without it.
    """
    rows = [path for path in paths if path.name != "tool.jsonl"]
    pool = next((path for path in paths if path.name == "tool.jsonl"), paths[0].with_name("tool.jsonl"))
    if not pool.is_file():
        raise UserError(f"{pool}: not found; Seal-Tools keeps its tools in tool.jsonl, give it too")
    tools: dict[str, dict[str, Any]] = {}
    field_of: dict[str, str] = {}
    fields: dict[str, list[str]] = {}
    for number, line, row, _ in read_rows(pool):
        if isinstance(row, InvalidTrajectory) or not isinstance(row.get("api_name"), str):
            raise UserError(f"{place(pool, number, line)}: not a tool; every line is an object with `api_name`")
        try:
            tools[row["api_name"]] = _schema(row)
        except InvalidTrajectory as invalid:
            raise UserError(
                f"{place(pool, number, line)}: {invalid.reason}: {invalid.detail}; correct the tool"
            ) from None
        field_of[row["api_name"]] = kind = str(row.get("field", "")).partition("/")[0]
        fields.setdefault(kind, []).append(row["api_name"])
    return convert_rows(rows, lambda row, name: _convert_row(row, name, tools, field_of, fields))


def _convert_row(
    row: dict[str, Any],
    name: str,
    tools: dict[str, dict[str, Any]],
    field_of: dict[str, str],
    fields: dict[str, list[str]],
) -> Iterator[dict[str, Any] | Repaired]:
    identity = row.get("id", name)
    called: dict[str, dict[str, Any]] = {}
    calls: list[dict[str, Any]] = []
    for number, item in enumerate(field(row, "calling", list), start=1):
        api, arguments = field(item, "api", str), field(item, "parameters", dict)
        if re.search(r"API_call_\d+", str(arguments)):
            raise InvalidTrajectory("refers-to-earlier-result", f"'{api}' is called with {arguments}")
        if api not in tools:
            raise InvalidTrajectory("undeclared-tool", f"'{api}' is not in tool.jsonl")
        called.setdefault(api, tools[api])
        arguments, repairs = declared_arguments(api, arguments, tools[api]["function"]["parameters"]["properties"])
        yield from repairs
        calls.append(call(number, api, arguments))
    if not calls:
        raise InvalidTrajectory("no-assistant-turn", "the row has no call")
    choice = random.Random(f"seal_tools {identity}")  # seeded per row, so that it does not depend on other rows
    others = [other for other in fields[field_of[next(iter(called))]] if other not in called]
    declared = [
        *called.values(),
        *(tools[other] for other in choice.sample(others, min(DISTRACTORS, len(others)))),
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


def _schema(row: dict[str, Any]) -> dict[str, Any]:
    properties = {
        key: json_schema(field(value, "type", str))[0] | {"description": field(value, "description", str)}
        for key, value in field(row, "parameters", dict).items()
    }
    required = field(row, "required", list)
    return tool(row["api_name"], field(row, "api_description", str), properties, required)
