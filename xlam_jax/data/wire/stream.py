"""Reads streamed completions."""

from xlam_jax.data.wire.base import Parsed, Tools, Wire
from xlam_jax.data.wire.reasoning import ReasoningStream
from xlam_jax.data.wire.table import ARRAY


class CompletionStream:
    """Reads a streamed completion; for any pieces, the result is that of `Wire.parse`.

    Content is released as soon as it cannot be a part of calls or reasoning. From the first text on with which calls
    may begin, everything is held until the end: only then is it known whether it is calls.
    """

    def __init__(self, wire: Wire = ARRAY, tools: Tools = ()) -> None:
        self._wire, self._tools = wire, tools
        self._reasoning = ReasoningStream(wire.reasoning, wire.opened) if wire.reasoning else None
        self._pieces: list[str] = []
        self._held = ""
        self._released = 0
        self.holding = False
        """Whether everything from here on is held until the end, because it may be calls."""

    def feed(self, piece: str) -> str:
        """Adds the next piece; returns the content that is certain now."""
        self._pieces.append(piece)
        if self._reasoning is not None:
            piece = self._reasoning.feed(piece)
        if self.holding or not piece:
            return ""
        text = self._held + piece
        at, self.holding = self._wire.format.fronts.split(text, is_start=self._released == 0)
        self._released += at
        self._held = text[at:]
        return text[:at]

    def finish(self) -> Parsed:
        """Returns the rest of the content, the reasoning, and the calls."""
        parsed = self._wire.parse("".join(self._pieces), self._tools)
        return parsed._replace(content=parsed.content[self._released :])
