"""Reads a server's answer: text, refusal, reasoning and tool calls, whole or streamed.

The one reader of answers: the client, evaluations, the rater, the chat and `parity` all use it. A stream is folded into
the message that the server would have sent whole and then read as that, so that both give the same result. Servers
differ in how they write an answer; all of these are read:

- arguments as JSON in a text, as an object, or as null or nothing (a call without arguments);
- calls without an id, or several with the same one: they get ids that differ;
- the older `function_call`; a flat call, `{"name", "arguments"}`;
- content as a list of parts; `refusal`, or a part of that type; reasoning as a field or as parts;
- streams that give all calls one index, or none.
"""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from xlam_jax.data.messages import legacy_call, openai_call, plain, unique_ids
from xlam_jax.data.row_json import DEEPEST, check_json, parse_json
from xlam_jax.data.trajectory import REASONING_KEYS, InvalidTrajectory
from xlam_jax.data.wire import TOOL_CALLS, CompletionStream, parse_completion
from xlam_jax.errors import UserError

_SHOWN = 300
"""Characters of a text in an error."""


class MalformedAnswer(ValueError):  # noqa: N818 - the client turns it into its own error
    """What a server sent is not a chat completion."""


def shortened(text: str) -> str:
    """A text for an error message, its end cut off where it is long."""
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]} … ({len(text)} characters)"


def read_response(response: Any, format: str, with_tools: bool) -> dict[str, Any]:
    """Reads a chat completion, an SDK's object or JSON: `{"choices": [{"message", "finish_reason"}, …], "usage"}`.

    A message is `{"role", "content", "tool_calls"}`, each call `{"name", "arguments", "id"}` with an object as
    arguments. A refusal is the content, and is marked by the key `refusal`; `reasoning` is what a reasoning model wrote
    before. `error` of a choice reports calls that cannot be read, or that it is empty. `format` is the client's; with
    `with_tools`, calls are looked for in the text too. Raises `MalformedAnswer`.
    """
    sent = plain(response)
    choices = sent.get("choices") if isinstance(sent, dict) else None
    if not isinstance(choices, list) or not choices:
        raise MalformedAnswer(f"did not answer with a chat completion: {shortened(str(sent))!r}")
    try:
        read = [_read_choice(choice["message"], choice.get("finish_reason"), format, with_tools) for choice in choices]
    except (TypeError, KeyError, AttributeError):
        raise MalformedAnswer(f"did not answer with a chat completion: {shortened(str(sent))!r}") from None
    return {"choices": read, "usage": sent.get("usage")}


class AnswerStream:
    """Folds the pieces of a streamed answer into the answer."""

    def __init__(self, format: str, with_tools: bool):
        self._format, self._with_tools = format, with_tools
        self._reads_calls = _reads_calls(format, with_tools)
        self._completion = CompletionStream()
        self._released = 0
        """Characters of the content that were given out."""
        self._texts: dict[str, list[str]] = {"content": [], "refusal": [], "reasoning": []}
        self._calls = _StreamedCalls()
        self._legacy = _StreamedCalls()
        self._finish: str | None = None
        self._usage: Any = None

    def add(self, chunk: Any) -> str:
        """Takes a chunk; returns the content that is certain now. Raises `MalformedAnswer`."""
        sent = plain(chunk)
        try:
            return self._add(sent)
        except (TypeError, AttributeError):
            raise MalformedAnswer(f"did not stream a chat completion: {shortened(str(sent))!r}") from None

    def _add(self, sent: dict[str, Any]) -> str:
        self._usage = sent.get("usage") or self._usage
        piece = ""
        for choice in sent.get("choices") or []:
            if choice.get("index"):
                raise UserError("a stream of several choices cannot be read; ask with n=1")
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
        """Returns the content that was not given out yet, and the answer as `read_response` does.

        None where the stream broke off.
        """
        if self._finish is None:
            return None
        message: dict[str, Any] = {key: "".join(texts) for key, texts in self._texts.items()}
        message["tool_calls"] = self._calls.folded() or self._legacy.folded()
        choice = _read_choice(message, self._finish, self._format, self._with_tools)
        answer = {"choices": [choice], "usage": self._usage}
        return choice["message"]["content"][self._released :], answer


class _StreamedCalls:
    """Calls that come in pieces."""

    def __init__(self) -> None:
        self._calls: list[dict[str, Any]] = []
        self._pieces: list[list[Any]] = []
        """Of the arguments of each call, to be joined once: a text would be copied with each piece."""
        self._brackets: list[_Brackets] = []
        """Of the arguments of each call."""
        self._open: dict[int, int] = {}
        """Index of a call in the stream → its place here: there are servers that give all calls one index."""

    def add(self, deltas: list[Any]) -> None:
        """Takes the calls of one delta. Raises `TypeError` or `AttributeError` for what are none."""
        for at, delta in enumerate(deltas):
            index = at if (given := delta.get("index")) is None else given
            if not isinstance(index, int):
                raise TypeError("an index is a number")
            function = delta.get("function")
            function = delta if function is None else function
            name, arguments = function.get("name"), function.get("arguments")
            place = self._open.get(index)
            id = None if delta.get("id") == "" else delta.get("id")
            if place is None or self._begins(place, id, name, arguments, given is None):
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
        """Whether a piece with the index of a call (or `unnumbered`, with none) begins another one."""
        call, pieces = self._calls[place], self._pieces[place]
        if id is not None and call["id"] is not None and id != call["id"]:
            return True
        if not name or not call["name"]:
            return False
        if name != call["name"] or unnumbered:
            return True
        # the name is repeated: by a server that does so with each piece, or for another call of the same tool
        if not pieces or arguments in (None, ""):
            return False
        if not isinstance(arguments, str) or not isinstance(pieces[-1], str):
            return True
        brackets = self._brackets[place]
        if not arguments.lstrip().startswith("{") or not brackets.closed:
            return False
        if not brackets.malformed:  # parsed at most once: what follows cannot repair it
            brackets.malformed = read_arguments(_joined(pieces)) is None
        return not brackets.malformed

    def folded(self) -> list[dict[str, Any]]:
        """The calls as a whole message has them: by their index, those of one index as they came."""
        order = sorted(range(len(self._calls)), key=lambda place: self._calls[place]["index"])
        return [
            {
                "id": self._calls[place]["id"],
                "function": {"name": self._calls[place]["name"], "arguments": _joined(self._pieces[place])},
            }
            for place in order
        ]


class _Brackets:
    """Follows the brackets of JSON that comes in pieces, in time that grows with its length."""

    def __init__(self) -> None:
        self.malformed = False
        """Whether a text whose brackets were closed could not be parsed."""
        self._depth = 0
        self._in_string = self._escaped = False

    @property
    def closed(self) -> bool:
        """Whether no bracket and no string is open."""
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
    """Joins the pieces of a call's arguments: returns a text, an object that came in one piece, or None."""
    if len(pieces) < 2:
        return pieces[0] if pieces else None
    return "".join(pieces) if all(isinstance(piece, str) for piece in pieces) else pieces


def read_arguments(sent: Any) -> dict[str, Any] | None:
    """A call's arguments from a JSON text, an object, or nothing (null, or an empty text); None for anything else."""
    try:
        if isinstance(sent, str):
            sent = parse_json(sent) if sent.strip() else {}
        elif isinstance(sent, dict):
            check_json(sent, DEEPEST)
    except InvalidTrajectory:
        return None
    sent = {} if sent is None else sent
    return sent if isinstance(sent, dict) else None


def _read_choice(sent: Any, finish: Any, format: str, with_tools: bool) -> dict[str, Any]:
    """A choice from the server's message. Raises `TypeError` or `AttributeError` for what is not a message."""
    content, refusal, reasoning = _texts(sent)
    calls, error = _read_calls(sent)
    if not calls and _reads_calls(format, with_tools):
        text = content
        content, found = parse_completion(text)
        calls = [{"name": call.name, "arguments": call.arguments, "id": call.id} for call in found or ()]
        if not calls and _meant_calls(text, content, format, cut_off=finish == "length"):
            error = f"the model's answer holds calls that cannot be read: {shortened(text)!r}"
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
    """The calls of a server's message, and what is wrong with the first one that cannot be read.

    Raises `TypeError` or `AttributeError` for what are no calls.
    """
    calls, error = [], ""
    sent = _list(message.get("tool_calls"))
    if not sent and (function := legacy_call(message)) is not None:
        sent = [{"function": function}]
    for call in map(openai_call, sent):
        if not isinstance(function := call.get("function"), dict | None):
            raise TypeError("a call's function is an object")
        name, given = (function or {}).get("name"), (function or {}).get("arguments")
        arguments = read_arguments(given)
        if not isinstance(name, str) or arguments is None:
            shown = shortened(json.dumps({"name": name, "arguments": given}))
            error = error or f"the server sent a call that cannot be read: {shown}"
            arguments = given
        calls.append({"name": name, "arguments": arguments, "id": call.get("id")})
    return calls, error


def _reads_calls(format: str, with_tools: bool) -> bool:
    """Whether calls are looked for in the text."""
    return with_tools or format == "xlam_v1"


def _meant_calls(text: str, content: str, format: str, cut_off: bool) -> bool:
    """Whether a text in which no calls were found was meant to contain some."""
    if format == "xlam_v1":  # anything but the object is malformed
        return content == text and bool(text.strip())
    stream = CompletionStream()
    stream.feed(text)
    keys = ('"arguments"', '"tool_calls"', *(('"name"',) if cut_off else ()))
    return TOOL_CALLS in text or (stream.holding and content == text and any(key in text for key in keys))


class _Texts(NamedTuple):
    """The texts of a message, or of a piece of one."""

    content: str
    refusal: str
    reasoning: str


def _texts(message: Mapping[str, Any]) -> _Texts:
    """The texts of a message or a delta. Raises `TypeError` for content that is not text."""
    content = message.get("content")
    parts = [{"type": "text", "text": content}] if isinstance(content, str | None) else content
    texts: dict[str, list[str]] = {"content": [], "refusal": [], "reasoning": []}
    if isinstance(refusal := message.get("refusal"), str):
        texts["refusal"].append(refusal)
    own = (message[key] for key in REASONING_KEYS if isinstance(message.get(key), str))
    texts["reasoning"] += [next(own, "")]  # vLLM sends the same text under two names
    for part in _list(parts):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in _PARTS:
            raise TypeError(f"a part of type {kind!r} is not text")
        key, names = _PARTS[kind]
        texts[key].append(_part_text(next((part[name] for name in names if part.get(name) is not None), None)))
    return _Texts(*("".join(texts[key]) for key in _Texts._fields))


_THOUGHT = ("reasoning", ("thinking", "reasoning", "summary", "text"))
_PARTS = {
    "text": ("content", ("text",)),
    "output_text": ("content", ("text",)),
    "refusal": ("refusal", ("refusal", "text")),
    "thinking": _THOUGHT,
    "reasoning": _THOUGHT,
}
"""Type of a content part → what its text is, and the keys that may hold that."""


def _part_text(value: Any) -> str:
    """The text of a part: a text, or a list of parts of text."""
    if isinstance(value, list):
        return "".join(_part_text(part.get("text") if isinstance(part, dict) else part) for part in value)
    if not isinstance(value, str | None):
        raise TypeError("a part's text is a text")
    return value or ""


def _list(value: Any) -> list[Any]:
    """A list, empty for nothing. Raises `TypeError` for what is neither."""
    if not isinstance(value, list | None):
        raise TypeError("a list is expected")
    return value or []
