"""Parses a server's answer, whole or streamed: text, refusal, reasoning and tool calls.

The client, evaluations, the rater, the chat and `parity` all use this parser. A stream is first assembled into the
message that the server would have sent whole, so that both give the same result. Servers write answers in different
ways; all of these are accepted:

- arguments as a JSON string, as an object, as null or absent (a call without arguments);
- calls without an id, or several calls with the same id, which get distinct ids;
- the older `function_call`; a flat call, `{"name", "arguments"}`;
- content as a list of parts; `refusal` as a field or a part; reasoning as a field or as parts;
- streams in which all calls have the same index, or none.
"""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from xlam_jax.data.messages import legacy_call, openai_call, plain, unique_ids
from xlam_jax.data.row_json import DEEPEST, check_json, parse_json
from xlam_jax.data.trajectory import REASONING_KEYS, InvalidTrajectory
from xlam_jax.data.wire import ANY, ARRAY, TOOL_CALLS, CompletionStream, Tools, Wire
from xlam_jax.errors import UserError

_SHOWN = 300
"""Maximum length of a quoted text in an error message, in characters."""


class MalformedAnswer(ValueError):  # noqa: N818 - the client converts it to its own error
    """The server's response is not a chat completion."""


def shorten(text: str) -> str:
    """Truncates a long text for an error message."""
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]} … ({len(text)} characters)"


def read_response(response: Any, format: str, tools: Tools | None) -> dict[str, Any]:
    """Parses a chat completion (an SDK object or JSON) into `{"choices": [{"message", "finish_reason"}, …], "usage"}`.

    A message is `{"role", "content", "tool_calls"}`; each call is `{"name", "arguments", "id"}`, its arguments an
    object. A refusal is returned as the content and under the key `refusal`; `reasoning` contains the text that a
    reasoning model wrote before its answer. A choice has an `error` if its calls cannot be parsed, or if it is empty.
    `format`: the client's format. `tools`: those of the request, with which calls in the text are parsed too, in any
    wire format; None if the request allows no calls. Raises `MalformedAnswer`.
    """
    sent = plain(response)
    choices = sent.get("choices") if isinstance(sent, dict) else None
    if not isinstance(choices, list) or not choices:
        raise MalformedAnswer(f"did not answer with a chat completion: {shorten(str(sent))!r}")
    try:
        parsed = [_read_choice(choice["message"], choice.get("finish_reason"), format, tools) for choice in choices]
    except (TypeError, KeyError, AttributeError):
        raise MalformedAnswer(f"did not answer with a chat completion: {shorten(str(sent))!r}") from None
    return {"choices": parsed, "usage": sent.get("usage")}


class AnswerStream:
    """Assembles a streamed answer from its chunks."""

    def __init__(self, format: str, tools: Tools | None):
        """`format` and `tools`: as in `read_response`."""
        self._format, self._tools = format, tools
        self._reads_calls = _reads_calls(format, tools)
        self._completion = CompletionStream(_wire(format), tools or ())
        self._released = 0
        """Characters of the content that `add` has returned."""
        self._texts: dict[str, list[str]] = {"content": [], "refusal": [], "reasoning": []}
        self._calls = _StreamedCalls()
        self._legacy = _StreamedCalls()
        """Calls of the older `function_call`."""
        self._finish: str | None = None
        self._usage: Any = None

    def add(self, chunk: Any) -> str:
        """Adds a chunk. Returns the new content that cannot become part of a call. Raises `MalformedAnswer`.

        Raises `UserError` for a stream of several choices.
        """
        sent = plain(chunk)
        try:
            return self._add(sent)
        except (TypeError, AttributeError):
            raise MalformedAnswer(f"did not stream a chat completion: {shorten(str(sent))!r}") from None

    def _add(self, sent: dict[str, Any]) -> str:
        self._usage = sent.get("usage") or self._usage
        piece = ""
        for choice in sent.get("choices") or []:
            if choice.get("index"):
                raise UserError("a stream of several choices cannot be read; request n=1")
            delta = choice.get("delta") or {}
            self._finish = choice.get("finish_reason") or self._finish
            texts = _texts(delta)
            for key, text in texts._asdict().items():
                self._texts[key].append(text)
            piece += self._completion.feed(texts.content) if self._reads_calls else texts.content
            self._calls.add(_list(delta.get("tool_calls")))
            if (function := legacy_call(delta)) is not None:
                self._legacy.add([{"index": 0, "function": function}])
        self._released += len(piece)
        return piece

    @property
    def content(self) -> str:
        """The content so far."""
        return "".join(self._texts["content"])

    def finish(self) -> tuple[str, dict[str, Any]] | None:
        """Returns the content that `add` has not returned, and the answer as from `read_response`.

        Returns None if the stream broke off.
        """
        if self._finish is None:
            return None
        message: dict[str, Any] = {key: "".join(texts) for key, texts in self._texts.items()}
        message["tool_calls"] = self._calls.assemble() or self._legacy.assemble()
        choice = _read_choice(message, self._finish, self._format, self._tools)
        answer = {"choices": [choice], "usage": self._usage}
        return choice["message"]["content"][self._released :], answer


class _StreamedCalls:
    """Assembles tool calls from the deltas of a stream."""

    def __init__(self) -> None:
        self._calls: list[dict[str, Any]] = []
        self._pieces: list[list[Any]] = []
        """Argument pieces of each call, joined at the end: joining at each piece would take quadratic time."""
        self._brackets: list[_Brackets] = []
        """Bracket state of each call's arguments."""
        self._open: dict[int, int] = {}
        """Index of a call in the stream → its position here: some servers give all calls the same index."""

    def add(self, deltas: list[Any]) -> None:
        """Adds the call deltas of one chunk. Raises `TypeError` or `AttributeError` for invalid deltas."""
        for position, delta in enumerate(deltas):
            sent_index = delta.get("index")
            index = position if sent_index is None else sent_index
            if not isinstance(index, int):
                raise TypeError("an index must be a number")
            function = delta.get("function")
            function = delta if function is None else function
            name, arguments = function.get("name"), function.get("arguments")
            place = self._open.get(index)
            id = None if delta.get("id") == "" else delta.get("id")
            if place is None or self._begins(place, id, name, arguments, sent_index is None):
                place = len(self._calls)
                self._open[index] = place
                self._calls.append({"id": None, "name": None, "index": index})
                self._pieces.append([])
                self._brackets.append(_Brackets())
            call = self._calls[place]
            call["id"] = id if call["id"] is None else call["id"]
            call["name"] = call["name"] or name
            if arguments is not None and arguments != "":
                self._pieces[place].append(arguments)
                self._brackets[place].add(arguments)

    def _begins(self, place: int, id: Any, name: Any, arguments: Any, unnumbered: bool) -> bool:
        """Returns whether a delta begins a new call, although the call at `place` has its index.

        `unnumbered`: the delta has no index.
        """
        call, pieces = self._calls[place], self._pieces[place]
        if id is not None and call["id"] is not None and id != call["id"]:
            return True
        if not name or not call["name"]:
            return False
        if name != call["name"] or unnumbered:
            return True
        # the same name again: the server repeats it in each delta, or calls the same tool a second time
        if not pieces or arguments in (None, ""):
            return False
        if not isinstance(arguments, str) or not isinstance(pieces[-1], str):
            return True
        brackets = self._brackets[place]
        if not arguments.lstrip().startswith("{") or not brackets.closed:
            return False
        if not brackets.malformed:  # parsed at most once: later pieces cannot repair it
            brackets.malformed = read_arguments(_joined(pieces)) is None
        return not brackets.malformed

    def assemble(self) -> list[dict[str, Any]]:
        """Returns the calls as a whole message contains them: sorted by index, then by arrival."""
        order = sorted(range(len(self._calls)), key=lambda place: self._calls[place]["index"])
        return [
            {
                "id": self._calls[place]["id"],
                "function": {"name": self._calls[place]["name"], "arguments": _joined(self._pieces[place])},
            }
            for place in order
        ]


class _Brackets:
    """Tracks the open brackets and strings of JSON that arrives in pieces, in linear time."""

    def __init__(self) -> None:
        self.malformed = False
        """Whether the text was invalid JSON when all its brackets were closed."""
        self._depth = 0
        self._in_string = self._escaped = False

    @property
    def closed(self) -> bool:
        """Whether no bracket or string is open."""
        return self._depth == 0 and not self._in_string

    def add(self, piece: Any) -> None:
        for char in piece if isinstance(piece, str) else "":
            if self._escaped:
                self._escaped = False
            elif self._in_string:
                self._escaped, self._in_string = char == "\\", char != '"'
            elif char == '"':
                self._in_string = True
            elif char in "{[":
                self._depth += 1
            elif char in "}]":
                self._depth -= 1


def _joined(pieces: list[Any]) -> Any:
    """Joins the argument pieces of a call. Returns a text, an object that came in one piece, or None for no piece."""
    if len(pieces) < 2:
        return pieces[0] if pieces else None
    return "".join(pieces) if all(isinstance(piece, str) for piece in pieces) else pieces


def read_arguments(sent: Any) -> dict[str, Any] | None:
    """Parses a call's arguments: a JSON text, an object, or nothing (null or an empty text, which mean `{}`).

    Returns None for anything else.
    """
    try:
        if isinstance(sent, str):
            sent = parse_json(sent) if sent.strip() else {}
        elif isinstance(sent, dict):
            check_json(sent, DEEPEST)
    except InvalidTrajectory:
        return None
    sent = {} if sent is None else sent
    return sent if isinstance(sent, dict) else None


def _read_choice(sent: Any, finish: Any, format: str, tools: Tools | None) -> dict[str, Any]:
    """Parses the message of a choice. Raises `TypeError` or `AttributeError` for an invalid message."""
    content, refusal, reasoning = _texts(sent)
    calls, error = _read_calls(sent)
    if not calls and _reads_calls(format, tools):
        text = content
        written, content, parsed = _wire(format).parse(text, tools or ())
        reasoning = reasoning or written
        calls = [{"name": call.name, "arguments": call.arguments, "id": call.id} for call in parsed or ()]
        if not calls and _meant_calls(text, content, format, tools or (), cut_off=finish == "length"):
            error = f"the model's answer contains calls that cannot be read: {shorten(text)!r}"
    if not calls:
        content = content or refusal
    if not error and not calls and not content.strip():
        error = "the model's answer is empty" + (" (cut off at max_tokens)" if finish == "length" else "")
    if error and finish == "length" and "cut off" not in error:
        error += " (cut off at max_tokens)"
    for call, id in zip(calls, unique_ids([call["id"] for call in calls]), strict=True):
        call["id"] = id
    message: dict[str, Any] = {"role": "assistant", "content": content, "tool_calls": calls}
    message |= {key: text for key, text in (("refusal", refusal), ("reasoning", reasoning)) if text}
    choice: dict[str, Any] = {"message": message, "finish_reason": finish}
    return choice | ({"error": error} if error else {})


def _read_calls(message: dict[str, Any]) -> tuple[list[dict[str, Any]], str]:
    """Returns the calls of a server's message, and an error message for the first call that cannot be parsed.

    Raises `TypeError` or `AttributeError` for invalid calls.
    """
    calls, error = [], ""
    sent = _list(message.get("tool_calls"))
    if not sent and (function := legacy_call(message)) is not None:
        sent = [{"function": function}]
    for call in map(openai_call, sent):
        if not isinstance(function := call.get("function"), dict | None):
            raise TypeError("a call's function must be an object")
        name, raw_arguments = (function or {}).get("name"), (function or {}).get("arguments")
        arguments = read_arguments(raw_arguments)
        if not isinstance(name, str) or arguments is None:
            shown = shorten(json.dumps({"name": name, "arguments": raw_arguments}))
            error = error or f"the server sent a call that cannot be read: {shown}"
            arguments = raw_arguments
        calls.append({"name": name, "arguments": arguments, "id": call.get("id")})
    return calls, error


def _reads_calls(format: str, tools: Tools | None) -> bool:
    """Returns whether calls in the text are parsed."""
    return tools is not None or format == "xlam_v1"


def _wire(format: str) -> Wire:
    """Returns how calls are written in the text: in any wire format if the server renders the request."""
    return ARRAY if format == "xlam_v1" else ANY


def _meant_calls(text: str, content: str, format: str, tools: Tools, cut_off: bool) -> bool:
    """Returns whether a text without any valid call looks like an attempt at one."""
    if format == "xlam_v1":  # any text but the format's object is malformed
        return content == text and bool(text.strip())
    stream = CompletionStream(ANY, tools)
    stream.feed(text)
    keys = ('"arguments"', '"tool_calls"', *(('"name"',) if cut_off else ()))
    return TOOL_CALLS in text or (stream.holding and content == text and any(key in text for key in keys))


class _Texts(NamedTuple):
    """The texts of a message or delta."""

    content: str
    refusal: str
    reasoning: str


def _texts(message: Mapping[str, Any]) -> _Texts:
    """Collects the texts of a message or delta. Raises `TypeError` for content that is not text."""
    content = message.get("content")
    parts = [{"type": "text", "text": content}] if isinstance(content, str | None) else content
    texts: dict[str, list[str]] = {"content": [], "refusal": [], "reasoning": []}
    if isinstance(refusal := message.get("refusal"), str):
        texts["refusal"].append(refusal)
    reasoning = (message[key] for key in REASONING_KEYS if isinstance(message.get(key), str))
    texts["reasoning"] += [next(reasoning, "")]  # vLLM sends the same text under two keys
    for part in _list(parts):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in _PARTS:
            raise TypeError(f"a part of type {kind!r} is not text")
        key, names = _PARTS[kind]
        texts[key].append(_part_text(next((part[name] for name in names if part.get(name) is not None), None)))
    return _Texts(*("".join(texts[key]) for key in _Texts._fields))


_REASONING = ("reasoning", ("thinking", "reasoning", "summary", "text"))
_PARTS = {
    "text": ("content", ("text",)),
    "output_text": ("content", ("text",)),
    "refusal": ("refusal", ("refusal", "text")),
    "thinking": _REASONING,
    "reasoning": _REASONING,
}
"""Type of a content part → field of `_Texts`, and the keys that may contain the text."""


def _part_text(value: Any) -> str:
    """Returns the text of a part, which is a string or a list of text parts."""
    if isinstance(value, list):
        return "".join(_part_text(part.get("text") if isinstance(part, dict) else part) for part in value)
    if not isinstance(value, str | None):
        raise TypeError("a part's text must be a string")
    return value or ""


def _list(value: Any) -> list[Any]:
    """Returns a list, empty for None. Raises `TypeError` for anything else."""
    if not isinstance(value, list | None):
        raise TypeError("expected a list")
    return value or []
