"""Reads completions: text and tool calls from what a model wrote, whole or streamed. The inverse of the wire formats.

Needs only the standard library, so that a server reads completions exactly as training and evaluation do.
"""

import json
import re
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

from xlam_jax.data.row_json import parse_json
from xlam_jax.data.trajectory import InvalidTrajectory, ToolCall

TOOL_CALLS = "[TOOL_CALLS]"
_CLOSING = {"```json": "```", "```": "```", "<tool_call>": "</tool_call>"}
"""Opening marks that models write around calls → closing marks."""
_BLANK = " \t\n\r"
"""White space of JSON."""

_STRING = r'"(?:[^"\\\x00-\x1f]++|\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4}))*+"'
_SCALAR = rf"{_STRING}|-?(?:0|[1-9][0-9]*+)(?:\.[0-9]++)?(?:[eE][-+]?[0-9]++)?|true|false|null"


def _token(pattern: str) -> re.Pattern[str]:
    return re.compile(rf"(?:{pattern})[{_BLANK}]*+")


_BEGINNING = re.compile(rf'\{{[{_BLANK}]*+["}}]')
"""The beginning of a JSON object."""
_VALUE = _token(rf"[{{[]|{_SCALAR}")
_KEY = _token(rf"{_STRING}[{_BLANK}]*+:")
_FIRST = {"{": _token(rf"\}}|{_STRING}[{_BLANK}]*+:"), "[": _token(rf"[{{\[\]]|{_SCALAR}")}
"""By the innermost open bracket: the tokens that may follow the bracket itself, a comma, and a value."""
_AFTER_COMMA = {"{": _KEY, "[": _VALUE}
_AFTER_VALUE = {"{": _token("[,}]"), "[": _token(r"[,\]]")}


def objects_in(text: str) -> Iterator[dict[str, Any]]:
    """Yields the outermost JSON objects in a text, in order. Takes linear time for any text.

    Of an object that is incomplete, the complete objects inside are yielded, and the search continues behind it.
    """
    at = 0
    while (beginning := _BEGINNING.search(text, at)) is not None:
        spans, at = _complete_objects(text, beginning.start())
        for start, end in spans:
            if isinstance(value := _parse(text[start:end]), dict):
                yield value


def _complete_objects(text: str, start: int) -> tuple[list[tuple[int, int]], int]:
    """Returns the spans of the outermost complete objects of the JSON at a brace, and where the search continues.

    All that is open when an unexpected token comes can never be complete, so nothing of it is read again: `json` would
    begin anew at each brace. Only the last token may hold a beginning, inside a string that was opened by mistake.
    """
    complete: list[tuple[int, int]] = []
    opened: list[tuple[int, int]] = []  # where a bracket is, and how many objects are complete before it
    expected, at, begin = _VALUE, start, start
    while (token := expected.match(text, at)) is not None:
        begin, at = at, token.end()
        written = token[0].rstrip(_BLANK)
        match written[-1]:
            case "{" | "[" as bracket:
                opened.append((begin, len(complete)))
                expected = _FIRST[bracket]
            case ",":
                expected = _AFTER_COMMA[text[opened[-1][0]]]
            case ":":
                expected = _VALUE
            case last:
                if last in "}]":
                    opening, before = opened.pop()
                    if last == "}":
                        complete[before:] = [(opening, begin + 1)]
                    if not opened:
                        return complete, at
                expected = _AFTER_VALUE[text[opened[-1][0]]]
    return complete, begin + 1


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


class CompletionStream:
    """Reads a streamed completion; for any pieces, the result is that of `parse_completion`.

    Content is released as soon as it cannot be a part of calls. From the first `[{"` on (from the start, in a text that
    begins with `{`) everything is held until the end: only then is it known whether it is calls.
    """

    def __init__(self) -> None:
        self._pieces: list[str] = []
        self._held = ""
        self._released = 0
        self.holding = False
        """Whether everything from here on is held until the end, because it may be calls."""

    def feed(self, piece: str) -> str:
        """Adds the next piece; returns the content that is certain now."""
        self._pieces.append(piece)
        if self.holding or not piece:
            return ""
        text, at = self._held + piece, 0
        while True:
            at_start = self._released + at == 0
            if _ARRAY.match(text, at) or (at_start and _OBJECT.match(text)):
                self.holding = True
                break
            if _FRONT.fullmatch(text, at):
                break
            blank = _SPACES.match(text, at)
            if blank:  # white space in front changes nothing about that
                at = blank.end()
            else:
                mark = _MARK.search(text, at + 1)
                at = mark.start() if mark else len(text)
        self._released += at
        self._held = text[at:]
        self.holding |= len(self._held) > _LONGEST_FRONT
        return text[:at]

    def finish(self) -> tuple[str, tuple[ToolCall, ...] | None]:
        """Returns the rest of the content, and the calls."""
        content, calls = parse_completion("".join(self._pieces))
        return content[self._released :], calls


def may_call(tools: Sequence[Any] | None, tool_choice: object) -> bool:
    """Whether the answer to a request may have calls; otherwise it is text, whatever it looks like."""
    return bool(tools) and tool_choice != "none"


def arguments_json(call: ToolCall) -> str:
    """A call's arguments as the JSON text of the OpenAI form."""
    return json.dumps(call.arguments, ensure_ascii=False)


def _beginning(pieces: Sequence[str]) -> str:
    """Returns a pattern that matches every beginning of a sequence of patterns."""
    pattern = ""
    for piece in reversed(pieces):
        pattern = f"(?:{piece}{pattern})?+"
    return pattern


def _front() -> str:
    """Returns a pattern that matches every beginning of `[TOOL_CALLS] ```json [{`, with each of the marks or none."""
    blank = r"\s*+"
    fronts = [
        [blank, *map(re.escape, token), blank, *map(re.escape, mark), blank, r"\[", blank, r"\{", blank]
        for token in ("", TOOL_CALLS)
        for mark in ("", *_CLOSING)
    ]
    return "|".join(map(_beginning, fronts))


_LONGEST_FRONT = 1000
"""Characters. A longer front, of white space, is held until the end like calls: searching it again with each piece
would take quadratic time."""
_MARKED = rf"(?:{'|'.join(map(re.escape, _CLOSING))})?+"
_FRONT = re.compile(_front())
_ARRAY = re.compile(rf'\s*+(?:{re.escape(TOOL_CALLS)})?+\s*+{_MARKED}\s*+\[\s*+\{{\s*+"')
_OBJECT = re.compile(rf"\s*+{_MARKED}\s*+\{{")
_SPACES = re.compile(r"\s++")
_MARK = re.compile(r"[\s\[<`]")
_BLANKS = re.compile(rf"[{_BLANK}]*+")
_QUOTE_OR_BRACKET = re.compile(r'"(\\*+)|[\[\]{}]')
_OTHER_CALLS = re.compile(
    rf"{re.escape(TOOL_CALLS)}\s*+(?:[\[{{<`]|[\w.-]{{1,128}}+(?:\[[A-Z_]++\][\w-]*+)*+\s*+\{{)"
    r"|<tool_call>\s*+(?:[\[{<`]|\Z)|</tool_call>"
    r"""|[{,]\s*+["']arguments["']\s*+:|["']arguments["']\s*+:\s*+[{\["']"""
    r"""|["']name["']\s*+:\s*+["'][^"'\n]*+["']\s*+,\s*+["']arguments["']"""
)
"""Text before the last calls that looks like further calls, so that not all calls of the text can be read. Prose may
mention the marks and the keys of calls."""


def _read_object(text: str) -> tuple[str, tuple[ToolCall, ...] | None] | None:
    """Returns thought and calls, where the text is the object of xLAM v1, in a fence or not."""
    body = text.strip()
    for opening, closing in _CLOSING.items():
        if body.startswith(opening) and body.endswith(closing):
            body = body.removeprefix(opening).removesuffix(closing).strip()
            break
    if not body.startswith("{"):
        return None
    match _parse(body):
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
    closing = next((mark for mark in _CLOSING.values() if text.endswith(mark, 0, end)), "")
    end = _without(_BLANKS, backwards, end - len(closing))
    start = _last_array(text, backwards, end)
    calls = None if start is None else _read_calls(_parse(text[start:end]))
    if start is None or not calls:
        return None
    bare = _without(_SPACES, backwards, start)
    if closing:
        opening = next((mark for mark in _CLOSING if _CLOSING[mark] == closing and text.endswith(mark, 0, bare)), "")
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


def _parse(text: str) -> object:
    """The value of JSON, None for other text."""
    try:
        return parse_json(text)
    except InvalidTrajectory:
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
