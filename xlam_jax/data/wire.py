"""From what a model wrote back to text and tool calls: the inverse of the wire formats, whole or piece by piece.

Needs nothing but the standard library, so that a server can read completions with it as training and evaluation do.
"""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from xlam_jax.data.trajectory import InvalidTrajectory, ToolCall, parse_json

TOOL_CALLS = "[TOOL_CALLS]"
_CLOSING = {"```json": "```", "```": "```", "<tool_call>": "</tool_call>"}
"""Marks that models put around calls, and the mark that closes each."""
_OBJECT = re.compile(r"""\{[ \t\n\r]*["}]""")
_BLANK = " \t\n\r"
"""JSON's."""


def objects_in(text: str) -> Iterator[dict[str, Any]]:
    """The JSON objects in a text, in their order; not those within them."""
    decoder, end = json.JSONDecoder(), 0
    while (begins := _OBJECT.search(text, end)) is not None:
        end = begins.start() + 1
        try:
            _, whole = decoder.raw_decode(text, begins.start())
            found = parse_json(text[begins.start() : whole])
        except (ValueError, RecursionError):  # InvalidTrajectory is one
            continue
        end = whole
        yield found


def parse_completion(text: str) -> tuple[str, tuple[ToolCall, ...] | None]:
    """Splits what a model wrote (without its end token) into content and tool calls.

    Calls are a JSON array up to the end of the text, alone or after a thought, with or without `[TOOL_CALLS]`, in a
    code fence or in `<tool_call>`; or the text is one JSON object `{"thought", "tool_calls"}`, where the first may be
    missing. Text whose calls are malformed comes back whole as content, with None; nothing raises.
    """
    if (found := _object(text)) is not None:
        return found
    body = text.rstrip(_BLANK)
    closing = next((mark for mark in _CLOSING.values() if body.endswith(mark)), "")
    start = _last_array(body.removesuffix(closing))
    calls = None if start is None else _calls(_parsed(body[start:].removesuffix(closing)))
    if not calls:
        return text, None
    content = text[:start]
    bare = content.rstrip()
    if closing:
        opening = next((mark for mark, closes in _CLOSING.items() if closes == closing and bare.endswith(mark)), "")
        if not opening:
            return text, None
        content = bare.removesuffix(opening)
        bare = content.rstrip()
    if bare.endswith(TOOL_CALLS):
        return bare.removesuffix(TOOL_CALLS), calls
    return (content[:-1] if content.endswith(("\n", " ")) else content), calls


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


def calls_schema(tools: Iterable[dict[str, Any]], at_most: int | None = None) -> dict[str, Any]:
    """The JSON Schema of an array of calls of tools in OpenAI form, to make a model write nothing else.

    `$defs` of the tools' own schemas are moved to the top, as references are resolved from there. Raises `ValueError`
    where two tools define the same name differently.
    """
    choices: list[Any] = []
    definitions: dict[str, Any] = {}
    for tool in tools:
        function = tool["function"]
        parameters: dict[str, Any] = dict(function.get("parameters") or {"type": "object", "properties": {}})
        for name, definition in parameters.pop("$defs", {}).items():
            if definitions.setdefault(name, definition) != definition:
                raise ValueError(f"tool '{function['name']}' defines $defs.{name} unlike a tool before it; rename one")
        choices.append(
            {
                "type": "object",
                "properties": {"name": {"type": "string", "enum": [function["name"]]}, "arguments": parameters},
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
        )
    schema: dict[str, Any] = {"type": "array", "minItems": 1, "items": {"anyOf": choices}}
    if at_most is not None:
        schema["maxItems"] = at_most
    if definitions:
        schema["$defs"] = definitions
    return schema


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
_QUOTE_OR_BRACKET = re.compile(r'"(\\*)|[\[\]{}]')


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


def _last_array(text: str) -> int | None:
    """Where the JSON array starts that ends with the text, if one does.

    Read backwards there is one place where it can: quotes that no backslash escapes come in pairs from the end on, and
    the brackets outside them show which one the last `]` closes. That takes linear time, unlike trying each `[`.
    """
    backwards = text.rstrip(_BLANK)[::-1]
    if not backwards.startswith("]"):
        return None
    depth, quoted = 0, False
    for found in _QUOTE_OR_BRACKET.finditer(backwards):
        if found[0][0] == '"':
            quoted ^= len(found[1]) % 2 == 0
        elif not quoted:
            depth += 1 if found[0] in "]}" else -1
            if depth == 0:
                return len(backwards) - found.end()
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
