"""Converts rows and files and exports trajectories, for tests of converters."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

from xlam_jax.data.converters import CONVERTERS, exporter, row_converter
from xlam_jax.data.converters.common import Converted, Dropped, Lost, convert_one
from xlam_jax.data.trajectory import Trajectory


def items(format: str, row: dict[str, Any]) -> list[Converted | Dropped]:
    """Converts one row, row 7 of its file."""
    convert_row = row_converter(format)
    assert convert_row
    return list(convert_one(Path("rows.jsonl"), 7, row, convert_row))


def export(name: str, trajectory: Trajectory) -> tuple[list[dict[str, Any]], set[str]]:
    """Exports a trajectory; returns (rows as read from a file, reasons of losses)."""
    exported = list(exporter(name)(trajectory))
    text = json.dumps([item for item in exported if isinstance(item, dict)], ensure_ascii=False, allow_nan=False)
    return json.loads(text), {item.reason for item in exported if isinstance(item, Lost)}


def run(name: str, *paths: Path) -> tuple[list[Trajectory], list[tuple], Counter]:
    """Converts files; returns (trajectories, (unit, row, reason) of dropped ones, number of repairs by reason)."""
    results = list(CONVERTERS[name](list(paths)))
    kept = [item for item in results if isinstance(item, Converted)]
    dropped = [(item.unit, item.row, item.reason) for item in results if isinstance(item, Dropped)]
    repaired = Counter(repair.reason for item in kept for repair in item.repairs)
    return [item.trajectory for item in kept], dropped, repaired


def turns(trajectory: Trajectory) -> list[tuple]:
    """Returns (role, text) of each turn, and of assistant turns also the calls."""
    return [
        (m.role, m.content, *((call.name, call.arguments) for call in m.tool_calls)) for m in trajectory.conversation
    ]
