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
        self._opening, self._closing, self._opened = reasoning.opening, reasoning.closing, opened
        self._before: list[str] = []
        """What becomes content if there is no reasoning."""
        self._tail = ""
        """The last text that was read, which may be the beginning of a mark."""
        self._continue = self._start

    def feed(self, piece: str) -> str:
        """Adds the next piece; returns the text after the reasoning that is certain now."""
        return self._continue(piece) if piece else ""

    def _start(self, piece: str) -> str:
        """Decides whether the text begins with the opening mark."""
        self._before.append(piece)
        written = self._tail + (piece if self._tail else piece.lstrip())
        self._tail = written[: len(self._opening)]
        if written.startswith(self._opening):
            self._tail, self._continue = "", self._inside
            return self._inside(written[len(self._opening) :])
        if self._opening.startswith(written):
            return ""
        if self._opened is False:
            return self._no_reasoning()
        text, self._before, self._tail = "".join(self._before), [], ""
        self._continue = self._inside if self._opened else self._undecided
        return self._continue(text)

    def _inside(self, piece: str) -> str:
        """Searches for the closing mark."""
        text = self._tail + piece
        end = text.find(self._closing)
        if end < 0:
            self._tail = text[-len(self._closing) + 1 :]
            return ""
        self._continue = self._after
        return self._after(text[end + len(self._closing) :])

    def _undecided(self, piece: str) -> str:
        """Searches for the first mark: a closing one ends reasoning, an opening one is a part of content."""
        self._before.append(piece)
        text = self._tail + piece
        end, opening = text.find(self._closing), text.find(self._opening)
        if opening >= 0 and not 0 <= end < opening:
            return self._no_reasoning()
        if end >= 0:
            self._continue = self._after
            return self._after(text[end + len(self._closing) :])
        self._tail = text[-max(len(self._closing), len(self._opening)) + 1 :]
        return ""

    def _after(self, piece: str) -> str:
        """Skips line breaks in front of the content."""
        rest = piece.lstrip("\r\n")
        if rest:
            self._continue = self._content
        return rest

    def _no_reasoning(self) -> str:
        self._continue = self._content
        return "".join(self._before)

    def _content(self, piece: str) -> str:
        return piece


REASONINGS = {
    row.name: row
    for row in (
        Reasoning("think", "<think>", "</think>", vllm="deepseek_r1"),
        Reasoning("mistral", "[THINK]", "[/THINK]", vllm="mistral"),
    )
}
"""How models mark reasoning, by name. Harmony marks it in a way of its own, which is a part of that wire format."""
