"""Actions as text: formats them for prompts, and parses them from a model's answers.

`Action: search[Oslo]` is the form of ReAct (arXiv 2210.03629). A tool with several arguments takes a JSON object:
`Action: book[{"from": "Oslo", "to": "Bergen"}]`.
"""

import contextlib
import json
import re
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from typing import Any

from xlam_jax.data.row_json import parse_json
from xlam_jax.data.trajectory import InvalidTrajectory, ToolCall
from xlam_jax.data.wire import parse_completion

_LINE = re.compile(r"^[ \t*_`#>-]*action(?:[ \t]*\d+)?[ \t*_`]*:[\s*_`]*(.+)$", re.IGNORECASE | re.MULTILINE)
_SHAPE = re.compile(r"([A-Za-z_][\w.-]*(?: +[\w.-]+)*)\s*([\[(])(.*)", re.DOTALL)
_CLOSES = {"[": "]", "(": ")"}
_NEXT = re.compile(r"\n[ \t]*[*_`]*(?:observation|thought|action)(?:[ \t]*\d+)?[*_`]*[ \t]*:", re.IGNORECASE)


def format_action(action: ToolCall) -> str:
    """Returns an action in the form in which a model has to write it."""
    values = list(action.arguments.values())
    plain = len(values) == 1 and isinstance(values[0], str)
    return (
        f"{action.name}[{values[0] if plain else json.dumps(action.arguments, ensure_ascii=False) if values else ''}]"
    )


def describe_tools(tools: Iterable[Mapping[str, Any]]) -> str:
    """Returns the list of actions for a prompt; `tools` are functions in OpenAI form."""
    lines = []
    for tool in tools:
        properties = (tool.get("parameters") or {}).get("properties") or {}
        if len(properties) == 1:
            inside = next(iter(properties))
        else:
            inside = json.dumps({name: f"<{schema.get('type', 'any')}>" for name, schema in properties.items()})
            inside = inside if properties else ""
        lines.append(f"- {tool['name']}[{inside}]: {tool.get('description', '')}")
    return "\n".join(lines)


def parse_action(text: str, tools: Mapping[str, Mapping[str, Any]]) -> ToolCall | None:
    """Returns the first action in a text; None if there is none.

    Accepts an `Action:` line, also with Markdown or a number; a line that begins with a tool's name and a bracket; and
    calls in JSON, as in `parse_completion`. Brackets may be round, and the closing one may be missing.
    """
    lines = list(_LINE.finditer(text))
    # the end of each action, so that no part of a text is parsed more than once
    ends = sorted(
        {following.start() for following in _NEXT.finditer(text)} | {line.start() for line in lines} | {len(text)}
    )
    for line in lines:
        rest = text[line.start(1) : ends[bisect_right(ends, line.start(1))]]
        if (action := _parse_action(rest.strip(" *_`\n"), tools, only_tools=False)) is not None:
            return action
    for line in filter(None, text.splitlines()):
        if (action := _parse_action(line.strip(" *_`-"), tools, only_tools=True)) is not None:
            return action
    _, calls = parse_completion(text)
    return calls[0] if calls else None


def _parse_action(text: str, tools: Mapping[str, Mapping[str, Any]], *, only_tools: bool) -> ToolCall | None:
    """Returns the action at the beginning of a text. `only_tools` ignores actions that are not tools."""
    if calls := parse_completion(f"[{text}]" if text.startswith("{") else text)[1]:
        return calls[0]
    by_name = {name.lower(): name for name in tools}
    shape = _SHAPE.match(text)
    if shape is None:
        name = by_name.get(text.strip().lower(), "")
        return ToolCall(None, name, {}) if name and not only_tools else None
    name = by_name.get(shape[1].strip().lower(), "" if only_tools else shape[1].strip())
    return ToolCall(None, name, _arguments(_inside(shape[3], shape[2]), tools.get(name, {}))) if name else None


def _inside(text: str, opening: str) -> str:
    """Returns the text up to the matching closing bracket; without one, the rest of the first line."""
    depth = 1
    for at, character in enumerate(text):
        depth += (character == opening) - (character == _CLOSES[opening])
        if depth == 0:
            return text[:at].strip()
    line = text.split("\n", 1)[0].rstrip()
    return line.removesuffix(_CLOSES[opening]).strip()


def _arguments(text: str, tool: Mapping[str, Any]) -> dict[str, Any]:
    properties = (tool.get("parameters") or {}).get("properties") or {}
    if text.startswith("{"):
        try:
            parsed = parse_json(text)
        except InvalidTrajectory:
            parsed = None
        if isinstance(parsed, dict):
            return parsed
    if not properties:
        return {} if not text else {"argument": text}
    name, schema = next(iter(properties.items()))
    bare = re.fullmatch(rf"{re.escape(name)}\s*=\s*(.+)", text, re.DOTALL)
    value: Any = bare[1].strip() if bare else text
    if len(value) > 1 and value[0] == value[-1] and value[0] in "\"'":
        value = value[1:-1]
    if schema.get("type", "string") != "string":
        with contextlib.suppress(InvalidTrajectory):  # the check against the schema reports the error
            value = parse_json(value)
    return {name: value}
