"""A JSON parser that follows the standard where Python's own is lenient."""

import json
from typing import Any


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """`object_pairs_hook` that raises `ValueError` for a duplicate key. By default Python keeps the last value."""
    values: dict[str, Any] = {}
    for name, value in pairs:
        if name in values:
            raise ValueError(f"the key {name!r} occurs twice")
        values[name] = value
    return values


def loads(data: bytes) -> Any:
    """Parses UTF-8 JSON as strictly as the parsers of other libraries that read the same files.

    Raises `ValueError` for duplicate keys, NaN and Infinity, a negative zero, half of a surrogate pair, and nesting too
    deep for the parser.
    """
    try:
        value = json.loads(
            data.decode("utf-8"), object_pairs_hook=unique_keys, parse_constant=_refuse, parse_int=_integer
        )
        json.dumps(value, ensure_ascii=False).encode("utf-8")  # fails for half of a surrogate pair
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    return value


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not a JSON value")


def _integer(digits: str) -> int:
    if digits == "-0":
        raise ValueError("-0 is not an integer")
    return int(digits)
