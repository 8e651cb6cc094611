"""JSON values and Python literals that are embedded in other text.

Every function takes time linear in the text between its start and the end that it returns (or the end of the text).
"""

import re
from typing import Any

from xlam_jax.data import literals
from xlam_jax.data.trajectory import InvalidTrajectory, parse_json

TOKEN = re.compile(
    r'"[^"\\]*+(?:\\(?:.|\Z)[^"\\]*+)*+(?:"|\Z)'
    r"|'[^'\\]*+(?:\\(?:.|\Z)[^'\\]*+)*+(?:'|\Z)"
    r"|[\[\](){},]",
    re.DOTALL,
)
"""A quoted string (one that is never closed extends to the end of the text), a bracket or a comma."""


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
