"""Typed access to the values of a Hugging Face config.json."""

from collections.abc import Iterable, Mapping
from typing import Any

from xlam_jax.errors import UserError

LARGEST = 2**31 - 1
MOST_LAYERS = 1024
"""Also the maximum number of experts per layer: each of their tensors is listed before a weight is read."""


def words(text: str) -> frozenset[str]:
    """The set of words of a text, for lists of keys."""
    return frozenset(text.split())


class Values:
    """The values of a config.json; every invalid one raises a `UserError` that names its key and file."""

    def __init__(self, values: Mapping[str, Any], origin: str, overridden: Iterable[str] = ()):
        """`origin` names the file; keys in `overridden` were set by `model.overrides` instead."""
        self._values, self._origin, self._overridden = values, origin, frozenset(overridden)

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def get(self, key: str, default: Any = None) -> Any:
        """The raw value; `default` if the key is missing."""
        return self._values.get(key, default)

    def with_defaults(self, defaults: Mapping[str, Any]) -> "Values":
        """The same values, with those of `defaults` for keys that are missing or null."""
        kept = {key: value for key, value in self._values.items() if value is not None or key not in defaults}
        return Values({**defaults, **kept}, self._origin, self._overridden)

    def error(self, *keys: str, expected: str) -> UserError:
        """The error that names keys with their values, where they were set, and what is expected instead."""
        listed = " and ".join(f"{key} is {self._values.get(key)!r}" for key in keys)
        by_override = any(key in self._overridden for key in keys)
        return UserError(f"{self._origin}{' with model.overrides' if by_override else ''}: {listed}; {expected}")

    def size(self, key: str, default: int | None = None, *, most: int = LARGEST, nullable: bool = False) -> int:
        """A positive integer. A missing key has the default; so has null if it is `nullable`."""
        value = self._values.get(key, default)
        value = default if value is None and nullable else value
        if type(value) is not int or not 0 < value <= most:
            raise self.error(key, expected=f"a positive whole number up to {most:,} is needed")
        return value

    def decimal(self, key: str, default: float, *, most: float) -> float:
        """A positive floating-point number; as in transformers, 1 is not one and 1.0 is."""
        value = self._values.get(key, default)
        if type(value) is not float or not 0 < value <= most:
            raise self.error(key, expected=f"a decimal number above 0 and up to {most:g} is needed, such as {default}")
        return value

    def flag(self, key: str, default: bool) -> bool:
        """true or false."""
        value = self._values.get(key, default)
        if type(value) is not bool:
            raise self.error(key, expected="true or false is needed")
        return value

    def check_multiple(self, first: str, first_size: int, second: str, second_size: int) -> None:
        """Raises `UserError` if the size of the first key is not a multiple of that of the second."""
        if first_size % second_size:
            raise self.error(first, second, expected="the first must be a multiple of the second")


def is_number(value: Any, least: float = 0.0) -> bool:
    """Whether a value is a finite number of at least `least` that int64 or float32 can represent; true and false are
    not."""
    return (type(value) is int and least <= value < 2**63) or (type(value) is float and least <= value <= 3.4e38)


def is_same(value: Any, other: Any) -> bool:
    """Whether two values are equal; true is not 1, and false is not 0."""
    return value == other and isinstance(value, bool) == isinstance(other, bool)
