"""Metrics of a run: the record, in which every step appears once, and the lines for people."""

import io
import json
from pathlib import Path
from typing import Any

import pytest

from xlam_jax.progress import Progress, Status
from xlam_jax.training import metrics as module
from xlam_jax.training.metrics import Metrics, plot, read

TRAIN = {
    "loss": 1.5,
    "aux_loss": 0.1,
    "grad_norm": 2.0,
    "tokens": 900.0,
    "trained_tokens": 300.0,
    "learning_rate": 3e-4,
}
HELDOUT = {
    "loss": 1.25,
    "trained_tokens": 1234.0,
    "sources": {
        "webshop": {"loss": 1.234, "tokens": 1000, "kinds": {"arguments": {"loss": 2.0, "tokens": 10}}},
        "hammer": {"loss": 0.98, "tokens": 234, "kinds": {}},
    },
}
REQUESTS = {"requests": 32, "parsable": 0.9, "schema_valid": 0.8, "right_function": 0.5, "exact": 0.25}
PAIRS = {"accuracy": 0.71, "margin": 0.125}


class Clock:
    """A clock that moves only on request."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


class FakeTrackers:
    """Records what trackers would receive."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, dict[str, float]]] = []
        self.closed: list[bool] = []

    def log(self, step: int, values: dict[str, float]) -> None:
        self.seen.append((step, values))

    def close(self, failed: bool = False) -> None:
        self.closed.append(failed)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module.time, "monotonic", clock.monotonic)
    return clock


def metrics(run: Path, *, start: int = 0, steps: int = 100, out: io.StringIO | None = None, **other: Any) -> Metrics:
    other = {"progress": Progress(out or io.StringIO()), "log_every": 1, "trackers": FakeTrackers()} | other
    return Metrics(run, start=start, steps=steps, places=1000, **other)


def lines(path: Path) -> list[dict[str, Any]]:
    """Returns its lines, read by a strict JSON parser."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_step_is_recorded_and_told(tmp_path: Path, clock: Clock):
    out, fake = io.StringIO(), FakeTrackers()
    with metrics(tmp_path, out=out, trackers=fake) as writer:
        clock.now += 2.0
        writer.record(1, "train", TRAIN | {"sources": {"webshop": {"loss": 1.1, "tokens": 300}}})
    (record,) = lines(tmp_path / "metrics.jsonl")
    assert (record["step"], record["kind"]) == (1, "train")
    assert (record["tokens_per_second"], record["trained_share"]) == (450.0, 0.3)
    assert record["sources"] == {"webshop": {"loss": 1.1, "tokens": 300}}
    assert out.getvalue() == (
        "step 1/100  loss 1.5000  450 tok/s  trained 30%  lr 3.00e-04  grad norm 2.000  left 3:18\n"
    )
    ((step, values),) = fake.seen
    assert step == 1
    assert values["train/sources/webshop/loss"] == 1.1
    assert values["train/tokens_per_second"] == 450.0
    assert not {name for name in values if "step" in name or "kind" in name}
    assert fake.closed == [False]


def test_what_is_told_of_evaluations_and_pairs(tmp_path: Path, clock: Clock):
    out = io.StringIO()
    with metrics(tmp_path, out=out) as writer:
        writer.record(0, "heldout", HELDOUT)
        clock.now += 1.0
        writer.record(5, "train", TRAIN | PAIRS)
        writer.record(5, "heldout", {"loss": 0.5, "trained_tokens": 10.0, "sources": {}} | PAIRS)
        writer.record(5, "requests", REQUESTS)
    heldout, train, pairs, requests = out.getvalue().splitlines()
    assert heldout == "step 0/100  held-out loss 1.2500 over 1,234 tokens (webshop 1.23, hammer 0.98)"
    assert train.startswith("step 5/100  loss 1.5000  accuracy 71%  margin 0.1250  900 tok/s")
    assert pairs == "step 5/100  held-out loss 0.5000 over 10 tokens  accuracy 71%  margin 0.1250"
    assert requests == (
        "step 5/100  32 held-out requests  parsable 90%  schema valid 80%  right function 50%  exact 25%"
    )
    assert [record["kind"] for record in read(tmp_path)] == ["heldout", "train", "heldout", "requests"]
    assert read(tmp_path)[0]["sources"]["webshop"]["kinds"] == {"arguments": {"loss": 2.0, "tokens": 10}}


def test_pauses_do_not_count(tmp_path: Path, clock: Clock):
    out = io.StringIO()
    with metrics(tmp_path, out=out, steps=5) as writer:
        for step in (1, 2, 3):
            clock.now += 2.0
            writer.record(step, "train", TRAIN)
            with writer.paused("evaluating"):
                clock.now += 1000.0
            clock.now += 500.0
            writer.exclude(500.0)
    assert [record["tokens_per_second"] for record in read(tmp_path)] == [450.0] * 3
    assert [line.rpartition("left ")[2] for line in out.getvalue().splitlines()] == ["0:08", "0:06", "0:04"]


def test_rates_are_of_the_last_steps(tmp_path: Path, clock: Clock):
    with metrics(tmp_path) as writer:
        for step in range(1, 41):
            clock.now += 10.0 if step <= 20 else 1.0
            writer.record(step, "train", TRAIN)
    rates = [record["tokens_per_second"] for record in read(tmp_path)]
    assert rates[19] == pytest.approx(90.0)
    assert rates[39] == pytest.approx(900.0)


def test_log_every_counts_in_a_log(tmp_path: Path):
    out = io.StringIO()
    with metrics(tmp_path, out=out, steps=7, log_every=3) as writer:
        for step in range(1, 8):
            writer.record(step, "train", TRAIN)
    assert [line.split()[1] for line in out.getvalue().splitlines()] == ["3/7", "6/7", "7/7"]
    assert len(read(tmp_path)) == 7


class Screen(Progress):
    """Records what a terminal would show."""

    def __init__(self) -> None:
        super().__init__(io.StringIO())
        self.live, self.shown, self.kept, self.closed = True, [], [], False

    def step(self, status: Status, *, keep: bool) -> None:
        self.shown.append(dict(status.fields))

    def line(self, text: str) -> None:
        self.kept.append((text, self.closed))

    def close(self) -> None:
        self.closed = True


def test_what_the_panel_shows_also_after_a_kill(tmp_path: Path):
    screen = Screen()
    with metrics(tmp_path, progress=screen) as writer:
        writer.record(0, "heldout", HELDOUT)
        writer.record(1, "train", TRAIN)
        writer.record(2, "train", TRAIN | {"loss": 0.5})
        writer.record(2, "requests", REQUESTS)
    assert screen.shown[0]["loss"] == "1.5000 (last 1.5000)"
    assert screen.shown[1]["loss"] == "1.0000 (last 0.5000)"
    assert list(screen.shown[1]) == ["loss", "held-out", "", "trained", "lr", "grad norm"]
    assert screen.shown[1]["held-out"] == "1.2500 at 0"
    assert [text.split("  ")[1] for text, _ in screen.kept[:2]] == [
        "held-out loss 1.2500 over 1,234 tokens (webshop 1.23, hammer 0.98)",
        "32 held-out requests",
    ]
    last, below = screen.kept[-1]  # the last state stays when the panel is removed
    assert last.startswith("step 2/100  loss 0.5000")
    assert below
    again = Screen()
    with metrics(tmp_path, start=2, progress=again) as writer:
        writer.record(3, "train", TRAIN | PAIRS)
    (shown,) = again.shown
    assert shown["loss"] == "1.1667 (last 1.5000)"
    assert (shown["held-out"], shown["exact"]) == ("1.2500 at 0", "25% at 2")
    assert (shown["accuracy"], shown["margin"]) == ("71%", "0.1250")


def test_every_step_stands_once_after_a_kill(tmp_path: Path):
    with metrics(tmp_path) as writer:
        writer.record(0, "heldout", HELDOUT)
        for step in range(1, 8):
            writer.record(step, "train", TRAIN)
            writer.append_samples([{"step": step, "text": "ä", "exact": True}, {"step": step, "text": "two"}])
        writer.record(7, "heldout", HELDOUT)
    kept = (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[:6]
    with (tmp_path / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 8, "kind": "tr')  # killed while writing
    with metrics(tmp_path, start=5) as writer:
        assert (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines() == kept
        for step in range(6, 11):
            writer.record(step, "train", TRAIN)
        writer.append_samples([{"step": 10, "text": "three"}])
    logged = [(record["step"], record["kind"]) for record in lines(tmp_path / "metrics.jsonl")]
    assert logged == [(0, "heldout"), *((step, "train") for step in range(1, 11))]
    assert [line["step"] for line in lines(tmp_path / "samples.jsonl")] == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 10]
    assert lines(tmp_path / "samples.jsonl")[0] == {"step": 1, "text": "ä", "exact": True}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "samples.jsonl"]


def test_a_run_killed_before_its_first_checkpoint_begins_anew(tmp_path: Path):
    with metrics(tmp_path) as writer:
        writer.record(0, "heldout", HELDOUT)
        writer.record(1, "train", TRAIN)
        writer.append_samples([{"step": 0}])
    with metrics(tmp_path) as writer:
        writer.record(0, "heldout", HELDOUT)
    assert [(record["step"], record["kind"]) for record in read(tmp_path)] == [(0, "heldout")]
    assert lines(tmp_path / "samples.jsonl") == []


def test_what_is_not_finite_is_null_and_named(tmp_path: Path):
    nan, infinite = float("nan"), float("inf")
    out, fake = io.StringIO(), FakeTrackers()
    with metrics(tmp_path, out=out, trackers=fake) as writer:
        writer.record(1, "train", TRAIN | {"loss": nan, "sources": {"webshop": {"loss": -infinite, "tokens": 3}}})
        writer.record(2, "train", TRAIN)
        writer.record(2, "heldout", HELDOUT | {"loss": infinite})
    first, second, heldout = lines(tmp_path / "metrics.jsonl")
    assert first["loss"] is None
    assert first["sources"] == {"webshop": {"loss": None, "tokens": 3}}
    assert first["not_finite"] == {"loss": "nan", "sources/webshop/loss": "-inf"}
    assert "not_finite" not in second
    assert heldout["not_finite"] == {"loss": "inf"}
    assert "loss nan" in out.getvalue()
    assert "held-out loss inf" in out.getvalue()
    assert fake.seen[0][1]["train/sources/webshop/loss"] == -infinite
    again = Screen()
    with metrics(tmp_path, start=2, progress=again) as writer:  # reads nulls
        writer.record(3, "train", TRAIN)
    assert again.shown[0]["loss"] == "1.5000 (last 1.5000)"
    assert again.shown[0]["held-out"] == "nan at 2"
    assert plot(tmp_path).read_bytes().startswith(b"\x89PNG")


def test_a_host_that_does_not_write_leaves_the_folder_alone(tmp_path: Path):
    with metrics(tmp_path) as writer:
        writer.record(1, "train", TRAIN)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    out = io.StringIO()
    with metrics(tmp_path, out=out, writes=False, trackers=None) as writer:
        writer.record(1, "train", TRAIN)
        writer.record(1, "heldout", HELDOUT)
        writer.append_samples([{"step": 1}])
        with writer.paused("saving"):
            pass
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
    assert out.getvalue() == ""


def test_the_plot_is_of_what_was_recorded(tmp_path: Path):
    with metrics(tmp_path) as writer:
        for step in range(1, 5):
            writer.record(step, "train", TRAIN | PAIRS)
    assert plot(tmp_path).read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "loss.part.png").exists()
