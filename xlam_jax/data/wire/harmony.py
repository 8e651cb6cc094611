"""Reads gpt-oss's harmony: messages with a channel and a recipient, among them the reasoning.

The prompt ends with `<|start|>assistant`; a completion begins with the rest of that header. The format is described at
https://cookbook.openai.com/articles/openai-harmony
"""

import re
from typing import NamedTuple

from xlam_jax.data.trajectory import ToolCall
from xlam_jax.data.wire.base import Tools
from xlam_jax.data.wire.fronts import Fronts, literal
from xlam_jax.data.wire.marked import Read, UnreadableError, end_of, object_at

_FUNCTIONS = "functions."
_HEADER = re.compile(
    r"\s*+(?:<\|start\|>assistant)?+(?:\s*+to=(?P<to>[^\s<]{1,256}+))?+"
    r"(?:<\|channel\|>(?P<channel>analysis|commentary|final)(?:\s++to=(?P<channel_to>[^\s<]{1,256}+))?+)"
    r"\s*+(?:<\|constrain\|>)?+\w*+<\|message\|>"
)
_BODY_END = re.compile(r"<\|(?:end|call|return)\|>|(?=<\|start\|>)|\Z")
_SPACE = re.compile(r"\s*+")
_CALL_END = re.compile(rf"\s*+(?:{_BODY_END.pattern})")
HARMONY_FRONTS = Fronts((), tuple(map(literal, ("<|start|>", "<|channel|>", "to="))))


class _Messages(NamedTuple):
    reasoning: str
    content: str
    calls: tuple[ToolCall, ...]


def read_harmony(text: str, tools: Tools = (), alone: bool = False) -> Read:
    """Reads calls from messages to functions, and content from the channel `final` and from messages to nobody."""
    messages = _read(text)
    return (text, None) if messages is None else (messages.content, messages.calls or None)


def read_harmony_reasoning(text: str) -> str:
    """Returns the text of the channel `analysis`."""
    messages = _read(text)
    return "" if messages is None else messages.reasoning


def _read(text: str) -> _Messages | None:
    """Returns the messages of a completion, None for text that is not harmony or has a call that cannot be read."""
    reasoning: list[str] = []
    content: list[str] = []
    calls: list[ToolCall] = []
    at = 0
    try:
        while at < len(text):
            header = _HEADER.match(text, at)
            if header is None:
                if at and text[at:].isspace():
                    break
                return None
            recipient = header["to"] or header["channel_to"]
            if recipient is not None:
                call, at = _read_call(text, header.end(), recipient)
                calls.append(call)
                continue
            end = _BODY_END.search(text, header.end())
            assert end is not None
            body, at = text[header.end() : end.start()], end.end()
            if header["channel"] == "analysis":
                reasoning.append(body)
            else:
                content.append(body)
    except ValueError:
        return None
    return _Messages("\n".join(reasoning), "\n".join(content), tuple(calls))


def _read_call(text: str, at: int, recipient: str) -> tuple[ToolCall, int]:
    """Returns the call in the body of a message, and where the message ends. A string in it may contain marks."""
    arguments, end = object_at(text, end_of(_SPACE, text, at))
    stop = end_of(_CALL_END, text, end)
    if not recipient.startswith(_FUNCTIONS):
        raise UnreadableError("not a call of a function")
    return ToolCall(None, recipient.removeprefix(_FUNCTIONS), arguments), stop
