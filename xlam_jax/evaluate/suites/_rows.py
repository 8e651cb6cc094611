"""Reads the rows of a suite's data."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from xlam_jax.data.files import read_items, read_lines
from xlam_jax.data.row_json import parse_json
from xlam_jax.data.rows import place
from xlam_jax.data.trajectory import InvalidTrajectory
from xlam_jax.errors import UserError, nearest


def read_rows(path: Path, kind: str, *required: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (number from 1, object) from a .jsonl file (also .gz, .zst), or from the list in a .json file.

    `kind` names a row in messages. Raises `UserError` if a row is not a JSON object, or lacks a required key.
    """
    is_list = path.name.removesuffix(path.suffix if path.suffix in (".gz", ".zst") else "").endswith(".json")
    texts = read_items(path) if is_list else ((number, number, text) for number, text in read_lines(path))
    for number, line, text in texts:
        where = place(path, number, line)
        try:
            row = parse_json(text)
        except InvalidTrajectory as invalid:
            raise UserError(f"{where}: {invalid.detail}; each {kind} must be a JSON object") from None
        if not isinstance(row, dict):
            raise UserError(f"{where}: each {kind} must be a JSON object, got {text[:60]!r}")
        for key in required:
            if key not in row:
                keys = ", ".join(map(str, row)) or "none"
                raise UserError(f"{where}: the {kind} has no '{key}'{nearest(key, row)}; its keys: {keys}")
        yield number, row


def check_data(suite: str, path: Path | None, expected: str) -> Path:
    """Returns the path of a suite's data. Raises `UserError` if it is missing or does not exist."""
    if path is None:
        raise UserError(f"--suite {suite}: --data is missing: {expected}")
    if not path.exists():
        raise UserError(f"--data {path}: does not exist; give {expected}")
    return path
