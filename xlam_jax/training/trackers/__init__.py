"""Trackers of metrics in addition to metrics.jsonl: TensorBoard, W&B, MLflow and trackio, each a `Tracker`.

Each tracker runs in a separate thread with a bounded queue, so that a run never waits for a tracker and never fails
because of it. The first failure of a tracker is reported. A tracker that fails repeatedly gets no more records, and a
slow one misses some; the number of missing records is reported at the end. metrics.jsonl contains all of them.
"""

import importlib.util
import json
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from xlam_jax import documents
from xlam_jax.config import Track
from xlam_jax.errors import UserError
from xlam_jax.outputs import write_text
from xlam_jax.training.trackers.mlflow import Mlflow
from xlam_jax.training.trackers.sender import Clock, Sender, Trackers
from xlam_jax.training.trackers.tensorboard import TensorBoard
from xlam_jax.training.trackers.tracker import TrackedRun, Tracker, flatten
from xlam_jax.training.trackers.trackio import Trackio
from xlam_jax.training.trackers.wandb import Wandb

__all__ = ["TRACKERS", "TrackedRun", "Tracker", "Trackers", "check_trackers", "flatten", "open_trackers"]

NAMES = "trackers.json"
"""File in the run folder with each tracker's own name of the run, with which a resumed run continues there."""
START_SECONDS = 20.0
"""Maximum time that a run waits for its trackers to start, so that what they print does not land in the panel."""
TRACKERS: dict[str, Callable[[], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": Wandb,
    "mlflow": Mlflow,
    "trackio": Trackio,
}


def check_trackers(track: Track) -> None:
    """Raises `UserError` when a tracker's package is missing; imports none of them."""
    for at, name in enumerate(track.to):
        spec = None if name == "tensorboard" else importlib.util.find_spec(name)
        # find_spec also finds a plain folder of that name, such as W&B leaves where it runs; it has no origin
        if name != "tensorboard" and (spec is None or spec.origin is None):
            raise UserError(
                f"track.to.{at}: {name} needs its package, which is not installed here; "
                f"pip install 'xlam_jax[{name}]', or remove it from track.to"
            )


def open_trackers(
    track: Track,
    run: Path,
    config: dict[str, Any],
    report: Callable[[str], None],
    *,
    after: int,
    clock: Clock = time.monotonic,
) -> Trackers:
    """Starts the trackers of a run that continues after the step `after`; on one host only.

    `config` is the resolved config as JSON values, `report` takes lines for people. Raises `UserError` when a tracker's
    package is missing. Any other failure is reported, and the run continues.
    """
    check_trackers(track)
    path, lock = run / NAMES, threading.Lock()
    names = _read_names(path, report)

    def remember(name: str, own_name: str) -> None:
        with lock:
            names[name] = {"project": track.project, "run": own_name}
            write_text(path, json.dumps(names, indent=1) + "\n")

    senders = []
    for name in dict.fromkeys(track.to):
        before = names.get(name, {})
        tracked = TrackedRun(
            folder=run,
            name=track.name or run.resolve().name,
            project=track.project,
            config=config,
            after=after,
            own_name=before.get("run") if before.get("project") == track.project else None,
        )
        senders.append(Sender(name, TRACKERS[name](), tracked, report, partial(remember, name), clock))
    until = clock() + START_SECONDS
    for sender in senders:
        sender.wait_start(until)
    return Trackers(senders, clock)


def _read_names(path: Path, report: Callable[[str], None]) -> dict[str, dict[str, str]]:
    """Each tracker's project and run id in an earlier process; {} where the file is missing or damaged."""
    if not path.exists():
        return {}
    try:
        names = documents.read_object(path)
        if not all(isinstance(value, dict) for value in names.values()):
            raise UserError(f"{path}: each tracker's project and run are expected")
    except UserError as error:
        report(f"warning: {error}; the trackers begin new runs")
        return {}
    return names
