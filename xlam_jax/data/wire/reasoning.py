"""Reads reasoning: the text that a model writes between marks before its answer."""

import re
from dataclasses import dataclass
from functools import cached_property

_BLANK_LINES = re.compile(r"[\r\n]*+")


@dataclass(frozen=True)
class Reasoning:
    """How reasoning is marked, and which of vLLM's reasoning parsers reads it."""

    name: str
    opening: str
    closing: str
    vllm: str

    def split(self, text: str, opened: bool | None = None) -> tuple[str, str]:
        """Returns the reasoning of a completion, without line breaks around it, and the text after it.

        The first closing mark ends it; without one, it extends to the end of the text. Line breaks in front of the text
        after it belong to the marks. Templates may write the opening mark into the prompt; `opened` says whether this
        one does, None if unknown: text without it is then reasoning where a closing mark follows, with no opening mark
        before it.
        """
        start = self._opening.match(text)
        end = text.find(self.closing, start.end() if start else 0)
        if not start and not opened and (opened is False or end < 0 or 0 <= text.find(self.opening) < end):
            return "", text
        begin = start.end() if start else 0
        if end < 0:
            return text[begin:].strip("\r\n"), ""
        after = _BLANK_LINES.match(text, end + len(self.closing))
        assert after is not None
        return text[begin:end].strip("\r\n"), text[after.end() :]

    @cached_property
    def _opening(self) -> re.Pattern[str]:
        return re.compile(rf"\s*+{re.escape(self.opening)}")


class ReasoningStream:
    """Separates the reasoning at the start of a streamed text from the text after it; agrees with `Reasoning.split`."""

    def __init__(self, reasoning: Reasoning, opened: bool | None):
        self._reasoning, self._opened = reasoning, opened
        self._held = ""
        self._state = "start"

    def feed(self, piece: str) -> str:
        """Adds the next piece; returns the text after the reasoning that is certain now."""
        raise NotImplementedError


REASONINGS = {
    row.name: row
    for row in (
        Reasoning("think", "<think>", "</think>", vllm="deepseek_r1"),
        Reasoning("mistral", "[THINK]", "[/THINK]", vllm="mistral"),
    )
}
"""How models mark reasoning, by name. Harmony marks it in a way of its own, which is a part of that wire format."""
