"""What the trajectory converters share: reading raw rows, counting what is dropped, JSON Schema of type spellings."""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from xlam_jax.data.trajectory import InvalidTrajectory, Trajectory, parse_json, parse_trajectory, read_lines
from xlam_jax.errors import UserError


@dataclass(frozen=True, slots=True)
class Dropped:
    """A trajectory, or one step of it, that was left out; `row` is its line (JSONL) or its item's number (JSON)."""

    path: Path
    row: int
    reason: str
    detail: str
    unit: Literal["trajectory", "step"] = "trajectory"


@dataclass(frozen=True, slots=True)
class StepDropped:
    """What a row converter yields, before its trajectory, for each step it leaves out."""

    reason: str
    detail: str


Convert = Callable[[list[Path]], Iterator[Trajectory | Dropped]]
ConvertRow = Callable[[dict[str, Any], str], Iterable[dict[str, Any] | StepDropped]]


def convert_rows(paths: Iterable[Path], convert_row: ConvertRow) -> Iterator[Trajectory | Dropped]:
    """Streams every row of `paths` through `convert_row(row, name)`, where `name` is unique to the row.

    `convert_row` yields unified trajectories as objects, which are checked here, and steps it left out; it raises
    `InvalidTrajectory` for a row that cannot be converted.
    """
    for path in paths:
        for number, row in read_rows(path):
            try:
                if isinstance(row, InvalidTrajectory):
                    raise row
                for item in convert_row(row, f"{path.stem}_{number}"):
                    if isinstance(item, StepDropped):
                        yield Dropped(path, number, item.reason, item.detail, unit="step")
                    else:
                        yield parse_trajectory(item)
            except InvalidTrajectory as invalid:
                yield Dropped(path, number, invalid.reason, invalid.detail)


def read_rows(path: Path) -> Iterator[tuple[int, dict[str, Any] | InvalidTrajectory]]:
    """Streams (number from 1, row): the lines of a .jsonl file, or the items of a JSON list or JSON object of rows.

    Rows that are no JSON objects come as `InvalidTrajectory`. Raises `UserError` on an unreadable file.
    """
    if path.suffix == ".jsonl":
        for number, line in read_lines(path):
            try:
                yield number, _object(parse_json(line))
            except InvalidTrajectory as invalid:
                yield number, invalid
        return
    try:
        document = parse_json(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    except InvalidTrajectory as invalid:
        raise UserError(f"{path}: {invalid.detail}; name files with one object a line .jsonl") from None
    if not isinstance(document, list | dict):
        raise UserError(f"{path}: a {type(document).__name__}, expected a list or an object of rows")
    for number, row in enumerate(document.values() if isinstance(document, dict) else document, start=1):
        try:
            yield number, _object(row)
        except InvalidTrajectory as invalid:
            yield number, invalid


def field(row: dict[str, Any], key: str, kind: type | tuple[type, ...]) -> Any:
    """Returns `row[key]`; raises `InvalidTrajectory("missing-field", …)` when it is absent or of another type."""
    value = row.get(key)
    if not isinstance(value, kind):
        raise InvalidTrajectory("missing-field", f"`{key}` is missing or a {type(value).__name__}")
    return value


def tool(name: str, description: str, properties: dict[str, Any], required: Sequence[str]) -> dict[str, Any]:
    """Returns an OpenAI tool schema."""
    parameters = {"type": "object", "properties": properties, "required": list(required)}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


def call(number: int, name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Returns a tool call with the id `call_<number>`."""
    return {"type": "function", "id": f"call_{number}", "function": {"name": name, "arguments": arguments}}


JSON_TYPES = {
    "str": "string",
    "string": "string",
    "int": "integer",
    "integer": "integer",
    "float": "number",
    "number": "number",
    "bool": "boolean",
    "boolean": "boolean",
    "list": "array",
    "array": "array",
    "tuple": "array",
    "set": "array",
    "dict": "object",
    "object": "object",
}


def json_schema(spelling: str) -> tuple[dict[str, Any], bool]:
    """Returns the JSON Schema of a Python-like type spelling and whether it says "optional".

    `str`, `List[int]`, `list(str)`, `Dict[str, Any]`, `Optional[str]`, `int, optional`. Spellings it does not know, and
    unions, allow anything: {}.
    """
    text, comma, _ = spelling.strip().partition(", optional")
    optional = bool(comma)
    if match := re.fullmatch(r"(?i)optional\[(.*)\]", text):
        text, optional = match[1], True
    head, inner = text.strip(), ""
    if match := re.fullmatch(r"(\w+)\s*[\[(](.*)[\])]", head):
        head, inner = match[1], match[2]
    kind = JSON_TYPES.get(head.lower())
    if kind is None:
        return {}, optional
    schema: dict[str, Any] = {"type": kind}
    if inner and head.lower() in ("list", "array", "set"):
        items, _ = json_schema(inner)
        if items:
            schema["items"] = items
    return schema, optional


def as_declared(value: object, schema: dict[str, Any]) -> object:
    """Returns numbers and booleans that a source wrote as text as the type its schema declares; else the value."""
    if not isinstance(value, str):
        return value
    kind = schema.get("type")
    if kind == "integer" and re.fullmatch(r"-?(0|[1-9]\d{0,17})", value):
        return int(value)
    if kind == "number" and re.fullmatch(r"-?(0|[1-9]\d{0,17})(\.\d{1,17})?", value):
        return float(value) if "." in value else int(value)
    if kind == "boolean" and value.lower() in ("true", "false"):
        return value.lower() == "true"
    return value


def _object(value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InvalidTrajectory("not-an-object", f"a row is a JSON object, got a {type(value).__name__}")
    return value
