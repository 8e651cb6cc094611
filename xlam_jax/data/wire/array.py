"""Reads the format "array": calls are JSON arrays at the end of a text, or xLAM v1's object.

It also reads `[TOOL_CALLS] [{…}]`, as Mistral's tokenizers v1 to v7 write calls, and the arrays of xLAM-2.
"""

import re
from itertools import chain

from xlam_jax.data.trajectory import ToolCall
from xlam_jax.data.wire.objects import BLANK, parse_or_none

TOOL_CALLS = "[TOOL_CALLS]"
CLOSING = {"```json": "```", "```": "```", "<tool_call>": "</tool_call>"}
"""Opening marks that models write around calls → closing marks."""

_BLANKS = re.compile(rf"[{BLANK}]*+")
_SPACES = re.compile(r"\s++")
_QUOTE_OR_BRACKET = re.compile(r'"(\\*+)|[\[\]{}]')
_OTHER_CALLS = re.compile(
    rf"{re.escape(TOOL_CALLS)}\s*+(?:[\[{{<`]|[\w.-]{{1,128}}+(?:\[[A-Z_]++\][\w-]*+)*+\s*+\{{)"
    r"|<tool_call>\s*+(?:[\[{<`]|\Z)|</tool_call>"
    r"""|[{,]\s*+["']arguments["']\s*+:|["']arguments["']\s*+:\s*+[{\["']"""
    r"""|["']name["']\s*+:\s*+["'][^"'\n]*+["']\s*+,\s*+["']arguments["']"""
)
"""Text before the last calls that looks like further calls, so that not all calls of the text can be read. Prose may
mention the marks and the keys of calls."""


def parse_completion(text: str) -> tuple[str, tuple[ToolCall, ...] | None]:
    """Splits a completion (without its end token) into content and tool calls.

    Calls are JSON arrays up to the end of the text, alone or after a thought, each with or without `[TOOL_CALLS]`, in a
    code fence or in `<tool_call>`; or the text is one JSON object `{"thought", "tool_calls"}`, where the first may be
    missing. All calls of a text are returned or none: where some are malformed, or other text is between them, the
    whole text is the content, with None. A thought may mention the marks and the keys of calls. Nothing raises.
    """
    if (whole := _read_object(text)) is not None:
        return whole
    backwards = text[::-1]
    groups: list[tuple[ToolCall, ...]] = []
    end = len(text)
    while (group := _last_group(text, backwards, end)) is not None:
        end, calls = group
        groups.append(calls)
    if not groups or _OTHER_CALLS.search(text, 0, end):
        return text, None
    if TOOL_CALLS in text[:end] and not text.startswith(TOOL_CALLS, end):
        return text, None  # the token announces calls, and other text follows it
    return text[:end], tuple(chain.from_iterable(reversed(groups)))


def _read_object(text: str) -> tuple[str, tuple[ToolCall, ...] | None] | None:
    """Returns thought and calls, where the text is the object of xLAM v1, in a fence or not."""
    body = text.strip()
    for opening, closing in CLOSING.items():
        if body.startswith(opening) and body.endswith(closing):
            body = body.removeprefix(opening).removesuffix(closing).strip()
            break
    if not body.startswith("{"):
        return None
    match parse_or_none(body):
        case {"tool_calls": list(values), **rest} if rest.keys() <= {"thought"}:
            thought, calls = rest.get("thought", ""), _read_calls(values)
            if isinstance(thought, str) and calls is not None:
                return thought, calls or None
    return None


def _last_group(text: str, backwards: str, end: int) -> tuple[int, tuple[ToolCall, ...]] | None:
    """Returns the end of the text before the array of calls with which `text[:end]` ends, and the calls.

    None where it does not end with calls. `backwards` is the whole text reversed.
    """
    end = _without(_BLANKS, backwards, end)
    closing = next((mark for mark in CLOSING.values() if text.endswith(mark, 0, end)), "")
    end = _without(_BLANKS, backwards, end - len(closing))
    start = _last_array(text, backwards, end)
    calls = None if start is None else _read_calls(parse_or_none(text[start:end]))
    if start is None or not calls:
        return None
    bare = _without(_SPACES, backwards, start)
    if closing:
        opening = next((mark for mark in CLOSING if CLOSING[mark] == closing and text.endswith(mark, 0, bare)), "")
        if not opening:
            return None
        start = bare - len(opening)
        bare = _without(_SPACES, backwards, start)
    if text.endswith(TOOL_CALLS, 0, bare):
        return bare - len(TOOL_CALLS), calls
    return (start - 1 if text.endswith(("\n", " "), 0, start) else start), calls


def _without(spaces: re.Pattern[str], backwards: str, end: int) -> int:
    """Returns the end of the text before the white space at its end."""
    blank = spaces.match(backwards, len(backwards) - end)
    return len(backwards) - blank.end() if blank else end


def _last_array(text: str, backwards: str, end: int) -> int | None:
    """Returns where the JSON array begins that ends at `end`, None where no array ends there.

    Read backwards there is only one possible place: quotes that no backslash escapes come in pairs from the end on, and
    the brackets outside them show which one the last `]` closes. That takes linear time, unlike trying each `[`.
    """
    if not text.endswith("]", 0, end):
        return None
    depth, is_quoted = 0, False
    for mark in _QUOTE_OR_BRACKET.finditer(backwards, len(text) - end):
        if mark[0][0] == '"':
            is_quoted ^= len(mark[1]) % 2 == 0
        elif not is_quoted:
            depth += 1 if mark[0] in "]}" else -1
            if depth == 0:
                return len(text) - mark.end()
    return None


def _read_calls(values: object) -> tuple[ToolCall, ...] | None:
    """The calls of a list of `{"name", "arguments"}`, None for any other value."""
    calls = []
    for value in values if isinstance(values, list) else [None]:
        match value:
            case {"name": str(name), "arguments": dict(arguments), **rest} if rest.keys() <= {"id"}:
                calls.append(ToolCall(str(rest["id"]) if "id" in rest else None, name, arguments))
            case _:
                return None
    return tuple(calls)
