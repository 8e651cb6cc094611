"""The protocol of a tracker, which shows the metrics of a run in addition to metrics.jsonl."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

Flat = Mapping[str, float]
"""Values by path, such as train/sources/webshop/loss."""


@dataclass(frozen=True, kw_only=True)
class TrackedRun:
    """Description of a run that a tracker receives at its start."""

    folder: Path
    name: str
    project: str
    config: dict[str, Any]
    """The resolved config, as JSON values."""
    after: int
    """The step that the run continues after; 0 for a new run."""
    own_name: str | None
    """The name that `start` returned when the run was begun; None if the run is new to the tracker."""


class Tracker(Protocol):
    """Destination of metrics. All calls come from the same thread and may raise."""

    def start(self, run: TrackedRun) -> str | None:
        """Begins or continues a run; returns the tracker's own name of it, for `own_name` of later starts."""

    def log(self, step: int, values: Flat) -> None:
        """Takes values of a step. There may be several calls for one step."""

    def close(self, failed: bool) -> None:
        """Ends the run in the tracker, once everything is sent."""


def flatten(values: Mapping[str, Any], separator: str = "/", prefix: str = "") -> dict[str, Any]:
    """Nested values by path, such as sources/webshop/loss."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        path = f"{prefix}{name}"
        flat |= flatten(value, separator, f"{path}{separator}") if isinstance(value, Mapping) else {path: value}
    return flat
