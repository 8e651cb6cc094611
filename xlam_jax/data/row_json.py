"""Strict JSON of rows, and of texts within rows: every fault is an `InvalidTrajectory`.

Nesting has one bound however a value is written, so that code that walks schemas and arguments may recurse.
"""

import json
import math
import re
from collections import Counter
from typing import Any, NoReturn

from xlam_jax.data.problems import Report, ignore
from xlam_jax.data.trajectory import InvalidTrajectory

DEEPEST = 400
"""Levels of nesting of any JSON that is read; far below Python's recursion limit."""
DEEPEST_ROW = 64
"""Levels of nesting of a trajectory."""
DEEPEST_TEXT = 48
"""Levels of nesting of arguments and tools that are JSON in a text: they become a part of the row."""
HALF_SURROGATE = "half of a surrogate pair (\\ud8xx … \\udfxx) is not a character"
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)
_TO_SQUARE = bytes.maketrans(b"{}", b"[]")
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))


def parse_json(text: str | bytes) -> Any:
    """Parses strict JSON in UTF-8, without NaN, Infinity, overflowing numbers, duplicate keys and lone surrogates.

    Raises `InvalidTrajectory("malformed-json", …)`.
    """
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8-sig")
        value = _DECODER.decode(text)
        if "\\ud" in text or "\\uD" in text:  # no tokenizer accepts half of an escaped surrogate pair
            encode(value).encode()
    except UnicodeDecodeError as error:
        _fail("malformed-json", f"not UTF-8: byte 0x{error.object[error.start]:02x} at position {error.start}")
    except UnicodeEncodeError:
        _fail("malformed-json", HALF_SURROGATE)
    except RecursionError:
        _fail("malformed-json", "nested too deeply")
    except ValueError as error:
        _fail("malformed-json", str(error))
    if _is_too_deep(text, DEEPEST):
        _fail("malformed-json", f"nested too deeply (more than {DEEPEST} levels)")
    return value


def parse_text(text: str, reason: str, what: str, deepest: int = DEEPEST_TEXT) -> Any:
    """Parses JSON that a row has as a text; `what` names it. Raises `InvalidTrajectory(reason, …)`."""
    try:
        value = parse_json(text)
        check_json(value, deepest)
    except InvalidTrajectory as invalid:
        _fail(reason, f"{what} is a text that is not valid JSON: {invalid.detail}")
    return value


def decode_arguments(text: str, where: str, repaired: Report | None = None) -> Any:
    """Returns the value of a call's arguments that are JSON in a text; `where` begins each message about them.

    Repairs prose behind the JSON, JSON that was encoded twice, and an empty text, which becomes {}. Raises
    `InvalidTrajectory`.
    """
    repaired = repaired or ignore
    if not text or text.isspace():
        repaired("missing-arguments", f"{where} an empty text")
        return {}
    try:
        try:
            value = parse_json(text)
        except InvalidTrajectory:
            value, rest = _leading_object(text)
            repaired("trailing-text-after-json", f"{where} arguments, then {rest[:80]!r}")
        if isinstance(value, str):
            value = parse_json(value)
            repaired("string-arguments", f"{where} JSON that was encoded twice")
        check_json(value, DEEPEST_TEXT)
    except InvalidTrajectory as invalid:
        _fail("bad-arguments", f"{where} a text that is not valid JSON: {invalid.detail}")
    return value


def check_json(value: object, deepest: int = DEEPEST_ROW) -> None:
    """Raises `InvalidTrajectory` for a value that JSON in UTF-8 cannot represent, or with more levels than `deepest`.

    Rows need not come from JSON.
    """
    try:
        text = encode(value)
        text.encode()
    except UnicodeEncodeError:
        _fail("malformed-json", HALF_SURROGATE)
    except RecursionError:
        _fail("malformed-json", "nested too deeply")
    except (TypeError, ValueError) as error:
        _fail("malformed-json", str(error))
    if _is_too_deep(text, deepest):
        _fail("malformed-json", f"nested too deeply (more than {deepest} levels)")


def _leading_object(text: str) -> tuple[Any, str]:
    """Returns the JSON object at the beginning of a text and the prose after it; raises as `parse_json` otherwise."""
    start = len(text) - len(text.lstrip())
    try:
        _, end = _DECODER.raw_decode(text, start)
    except (ValueError, RecursionError):
        end = len(text)
    rest = text[end:].strip()
    if text[start : start + 1] != "{" or "{" in rest or rest.startswith((",", ":", "}", "[", "]", '"', "'")):
        end = len(text)  # more JSON, or the object closes too early: which part is meant is not clear
    return parse_json(text[:end]), rest


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        key, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"key {key!r} occurs twice in one object")
    return value


def _refuse_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"number {digits} is out of range")
    return value


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant, parse_float=_finite, object_pairs_hook=_unique_keys)
encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False).encode
"""Writes JSON in one line, other scripts as they are. Raises `ValueError` for NaN and Infinity."""


def _is_too_deep(text: str, deepest: int) -> bool:
    """Whether JSON has more than `deepest` levels of lists and objects."""
    if text.count("[") + text.count("{") <= deepest:
        return False
    brackets = _STRING.sub(b"", text.encode("utf-8", "surrogatepass")).translate(_TO_SQUARE, _NO_BRACKETS)
    for _ in range(deepest):
        brackets = brackets.replace(b"[]", b"")  # removes the innermost level
    return bool(brackets)


def _fail(reason: str, detail: str) -> NoReturn:
    raise InvalidTrajectory(reason, detail)
