"""What calls begin with: decides which part of a streamed text is certainly content."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

SPACES = r"\s*+"
LONGEST = 1000
"""Characters of the longest front that is searched for. A longer one, of white space, counts as complete: a stream
would search it again with each piece, which takes quadratic time."""


@dataclass(frozen=True)
class Fronts:
    """The beginnings of calls, each as a sequence of patterns that consume text one after the other.

    White space in front of calls belongs to them.
    """

    anywhere: tuple[tuple[str, ...], ...]
    at_start: tuple[tuple[str, ...], ...] = ()
    """Fronts that begin calls only at the start of a text."""

    def __or__(self, other: "Fronts") -> "Fronts":
        return Fronts(
            tuple(dict.fromkeys((*self.anywhere, *other.anywhere))),
            tuple(dict.fromkeys((*self.at_start, *other.at_start))),
        )

    def split(self, text: str, is_start: bool) -> tuple[int, bool]:
        """Returns the length of the text before the first front, and whether that front is complete.

        A front that is not complete extends to the end of the text. `is_start`: the text begins at its start.
        """
        at = 0
        while at < len(text):
            complete = self._anywhere.match(text, at) or (is_start and at == 0 and self._at_start.match(text))
            if complete:
                return at, True
            if self._partial.fullmatch(text, at) or (is_start and at == 0 and self._partial_at_start.fullmatch(text)):
                return at, len(text) - at > LONGEST
            blank = _SPACES.match(text, at)
            if blank:  # white space in front changes nothing about that
                at = blank.end()
            else:
                first = self._first.search(text, at + 1)
                at = first.start() if first else len(text)
        return at, False

    @cached_property
    def _anywhere(self) -> re.Pattern[str]:
        return _any_of("".join(front) for front in self._with_spaces(self.anywhere))

    @cached_property
    def _at_start(self) -> re.Pattern[str]:
        return _any_of("".join(front) for front in self._with_spaces(self.at_start))

    @cached_property
    def _partial(self) -> re.Pattern[str]:
        return _any_of(_beginning(front) for front in self._with_spaces(self.anywhere))

    @cached_property
    def _partial_at_start(self) -> re.Pattern[str]:
        return _any_of(_beginning(front) for front in self._with_spaces(self.at_start))

    @cached_property
    def _first(self) -> re.Pattern[str]:
        """Matches white space and the first characters of fronts, which are their first patterns."""
        return _any_of([r"\s", *dict.fromkeys(front[0] for front in self.anywhere)])

    @staticmethod
    def _with_spaces(fronts: Iterable[tuple[str, ...]]) -> Iterable[tuple[str, ...]]:
        return ((SPACES, *front) for front in fronts)


def literal(text: str) -> tuple[str, ...]:
    """Returns the patterns of a front, or of a part of one, that is a fixed text."""
    return tuple(map(re.escape, text))


_SPACES = re.compile(r"\s++")


def _any_of(patterns: Iterable[str]) -> re.Pattern[str]:
    return re.compile("|".join(patterns) or r"(?!)")


def _beginning(pieces: Sequence[str]) -> str:
    """Returns a pattern that matches every beginning of a sequence of patterns."""
    pattern = ""
    for piece in reversed(pieces):
        pattern = f"(?:{piece}{pattern})?+"
    return pattern
