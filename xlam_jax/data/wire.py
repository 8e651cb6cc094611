"""From what a model wrote back to text and tool calls: the inverse of the wire formats, whole or piece by piece.

Needs nothing but the standard library, so that a server can read completions with it as training and evaluation do.
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
"""Marks that models put around calls, and the mark that closes each."""
_BLANK = " \t\n\r"
"""JSON's white space."""

_STRING = r'"(?:[^"\\\x00-\x1f]++|\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4}))*+"'
_SCALAR = rf"{_STRING}|-?(?:0|[1-9][0-9]*+)(?:\.[0-9]++)?(?:[eE][-+]?[0-9]++)?|true|false|null"


def _token(pattern: str) -> re.Pattern[str]:
    return re.compile(rf"(?:{pattern})[{_BLANK}]*+")


_BEGINNING = re.compile(rf'\{{[{_BLANK}]*+["}}]')
"""Of a JSON object."""
_VALUE = _token(rf"[{{[]|{_SCALAR}")
_KEY = _token(rf"{_STRING}[{_BLANK}]*+:")
_FIRST = {"{": _token(rf"\}}|{_STRING}[{_BLANK}]*+:"), "[": _token(rf"[{{\[\]]|{_SCALAR}")}
"""The token that may follow an opening bracket; then, after a comma, and after a value, by the bracket that is open."""
_AFTER_COMMA = {"{": _KEY, "[": _VALUE}
_AFTER_VALUE = {"{": _token("[,}]"), "[": _token(r"[,\]]")}


def objects_in(text: str) -> Iterator[dict[str, Any]]:
    """The JSON objects in a text, in their order; not those inside them. Takes linear time for any text.

    Where an object breaks off, the complete objects inside it count, and what follows may begin another one.
    """
    at = 0
    while (beginning := _BEGINNING.search(text, at)) is not None:
        spans, at = _complete_objects(text, beginning.start())
        for start, end in spans:
            if isinstance(value := _parsed(text[start:end]), dict):
                yield value


def _complete_objects(text: str, start: int) -> tuple[list[tuple[int, int]], int]:
    """The spans of the outermost complete objects of the JSON that begins at a brace, and where to search on.

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
    """Splits what a model wrote (without its end token) into content and tool calls.

    Calls are JSON arrays up to the end of the text, alone or after a thought, each with or without `[TOOL_CALLS]`, in a
    code fence or in `<tool_call>`; or the text is one JSON object `{"thought", "tool_calls"}`, where the first may be
    missing. All calls of a text come back or none: where some are malformed, or other text is between them, the text
    comes back whole as content, with None. A thought may mention the marks and the keys of calls. Nothing raises.
    """
    if (whole := _object(text)) is not None:
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
    """Reads a completion that comes in pieces; whatever the pieces are, the outcome is that of `parse_completion`.

    Content is given out as soon as it cannot be part of calls. From the first `[{"` on (in a text that begins with `{`,
    from the start) all is held until the end, as only the end tells calls from text that looks like them.
    """

    def __init__(self) -> None:
        self._pieces: list[str] = []
        self._held = ""
        self._released = 0
        self.holding = False
        """Whether what comes is held to the end: it may be calls."""

    def feed(self, piece: str) -> str:
        """Takes the next piece; returns the content that is certain now."""
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
            if blank:  # what is not the front of calls is none with white space before it
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
    """Whether an answer to a request may hold calls; otherwise it is text, whatever it looks like."""
    return bool(tools) and tool_choice != "none"


def arguments_json(call: ToolCall) -> str:
    """A call's arguments as the JSON text of the OpenAI form."""
    return json.dumps(call.arguments, ensure_ascii=False)


def _beginning(pieces: Sequence[str]) -> str:
    """The pattern of every beginning of a sequence of patterns."""
    pattern = ""
    for piece in reversed(pieces):
        pattern = f"(?:{piece}{pattern})?+"
    return pattern


def _front() -> str:
    """The pattern of every beginning of `[TOOL_CALLS] ```json [{`, with each of the marks and without."""
    blank = r"\s*+"
    fronts = [
        [blank, *map(re.escape, token), blank, *map(re.escape, mark), blank, r"\[", blank, r"\{", blank]
        for token in ("", TOOL_CALLS)
        for mark in ("", *_CLOSING)
    ]
    return "|".join(map(_beginning, fronts))


_LONGEST_FRONT = 1000
"""Characters. What is longer, by white space, is held to the end like calls: to look through it again with each piece
would take time that grows with its square."""
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
"""What in the content before calls looks like other calls, so that these are not all calls of the text. Prose may
mention the marks and the keys of calls."""


def _object(text: str) -> tuple[str, tuple[ToolCall, ...] | None] | None:
    """Thought and calls, where the text is xLAM v1's object, in a fence or not."""
    body = text.strip()
    for opening, closing in _CLOSING.items():
        if body.startswith(opening) and body.endswith(closing):
            body = body.removeprefix(opening).removesuffix(closing).strip()
            break
    if not body.startswith("{"):
        return None
    match _parsed(body):
        case {"tool_calls": list(found), **rest} if rest.keys() <= {"thought"}:
            thought, calls = rest.get("thought", ""), _calls(found)
            if isinstance(thought, str) and calls is not None:
                return thought, calls or None
    return None


def _last_group(text: str, backwards: str, end: int) -> tuple[int, tuple[ToolCall, ...]] | None:
    """The array of calls with which `text[:end]` ends, and where what is before it and its marks ends.

    `backwards` is the whole text reversed.
    """
    end = _without(_BLANKS, backwards, end)
    closing = next((mark for mark in _CLOSING.values() if text.endswith(mark, 0, end)), "")
    end = _without(_BLANKS, backwards, end - len(closing))
    start = _last_array(text, backwards, end)
    calls = None if start is None else _calls(_parsed(text[start:end]))
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
    """Where a text ends without the white space at its end."""
    found = spaces.match(backwards, len(backwards) - end)
    return len(backwards) - found.end() if found else end


def _last_array(text: str, backwards: str, end: int) -> int | None:
    """Where the JSON array starts that ends at `end`, if one does.

    Read backwards there is one place where it can: quotes that no backslash escapes come in pairs from the end on, and
    the brackets outside them show which one the last `]` closes. That takes linear time, unlike trying each `[`.
    """
    if not text.endswith("]", 0, end):
        return None
    depth, quoted = 0, False
    for found in _QUOTE_OR_BRACKET.finditer(backwards, len(text) - end):
        if found[0][0] == '"':
            quoted ^= len(found[1]) % 2 == 0
        elif not quoted:
            depth += 1 if found[0] in "]}" else -1
            if depth == 0:
                return len(text) - found.end()
    return None


def _parsed(text: str) -> object:
    try:
        return parse_json(text)
    except InvalidTrajectory:
        return None


def _calls(found: object) -> tuple[ToolCall, ...] | None:
    parsed = []
    for call in found if isinstance(found, list) else [None]:
        match call:
            case {"name": str(name), "arguments": dict(arguments), **rest} if rest.keys() <= {"id"}:
                parsed.append(ToolCall(str(rest["id"]) if "id" in rest else None, name, arguments))
            case _:
                return None
    return tuple(parsed)
