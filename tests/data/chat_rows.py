"""Converts rows of chat formats and exports to them, for tests of these formats."""

from pathlib import Path
from typing import Any

from conversions import export, items

from xlam_jax.data.converters.common import Converted, Dropped
from xlam_jax.data.trajectory import Trajectory

TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
FLAT = {"name": "look", "description": "Looks.", "parameters": {"type": "object", "properties": {"b": {}, "a": {}}}}


def read(format: str, row: dict[str, Any], *repairs: str) -> Trajectory:
    """Converts a row that gives one trajectory, after exactly these repairs."""
    (item,) = items(format, row)
    assert isinstance(item, Converted), item
    assert [repair.reason for repair in item.repairs] == list(repairs), item.repairs
    return item.trajectory


def refused(format: str, row: dict[str, Any]) -> str:
    """Converts a row that is dropped; returns the reason and the detail."""
    (item,) = items(format, row)
    assert isinstance(item, Dropped), item
    assert (item.path, item.row) == (Path("rows.jsonl"), 7)
    return f"{item.reason}: {item.detail}"


def write(format: str, trajectory: Trajectory) -> tuple[dict[str, Any], set[str]]:
    """Exports to one row; returns (row as read from a file, reasons of losses)."""
    (row,), lost = export(format, trajectory)
    return row, lost
