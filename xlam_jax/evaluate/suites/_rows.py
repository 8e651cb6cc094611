"""Reading the rows of a suite's data."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from xlam_jax.data.files import read_items, read_lines
from xlam_jax.data.row_json import parse_json
from xlam_jax.data.rows import place
from xlam_jax.data.trajectory import InvalidTrajectory
from xlam_jax.errors import UserError, nearest


def read_rows(path: Path, what: str, *required: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Streams (number from 1, object) from a .jsonl file (also .gz, .zst), or from the list in a .json file.

    `what` says in a word what a row is. Raises `UserError` for a row that is no JSON object or lacks a required key.
    """
    is_list = path.name.removesuffix(path.suffix if path.suffix in (".gz", ".zst") else "").endswith(".json")
    texts = read_items(path) if is_list else ((number, number, text) for number, text in read_lines(path))
    for number, line, text in texts:
        where = place(path, number, line)
        try:
            row = parse_json(text)
        except InvalidTrajectory as invalid:
            raise UserError(f"{where}: {invalid.detail}; each {what} is one JSON object") from None
        if not isinstance(row, dict):
            raise UserError(f"{where}: each {what} is one JSON object, got {text[:60]!r}")
        for key in required:
            if key not in row:
                keys = ", ".join(map(str, row)) or "none"
                raise UserError(f"{where}: the {what} has no '{key}'{nearest(key, row)}; its keys: {keys}")
        yield number, row


def wanted(suite: str, path: Path | None, what: str) -> Path:
    """The path, which must be there. Raises `UserError`."""
    if path is None:
        raise UserError(f"--suite {suite}: --data is missing: {what}")
    if not path.exists():
        raise UserError(f"--data {path}: does not exist; give {what}")
    return path
