"""The unified trajectory itself: reading it mends what can be mended, and writes every row in its canonical form.

Raw: {"unique_trajectory_id", "source", "score", "task_instruction", "tools", "conversation"}; the last alone is a must.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from xlam_jax.data.converters.common import Converted, Dropped, convert_rows


def convert(paths: list[Path]) -> Iterator[Converted | Dropped]:
    """Each row becomes one trajectory; a row without id is named after its file and line."""
    return convert_rows(paths, convert_row)


def convert_row(row: dict[str, Any], name: str) -> Iterator[dict[str, Any]]:
    """Gives the row an id; the rest is the reader's to mend."""
    yield {"unique_trajectory_id": name} | {key: value for key, value in row.items() if value is not None}
