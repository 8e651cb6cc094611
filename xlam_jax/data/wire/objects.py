"""Finds JSON objects in other text, in linear time."""

import re
from collections.abc import Iterator
from typing import Any

from xlam_jax.data.row_json import parse_json
from xlam_jax.data.trajectory import InvalidTrajectory

BLANK = " \t\n\r"
"""White space of JSON."""

_STRING = r'"(?:[^"\\\x00-\x1f]++|\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4}))*+"'
_SCALAR = rf"{_STRING}|-?(?:0|[1-9][0-9]*+)(?:\.[0-9]++)?(?:[eE][-+]?[0-9]++)?|true|false|null"


def _token(pattern: str) -> re.Pattern[str]:
    return re.compile(rf"(?:{pattern})[{BLANK}]*+")


_BEGINNING = re.compile(rf'\{{[{BLANK}]*+["}}]')
"""The beginning of a JSON object."""
_VALUE = _token(rf"[{{[]|{_SCALAR}")
_KEY = _token(rf"{_STRING}[{BLANK}]*+:")
_FIRST = {"{": _token(rf"\}}|{_STRING}[{BLANK}]*+:"), "[": _token(rf"[{{\[\]]|{_SCALAR}")}
"""By the innermost open bracket: the tokens that may follow the bracket itself, a comma, and a value."""
_AFTER_COMMA = {"{": _KEY, "[": _VALUE}
_AFTER_VALUE = {"{": _token("[,}]"), "[": _token(r"[,\]]")}


def objects_in(text: str) -> Iterator[dict[str, Any]]:
    """Yields the outermost JSON objects in a text, in order. Takes linear time for any text.

    Of an object that is incomplete, the complete objects inside are yielded, and the search continues behind it.
    """
    at = 0
    while (beginning := _BEGINNING.search(text, at)) is not None:
        spans, at = _complete_objects(text, beginning.start())
        for start, end in spans:
            if isinstance(value := parse_or_none(text[start:end]), dict):
                yield value


def _complete_objects(text: str, start: int) -> tuple[list[tuple[int, int]], int]:
    """Returns the spans of the outermost complete objects of the JSON at a brace, and where the search continues.

    All that is open when an unexpected token comes can never be complete, so nothing of it is read again: `json` would
    begin anew at each brace. Only the last token may hold a beginning, inside a string that was opened by mistake.
    """
    complete: list[tuple[int, int]] = []
    opened: list[tuple[int, int]] = []  # where a bracket is, and how many objects are complete before it
    expected, at, begin = _VALUE, start, start
    while (token := expected.match(text, at)) is not None:
        begin, at = at, token.end()
        written = token[0].rstrip(BLANK)
        match written[-1]:
            case "{" | "[" as bracket:
                opened.append((begin, len(complete)))
                expected = _FIRST[bracket]
            case ",":
                expected = _AFTER_COMMA[text[opened[-1][0]]]
            case ":":
                expected = _VALUE
            case last:
                if last in "}]":
                    opening, before = opened.pop()
                    if last == "}":
                        complete[before:] = [(opening, begin + 1)]
                    if not opened:
                        return complete, at
                expected = _AFTER_VALUE[text[opened[-1][0]]]
    return complete, begin + 1


def parse_or_none(text: str) -> object:
    """Returns the value of strict JSON, None for other text."""
    try:
        return parse_json(text)
    except InvalidTrajectory:
        return None
