"""JSON values and Python literals that are embedded in other text.

Every function takes time linear in the text between its start and the end that it returns (or the end of the text).
"""

import re
from collections.abc import Iterator
from typing import Any

from xlam_jax.data import literals
from xlam_jax.data.row_json import parse_json
from xlam_jax.data.trajectory import InvalidTrajectory

TOKEN = re.compile(
    r'"[^"\\]*+(?:\\(?:.|\Z)[^"\\]*+)*+(?:"|\Z)'
    r"|'[^'\\]*+(?:\\(?:.|\Z)[^'\\]*+)*+(?:'|\Z)"
    r"|[\[\](){},]",
    re.DOTALL,
)
"""A quoted string (one that is never closed extends to the end of the text), a bracket or a comma."""
_KEY = re.compile(r"\s*+([^\W\d][^=,\"'()\[\]{}\n]{0,127}?)\s*=(?!=)")


def value_at(text: str, start: int) -> tuple[Any, int]:
    """Returns the list or object whose bracket is at `start`, written in JSON or as a Python literal, and its end.

    Raises `ValueError` where it is neither.
    """
    end = closing(text, start)
    value = text[start:end]  # alone: an error of `json` counts the lines before it
    try:
        return parse_json(value), end
    except InvalidTrajectory as invalid:
        json_error = invalid.detail
    try:
        return literals.value(literals.expression(value)), end
    except ValueError as error:
        raise ValueError(f"neither JSON ({json_error}) nor a Python literal ({error})") from None


def closing(text: str, start: int, limit: int | None = None) -> int:
    """Returns the position after the bracket that closes the one at `start`, no further than `limit`.

    Brackets within quotes do not count. Raises `ValueError` where none closes it.
    """
    depth = 0
    for token in TOKEN.finditer(text, start, len(text) if limit is None else limit):
        if token[0] in "[({":
            depth += 1
        elif token[0] in "])}":
            depth -= 1
            if depth == 0:
                return token.end()
    raise ValueError("a bracket is not closed")


def keyword_arguments(text: str, opening: int) -> tuple[dict[str, Any], int]:
    """Returns the keyword arguments in the parentheses at `opening`, `(key="value", …)`, and where these end.

    Raises `ValueError` for arguments without a name, a name that occurs twice, and values that are not literals.
    """
    end = closing(text, opening)
    arguments: dict[str, Any] = {}
    for part in _split(text[opening + 1 : end - 1]):
        key = _KEY.match(part)
        if key is None:
            raise ValueError(f"{part.strip()[:80]!r} is not an argument with a name")
        if key[1] in arguments:
            raise ValueError(f"argument {key[1]!r} is given twice")
        arguments[key[1]] = literals.value(literals.expression(part[key.end() :]))
    return arguments, end


def _split(text: str) -> Iterator[str]:
    """Yields the parts between the commas outside brackets and quotes, without an empty last part."""
    depth = begin = 0
    for token in TOKEN.finditer(text):
        if token[0] in "[({":
            depth += 1
        elif token[0] in "])}":
            depth -= 1
        elif token[0] == "," and depth == 0:
            yield text[begin : token.start()]
            begin = token.end()
    if text[begin:].strip():
        yield text[begin:]
