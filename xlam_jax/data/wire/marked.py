"""Reads calls that begin with a mark and whose arguments are JSON: Hermes, Mistral, DeepSeek.

In every format here and in the modules next to it, an attempt is text that can only be meant as a call; a mark in prose
is none. All calls of a text are returned or none: one attempt that cannot be read makes the whole text content.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

from xlam_jax.data.embedded import closing
from xlam_jax.data.row_json import parse_json
from xlam_jax.data.trajectory import ToolCall
from xlam_jax.data.wire.base import Tools
from xlam_jax.data.wire.fronts import Fronts, literal

Read = tuple[str, tuple[ToolCall, ...] | None]
"""Content and calls."""
ReadAttempt = Callable[[str, re.Match[str]], tuple[Sequence[ToolCall], int]]
"""Returns the calls of an attempt and where they end, no calls for text. Raises `ValueError`."""

NAME = r"[^\s\[\]{}()<>\"'`,;]{1,128}+"
"""The name of a function."""


class UnreadableError(ValueError):
    """An attempt at a call cannot be read."""


def read_attempts(text: str, attempt: re.Pattern[str], read: ReadAttempt, alone: bool = False) -> Read:
    """Returns the content of a text and the calls of all attempts in it; the text and None where one is unreadable.

    White space in front of calls is dropped; other text after them is appended to the content on a new line. With
    `alone`, such text makes the whole text content.
    """
    calls: list[ToolCall] = []
    parts: list[str] = []
    begin = at = 0
    try:
        while (front := attempt.search(text, at)) is not None:
            new, at = read(text, front)
            if new:
                calls += new
                parts.append(text[begin : front.start()])
                begin = at
    except ValueError:
        return text, None
    first, *others = [*parts, text[begin:]]
    others = [part.strip() for part in others if not part.isspace() and part]
    if not calls or (alone and others):
        return text, None
    return "\n".join([part for part in (first.rstrip(), *others) if part]), tuple(calls)


def object_at(text: str, start: int) -> tuple[dict[str, Any], int]:
    """Returns the JSON object at a brace and where it ends. Raises `ValueError` for anything else."""
    if text[start : start + 1] != "{":
        raise UnreadableError("not an object")
    end = closing(text, start)
    return parse_json(text[start:end]), end


def end_of(pattern: re.Pattern[str], text: str, at: int) -> int:
    """Returns where the text that must follow at `at` ends. Raises `UnreadableError` where it does not follow."""
    match = pattern.match(text, at)
    if match is None:
        raise UnreadableError(f"{pattern.pattern} is missing")
    return match.end()


def call_of(value: dict[str, Any]) -> ToolCall:
    """Returns the call of `{"name", "arguments"}`, with or without an id. Raises `UnreadableError` for others."""
    match value:
        case {"name": str(name), "arguments": dict(arguments), **rest} if rest.keys() <= {"id"}:
            return ToolCall(str(rest["id"]) if "id" in rest else None, name, arguments)
    raise UnreadableError("not a call")


TOOL_CALL = r"<tool_call>\s*+(?:[\[{]|<(?!/)|```|\Z)"
"""An attempt at a call between tags, in any format."""
_HERMES = re.compile(rf"{TOOL_CALL}|\}}\s*+</tool_call>")
_TOOL_CALL = re.compile(r"<tool_call>\s*+")
_TOOL_CALL_END = re.compile(r"\s*+</tool_call>")
HERMES_FRONTS = Fronts((literal("<tool_call>"),))


def read_hermes(text: str, tools: Tools = (), alone: bool = False) -> Read:
    """Reads `<tool_call>{"name", "arguments"}</tool_call>`."""

    def read(text: str, front: re.Match[str]) -> tuple[list[ToolCall], int]:
        value, end = object_at(text, end_of(_TOOL_CALL, text, front.start()))
        return [call_of(value)], end_of(_TOOL_CALL_END, text, end)

    return read_attempts(text, _HERMES, read, alone)


_MISTRAL = re.compile(
    rf"\[TOOL_CALLS\]\s*+(?:[\[{{]|<(?!/)|```|{NAME}(?:\[(?:ARGS|CALL_ID)\]|\s*+\{{)|(?:{NAME})?+(?:\[[A-Z_]*+)?+\Z)"
)
_MISTRAL_CALL = re.compile(rf"\[TOOL_CALLS\]\s*+({NAME})(?:\[CALL_ID\]([\w-]{{1,128}}+))?+(?:\[ARGS\])?+\s*+")
MISTRAL_FRONTS = Fronts((literal("[TOOL_CALLS]"),))


def read_mistral(text: str, tools: Tools = (), alone: bool = False) -> Read:
    """Reads `[TOOL_CALLS]name[ARGS]{…}`, also with `[CALL_ID]id` in front of `[ARGS]`, or without these marks."""

    def read(text: str, front: re.Match[str]) -> tuple[list[ToolCall], int]:
        call = _MISTRAL_CALL.match(text, front.start())
        if call is None:
            raise UnreadableError("no name")
        arguments, end = object_at(text, call.end())
        return [ToolCall(call[2], call[1], arguments)], end

    return read_attempts(text, _MISTRAL, read, alone)


_BEGIN = r"(?:<｜tool▁calls▁begin｜>\s*+)?+<｜tool▁call▁begin｜>"
_DEEPSEEK = re.compile(
    r"<｜tool▁calls▁begin｜>\s*+<｜tool▁call▁begin｜>"
    r"|<｜tool▁call▁begin｜>(?:[^<\n]{0,256}+<｜tool▁sep｜>|[^<\n]{0,256}+(?:<[^<>\n]{0,16}+)?+\Z)|<｜tool▁calls▁begin｜>\s*+\Z"
)
_DEEPSEEK_V3 = re.compile(rf"{_BEGIN}function<｜tool▁sep｜>({NAME})\s*+```json\s*+")
_DEEPSEEK_V31 = re.compile(rf"{_BEGIN}({NAME})<｜tool▁sep｜>\s*+")
_END = r"\s*+<｜tool▁call▁end｜>(?:\s*+<｜tool▁calls▁end｜>)?+"
_DEEPSEEK_V3_END = re.compile(rf"\s*+```{_END}")
_DEEPSEEK_V31_END = re.compile(_END)
DEEPSEEK_FRONTS = Fronts((literal("<｜tool▁calls▁begin｜>"), literal("<｜tool▁call▁begin｜>")))


def read_deepseek_v3(text: str, tools: Tools = (), alone: bool = False) -> Read:
    """Reads calls of DeepSeek V3 and R1: a type, a name, and JSON in a code fence."""
    return read_attempts(text, _DEEPSEEK, _deepseek(_DEEPSEEK_V3, _DEEPSEEK_V3_END), alone)


def read_deepseek_v31(text: str, tools: Tools = (), alone: bool = False) -> Read:
    """Reads calls of DeepSeek V3.1: a name and JSON."""
    return read_attempts(text, _DEEPSEEK, _deepseek(_DEEPSEEK_V31, _DEEPSEEK_V31_END), alone)


def _deepseek(begin: re.Pattern[str], end: re.Pattern[str]) -> ReadAttempt:
    def read(text: str, front: re.Match[str]) -> tuple[list[ToolCall], int]:
        call = begin.match(text, front.start())
        if call is None:
            raise UnreadableError("no name")
        arguments, stop = object_at(text, call.end())
        return [ToolCall(None, call[1], arguments)], end_of(end, text, stop)

    return read


MARKED_ATTEMPTS = (_HERMES, _MISTRAL, _DEEPSEEK)
