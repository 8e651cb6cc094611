"""The unified trajectory itself: the conversion repairs rows and brings them into the canonical form.

Raw: {"unique_trajectory_id", "source", "score", "task_instruction", "tools", "conversation"}; only `conversation` is
required.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from xlam_jax.data.converters.common import Converted, Dropped, convert_rows


def convert(paths: list[Path]) -> Iterator[Converted | Dropped]:
    """Converts each row to one trajectory; a row without id gets one from its file and line."""
    return convert_rows(paths, convert_row)


def convert_row(row: dict[str, Any], name: str) -> Iterator[dict[str, Any]]:
    """Adds an id to a row without one; the parser repairs the rest."""
    yield {"unique_trajectory_id": name} | {key: value for key, value in row.items() if value is not None}
