"""Finds the tools that a system text declares, as Hermes, Qwen, Llama, ToolACE and glaive data have them.

They are in a block `<tools>…</tools>` (or another tag of `_TAG`), or JSON or Python literals anywhere in the text: a
list, or consecutive objects. Literals are never evaluated. All functions take time linear in the text.
"""

import contextlib
import json
import re
from collections.abc import Iterator
from typing import Any, NamedTuple, NoReturn

from xlam_jax.data.embedded import closing, value_at
from xlam_jax.data.row_json import DEEPEST_TEXT, check_json
from xlam_jax.data.trajectory import InvalidTrajectory

MOST_FAILURES = 8
"""Number of values outside blocks that may fail to parse before the search ends."""
_TAG = re.compile(
    r"<(?P<tag>tools|available_tools|functions|function_list)>|</(?P<end>tools|available_tools|functions|function_list)>"
    r"|\[(?P<slash>/?)AVAILABLE_TOOLS\]"
)
_OPENS = re.compile(r"\s*+(?:```\w{0,20}\s*+)?+(?=[\[{])")
_BETWEEN = re.compile(r"[\s,]*+")
_AFTER = re.compile(r"\s*+(?:```\s*+)?+")
_VALUE = re.compile(r"""(?:\[\s*+)?+\{\s*+["'][\w$-]{1,40}["']\s*+:""")
_TALK_OF_TOOLS = re.compile(r"\b(?:functions?|tools?|apis?)\b", re.IGNORECASE)
_LIKE_A_TOOL = re.compile(
    r"""(?:\[\s*+)?+\{\s*+["'](?:name|type["']\s*+:\s*+["']function|function|description|parameters|tools|functions)["']"""
)
_LIKE_A_SCHEMA = re.compile(r"""["'](?:parameters|description|input_schema)["']\s*+:\s*+["'{\[]""")
_OTHER_SPELLINGS = re.compile(r"namespace functions \{|Format the arguments as a JSON object|✿FUNCTION✿")
_NAME = re.compile(r"[^\W_][^\n\"<>\[\]{}]{0,127}+")
_PARAMETERS = ("parameters", "input_schema", "inputSchema", "arguments", "args")


class _Block(NamedTuple):
    """Tools and the part of the text that declares them."""

    start: int
    end: int
    tools: list[dict[str, Any]]


def find_tools(text: str) -> tuple[list[dict[str, Any]], str]:
    """Returns the tools that a text declares, in OpenAI form, and the text without their declarations.

    An object is a tool only if it looks like one: other JSON, and a text without tools, stay as they are. Raises
    `InvalidTrajectory("unreadable-tools", …)` where tools are declared in a form that cannot be read.
    """
    blocks = list(_tagged(text)) or list(_untagged(text))
    tools = list({json.dumps(tool): tool for block in blocks for tool in block.tools}.values())  # without duplicates
    if not tools:
        if other := _OTHER_SPELLINGS.search(text):
            _refuse(text, other.start(), "in a form that is not read")
        return [], text
    kept, at = [], 0
    for block in blocks:
        between = text[at : block.start]
        if not at or between.strip(", \n\t"):
            kept.append(between)
        at = block.end
    return tools, ("".join(kept) + text[at:]).strip()


def _refuse(text: str, at: int, why: str) -> NoReturn:
    raise InvalidTrajectory("unreadable-tools", f"the system text declares tools {why}: {text[at : at + 80]!r}")


def _tagged(text: str) -> Iterator[_Block]:
    """Yields the blocks between tags. Prose may mention the tags, with nothing or a few words between them."""
    at = 0
    while (tag := _TAG.search(text, at)) is not None:
        at = tag.end()
        if tag["end"] or tag["slash"]:
            continue
        opens = _OPENS.match(text, at)
        if opens is None:
            closes = _TAG.search(text, at)
            inside = text[at : closes.start()] if closes and _closes(closes, tag) else ""
            at = closes.start() if closes else at
            own_line = "\n" in inside.strip(" ") and text[: tag.start()].rstrip(" ")[-1:] in ("", "\n")
            if inside.strip() and (own_line or "{" in inside):
                _refuse(text, tag.start(), "in a form that is not read")
            continue
        at = opens.end()
        values: list[Any] = []
        while text[at : at + 1] in ("[", "{") and not _TAG.match(text, at):
            try:
                value, at = value_at(text, at)
            except ValueError as error:
                _refuse(text, tag.start(), f"that cannot be read ({error})")
            values.append(value)
            between = _BETWEEN.match(text, at)
            at = between.end() if between else at
        after = _AFTER.match(text, at)
        closes = _TAG.match(text, after.end() if after else at)
        if closes is None or not _closes(closes, tag):
            _refuse(text, tag.start(), f"with other text among them ({text[at : at + 40]!r})")
        tools = [_declared(item, text, tag.start()) for value in values for item in _items(value)]
        at = closes.end()
        yield _Block(tag.start(), at, tools)


def _closes(tag: re.Match[str], opening: re.Match[str]) -> bool:
    return bool(tag["slash"]) if opening["tag"] is None else tag["end"] == opening["tag"]


def _items(value: Any) -> list[Any]:
    if isinstance(value, dict) and len(value) == 1:
        inner = value.get("tools", value.get("functions"))
        if isinstance(inner, list):
            return inner
    return value if isinstance(value, list) else [value]


def _declared(value: Any, text: str, at: int) -> dict[str, Any]:
    """The tool that a value in a block declares."""
    tool = _tool(value, among_tools=True)
    if tool is None:
        _refuse(text, at, f"and one of them is not a tool ({str(value)[:80]})")
    return tool


def _untagged(text: str) -> Iterator[_Block]:
    """Yields lists and objects outside of tags that look like tools."""
    at = failures = 0
    while failures < MOST_FAILURES and (start := _VALUE.search(text, at)) is not None:
        begin = start.start()
        try:
            value, at = value_at(text, begin)
        except ValueError as error:
            if _talks_of_tools(text, begin):
                _refuse(text, begin, f"that cannot be read ({error})")
            failures, at = failures + 1, begin + 1
            continue
        items = _items(value)
        if any(_tool(item, among_tools=False) for item in items):
            yield _Block(begin, at, [_declared(item, text, begin) for item in items])
    if failures == MOST_FAILURES:
        for start in _VALUE.finditer(text, at):
            if _talks_of_tools(text, start.start()):
                _refuse(text, start.start(), "after other text that cannot be read")


def _talks_of_tools(text: str, at: int) -> bool:
    """Whether the JSON at `at` looks like a tool, and the text before it mentions tools.

    A template of calls with placeholders for values, as in Llama's system text before the tools, does not look like a
    tool.
    """
    end = at + 2000
    with contextlib.suppress(ValueError):
        end = closing(text, at, end)
    return bool(
        _TALK_OF_TOOLS.search(text, max(0, at - 300), at)
        and _LIKE_A_TOOL.match(text, at)
        and _LIKE_A_SCHEMA.search(text, at, end)
    )


def _tool(value: Any, among_tools: bool) -> dict[str, Any] | None:
    """The value in OpenAI form if it looks like a tool's declaration, else None.

    Where it is `among_tools`, in a place for tools, a name with a description is enough.
    """
    if not isinstance(value, dict):
        return None
    function = value.get("function")
    if isinstance(function, dict):
        described = among_tools or "description" in function or "parameters" in function
        with_description = {**function, "description": function.get("description", "")}
        flat = _tool(with_description, among_tools=True) if described else None
        return None if flat is None or value.get("type", "function") != "function" else _whole(value, function, flat)
    name = value.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        return None
    key = next((key for key in _PARAMETERS if key in value), None)
    parameters = value.get(key) if key else None
    described = isinstance(value.get("description"), str)
    schema = key is not None and _is_schema(parameters)
    if key is not None and not schema:
        return None
    if not (described and (schema or among_tools)) and not (parameters and schema and key not in ("arguments", "args")):
        return None
    renamed = {("parameters" if other == key else other): inner for other, inner in value.items()}
    if renamed.get("type") == "function":
        del renamed["type"]
    if key in ("arguments", "args") and isinstance(parameters, dict) and "properties" not in parameters:
        renamed["parameters"] = {"type": "object", "properties": parameters}
    try:
        check_json(renamed, DEEPEST_TEXT)
    except InvalidTrajectory as invalid:
        raise InvalidTrajectory("unreadable-tools", f"the system text declares '{name}': {invalid.detail}") from None
    return {"type": "function", "function": renamed}


def _whole(value: dict[str, Any], function: dict[str, Any], flat: dict[str, Any]) -> dict[str, Any]:
    """A tool in OpenAI form, with its keys in their order."""
    inner = flat["function"]
    if "description" not in function:
        inner = {key: item for key, item in inner.items() if key != "description"}
    return {**value, "function": inner} if "type" in value else {"type": "function", **value, "function": inner}


def _is_schema(value: Any) -> bool:
    """Whether a value describes parameters: a JSON Schema of an object, or a schema per name; both may be empty."""
    if not value:
        return value is None or isinstance(value, dict)
    if not isinstance(value, dict):
        return False
    if isinstance(value.get("properties"), dict) or value.get("type") in ("object", "dict"):
        return True
    return all(isinstance(item, dict) and ("type" in item or "description" in item) for item in value.values())
