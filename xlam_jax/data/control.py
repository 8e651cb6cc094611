"""Keeps the text of conversations from spelling a mark of the format: a control token, or a tag that is plain text.

A server renders a request as text before it tokenizes it, so that a control token spelled in a message becomes the
token, and a tag that is plain text has the same ids in any text. The project's own formats therefore write spelled
marks differently, in the renderer and in the saved template alike. A chat template of others cannot do this; runs
report such data.
"""

import re
from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import groupby
from typing import NamedTuple

from xlam_jax.data.codec import Codec, to_json
from xlam_jax.data.trajectory import Trajectory, turn_number

ZERO_WIDTH_SPACE = "\u200b"
"""Written after the first character of a mark in a text."""
_JSON_SYNTAX = frozenset('"\\[]{},:+-. 0123456789abcdefABCDEF' + "truefalsenullNaNInfinity")
"""Characters that occur in JSON outside of strings, or after the backslash of an escape (without `/`)."""
_LEAST_RUN = 4
"""Marks that differ only in consecutive numbers are written as one run in a template from this count on."""


class _Run(NamedTuple):
    """Marks with the numbers from `first` to `last` between `front` and `back`."""

    front: str
    escaped_front: str
    """`front` in JSON."""
    first: int
    last: int
    back: str


class Marks:
    """The marks of a format with a tokenizer, and how text that spells one is written.

    A text gets a zero-width space after the first character of a mark. JSON gets an escape for the first character that
    JSON's own syntax does not have, and so has the same value. Marks without such a character, of one character or of
    white space only stay as they are. `template` has the statements that set the same marks for the macros of
    `templates/plain_text.jinja`. Both replace one mark after the other in the same order.
    """

    def __init__(self, marks: Iterable[str] = ()):
        usable = sorted({mark for mark in marks if len(mark) > 1 and not mark.isspace()})
        runs, rest = _find_runs(usable)
        single = [mark for mark in rest for _ in range(_passes(mark))]
        numbered = [mark for run in runs for mark in _numbered(run)]
        self._in_text = [(mark, _interrupted(mark)) for mark in single + numbered]
        self._in_json = [(mark, _escaped(mark)) for mark in single + numbered]
        self._contains = re.compile("|".join(map(re.escape, [*rest, *(run.front for run in runs)])) or "(?!)")
        self.pattern = any_of(usable)
        """Matches a mark."""
        pairs = ", ".join(f"[{mark!a}, {_escaped(mark)!a}]" for mark in single)
        lists = ", ".join(f"[{', '.join(map(ascii, run))}]" for run in runs)
        self.template = f"{{%- set marks = [{pairs}] -%}}\n{{%- set numbered_marks = [{lists}] -%}}\n"

    def __bool__(self) -> bool:
        return bool(self._in_text)

    def in_text(self, text: str) -> str:
        """Returns the text with a zero-width space in every mark that it spells."""
        return self._replace(text, self._in_text)

    def in_json(self, json: str) -> str:
        """Returns JSON of the same value that spells no mark."""
        return self._replace(json, self._in_json)

    def _replace(self, text: str, replacements: list[tuple[str, str]]) -> str:
        if self._contains.search(text) is None:
            return text
        for mark, instead in replacements:
            text = text.replace(mark, instead)
        return text


@lru_cache(maxsize=8)
def control_marks(codec: Codec, *tags: str) -> Marks:
    """Returns the marks of a tokenizer's control tokens and of a format's `tags`.

    Added tokens that are not special are not among them: text that spells one is meant to become it, in training and
    at a server.
    """
    return Marks([*codec.special, *tags])


@lru_cache(maxsize=8)
def added_tokens(codec: Codec) -> re.Pattern[str]:
    """Returns a pattern of all added tokens of a tokenizer, any of which may be a mark of its chat template."""
    return any_of([token.content for token in codec.whole.get_added_tokens_decoder().values()])


def any_of(marks: Iterable[str]) -> re.Pattern[str]:
    """Returns a pattern that matches one of the marks, the longest one first."""
    longest_first = sorted(filter(None, marks), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


def spelled_mark(trajectory: Trajectory, marks: re.Pattern[str]) -> str | None:
    """Describes the first mark that a conversation spells, in its texts, its tools or its calls; None without any."""
    for text, where in _texts(trajectory):
        if match := marks.search(text):
            return f"{match[0]!r} in {where}"
    return None


def _texts(trajectory: Trajectory) -> Iterator[tuple[str, str]]:
    """Yields each text of a conversation, and what it is."""
    yield trajectory.task_instruction, "the task instruction"
    for tool in trajectory.tools:
        yield to_json(tool), "the tools"
    for index, turn in enumerate(trajectory.conversation):
        where = f"turn {turn_number(index, turn)}"
        yield turn.content, where
        yield turn.reasoning, where
        for call in turn.tool_calls:
            yield to_json([call.name, call.arguments]), f"a call of {where}"


def _interrupted(mark: str) -> str:
    return mark[0] + ZERO_WIDTH_SPACE + mark[1:]


def _escaped(mark: str) -> str:
    at = _escapable(mark)
    if at is None:
        return mark
    units = mark[at].encode("utf-16-be", "surrogatepass")
    escape = "".join(f"\\u{units[i : i + 2].hex()}" for i in range(0, len(units), 2))
    return mark[:at] + escape + mark[at + 1 :]


def _escapable(mark: str) -> int | None:
    """Returns the index of the first character that JSON has only in strings, outside of escapes; None without any."""
    for at, character in enumerate(mark):
        if character < " " or character in _JSON_SYNTAX:
            continue
        if mark[at - 1 : at] != "\\" and (at or character != "/"):  # a slash may be escaped as \/
            return at
    return None


def _passes(mark: str) -> int:
    """Returns how often a mark must be replaced until none is left: one may overlap the next, as in `<a<a<`."""
    period = next(size for size in range(1, len(mark) + 1) if mark.startswith(mark[size:]))
    return -(-len(mark) // period)


def _find_runs(marks: Iterable[str]) -> tuple[list[_Run], list[str]]:
    """Returns the runs of numbered marks, and the other marks."""
    numbers: dict[tuple[str, str], list[int]] = {}
    rest: list[str] = []
    for mark in marks:
        match = re.fullmatch(r"(.*[^0-9])(0|[1-9][0-9]{0,8})([^0-9]*)", mark, re.DOTALL)
        at = _escapable(mark)
        if match and _passes(mark) == 1 and (at is None or at < len(match[1])):
            numbers.setdefault((match[1], match[3]), []).append(int(match[2]))
        else:
            rest.append(mark)
    runs: list[_Run] = []
    for (front, back), values in numbers.items():
        for _, group in groupby(enumerate(sorted(values)), key=lambda pair: pair[1] - pair[0]):
            consecutive = [value for _, value in group]
            run = _Run(front, _escaped(front), consecutive[0], consecutive[-1], back)
            if len(consecutive) < _LEAST_RUN:
                rest += _numbered(run)
            else:
                runs.append(run)
    return runs, sorted(rest)


def _numbered(run: _Run) -> list[str]:
    return [f"{run.front}{number}{run.back}" for number in range(run.first, run.last + 1)]


NO_MARKS = Marks()
"""For formats that write every text as it is."""
