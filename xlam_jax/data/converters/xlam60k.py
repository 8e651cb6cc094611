"""xlam-function-calling-60k: one query, the tools, and the calls that answer it.

Raw: {"id", "query", "tools", "answers"}; tools and answers are JSON, mostly in strings. Tools are flat,
[{"name", "description", "parameters": {"city": {"type": "str, optional", "description", "default"}}}], with Python type
spellings; answers are [{"name", "arguments"}]. Also read: a `required` flag (true or false) in the parameters, further
JSON Schema keywords there, `parameters` that are already a JSON Schema, tools and calls in OpenAI form, arguments that
are JSON in a string, and a single tool or answer that is not in a list.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from xlam_jax.data.converters.common import (
    Converted,
    Dropped,
    Lost,
    Repaired,
    as_declared,
    call,
    convert_rows,
    declared_arguments,
    field,
    json_schema,
    losses,
)
from xlam_jax.data.row_json import decode_arguments, parse_json
from xlam_jax.data.trajectory import InvalidTrajectory, Trajectory

SOURCE = "xlam60k"
SPELLINGS = {
    "string": "str",
    "integer": "int",
    "number": "float",
    "boolean": "bool",
    "array": "list",
    "object": "dict",
    "null": "None",
}


def convert(paths: list[Path]) -> Iterator[Converted | Dropped]:
    """Converts the query to a user turn, and the answers to calls of the assistant; drops rows without answers.

    In data without `required` flags, a parameter is required if its type does not say "optional" and it has no default.
    """
    return convert_rows(paths, convert_row)


def convert_row(row: dict[str, Any], name: str) -> Iterator[dict[str, Any] | Repaired]:
    """Converts one row. `source` and `score`, which some files add, are kept; numeric ids get the source's name."""
    tools = tool_schemas(json_list(row, "tools"))
    calls, repairs = tool_calls(json_list(row, "answers"), tools)
    identity = row.get("id")
    if isinstance(identity, int) and not isinstance(identity, bool):
        identity = f"{SOURCE}_{identity}"
    turns: list[dict[str, Any]] = [{"role": "user", "content": field(row, "query", str)}]
    if not calls:
        raise InvalidTrajectory("no-assistant-turn", "`answers` is empty: no call, and no text either, to learn from")
    turns.append({"role": "assistant", "content": "", "tool_calls": calls})
    yield from repairs
    yield {
        "unique_trajectory_id": name if identity is None else identity,
        "source": SOURCE if row.get("source") is None else row["source"],
        "score": row.get("score"),
        "tools": tools,
        "conversation": turns,
    }


def json_list(row: dict[str, Any], key: str) -> list[Any]:
    """Returns the list at `key`, which may be a JSON text, or one object. Raises `InvalidTrajectory`."""
    value = row.get(key)
    value = parse_json(value) if isinstance(value, str) else value
    value = [value] if isinstance(value, dict) else value
    if not isinstance(value, list):
        raise InvalidTrajectory("missing-field", f"`{key}` is missing or a {type(value).__name__}")
    return value


def tool_schemas(raw_tools: Sequence[Any]) -> list[dict[str, Any]]:
    """Converts tools, flat or in OpenAI form, to OpenAI tool schemas with the same order of keys.

    Raises `InvalidTrajectory`.
    """
    raw_tools = [_flattened(raw) for raw in raw_tools]
    # files with `required` flags flag all required parameters; in others, a parameter without default is required
    flagged = any(_is_flag(value) for raw in raw_tools for value in _parameters(raw).values())
    return [{"type": "function", "function": _function(raw, flagged)} for raw in raw_tools]


def tool_calls(items: Sequence[Any], tools: Sequence[dict[str, Any]], number: int = 0) -> tuple[list[Any], list[Any]]:
    """Returns (calls of `[{"name", "arguments"}]`, repairs). The ids of the calls start with `call_<number + 1>`."""
    declared = {tool["function"]["name"]: _properties(tool["function"]) for tool in tools}
    calls: list[dict[str, Any]] = []
    repairs: list[Repaired] = []
    for i, item in enumerate(map(_flattened, items), start=number + 1):
        name, arguments = field(item, "name", str), item.get("arguments")
        if isinstance(arguments, str):
            note = lambda reason, detail: repairs.append(Repaired(reason, detail))  # noqa: E731
            repairs.append(Repaired("string-arguments", f"the answer calls '{name}' with arguments in a text"))
            arguments = decode_arguments(arguments, f"the answer calls '{name}' with", note)
        elif arguments is None:
            repairs.append(Repaired("missing-arguments", f"the answer calls '{name}' with no arguments"))
            arguments = {}
        if not isinstance(arguments, dict):
            raise InvalidTrajectory("bad-arguments", f"'{name}' is called with a {type(arguments).__name__}")
        arguments, changed = declared_arguments(name, arguments, declared.get(name, {}))
        repairs.extend(changed)
        calls.append(call(i, name, arguments))
    return calls, repairs


def _flattened(item: Any) -> Any:
    """A tool or a call without OpenAI's wrapper."""
    function = item.get("function") if isinstance(item, dict) and "name" not in item else None
    return function if isinstance(function, dict) else item


def _is_schema(parameters: Any) -> bool:
    """Whether parameters are a JSON Schema. Descriptions of parameters named `type` or `properties` are objects."""
    if not isinstance(parameters, dict) or not isinstance(parameters.get("type", "object"), str):
        return False
    properties = parameters.get("properties")
    if properties is None:
        return parameters.get("type") == "object"
    names = ("type", "description", "title")
    return isinstance(properties, dict) and not any(
        key in properties and not isinstance(properties[key], dict | None) for key in names
    )


def _is_flag(parameter: dict[str, Any]) -> bool:
    return "required" in parameter and not isinstance(
        parameter["required"], list
    )  # a list is the keyword of an object schema


def _parameters(raw: Any) -> dict[str, dict[str, Any]]:
    if not isinstance(raw, dict):
        raise InvalidTrajectory("tool-without-name", f"a tool is a {type(raw).__name__}, not an object")
    parameters = raw.get("parameters") or {}
    if isinstance(parameters, str):
        parameters = parse_json(parameters)
    if _is_schema(parameters):
        return {}
    if not isinstance(parameters, dict) or not all(isinstance(value, dict | None) for value in parameters.values()):
        raise InvalidTrajectory("bad-tools", f"`parameters` of '{raw.get('name')}' are not objects")
    # null is the padding of a union schema
    present = {key: value for key, value in parameters.items() if value is not None}
    return {key: {name: item for name, item in value.items() if item is not None} for key, value in present.items()}


def _function(raw: dict[str, Any], flagged: bool) -> dict[str, Any]:
    function: dict[str, Any] = {"name": field(raw, "name", str), "description": str(raw.get("description") or "")}
    parameters = raw.get("parameters") or {}
    parameters = parse_json(parameters) if isinstance(parameters, str) else parameters
    if _is_schema(parameters):
        return function | {"parameters": parameters if "type" in parameters else {"type": "object"} | parameters}
    properties: dict[str, Any] = {}
    required: list[str] = []
    for key, parameter in _parameters(raw).items():
        properties[key], optional = _property(parameter)
        if parameter.get("required") is True if flagged else not optional and "default" not in parameter:
            required.append(key)
    return function | {"parameters": {"type": "object", "properties": properties, "required": required}}


def _property(parameter: dict[str, Any]) -> tuple[dict[str, Any], bool]:
    """Returns (JSON Schema of a parameter with the same order of keys, whether its type says "optional")."""
    schema: dict[str, Any] = {}
    typed, optional = json_schema(str(parameter.get("type", "")))
    for key, value in parameter.items():
        if key == "type":
            schema |= typed
        elif key == "default":
            # an empty text means "none" for a parameter that is not text
            if value is not None and (value != "" or typed.get("type") == "string"):
                schema[key] = as_declared(value, typed)
        elif value if key == "description" else not (key == "required" and _is_flag(parameter)):
            schema[key] = value
    return schema, optional


def spelling(schema: Any, levels: int = 8) -> str:
    """Returns the type spelling of a JSON Schema, the inverse of `json_schema`: `str`, `List[List[int]]`, `dict`.

    Null, several types and no type are spelled `None`, `Union[str, int]` and `Any`, for which `json_schema` returns {}.
    """
    kind = schema.get("type") if isinstance(schema, dict) else None
    if isinstance(kind, list):
        return f"Union[{', '.join(SPELLINGS.get(str(name), 'Any') for name in kind)}]"
    items = schema.get("items") if isinstance(schema, dict) else None
    if kind == "array" and levels and isinstance(items, dict) and items.keys() in ({"type"}, {"type", "items"}):
        return f"List[{spelling(items, levels - 1)}]"
    return SPELLINGS.get(kind, "Any") if isinstance(kind, str) else "Any"


def export_row(trajectory: Trajectory) -> Iterator[dict[str, Any] | Lost]:
    """Yields one row with the user's query and the calls of the assistant's first turn; the rest is lost.

    A trajectory whose first answer has no calls gives no row. If a required parameter has a default, which otherwise
    means "optional" in this format, every parameter gets a `required` flag. Numeric ids become numbers again.
    """
    turns = trajectory.conversation
    at = next(i for i, turn in enumerate(turns) if turn.role == "assistant")
    if not turns[at].tool_calls:
        yield Lost("no-calls", f"turn {at} answers the query without a call, and this format has calls only")
        return
    functions = [tool["function"] for tool in trajectory.tools]
    flagged = any(
        "default" in schema and key in _required(function)
        for function in functions
        for key, schema in _properties(function).items()
    )
    tools = [_flat(function, flagged) for function in functions]
    answers = [{"name": call.name, "arguments": call.arguments} for call in turns[at].tool_calls]
    number = trajectory.id.removeprefix(f"{SOURCE}_")
    is_number = number != trajectory.id and number.isdecimal() and len(number) < 16 and str(int(number)) == number
    row = {
        "id": int(number) if is_number else trajectory.id,
        "query": "\n\n".join(turn.content for turn in turns[:at] if turn.role == "user"),
        "tools": json.dumps(tools, ensure_ascii=False),
        "answers": json.dumps(answers, ensure_ascii=False),
    }
    yield row
    yield from losses(replace(trajectory, tools=[_padded(tool) for tool in trajectory.tools]), row, convert_row)


def _properties(function: dict[str, Any]) -> dict[str, Any]:
    properties = (function.get("parameters") or {}).get("properties") or {}
    return {key: schema if isinstance(schema, dict) else {} for key, schema in properties.items()}


def _required(function: dict[str, Any]) -> list[Any]:
    required = (function.get("parameters") or {}).get("required")
    return required if isinstance(required, list) else []


def _flat(function: dict[str, Any], flagged: bool) -> dict[str, Any]:
    """A tool in this format."""
    parameters = {}
    for key, schema in _properties(function).items():
        needed = key in _required(function)
        parameters[key] = _parameter(schema, needed)
        if flagged:
            parameters[key]["required"] = needed
    return {"name": function["name"], "description": function.get("description") or "", "parameters": parameters}


def _parameter(schema: dict[str, Any], required: bool) -> dict[str, Any]:
    spelled = spelling(schema)
    understood, _ = json_schema(spelled)
    kind = spelled if required else f"{spelled}, optional"
    parameter = {} if "type" in schema else {"type": kind}
    for key, value in schema.items():
        if key == "type":
            parameter[key] = kind
        elif key not in understood or understood[key] != value:
            parameter[key] = value
    return parameter


def _padded(tool: dict[str, Any]) -> dict[str, Any]:
    """The tool with the defaults that an import adds, which are not losses."""
    function = _filled(tool["function"], {"name": "", "description": "", "parameters": {}})
    full = {"type": "object", "properties": {}, "required": []}
    if isinstance(function.get("parameters"), dict):
        function["parameters"] = _filled(function["parameters"], full)
    return {**tool, "function": function}


def _filled(obj: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """`obj` with defaults for missing keys, if it has only keys of `defaults`, in the same order; else a copy."""
    if list(obj) != [key for key in defaults if key in obj]:
        return dict(obj)
    return {key: default if obj.get(key) is None else obj[key] for key, default in defaults.items()}
