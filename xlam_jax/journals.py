"""Files of one JSON value per line that grow while a command runs, such as metrics.jsonl."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SHOWN = 5
"""Problems of a file that a warning names; the rest is counted."""


def json_lines(path: Path, problems: list[str]) -> Iterator[tuple[int, Any]]:
    """Yields (number, value) of a file's lines. A line that is not JSON is reported in `problems` and skipped; a last
    line that a kill cut short is skipped without."""
    from pydantic_core import from_json  # three times as fast as json on these records

    with path.open("rb") as file:
        for at, line in enumerate(file, 1):
            try:
                value = from_json(line)
            except ValueError:
                try:
                    value = json.loads(line)  # it also takes half a surrogate pair
                except ValueError:
                    if line.endswith(b"\n"):
                        problems.append(f"line {at} is not valid JSON")
                    continue
            yield at, value


def summarize(path: Path, problems: list[str], done: str = "left out") -> list[str]:
    """One warning for all that is wrong with a file, or none."""
    if not problems:
        return []
    rest = f", and {len(problems) - SHOWN:,} more like this" if len(problems) > SHOWN else ""
    return [f"{path}: {'; '.join(problems[:SHOWN])}{rest}: {done}"]
