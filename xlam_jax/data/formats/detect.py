"""Detects the wire format of a chat template: which row of the table parses what the template writes.

A template's text is not searched for known marks, because templates of one family differ in details. Instead, a probe
conversation is rendered, and each row of the table parses the answer; the first that returns the probe's call is it.
"""

from collections.abc import Callable, Iterator
from itertools import takewhile
from typing import Any, NamedTuple

from xlam_jax.data.formats import Layout
from xlam_jax.data.trajectory import InvalidTrajectory, Message, ToolCall, Trajectory
from xlam_jax.data.wire import REASONINGS, WIRE_FORMATS, Reasoning, Wire
from xlam_jax.errors import UserError

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
    turn = Message("assistant", "", (CALL,))
    called = _render(layouts, turn, TOOLS) or _render(layouts, turn, [])  # some templates write calls and no tools
    if called is None:
        return None
    reasoning = _detect_reasoning(layouts)
    for format_ in WIRE_FORMATS.values():
        # a template may write empty reasoning in front of the call
        for marks in (reasoning,) if reasoning else (None, *REASONINGS.values()):
            wire = Wire(format_, marks, opened=marks and called.ends_with(marks.opening))
            if _parses(wire, called.answer):
                return wire
    return None


def _parses(wire: Wire, answer: str) -> bool:
    """Returns whether a wire format parses the answer to the probe with a call."""
    reasoning, content, calls = wire.parse(answer, TOOLS)
    is_call = [(call.name, call.arguments) for call in calls or ()] == [(CALL.name, CALL.arguments)]
    return is_call and not reasoning.strip() and not content.strip()


def _detect_reasoning(layouts: Layouts) -> Reasoning | None:
    """Returns the marks of a template's reasoning, None if it writes none or marks it in a way of its own."""
    rendered = _render(layouts, Message("assistant", _CONTENT, reasoning=_REASONING), [])
    if rendered is None:
        return None
    for marks in REASONINGS.values():
        reasoning, content = marks.split(rendered.answer, rendered.ends_with(marks.opening))
        if reasoning.strip() == _REASONING and content.strip() == _CONTENT:
            return marks
    return None


class _Rendered(NamedTuple):
    """A prompt, and the answer that a model would write, without its end token."""

    prompt: str
    answer: str

    def ends_with(self, mark: str) -> bool:
        """Returns whether the prompt ends with a mark."""
        return self.prompt.rstrip().endswith(mark)


def _render(layouts: Layouts, turn: Message, tools: list[dict[str, Any]]) -> _Rendered | None:
    """Renders a question and a turn; None if the format cannot write them."""
    probe = Trajectory("", None, None, "", tools, (_QUESTION, turn))
    try:
        *_, layout = layouts(probe)
    except (InvalidTrajectory, UserError):
        return None
    prompt = takewhile(lambda segment: segment.kind == "prompt", layout.segments)
    answer = (part.text for part in layout.segments if part.turn == 1 and part.kind not in ("prompt", "eos"))
    return _Rendered("".join(part.text for part in prompt), "".join(answer))
