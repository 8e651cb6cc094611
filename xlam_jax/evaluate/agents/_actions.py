"""Actions in words: how they are written in prompts, and read from what a model wrote.

`Action: search[Oslo]` is the way of ReAct (arXiv 2210.03629). A tool of several arguments takes them as a JSON object:
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
_AFTER = re.compile(r"\n[ \t]*[*_`]*(?:observation|thought|action)(?:[ \t]*\d+)?[*_`]*[ \t]*:", re.IGNORECASE)


def written(action: ToolCall) -> str:
    """An action as a model is to write it."""
    values = list(action.arguments.values())
    plain = len(values) == 1 and isinstance(values[0], str)
    return (
        f"{action.name}[{values[0] if plain else json.dumps(action.arguments, ensure_ascii=False) if values else ''}]"
    )


def described(tools: Iterable[Mapping[str, Any]]) -> str:
    """The actions as a prompt lists them; `tools` are functions in OpenAI form."""
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


def read(text: str, tools: Mapping[str, Mapping[str, Any]]) -> ToolCall | None:
    """The first action in a text; None where there is none.

    Read are an `Action:` line, in Markdown's dress or with a number; a line that begins with the name of a tool and a
    bracket; and calls in JSON, as `parse_completion` reads them. A bracket may be round, or lack its end.
    """
    lines = list(_LINE.finditer(text))
    # where each is over, so that no part of a text is read for several of them
    ends = sorted({after.start() for after in _AFTER.finditer(text)} | {line.start() for line in lines} | {len(text)})
    for line in lines:
        rest = text[line.start(1) : ends[bisect_right(ends, line.start(1))]]
        if (action := _action(rest.strip(" *_`\n"), tools, known=False)) is not None:
            return action
    for line in filter(None, text.splitlines()):
        if (action := _action(line.strip(" *_`-"), tools, known=True)) is not None:
            return action
    _, calls = parse_completion(text)
    return calls[0] if calls else None


def _action(text: str, tools: Mapping[str, Mapping[str, Any]], *, known: bool) -> ToolCall | None:
    """An action that stands at the beginning of a text. `known`: only one of the tools."""
    if calls := parse_completion(f"[{text}]" if text.startswith("{") else text)[1]:
        return calls[0]
    by_name = {name.lower(): name for name in tools}
    shape = _SHAPE.match(text)
    if shape is None:
        name = by_name.get(text.strip().lower(), "")
        return ToolCall(None, name, {}) if name and not known else None
    name = by_name.get(shape[1].strip().lower(), "" if known else shape[1].strip())
    return ToolCall(None, name, _arguments(_inside(shape[3], shape[2]), tools.get(name, {}))) if name else None


def _inside(text: str, opening: str) -> str:
    """What is between the bracket and the one that closes it; else the first line's rest."""
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
            given = parse_json(text)
        except InvalidTrajectory:
            given = None
        if isinstance(given, dict):
            return given
    if not properties:
        return {} if not text else {"argument": text}
    name, schema = next(iter(properties.items()))
    bare = re.fullmatch(rf"{re.escape(name)}\s*=\s*(.+)", text, re.DOTALL)
    value: Any = bare[1].strip() if bare else text
    if len(value) > 1 and value[0] == value[-1] and value[0] in "\"'":
        value = value[1:-1]
    if schema.get("type", "string") != "string":
        with contextlib.suppress(InvalidTrajectory):  # the schema tells what is wrong with it
            value = parse_json(value)
    return {name: value}
