"""Reads JSON and YAML files from users or earlier runs, with limits on size and nesting.

Every problem with such a file raises one `UserError` that names the file.
"""

import json
import re
from pathlib import Path
from typing import Any

import yaml

from xlam_jax.errors import UserError
from xlam_jax.strict_json import unique_keys

LARGEST_JSON = 64 << 20
"""Maximum size of a JSON file in bytes. The largest ones of a model folder, tokenizers with a large vocabulary, are
smaller."""
LARGEST_YAML = 1 << 20
"""Maximum size of a YAML file in bytes. PyYAML reads less than a megabyte per second."""
DEEPEST = 64
"""Maximum nesting depth. Deeper values overflow the stack of code that copies, compares or writes them."""
MOST_VALUES = 1_000_000
"""Maximum number of values in a YAML document after its aliases are expanded: a few nested aliases can expand to
billions of values."""
_SURROGATE = re.compile("[\ud800-\udfff]")


def read_text(path: Path, expected: str, largest: int = LARGEST_JSON) -> str:
    """Reads a UTF-8 file of at most `largest` bytes.

    `expected`: what the file should contain, for error messages. Raises `UserError`.
    """
    try:
        with path.open("rb") as file:
            data = file.read(largest + 1)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; {expected}") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder; {expected}") from None
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror or error}); {expected}") from None
    except ValueError:  # a NUL
        raise UserError(f"{str(path)!r}: not a valid path; {expected}") from None
    if len(data) > largest:
        raise UserError(f"{path}: larger than {largest >> 20} MiB; {expected}")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: not UTF-8 text (byte 0x{data[error.start]:02x} at position {error.start}); {expected}"
        ) from None


def parse_json(text: str, origin: object) -> Any:
    """Parses JSON. Raises `UserError` with `origin`, the file it came from, and the line where it is malformed."""
    try:
        value = json.loads(text, object_pairs_hook=unique_keys)
        _check(value)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{origin}, line {error.lineno}, column {error.colno}: not valid JSON: {error.msg}; correct the file, or "
            "get it again"
        ) from None
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise UserError(f"{origin}: not valid JSON: {reason}; correct the file, or get it again") from None
    return value


def read_json(path: Path, expected: str = "a JSON file is expected here") -> Any:
    """Reads a JSON file.

    Raises `UserError` if it is missing, not UTF-8, malformed, has a duplicate key, or exceeds LARGEST_JSON or DEEPEST.
    """
    return parse_json(read_text(path, expected), path)


def read_object(path: Path, expected: str = "a JSON object is expected here") -> dict[str, Any]:
    """Reads a JSON file that contains an object. Raises `UserError` as `read_json`, and if it is not an object."""
    value = read_json(path, expected)
    if not isinstance(value, dict):
        raise UserError(f"{path}: contains a {type(value).__name__}; a JSON object is expected")
    return value


def parse_yaml(text: str, origin: object, loader: type[yaml.SafeLoader] = yaml.SafeLoader) -> Any:
    """Parses YAML.

    Raises `UserError` with `origin` if it is malformed, nested too deeply, or its aliases expand to more than
    MOST_VALUES values.
    """
    try:
        value = yaml.load(text, Loader=loader)
        _check(value, text=True)
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, KeyError, IndexError) as error:
        # PyYAML's constructors also raise the errors of int(), float() and datetime()
        raise UserError(f"{origin}: not valid YAML: {' '.join(str(error).split())[:500]}") from None
    except RecursionError:
        raise UserError(f"{origin}: not valid YAML: it is nested too deeply") from None
    return value


def read_yaml(path: Path, expected: str, loader: type[yaml.SafeLoader] = yaml.SafeLoader) -> Any:
    """Reads a YAML file of at most LARGEST_YAML bytes. Raises `UserError` as `read_text` and `parse_yaml`."""
    return parse_yaml(read_text(path, expected, LARGEST_YAML), path, loader)


def _check(value: Any, text: bool = False) -> None:
    """Raises `ValueError` for nesting deeper than DEEPEST and for strings that can't be encoded as UTF-8.

    With `text` also for more than MOST_VALUES values, and for strings with a NUL character, which paths can't contain.
    """
    level, depth, count = [value], 0, 0
    while level:
        depth, count = depth + 1, count + len(level)
        if depth > DEEPEST:
            raise ValueError(f"it is nested too deeply (more than {DEEPEST} levels)")
        below: list[Any] = []
        for item in level:
            if text and count + len(below) > MOST_VALUES:
                raise ValueError(f"its aliases expand to more than {MOST_VALUES:,} values")
            if isinstance(item, dict):
                below += item.keys()
                below += item.values()
            elif isinstance(item, list | tuple | set):
                below += item
            elif isinstance(item, str):
                if text and "\0" in item:
                    raise ValueError(f"{item[:80]!r} contains a NUL character")
                if _SURROGATE.search(item):
                    raise ValueError(f"{item[:80]!r} contains half of a surrogate pair")
        level = below
