"""Detects the wire format of a chat template: which row of the table parses what the template writes.

A template's text is not searched for known marks, because templates of one family differ in details. Instead, a probe
conversation is rendered, and each row of the table parses the answer; the first that returns the probe's call is it.
"""

from collections.abc import Callable, Iterator
from typing import Any

from xlam_jax.data.formats import Layout
from xlam_jax.data.trajectory import InvalidTrajectory, Message, ToolCall, Trajectory
from xlam_jax.data.wire import REASONINGS, WIRE_FORMATS, Wire

TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Looks up the weather.",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "description": "A city"},
                    "days": {"type": "integer", "description": "Days to look ahead"},
                    "metric": {"type": "boolean", "description": "Whether to use metric units"},
                },
                "required": ["city"],
            },
        },
    }
]
CALL = ToolCall("call00001", "get_weather", {"city": "La Paz", "days": 3, "metric": True})
_QUESTION = Message("user", "What is the weather?")
_REASONING = "The first thought."
_CONTENT = "The answer."

Layouts = Callable[[Trajectory], Iterator[Layout]]
"""The method `layouts` of a format."""


def detect(layouts: Layouts) -> Wire | None:
    """Returns the wire format in which a format writes calls, and how it marks reasoning.

    Returns None if no row of the table parses the calls, or if the format writes none.
    """
    called = _answer(layouts, Message("assistant", "", (CALL,)), TOOLS)
    if called is None:
        return None
    expected = [(CALL.name, CALL.arguments)]
    for format_ in WIRE_FORMATS.values():
        parsed = Wire(format_).parse(called, TOOLS)
        if [(call.name, call.arguments) for call in parsed.calls or ()] == expected and not parsed.content.strip():
            return _with_reasoning(Wire(format_), layouts)
    return None


def _with_reasoning(wire: Wire, layouts: Layouts) -> Wire:
    """Returns a wire format with the marks of a template's reasoning, unchanged if it writes none or its own."""
    answer = _answer(layouts, Message("assistant", _CONTENT, reasoning=_REASONING), [])
    if answer is None or wire.parse(answer).reasoning.strip() == _REASONING:
        return wire
    for reasoning in REASONINGS.values():
        parsed = Wire(wire.format, reasoning).parse(answer)
        if parsed.reasoning.strip() == _REASONING and parsed.content.strip() == _CONTENT:
            return Wire(wire.format, reasoning)
    return wire


def _answer(layouts: Layouts, turn: Message, tools: list[dict[str, Any]]) -> str | None:
    """Returns what a model would write for a turn, without the end token; None if the format cannot write it."""
    probe = Trajectory("", None, None, "", tools, (_QUESTION, turn))
    try:
        *_, layout = layouts(probe)
    except InvalidTrajectory:
        return None
    return "".join(part.text for part in layout.segments if part.turn == 1 and part.kind not in ("prompt", "eos"))
