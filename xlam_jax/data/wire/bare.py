"""Reads calls that need no mark: Llama's JSON objects and lists of Python calls."""

import re

from xlam_jax.data.embedded import keyword_arguments
from xlam_jax.data.row_json import DEEPEST, check_json
from xlam_jax.data.trajectory import ToolCall
from xlam_jax.data.wire.base import Tools
from xlam_jax.data.wire.fronts import SPACES, Fronts, literal
from xlam_jax.data.wire.marked import Read, UnreadableError, end_of, object_at, read_attempts

_KEYS = ("parameters", "arguments")
_OBJECT = r"\{\s*+\"(?:name|type|parameters|arguments)\"\s*+:"
_LLAMA3 = re.compile(rf"<\|python_tag\|>\s*+\{{|(?:\A\s*+|^){_OBJECT}", re.MULTILINE)
_LLAMA3_START = re.compile(r"(?:<\|python_tag\|>)?+\s*+")
_LLAMA3_NEXT = re.compile(rf"\s*+;?+\s*+(?:<\|python_tag\|>)?+\s*+(?={_OBJECT})")
LLAMA3_FRONTS = Fronts((literal("<|python_tag|>"), (r"\{", SPACES, '"')))


def read_llama3_json(text: str, tools: Tools = (), alone: bool = False) -> Read:
    """Reads `{"name", "parameters"}` at the beginning of lines, several separated by `;` or white space.

    Other objects are text.
    """

    def read(text: str, front: re.Match[str]) -> tuple[list[ToolCall], int]:
        at = end_of(_LLAMA3_START, text, front.start())
        calls: list[ToolCall] = []
        while True:
            value, end = object_at(text, at)
            if "name" not in value or not any(key in value for key in _KEYS):
                return calls, end if not calls else at
            calls.append(_llama3_call(value))
            following = _LLAMA3_NEXT.match(text, end)
            if following is None:
                return calls, end
            at = following.end()

    return read_attempts(text, _LLAMA3, read, alone)


def _llama3_call(value: dict) -> ToolCall:
    match value:
        case {"name": str(name), "parameters": dict(arguments), **rest} | {
            "name": str(name),
            "arguments": dict(arguments),
            **rest,
        } if rest in ({}, {"type": "function"}):
            return ToolCall(None, name, arguments)
    raise UnreadableError("not a call")


_PYTHON_NAME = r"[^\W\d][\w.-]{0,127}+"
_MARKS = {"<|tool_call_start|>": "<|tool_call_end|>", "<|python_start|>": "<|python_end|>"}
_START = "|".join(map(re.escape, _MARKS))
_PYTHONIC = re.compile(rf"(?:{_START})\s*+\[|(?:\A\s*+|^)\[\s*+{_PYTHON_NAME}\s*+\(", re.MULTILINE)
_LIST_START = re.compile(rf"({_START})?+\s*+\[")
_FUNCTION = re.compile(rf"\s*+({_PYTHON_NAME})\s*+(?=\()")
_COMMA_OR_END = re.compile(r"\s*+([,\]])")
_LINK = re.compile(r"\(")
PYTHONIC_FRONTS = Fronts(
    (*map(literal, _MARKS), (r"\[", SPACES, r"[^\W\d]", r"[\w.-]*+", SPACES, r"\(")),
)


def read_pythonic(text: str, tools: Tools = (), alone: bool = False) -> Read:
    """Reads `[f(a="x"), g()]` at the beginning of lines, or anywhere between marks.

    Values are Python literals or JSON of at most 100,000 characters, which are never evaluated.
    """

    def read(text: str, front: re.Match[str]) -> tuple[list[ToolCall], int]:
        start = _LIST_START.match(text, front.start())
        if start is None:
            raise UnreadableError("no list")
        calls: list[ToolCall] = []
        at = start.end()
        while True:
            function = _FUNCTION.match(text, at)
            if function is None:
                raise UnreadableError("no function")
            arguments, end = keyword_arguments(text, function.end())
            check_json(arguments, DEEPEST)
            calls.append(ToolCall(None, function[1], arguments))
            separator = _COMMA_OR_END.match(text, end)
            if separator is None:
                raise UnreadableError("the list does not end")
            at = separator.end()
            if separator[1] == "]":
                break
        if start[1]:
            return calls, end_of(re.compile(rf"\s*+{re.escape(_MARKS[start[1]])}"), text, at)
        return ([] if _LINK.match(text, at) else calls), at

    return read_attempts(text, _PYTHONIC, read, alone)


BARE_ATTEMPTS = (_LLAMA3, _PYTHONIC)
