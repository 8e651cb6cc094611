"""Checks that what is trained is what a server would parse: `parse(render(x)) == x` for each turn of a sequence.

Templates can write calls that cannot be parsed back, for example an argument that contains the closing mark of a call.
A model that learns to write them answers with text that looks like a call and is none.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from xlam_jax.data.codec import to_json
from xlam_jax.data.render import Rendered
from xlam_jax.data.schemas import hashable
from xlam_jax.data.trajectory import Message, ToolCall, Trajectory, turn_number
from xlam_jax.data.wire import Wire

_SHOWN = 200
"""Maximum length of a quoted text in a message, in characters."""

Decode = Callable[[Sequence[int]], str]
"""Decodes token ids, with their control tokens."""


class Unreadable(NamedTuple):
    """A turn that a server would parse differently."""

    reason: str
    """`unreadable-call`: its calls are lost or changed; `text-read-as-call`: it has none, and its text is parsed as
    calls."""
    detail: str


def unreadable_turn(rendered: Rendered, trajectory: Trajectory, wire: Wire | None, decode: Decode) -> Unreadable | None:
    """Returns the first trained turn of a sequence that a server would parse differently, None if there is none.

    `rendered`: a rendering of `trajectory`. `wire`: the format's wire format, None if it is unknown.
    """
    for index, turn in enumerate(trajectory.conversation):
        text = _trained_text(rendered, index, decode) if turn.role == "assistant" else ""
        if text and (difference := _compare(text, turn, index, trajectory, wire)) is not None:
            return difference
    return None


def _trained_text(rendered: Rendered, turn: int, decode: Decode) -> str:
    """Returns the text that a sequence trains for a turn, without its end; empty if it trains none."""
    spans = [span for span in rendered.spans if span.turn == turn and span.kind not in ("prompt", "eos")]
    if not any(span.weight > 0 for span in spans):
        return ""
    return decode(np.concatenate([rendered.input_ids[span.start : span.end] for span in spans]).tolist())


def _compare(text: str, turn: Message, index: int, trajectory: Trajectory, wire: Wire | None) -> Unreadable | None:
    number = turn_number(index, turn)
    if wire is None:
        if not turn.tool_calls:
            return None
        return Unreadable("unreadable-call", f"turn {number}: no wire format is known for {_quoted(text)}")
    calls = wire.parse(text, trajectory.tools).calls or ()
    if _values(calls) == _values(turn.tool_calls):
        return None
    if not turn.tool_calls:
        return Unreadable("text-read-as-call", f"turn {number}: {_quoted(text)} has no call, and is parsed as one")
    parsed = f"parsed as {_shown(calls)}" if calls else "not parsed as calls"
    return Unreadable(
        "unreadable-call",
        f"turn {number} calls {_shown(turn.tool_calls)}; written as {_quoted(text)}, it is {parsed} by the wire format "
        f"{wire.format.name}",
    )


def _values(calls: Sequence[ToolCall]) -> list[tuple[str, object]]:
    return [(call.name, hashable(call.arguments)) for call in calls]


def _shown(calls: Sequence[ToolCall]) -> str:
    return _cut(", ".join(f"{call.name}({to_json(call.arguments)})" for call in calls))


def _quoted(text: str) -> str:
    return _cut(repr(text))


def _cut(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]} …"
