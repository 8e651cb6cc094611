"""Trackers: the real packages without a network, and what happens when one fails, hangs or is missing."""

import json
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support import ROOT, deadline, wait_until

from xlam_jax import train
from xlam_jax.config import Track
from xlam_jax.errors import UserError
from xlam_jax.progress import Progress
from xlam_jax.training import trackers as module
from xlam_jax.training.metrics import Metrics
from xlam_jax.training.trackers import NAMES, TrackedRun, check_trackers, flatten, open_trackers, sender

CONFIG = {"model": {"config": "model.json"}, "train": {"steps": 10}, "data": {"sources": [{"name": "shop"}]}}


def loss_of(step: int) -> float:
    return 1 / step


def live(run: Path, name: str, after: int, to: int, *, failed: bool = False, project: str = "mine") -> list[str]:
    """Runs steps after `after` up to `to`, evaluated at every fifth. Returns the lines for people."""
    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("xlam_jax.training.trackers.START_SECONDS", 600)  # on a busy machine, a tracker starts late
        patch.setattr(sender, "CLOSE_SECONDS", 600)
        trackers = open_trackers(
            Track.model_validate({"to": [name], "project": project}), run, CONFIG, said.append, after=after
        )
        if not after:
            trackers.log(0, {"heldout/loss": 3.0})
        for step in range(after + 1, to + 1):
            trackers.log(step, {"train/loss": loss_of(step), "train/sources/shop (a)/loss": 2.0})
            if step % 5 == 0:
                trackers.log(step, {"heldout/loss": 3.0})
        trackers.close(failed)
    return said


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "my run"
    folder.mkdir()
    return folder


def test_tensorboard_shows_each_step_once_after_a_kill(run: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    # the second was killed before its first checkpoint
    for after, to in ((0, 8), (0, 7), (5, 10)):
        assert live(run, "tensorboard", after, to) == []
        time.sleep(1.01)  # the name of a file contains the second in which it was created
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    points = [(point.step, point.value) for point in events.Scalars("train/loss")]
    assert points == [(step, pytest.approx(loss_of(step))) for step in range(1, 11)]
    assert [point.step for point in events.Scalars("heldout/loss")] == [0, 5, 10]


@pytest.fixture
def wandb_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Isolates W&B from the user's settings and removes everything that it writes."""
    for name in ("CACHE", "CONFIG", "DATA"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / "elsewhere"))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    yield
    import wandb

    wandb.teardown()


@pytest.mark.usefixtures("wandb_apart")
def test_wandb_continues_its_run(run: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert live(run, "wandb", 0, 8, failed=True) == []
    own_name = json.loads((run / NAMES).read_text(encoding="utf-8"))["wandb"]["run"]
    [folder] = (run / "wandb").glob(f"offline-run-*-{own_name}")
    assert wandb_history(folder / f"run-{own_name}.wandb") == ({step: loss_of(step) for step in range(1, 9)}, 1)
    folder.rename(
        run / "before"
    )  # W&B names folders by the second: another run in the same second would overwrite this one
    assert live(run, "wandb", 5, 10) == []
    [folder] = (run / "wandb").glob(f"offline-run-*-{own_name}")
    assert wandb_history(folder / f"run-{own_name}.wandb") == ({step: loss_of(step) for step in range(6, 11)}, 0)


def wandb_history(path: Path) -> tuple[dict[int, float], int]:
    """Returns the losses by step of a W&B file, and the exit code. W&B's service writes the last records some time
    after a run has ended."""
    losses, code = read_wandb(path)
    for _ in range(600):
        if code != -1:
            break
        time.sleep(0.1)
        losses, code = read_wandb(path)
    return losses, code


def read_wandb(path: Path) -> tuple[dict[int, float], int]:
    """Reads the current contents of the file: a log in LevelDB's format."""
    from wandb.proto.wandb_internal_pb2 import Record  # pyright: ignore[reportAttributeAccessIssue]  generated

    content, at, parts, losses, code = path.read_bytes(), 7, b"", {}, -1
    while at + 7 <= len(content):
        if at // 32768 != (at + 6) // 32768:  # a block's end too short for a header
            at += -at % 32768
            continue
        length, kind = struct.unpack("<HB", content[at + 4 : at + 7])
        if at + 7 + length > len(content):  # it is being written
            break
        parts += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a complete record, or its last part
            record = Record.FromString(parts)
            parts = b""
            values = {
                "/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item
            }
            if "train/loss" in values:
                losses[int(values["_step"])] = values["train/loss"]
            if record.HasField("exit"):
                code = record.exit.exit_code
    return losses, code


@pytest.mark.usefixtures("wandb_apart")
def test_wandb_without_a_key_says_what_to_do_and_asks_nothing(run: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setattr("wandb.errors.term.can_use_terminput", lambda: True)
    started, *rest = live(run, "wandb", 0, 2)
    assert "tracker wandb failed to start, the run continues: PermissionError: no API key: run `wandb login`" in started
    assert rest == ["tracker wandb did not get 3 of 3 records; metrics.jsonl has them all"]


@pytest.fixture
def mlflow_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{tmp_path}/mlruns")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")


@pytest.mark.usefixtures("mlflow_store")
def test_mlflow_continues_its_run(run: Path):
    assert live(run, "mlflow", 0, 8, failed=True) == []
    import mlflow

    client = mlflow.MlflowClient()
    own_name = json.loads((run / NAMES).read_text(encoding="utf-8"))["mlflow"]["run"]
    assert client.get_run(own_name).info.status == "FAILED"
    assert live(run, "mlflow", 5, 10) == []
    run_there = client.get_run(own_name)
    assert (run_there.info.status, run_there.info.run_name) == ("FINISHED", "my run")
    assert run_there.data.params["train.steps"] == "10"
    history = client.get_metric_history(own_name, "train/loss")
    assert [(point.step, point.value) for point in history] == [(step, loss_of(step)) for step in range(1, 11)]
    assert [point.step for point in client.get_metric_history(own_name, "train/sources/shop _a_/loss")] == [
        *range(1, 11)
    ]
    assert [point.step for point in client.get_metric_history(own_name, "heldout/loss")] == [0, 5, 10]
    assert live(run, "mlflow", 5, 10, project="another") == []  # a run belongs to one project
    assert json.loads((run / NAMES).read_text(encoding="utf-8"))["mlflow"]["run"] != own_name


@pytest.mark.usefixtures("mlflow_store")
def test_mlflow_that_lost_the_run_says_so(run: Path):
    (run / NAMES).write_text(json.dumps({"mlflow": {"project": "mine", "run": "0" * 32}}), encoding="utf-8")
    started, missing = live(run, "mlflow", 5, 7)
    assert "tracker mlflow failed to start, the run continues: MlflowException: Run '000" in started
    assert missing == "tracker mlflow did not get 2 of 2 records; metrics.jsonl has them all"


def test_trackio_continues_its_run(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert "trackio" not in sys.modules, "it reads where to write when it is imported"
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    assert live(run, "trackio", 0, 8) == []
    assert live(run, "trackio", 5, 10) == []
    from trackio.sqlite_storage import SQLiteStorage

    own_name = json.loads((run / NAMES).read_text(encoding="utf-8"))["trackio"]["run"]
    assert own_name.startswith("my run-")
    logs = SQLiteStorage.get_logs("mine", own_name)
    losses = [(entry["step"], entry["train/loss"]) for entry in logs if "train/loss" in entry]
    assert losses == [(step, loss_of(step)) for step in range(1, 11)]


class Good:
    """Records the calls that it receives."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, Any]] = []
        self.begun: list[TrackedRun] = []
        self.closed: list[bool] = []

    def start(self, run: TrackedRun) -> str | None:
        self.begun.append(run)
        return "own name"

    def log(self, step: int, values: Any) -> None:
        self.seen.append((step, dict(values)))

    def close(self, failed: bool) -> None:
        self.closed.append(failed)


class Raising(Good):
    """Raises in the method that `at` names; in log, only at some of the steps."""

    def __init__(self, at: str, steps: range = range(1000)) -> None:
        super().__init__()
        self._at, self._steps = at, steps

    def start(self, run: TrackedRun) -> str | None:
        if self._at == "start":
            raise ConnectionError("no\nserver")
        return super().start(run)

    def log(self, step: int, values: Any) -> None:
        if self._at == "log" and step in self._steps:
            raise SystemExit("no " + "space " * 200)
        super().log(step, values)

    def close(self, failed: bool) -> None:
        if self._at == "close":
            raise ValueError("not now")
        super().close(failed)


class Hanging(Good):
    """Waits in the method that `at` names, for ever or until the test is over."""

    over = threading.Event()

    def __init__(self, at: str) -> None:
        super().__init__()
        self._at = at

    def _wait(self, at: str) -> None:
        if at == self._at:
            self.over.wait()

    def start(self, run: TrackedRun) -> str | None:
        self._wait("start")
        return super().start(run)

    def log(self, step: int, values: Any) -> None:
        self._wait("log")
        super().log(step, values)

    def close(self, failed: bool) -> None:
        self._wait("close")
        super().close(failed)


@pytest.fixture
def hanging_ends() -> Iterator[None]:
    Hanging.over.clear()
    yield
    Hanging.over.set()


def metrics_run(
    run: Path,
    monkeypatch: pytest.MonkeyPatch,
    tracker: Good,
    *,
    steps: int = 10,
    clock: Callable[[], float] = time.monotonic,
) -> list[str]:
    """Runs `Metrics` with a working tracker and this one; returns the lines about trackers."""
    good, said = Good(), []
    monkeypatch.setitem(module.TRACKERS, "wandb", lambda: tracker)
    monkeypatch.setitem(module.TRACKERS, "tensorboard", lambda: good)
    progress = Progress(quiet=True)
    monkeypatch.setattr(progress, "line", said.append)
    track = Track(to=["tensorboard", "wandb"])
    values = {"loss": 1.5, "grad_norm": 1.0, "tokens": 10.0, "trained_tokens": 5.0, "learning_rate": 0.1}
    trackers = open_trackers(track, run, CONFIG, progress.line, after=0, clock=clock)
    with Metrics(run, start=0, steps=steps, places=10, progress=progress, log_every=1000, trackers=trackers) as metrics:
        for step in range(1, steps + 1):
            metrics.record(step, "train", values | {"sources": {"shop": {"loss": 1.0}}})
            wait_until(lambda step=step: len(good.seen) >= step)
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, steps + 1))
    assert [step for step, _ in good.seen] == list(range(1, steps + 1))
    assert good.seen[0][1]["train/sources/shop/loss"] == 1.0
    assert good.closed == [False]
    return [line for line in said if "tracker" in line]


def test_what_a_good_tracker_is_told(run: Path, monkeypatch: pytest.MonkeyPatch):
    tracker = Good()
    assert metrics_run(run, monkeypatch, tracker) == []
    (begun,) = tracker.begun
    assert (begun.folder, begun.name, begun.project) == (run, "my run", "xlam_jax")
    assert (begun.after, begun.own_name) == (0, None)
    assert begun.config == CONFIG
    assert json.loads((run / NAMES).read_text(encoding="utf-8"))["wandb"] == {"project": "xlam_jax", "run": "own name"}


def test_one_that_fails_to_start(run: Path, monkeypatch: pytest.MonkeyPatch):
    assert metrics_run(run, monkeypatch, Raising("start")) == [
        "tracker wandb failed to start, the run continues: ConnectionError: no server",
        "tracker wandb did not get 10 of 10 records; metrics.jsonl has them all",
    ]


def test_one_that_fails_at_every_record(run: Path, monkeypatch: pytest.MonkeyPatch):
    tracker = Raising("log")
    first, left_alone, missing = metrics_run(run, monkeypatch, tracker)
    assert first.startswith("tracker wandb failed to take step 1, the run continues: SystemExit: no space space")
    assert len(first) < 400
    assert left_alone == "tracker wandb failed 3 times in a row and gets no more records after step 3"
    assert missing == "tracker wandb did not get 10 of 10 records; metrics.jsonl has them all"
    assert tracker.closed == [False]


def test_one_that_fails_now_and_then(run: Path, monkeypatch: pytest.MonkeyPatch):
    tracker = Raising("log", range(0, 1000, 2))
    first, missing = metrics_run(run, monkeypatch, tracker)
    assert first.startswith("tracker wandb failed to take step 2")
    assert missing == "tracker wandb did not get 5 of 10 records; metrics.jsonl has them all"
    assert [step for step, _ in tracker.seen] == [1, 3, 5, 7, 9]


def test_one_that_fails_at_the_end(run: Path, monkeypatch: pytest.MonkeyPatch):
    assert metrics_run(run, monkeypatch, Raising("close")) == [
        "tracker wandb failed to end, the run continues: ValueError: not now"
    ]


@pytest.mark.usefixtures("hanging_ends")
@pytest.mark.parametrize("at", ["start", "log", "close"])
@pytest.mark.parametrize("real", [False, pytest.param(True, marks=pytest.mark.nightly)])
def test_one_that_hangs(at: str, real: bool, run: Path, monkeypatch: pytest.MonkeyPatch):
    """The fake clock moves only while the run waits for the hanging tracker."""
    monkeypatch.setattr(module, "START_SECONDS", 0.2 if real else deadline(60))
    monkeypatch.setattr(sender, "CLOSE_SECONDS", 0.2 if real else deadline(60))
    monkeypatch.setattr(sender, "QUEUE", 50)
    steps = 10 if at == "close" else 100
    day = 86400.0
    at_start = [0.0, 0.0, day if at == "start" else 0.0]  # the time itself, and the limit for each of the two
    times = iter([*at_start, 2 * day, 2 * day, 3 * day])
    began = time.monotonic()
    said = metrics_run(
        run, monkeypatch, Hanging(at), steps=steps, clock=time.monotonic if real else lambda: next(times)
    )
    assert not real or time.monotonic() - began < deadline(30)
    not_ready = ["tracker wandb is not ready yet; the run continues without waiting for it"] if at == "start" else []
    assert said[: len(not_ready)] == not_ready
    if at != "close":
        assert said[len(not_ready)].startswith("tracker wandb is too slow: it misses records from step 5")
        assert said[-1] == "tracker wandb did not get 100 of 100 records; metrics.jsonl has them all"
    assert said.count("tracker wandb does not end and is abandoned") == 1


def test_a_failed_run_is_told(run: Path, monkeypatch: pytest.MonkeyPatch):
    tracker = Good()
    monkeypatch.setitem(module.TRACKERS, "wandb", lambda: tracker)
    trackers = open_trackers(Track(to=["wandb"]), run, CONFIG, print, after=0)

    def fail() -> None:
        with Metrics(run, start=0, steps=1, places=1, progress=Progress(quiet=True), log_every=1, trackers=trackers):
            raise UserError("NaN")

    with pytest.raises(UserError):
        fail()
    assert tracker.closed == [True]


@pytest.mark.parametrize("folder", [False, True], ids=["nothing", "only a folder of its name"])
def test_a_missing_package_stops_the_run_before_it_starts(
    folder: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    if folder:
        (tmp_path / "wandb").mkdir()  # as W&B leaves it in its working directory
    with pytest.raises(UserError, match=r"track\.to\.1: wandb needs its package.*pip install 'xlam_jax\[wandb\]'"):
        check_trackers(Track(to=["tensorboard", "wandb"]))
    check_trackers(Track())


def test_the_command_says_so_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config, out = ROOT / "configs/quickstart.yaml", tmp_path / "run"
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["train", "--config", str(config), "track.to=[mlflow]", f"output_dir={out}"])
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(train, "with_huge_pages", lambda: pytest.fail("the run begins"))
    with pytest.raises(UserError, match=r"track\.to\.0: mlflow needs its package"):
        train.main()
    assert not out.exists()


def test_flat():
    assert flatten({"a": 1, "b": {"c": {"d": 2}, "e": 3}, "f": {}}) == {"a": 1, "b/c/d": 2, "b/e": 3}
    assert flatten({"b": {"c": 1}}, ".") == {"b.c": 1}
