"""API-Bank: dialogues with calls of its APIs (Li et al. 2023, arXiv:2304.08244), one per line.

Raw: {"file", "turns": [{"role": "User" or "AI", "text"} or {"role": "API", "api_name", "param_dict", "result":
{"input", "output", "exception"}}, …]}; the APIs are in apis.json, {name: {"description", "input_parameters": {name:
{"type", "description"}}}}.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
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
from xlam_jax.data.row_json import parse_json
from xlam_jax.data.trajectory import InvalidTrajectory
from xlam_jax.errors import UserError

INSTRUCTION = "Help the user with the tools. Ask for what a call needs and the user has not told."
APIS = "apis.json"
OPTIONAL = "Only needed for"  # in the description of a parameter that not every call needs
CALL_IN_TEXT = re.compile(r"\[(\w+)\(")


def convert(paths: list[Path]) -> Iterator[Converted | Dropped]:
    """Converts dialogues; text of the AI directly before a call is the text of the turn with the call.

    The tools are the APIs in the file's name and those that are called. Arguments that are written as text get the type
    with which they reached the API. Dialogues with calls in the text of the AI are dropped, because their results were
    not recorded. User turns and results after the AI's last turn are dropped.
    The APIs are read from apis.json, which is one of `paths` or in the folder of the first. Raises `UserError` without
    it.
    """
    rows = [path for path in paths if path.name != APIS]
    pool = next((path for path in paths if path.name == APIS), paths[0].with_name(APIS))
    tools = _read_tools(pool)
    return convert_rows(rows, lambda row, name: _convert_row(row, name, tools))


def _read_tools(path: Path) -> dict[str, dict[str, Any]]:
    if not path.is_file():
        raise UserError(f"{path}: not found; API-Bank keeps its APIs in {APIS}, give it too")
    try:
        apis = parse_json(path.read_bytes())
        if not isinstance(apis, dict):
            raise InvalidTrajectory("bad-tools", f"a {type(apis).__name__}, not an object of APIs")
        return {name: _tool(name, api) for name, api in apis.items()}
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    except InvalidTrajectory as invalid:
        raise UserError(f"{path}: {invalid.reason}: {invalid.detail}; correct it") from None


def _tool(name: str, api: Any) -> dict[str, Any]:
    properties: dict[str, Any] = {}
    required: list[str] = []
    for key, parameter in field(api, "input_parameters", dict).items():
        description = field(parameter, "description", str)
        properties[key] = json_schema(field(parameter, "type", str))[0] | {"description": description}
        if OPTIONAL not in description:
            required.append(key)
    return tool(name, field(api, "description", str), properties, required)


def _convert_row(
    row: dict[str, Any], name: str, tools: dict[str, dict[str, Any]]
) -> Iterator[dict[str, Any] | Repaired]:
    file = row.get("file")
    title = PurePosixPath(file).stem if isinstance(file, str) else name
    declared = {api: tools[api] for api in title.partition("-level-")[0].split("-") if api in tools}
    turns: list[dict[str, Any]] = []
    number = 0
    for i, item in enumerate(field(row, "turns", list)):
        role = field(item, "role", str)
        after_text = bool(turns) and turns[-1]["role"] == "assistant" and "tool_calls" not in turns[-1]
        if role == "User":
            turns.append({"role": "user", "content": field(item, "text", str)})
        elif role == "AI":
            text = field(item, "text", str)
            if any(api in tools for api in CALL_IN_TEXT.findall(text)):
                raise InvalidTrajectory("call-in-text", f"turn {i}: {text[:200]}")
            if after_text:
                yield Repaired("consecutive-turns", f"turn {i} is by the AI, like the one before; they are joined")
                turns[-1]["content"] += "\n" + text
            else:
                turns.append({"role": "assistant", "content": text})
        elif role == "API":
            number += 1
            api, result = field(item, "api_name", str), field(item, "result", dict)
            if api not in tools:
                raise InvalidTrajectory("undeclared-tool", f"turn {i} calls '{api}', which is not in {APIS}")
            declared[api] = tools[api]
            arguments, repairs = _arguments(api, field(item, "param_dict", dict), result.get("input"), tools[api])
            yield from repairs
            if not after_text:
                turns.append({"role": "assistant", "content": ""})
            turns[-1]["tool_calls"] = [call(number, api, arguments)]
            turns.append({"role": "tool", "tool_call_id": f"call_{number}", "name": api, "content": _content(result)})
        else:
            raise InvalidTrajectory("unknown-role", f"turn {i} has role '{role}', known roles: User, AI, API")
    while turns and turns[-1]["role"] != "assistant":
        turns.pop()
    yield {
        "unique_trajectory_id": f"api_bank_{title}",
        "source": "api_bank",
        "task_instruction": INSTRUCTION,
        "tools": list(declared.values()),
        "conversation": turns,
    }


def _arguments(
    name: str, written: dict[str, Any], received: Any, schema: dict[str, Any]
) -> tuple[dict[str, Any], list[Repaired]]:
    """Returns (arguments with their declared types, repairs); `received` are the arguments that reached the API."""
    properties = schema["function"]["parameters"]["properties"]
    received = received if isinstance(received, dict) else {}
    arguments, repairs = dict(written), []
    for key, value in written.items():
        kind = properties.get(key, {}).get("type", "string")
        if kind != "string" and isinstance(value, str) and not isinstance(received.get(key, value), str):
            arguments[key] = received[key]
            repairs.append(Repaired("text-for-declared-type", f"`{key}` of '{name}' is the text {value!r}"))
    arguments, others = declared_arguments(name, arguments, properties)
    return arguments, repairs + others


def _content(result: dict[str, Any]) -> str:
    """Returns the answer of the API: its output, or its exception and output."""
    output = result.get("output")
    if result.get("exception") is not None:
        output = {"exception": result["exception"], "output": output}
    return output if isinstance(output, str) else json.dumps(output, ensure_ascii=False)
