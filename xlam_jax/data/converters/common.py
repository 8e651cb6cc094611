"""Shared parts of the trajectory converters: reading rows, dropped rows, repairs, losses of exports, JSON Schema."""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from xlam_jax.data.declarations import find_tools
from xlam_jax.data.files import stem
from xlam_jax.data.parse import parse_trajectory
from xlam_jax.data.row_json import DEEPEST_ROW, parse_text
from xlam_jax.data.rows import place, read_rows
from xlam_jax.data.trajectory import InvalidTrajectory, Message, Trajectory, system_text


@dataclass(frozen=True, slots=True)
class Dropped:
    """A dropped trajectory, or one dropped step of it; `row` is its line (JSONL) or the number of its item (JSON)."""

    path: Path
    row: int
    reason: str
    detail: str
    unit: Literal["trajectory", "step"] = "trajectory"
    line: int = 0
    """The line on which the row begins, 0 where unknown."""

    @property
    def where(self) -> str:
        """Where the row is, for messages."""
        return place(self.path, self.row, self.line)


@dataclass(frozen=True, slots=True)
class StepDropped:
    """A step that a row converter drops. It yields them before the trajectory."""

    reason: str
    detail: str


@dataclass(frozen=True, slots=True)
class Repaired:
    """A repair by a row converter, which yields them before the trajectory, or by the parser."""

    reason: str
    detail: str


@dataclass(frozen=True, slots=True)
class Converted:
    """A trajectory, the row that it was made from, and the repairs."""

    path: Path
    row: int
    trajectory: Trajectory
    repairs: tuple[Repaired, ...] = ()
    line: int = 0

    @property
    def where(self) -> str:
        """Where the row is, for messages."""
        return place(self.path, self.row, self.line)


@dataclass(frozen=True, slots=True)
class Lost:
    """A part of a trajectory that an exporter's format cannot represent. It yields them after its rows."""

    reason: str
    detail: str


Convert = Callable[[list[Path]], Iterator[Converted | Dropped]]
"""Converts files. Every row gives one or several consecutive items."""
ConvertRow = Callable[[dict[str, Any], str], Iterable[dict[str, Any] | StepDropped | Repaired | InvalidTrajectory]]
ExportRow = Callable[[Trajectory], Iterable[dict[str, Any] | Lost]]


def convert_rows(paths: Iterable[Path], convert_row: ConvertRow) -> Iterator[Converted | Dropped]:
    """Converts every row of `paths` with `convert_row(row, name)`, where `name` identifies the row."""
    for path in paths:
        for read in read_rows(path):
            yield from convert_one(path, read.number, read.row, convert_row, read.padded, read.line)


def convert_one(
    path: Path,
    number: int,
    row: dict[str, Any] | InvalidTrajectory,
    convert_row: ConvertRow,
    padded: bool = False,
    line: int = 0,
) -> Iterator[Converted | Dropped]:
    """Converts row `number` of `path`, on `line`; `padded` if it has the null fields of a union schema.

    `convert_row(row, name)` yields unified trajectories as objects, which are checked here, each after its dropped
    steps and repairs. It raises `InvalidTrajectory` for a row that cannot be converted, and yields it in place of one
    of several trajectories. Repairs and dropped steps of a dropped trajectory are not reported.
    """
    steps: list[StepDropped] = []
    repairs: list[Repaired] = []
    is_empty = True
    try:
        if isinstance(row, InvalidTrajectory):
            raise row
        for item in convert_row(row, f"{stem(path)}_{number}"):
            if isinstance(item, StepDropped):
                steps.append(item)
                continue
            if isinstance(item, Repaired):
                repairs.append(item)
                continue
            is_empty = False
            try:
                if isinstance(item, InvalidTrajectory):
                    raise item
                trajectory = parse_trajectory(item, repaired=partial(_note, repairs), padded=padded)
            except InvalidTrajectory as invalid:  # the next trajectory of the row may be valid
                yield Dropped(path, number, invalid.reason, invalid.detail, line=line)
            else:
                yield from (Dropped(path, number, step.reason, step.detail, unit="step", line=line) for step in steps)
                yield Converted(path, number, trajectory, tuple(repairs), line)
            steps, repairs = [], []
    except InvalidTrajectory as invalid:
        yield Dropped(path, number, invalid.reason, invalid.detail, line=line)
    else:
        yield from (Dropped(path, number, step.reason, step.detail, unit="step", line=line) for step in steps)
        if is_empty:
            yield Dropped(path, number, "no-trajectory", "the row has no trajectory", line=line)


def _note(repairs: list[Repaired], reason: str, detail: str) -> None:
    repairs.append(Repaired(reason, detail))


def losses(trajectory: Trajectory, row: dict[str, Any], convert_row: ConvertRow) -> Iterator[Lost]:
    """Yields the parts of a trajectory that are lost when its exported `row` is imported with `convert_row`.

    Ids and names that were added are not losses.
    """
    try:
        back = next(item for item in convert_row(row, "") if isinstance(item, dict))
        yield from _differences(trajectory, parse_trajectory(back))
    except InvalidTrajectory as invalid:
        yield Lost("not-read-back", str(invalid))


def _differences(before: Trajectory, after: Trajectory) -> Iterator[Lost]:
    for key in ("id", "source", "score"):
        value, back = getattr(before, key), getattr(after, key)
        if value is not None and value != back:
            yield Lost(f"{key}-not-held", f"{key} {value!r} comes back as {back!r}")
    if system_text(before.task_instruction, before.conversation) != system_text(
        after.task_instruction, after.conversation
    ):
        yield Lost("system-text-not-held", "the task instruction and the system turns come back changed")
    if json.dumps(before.tools) != json.dumps(after.tools):  # the order of keys counts
        yield Lost("tools-not-held", f"{len(before.tools)} tools come back changed")
    if any(turn.name or turn.loss is not None for turn in before.conversation if turn.role == "system"):
        yield Lost("system-flags-not-held", "a system turn has a name or a loss flag")
    turns, others = ([turn for turn in t.conversation if turn.role != "system"] for t in (before, after))
    if [turn.role for turn in turns] != [turn.role for turn in others]:
        yield Lost("turns-not-held", f"{len(turns)} turns come back as {len(others)}")
        reasoning, back = (sum(bool(turn.reasoning) for turn in t) for t in (turns, others))
        if back < reasoning:
            yield Lost("reasoning-not-held", f"{reasoning} turns have reasoning, {back} of them come back with it")
        return
    seen: set[str] = set()
    for i, (turn, other) in enumerate(zip(turns, others, strict=True)):
        for reason in _turn_losses(turn, other):
            if reason not in seen:
                yield Lost(reason, f"turn {i} ({turn.role}), not counting system turns")
            seen.add(reason)


def _turn_losses(turn: Message, other: Message) -> Iterator[str]:
    if turn.content != other.content:
        yield "text-not-held"
    if turn.reasoning and turn.reasoning != other.reasoning:
        yield "reasoning-not-held"
    if [(c.name, json.dumps(c.arguments)) for c in turn.tool_calls] != [
        (c.name, json.dumps(c.arguments)) for c in other.tool_calls
    ]:
        yield "calls-not-held"
    elif any(c.id not in (None, d.id) for c, d in zip(turn.tool_calls, other.tool_calls, strict=True)):
        yield "call-id-not-held"
    if turn.tool_call_id not in (None, other.tool_call_id):
        yield "call-id-not-held"
    if turn.name not in (None, other.name):
        yield "name-not-held"
    if turn.loss not in (None, other.loss):
        yield "loss-flag-not-held"


def field(row: object, key: str, kind: type | tuple[type, ...]) -> Any:
    """Returns `row[key]`; raises `InvalidTrajectory("missing-field", …)` when it is absent or of another type."""
    if not isinstance(row, dict):
        raise InvalidTrajectory("missing-field", f"`{key}` is looked for in a {type(row).__name__}, not an object")
    value = row.get(key)
    if not isinstance(value, kind):
        raise InvalidTrajectory("missing-field", f"`{key}` is {'missing' if value is None else type(value).__name__}")
    return value


def turns_of(row: dict[str, Any], key: str, repairs: list[Repaired]) -> list[Any]:
    """Returns the turns at `key`: a list, or a list as JSON text, as tables have it. Raises `InvalidTrajectory`."""
    value = row.get(key)
    if isinstance(value, str):
        value = parse_text(value, "no-conversation", f"`{key}`", DEEPEST_ROW)
        repairs.append(Repaired("string-turns", f"`{key}` is JSON in a text"))
    return field(row | {key: value}, key, list)


def declared_tools(value: Any) -> list[Any]:
    """Returns a list of tools. The list or each tool may be a JSON text, and a single tool need not be in a list.

    Raises `InvalidTrajectory` for a text that is not JSON.
    """
    if isinstance(value, str):
        value = parse_text(value, "bad-tools", "`tools`") if value.strip() else []
    tools = value if isinstance(value, list) else [] if value is None else [value]
    return [
        parse_text(tool, "bad-tools", f"item {at} of `tools`") if isinstance(tool, str) else tool
        for at, tool in enumerate(tools)
    ]


def take_tools(turns: list[dict[str, Any]], tools: list[Any], repairs: list[Repaired]) -> list[Any]:
    """Returns the tools of a row: `tools`, or those that the last of `turns`, a system turn, declares in its text.

    The declarations are removed from the text, and the turn too if no text remains. Where the row's `tools` differ from
    those in the text, both stay as they are. Raises `InvalidTrajectory("unreadable-tools", …)` for a row without tools
    whose text declares tools that cannot be read.
    """
    text = turns[-1].get("content")
    if not isinstance(text, str):
        return tools
    try:
        declared, rest = find_tools(text)
    except InvalidTrajectory:
        if tools:
            return tools
        raise
    if not declared or (tools and tools != declared):
        return tools
    repairs.append(Repaired("tools-in-system", f"{len(declared)} tools are declared in the system text"))
    turns[-1]["content"] = rest
    if not rest:
        turns.pop()
    return declared


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


def json_schema(spelling: str, levels: int = 8) -> tuple[dict[str, Any], bool]:
    """Returns (JSON Schema, whether it is optional) of a Python-like type spelling.

    Examples are `str`, `List[int]`, `list(str)`, `Dict[str, Any]`, `Optional[str]`, `int, optional`. The schema {},
    which allows any value, is returned for unknown spellings, unions, and types nested deeper than `levels`.
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
    if inner and levels and head.lower() in ("list", "array", "set"):
        items, _ = json_schema(inner, levels - 1)
        if items:
            schema["items"] = items
    return schema, optional


def as_declared(value: object, schema: dict[str, Any]) -> object:
    """Converts numbers and booleans written as text to the type of their schema; returns other values as they are."""
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


def declared_arguments(
    tool_name: str, arguments: dict[str, Any], properties: dict[str, Any]
) -> tuple[dict[str, Any], list[Repaired]]:
    """Returns (arguments of a call with the types of `properties`, repairs); see `as_declared`."""
    declared = {key: as_declared(value, properties.get(key, {})) for key, value in arguments.items()}
    return declared, [
        Repaired("text-for-declared-type", f"`{key}` of '{tool_name}' is the text {value!r}")
        for key, value in arguments.items()
        if declared[key] is not value
    ]
