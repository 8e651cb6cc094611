"""Where metrics go besides metrics.jsonl: TensorBoard, W&B, MLflow and trackio, each behind `Tracker`.

Each works in a thread of its own, behind a queue of bounded length, so that a run never waits for one and never ends by
one. A tracker that fails says so once; one that fails again and again is left alone; one too slow to follow misses
records; and at the end it is told how many did not arrive. metrics.jsonl has them all.
"""

import importlib.util
import json
import os
import re
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from textwrap import shorten
from typing import Any, Protocol

from xlam_jax import config as configs
from xlam_jax import documents
from xlam_jax.errors import UserError
from xlam_jax.outputs import write_text

KNOWN = "trackers.json"
"""In the run folder: each tracker's own name of the run, so that a continued run goes on there."""
METRICS = "metrics.jsonl"
QUEUE = 4096
"""Records that wait for a tracker at most."""
FAILURES = 3
"""A tracker that fails so often in a row is left alone."""
START_SECONDS = 20.0
"""A run waits so long for its trackers to start, for what they print then not to fall into the panel."""
CLOSE_SECONDS = 60.0
"""A run waits so long at its end for what is still to be sent."""
Flat = Mapping[str, float]
Clock = Callable[[], float]
"""Seconds since some moment, never fewer than before."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a tracker is told at its start."""

    folder: Path
    name: str
    project: str
    config: dict[str, Any]
    """The resolved config, as JSON values."""
    after: int
    """The run goes on after this step; 0 for a new one."""
    known: str | None
    """What `start` gave when the run was begun, None if it is new to the tracker."""


class Tracker(Protocol):
    """One place for metrics. All calls come from one thread, and may raise."""

    def start(self, run: Run) -> str | None:
        """Begins or continues a run; returns the tracker's own name of it, for `Run.known`."""

    def log(self, step: int, values: Flat) -> None:
        """Takes values such as train/sources/webshop/loss; several calls may belong to a step."""

    def close(self, failed: bool) -> None:
        """Ends the run there once everything is sent."""


class TensorBoard:
    """Event files in the run folder."""

    def start(self, run: Run) -> None:
        from tensorboardX import SummaryWriter

        # what a killed run left from this step on is hidden; a run without a checkpoint starts before its step 0
        self._board = SummaryWriter(str(run.folder / "tensorboard"), purge_step=run.after + 1 if run.after else 0)

    def log(self, step: int, values: Flat) -> None:
        for name, value in values.items():
            self._board.add_scalar(name, value, step)
        self._board.flush()  # or a killed run would lose what lies before its last checkpoint

    def close(self, failed: bool) -> None:
        self._board.close()


class Wandb:
    """Weights & Biases; its files lie in the run folder unless WANDB_DIR says otherwise."""

    def start(self, run: Run) -> str:
        import wandb

        # without a key it would ask at the terminal
        if wandb.setup().settings.mode in ("online", "shared") and not wandb.login(prompt=False):
            raise PermissionError("no API key: run `wandb login`, or set WANDB_API_KEY, or WANDB_MODE=offline")
        name = run.known or secrets.token_hex(4)
        self._run = wandb.init(
            project=run.project,
            name=run.name,
            id=name,
            resume="allow",
            dir=os.environ.get("WANDB_DIR", run.folder),
            config=run.config,
            # the panel is no log
            settings=None if "WANDB_CONSOLE" in os.environ else wandb.Settings(console="off"),
        )
        self._next = self._run.starting_step
        return name

    def log(self, step: int, values: Flat) -> None:
        if step >= self._next:  # it has the same values of earlier ones from before the run was killed
            self._run.log(dict(values), step=step)

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class Mlflow:
    """An MLflow server or store, as MLFLOW_TRACKING_URI names it."""

    PARAMS_A_CALL, PARAM_LENGTH = 100, 6000

    def start(self, run: Run) -> str:
        import mlflow
        from mlflow.entities import Metric, Param

        self._client, self._metric = mlflow.MlflowClient(), Metric
        self._last: dict[str, int] = {}
        if run.known:
            self._id = run.known
            self._client.update_run(self._id, status="RUNNING")
            for kind, key in (("train", "loss"), ("heldout", "loss"), ("requests", "exact")):
                history = self._client.get_metric_history(self._id, f"{kind}/{key}")
                self._last[kind] = max((metric.step for metric in history), default=-1)
            return self._id
        experiment = self._client.get_experiment_by_name(run.project)
        experiment_id = experiment.experiment_id if experiment else self._client.create_experiment(run.project)
        self._id = self._client.create_run(experiment_id, run_name=run.name).info.run_id
        named = {self._name(key): str(value) for key, value in flat(run.config, ".").items()}
        params = [Param(key, value[: self.PARAM_LENGTH]) for key, value in named.items()]
        for at in range(0, len(params), self.PARAMS_A_CALL):
            self._client.log_batch(self._id, params=params[at : at + self.PARAMS_A_CALL])
        return self._id

    def log(self, step: int, values: Flat) -> None:
        kind = next(iter(values), "").partition("/")[0]
        if step > self._last.get(kind, -1):  # it has the same values of earlier ones from before the run was killed
            now = round(time.time() * 1000)
            metrics = [self._metric(self._name(key), value, now, step) for key, value in values.items()]
            self._client.log_batch(self._id, metrics)

    def close(self, failed: bool) -> None:
        self._client.set_terminated(self._id, "FAILED" if failed else "FINISHED")

    @staticmethod
    def _name(key: str) -> str:
        """Of what else a source's name may hold, it takes nothing."""
        return re.sub(r"[^\w/. -]", "_", key)


class Trackio:
    """trackio: a store on this machine, or a Space that TRACKIO_SPACE_ID names."""

    def start(self, run: Run) -> str:
        import trackio

        # it knows a run by its name, and finds the newest of that name
        name = run.known or f"{run.name}-{secrets.token_hex(2)}"
        resume = "must" if run.known else "never"
        self._run = trackio.init(project=run.project, name=name, config=dict(run.config), resume=resume, embed=False)
        self._next = getattr(self._run, "_next_step", 0) if run.known else 0  # there is no public way to ask
        return name

    def log(self, step: int, values: Flat) -> None:
        if step >= self._next:  # it has the same values of earlier ones from before the run was killed
            self._run.log(dict(values), step=step)

    def close(self, failed: bool) -> None:
        self._run.finish()


TRACKERS: dict[str, Callable[[], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": Wandb,
    "mlflow": Mlflow,
    "trackio": Trackio,
}


def flat(values: Mapping[str, Any], separator: str = "/", prefix: str = "") -> dict[str, Any]:
    """Nested values by their path, such as sources/webshop/loss."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        path = f"{prefix}{name}"
        found |= flat(value, separator, f"{path}{separator}") if isinstance(value, Mapping) else {path: value}
    return found


def check_trackers(track: configs.Track) -> None:
    """Raises `UserError` when a tracker's package is missing; imports none of them."""
    for at, name in enumerate(track.to):
        spec = None if name == "tensorboard" else importlib.util.find_spec(name)
        # a mere folder of that name, such as W&B leaves where it runs, is found as well, and has no origin
        if name != "tensorboard" and (spec is None or spec.origin is None):
            raise UserError(
                f"track.to.{at}: {name} needs its package, which is not installed here; "
                f"pip install 'xlam_jax[{name}]', or take it out of track.to"
            )


class Sender:
    """One tracker in its thread."""

    def __init__(
        self,
        name: str,
        tracker: Tracker,
        run: Run,
        tell: Callable[[str], None],
        begun: Callable[[str], None],
        clock: Clock,
    ):
        """`tell` takes a line for people, `begun` the tracker's own name of the run."""
        self.name = name
        self._tracker, self._run, self._tell, self._begun, self._clock = tracker, run, tell, begun, clock
        self._records: deque[tuple[int, Flat]] = deque()
        self._change = threading.Condition()
        self._given = self._arrived = self._in_a_row = 0
        self._slow = self._told = self._off = self._ends = self._failed = False
        self._settled = threading.Event()
        self._thread = threading.Thread(target=self._work, name=f"tracker {name}", daemon=True)
        self._thread.start()

    def put(self, step: int, values: Flat) -> None:
        """Hands a record over; never waits."""
        self._given += 1
        with self._change:
            if self._off:
                return
            if len(self._records) < QUEUE:
                self._records.append((step, values))
                self._change.notify()
                return
        if not self._slow:
            self._slow = True
            self._tell(f"tracker {self.name} does not keep up: from step {step} on it misses records")

    def wait_start(self, until: float) -> None:
        """Waits until the tracker has started or failed to, or the clock says `until`."""
        if not self._settled.wait(max(0.0, until - self._clock())):
            self._tell(f"tracker {self.name} is not ready yet; the run goes on without waiting for it")

    def end(self, failed: bool) -> None:
        """Asks it to end once everything is sent."""
        with self._change:
            self._failed, self._ends = failed, True
            self._change.notify()

    def wait_end(self, until: float) -> None:
        """Waits for that, at most until the clock says `until`, and tells what is missing."""
        self._thread.join(max(0.0, until - self._clock()))
        if self._thread.is_alive():
            self._tell(f"tracker {self.name} does not come to an end and is left behind")
        missing = self._given - self._arrived
        if missing:
            self._tell(f"tracker {self.name} did not get {missing} of {self._given} records; {METRICS} has them all")

    def _work(self) -> None:
        started = self._try("start", self._start)
        self._settled.set()
        self._off = not started
        while not self._off:
            with self._change:
                self._change.wait_for(lambda: self._records or self._ends)
                if not self._records:
                    break
                step, values = self._records.popleft()
            if self._try(f"take step {step}", partial(self._tracker.log, step, values)):
                self._arrived += 1
                self._in_a_row = 0
            elif self._in_a_row == FAILURES:
                self._off = True
                self._tell(
                    f"tracker {self.name} failed {FAILURES} times in a row and gets nothing more after step {step}"
                )
        if started:
            self._try("end", lambda: self._tracker.close(self._failed))

    def _start(self) -> None:
        known = self._tracker.start(self._run)
        if known is not None:
            self._begun(known)

    def _try(self, what: str, call: Callable[[], None]) -> bool:
        try:
            call()
        except (Exception, SystemExit) as error:  # whatever it is, it is the tracker's and not the run's
            self._in_a_row += 1
            if not self._told:
                self._told = True
                reason = " ".join(f"{type(error).__name__}: {error}".split())
                self._tell(f"tracker {self.name} failed to {what}, the run goes on: {shorten(reason, 300)}")
            return False
        return True


class Trackers:
    """The trackers of a run, all told the same."""

    def __init__(self, senders: Sequence[Sender], clock: Clock):
        self._senders, self._clock = senders, clock

    def log(self, step: int, values: Flat) -> None:
        """Hands values such as train/loss to all; never waits and never fails."""
        for sender in self._senders:
            sender.put(step, values)

    def close(self, failed: bool = False) -> None:
        """Ends the run there, and tells what did not arrive; takes `CLOSE_SECONDS` at most."""
        for sender in self._senders:
            sender.end(failed)
        until = self._clock() + CLOSE_SECONDS
        for sender in self._senders:
            sender.wait_end(until)
        self._senders = ()


def _read_known(path: Path, tell: Callable[[str], None]) -> dict[str, dict[str, str]]:
    """Each tracker's project and run id in an earlier process; {} where the file is missing or damaged."""
    if not path.exists():
        return {}
    try:
        known = documents.read_object(path)
        if not all(isinstance(value, dict) for value in known.values()):
            raise UserError(f"{path}: each tracker's project and run are expected")
    except UserError as error:
        tell(f"warning: {error}; the trackers begin new runs")
        return {}
    return known


def open_trackers(
    track: configs.Track,
    run: Path,
    config: dict[str, Any],
    tell: Callable[[str], None],
    *,
    after: int,
    clock: Clock = time.monotonic,
) -> Trackers:
    """Starts the trackers of a run that goes on after the step `after`, for one host only.

    `config` is the resolved one as JSON values, `tell` takes lines for people. Raises `UserError` when a tracker's
    package is missing; what else goes wrong is told, and the run goes on.
    """
    check_trackers(track)
    path, lock = run / KNOWN, threading.Lock()
    known = _read_known(path, tell)

    def begun(name: str, own: str) -> None:
        with lock:
            known[name] = {"project": track.project, "run": own}
            write_text(path, json.dumps(known, indent=1) + "\n")

    senders = []
    for name in dict.fromkeys(track.to):
        before = known.get(name, {})
        told = Run(
            folder=run,
            name=track.name or run.resolve().name,
            project=track.project,
            config=config,
            after=after,
            known=before.get("run") if before.get("project") == track.project else None,
        )
        senders.append(Sender(name, TRACKERS[name](), told, tell, partial(begun, name), clock))
    until = clock() + START_SECONDS
    for sender in senders:
        sender.wait_start(until)
    return Trackers(senders, clock)
