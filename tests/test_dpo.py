"""Training on pairs: the reference policy, kill and resume, invalid input, and the metrics of a run."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp
from small_pairs import write_config, write_pairs
from support import ROOT, Commands, assert_same_run, train_losses
from test_train import TRAIN

from xlam_jax import config as configs
from xlam_jax import train
from xlam_jax.errors import UserError
from xlam_jax.parallel.link import Hosts
from xlam_jax.progress import Progress
from xlam_jax.signals import Stop
from xlam_jax.training.dry_run import dry_run
from xlam_jax.training.run_folder import check_run_folder

LORA = ("train.trainable=lora", "lora.rank=4")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("pairs") / "pairs.jsonl")


@pytest.fixture(scope="module")
def config(pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny dense model on pairs whose sides call different functions."""
    return write_config(tmp_path_factory.mktemp("config"), pairs)


def started(config: Path, run: Path, *overrides: str) -> list[dict[str, Any]]:
    """Trains in this process and returns the records."""
    resolved = configs.load(config, [f"output_dir={run}", *overrides])
    check_run_folder(run, resolved)
    with Progress(quiet=True) as progress:
        assert train.train(resolved, run, progress, Hosts(), Stop()) == 0
    return records_of(run)


def records_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def test_adapters_off_and_precomputed_are_one_reference(config: Path, tmp_path: Path):
    """New adapters have no effect, so the model without them is the start of the run."""
    resident = started(config, tmp_path / "off", *LORA)
    computed = started(config, tmp_path / "computed", *LORA, "objective.reference=precomputed")
    assert len(resident) == len(computed) == 8 + 3
    for one, other in zip(resident, computed, strict=True):
        assert one.keys() == other.keys()
        for name in ("loss", "margin", "rewards_chosen", "rewards_rejected", "kl"):
            np.testing.assert_allclose(one[name], other[name], atol=1e-6, rtol=1e-6)
    first, *_, last = [record for record in resident if record["kind"] == "heldout"]
    np.testing.assert_allclose(first["loss"], np.log(2), rtol=1e-6)
    assert (first["accuracy"], first["margin"]) == (0.5, 0)
    assert last["accuracy"] > 0.9
    assert last["sources"]["things"]["tokens"] > 5  # pairs


@pytest.mark.slow
def test_killed_runs_end_with_the_same_bits(commands: Commands, config: Path, tmp_path: Path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    started(config, whole)
    commands.kill(TRAIN, "--config", config, f"output_dir={killed}", at="step 5/8 ")
    started(config, killed)
    assert_same_run(whole, killed)
    assert list(train_losses(killed)) == list(range(1, 9))
    assert len(json.loads((killed / "run.json").read_text(encoding="utf-8"))["started"]) == 2


def test_a_reference_of_something_else_is_refused(config: Path, pairs: Path, tmp_path: Path):
    cache = tmp_path / "reference"
    kept = (f"objective.reference_cache={cache}", "train.steps=1")
    started(config, tmp_path / "first", *kept)
    before = {path.name: path.read_bytes() for path in cache.iterdir()}
    started(config, tmp_path / "second", *kept, "train.learning_rate=0.1")  # reads it
    fewer = tmp_path / "fewer.jsonl"
    fewer.write_text("".join(pairs.read_text(encoding="utf-8").splitlines(keepends=True)[:50]), encoding="utf-8")
    sources = f"data.sources=[{{name: things, files: [{fewer}], format: pairs}}]"
    for at, (override, message) in enumerate(((sources, "things, train: "), ("seed=1", "weights: "))):
        with pytest.raises(UserError, match=message):
            started(config, tmp_path / f"refused{at}", *kept, override)
    (cache / "0.train.npy").unlink()
    with pytest.raises(UserError, match=r"0\.train\.npy is missing; name another folder"):
        started(config, tmp_path / "fourth", *kept)
    assert {path.name: path.read_bytes() for path in cache.iterdir()} == {
        name: content for name, content in before.items() if name != "0.train.npy"
    }


def first_loss(records: list[dict[str, Any]]) -> float:
    """Returns the held-out loss before the first step: ln 2 if the reference is the start of the run."""
    return next(record["loss"] for record in records if record["kind"] == "heldout")


@pytest.mark.parametrize(
    "method",
    [
        pytest.param((), id="full"),
        pytest.param((*LORA, "objective.reference=precomputed"), id="lora", marks=pytest.mark.slow),
    ],
)
def test_a_lost_reference_is_computed_from_the_weights_it_names(config: Path, tmp_path: Path, method: tuple[str, ...]):
    """After a kill, with the reference deleted or another cache selected, it is recomputed from the initial weights,
    not from trained ones."""
    whole, killed, cache = tmp_path / "whole", tmp_path / "killed", tmp_path / "cache"
    started(config, whole, *method)
    shutil.copytree(whole, killed)
    shutil.rmtree(killed / "checkpoints" / "8")
    shutil.rmtree(killed / "reference")
    started(config, killed, *method, f"objective.reference_cache={cache}")
    assert_same_run(whole, killed)
    for file in (whole / "reference").iterdir():
        assert file.read_bytes() == (cache / file.name).read_bytes()
    # the cache contains the reference of another run
    other = started(config, tmp_path / "other", *method, f"objective.reference_cache={cache}", "train.steps=1")
    np.testing.assert_allclose(first_loss(other), np.log(2), rtol=1e-6)


@pytest.mark.slow
def test_a_reference_whose_weights_are_gone_is_refused(config: Path, tmp_path: Path):
    base, run = tmp_path / "base", tmp_path / "run"
    started(config, base)
    named = f"model.init_from={base}"
    started(config, run, named)
    shutil.rmtree(run / "checkpoints" / "8")
    started_from = shutil.move(run / "reference", tmp_path / "reference")
    shutil.move(base / "checkpoints" / "8", tmp_path / "8")  # the base is now an earlier step
    with pytest.raises(UserError, match=r"its reference policy has weights of fingerprint \w{16}, and") as error:
        started(config, run, named)
    assert f"model.init_from, {base}, now has " in str(error.value)
    assert not (run / "reference").exists()
    started(config, run, named, f"objective.reference_cache={started_from}")  # its scores are still those of the base


def test_a_loss_that_is_no_number_stops_the_run(config: Path, tmp_path: Path):
    run = tmp_path / "run"
    with pytest.raises(UserError) as error:
        started(config, run, "train.learning_rate=1e30", "train.clip_norm=1e9", "checkpoint.every=1")
    said = str(error.value)
    step = max(train_losses(run)) + 1
    assert said.startswith(f"step {step}: the loss is ")
    assert f"checkpoint {run}/checkpoints/{step - 1} is what this step started from" in said
    assert "things: pair " in said
    kept = sorted(int(path.name) for path in (run / "checkpoints").iterdir())
    assert kept[-1] == step - 1
    for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_a_dry_run_tells_the_costs_and_writes_nothing(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = tmp_path / "run"
    assert dry_run(configs.load(config, [f"output_dir={run}", *LORA])) == 0
    said = capsys.readouterr().out
    assert not run.exists()
    for name in ("parameters", "memory per device", "tokens per step", "model FLOPs", "time", "the whole run"):
        assert f"\n{name}" in f"\n{said}"
    with pytest.raises(UserError, match="no such folder"):
        dry_run(configs.load(config, [f"output_dir={run}", f"model.init_from={tmp_path}/weights"]))


@pytest.mark.slow
def test_the_best_checkpoint_the_average_and_the_answers_of_a_run(commands: Commands, config: Path, tmp_path: Path):
    run = tmp_path / "run"
    # a separate process: XLA's profiler ends a process in which other tests have loaded the TPU compiler
    commands.run(
        TRAIN, "--config", config, f"output_dir={run}", "--profile", "2:3", "checkpoint.best=heldout.log_p_rejected",
        "checkpoint.keep=1", "train.ema=0.9", "eval.requests=3", "eval.max_new_tokens=8", "train.steps=9",
        "eval.every=2",
    )  # fmt: skip
    records = records_of(run)
    answered = [record for record in records if record["kind"] == "requests"]
    assert [record["step"] for record in answered] == [0, 2, 4, 6, 8, 9]
    assert all(record["requests"] == 3 for record in answered)
    lines = [json.loads(line) for line in (run / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["step"] for line in lines] == [step for step in (0, 2, 4, 6, 8, 9) for _ in range(3)]
    assert lines[0]["expected"][0]["name"] == "take"
    steps = sorted(int(path.name) for path in (run / "checkpoints").iterdir())
    assert steps == [2, 9]  # the loss falls from the first step on; plus the newest
    held = ocp.checkpointables_metadata(str(run / "checkpoints" / "9")).metadata
    assert set(held) == {"params", "ema", "opt", "data"}
    assert list((run / "profile").rglob("*.xplane.pb"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["objective.kind=sft"], "data.sources.0 (things): format is pairs, and objective.kind sft learns from whole"),
        (["objective.reference=adapters_off"], "train.trainable is full, which has no adapters"),
        (["objective.kind=orpo", "objective.reference=precomputed"], "and orpo has none"),
        (
            ["train.trainable=lora", "lora.init_from=peft"],
            "set objective.reference to precomputed, or to adapters_off",
        ),
        (["objective.margin=1.0"], "objective.margin is 1.0 and objective.kind is sigmoid; it is for simpo"),
        (["data.on_long=split"], "a pair stays whole"),
        (["data.loss.thought=0.5"], "set it to 0 or 1"),
        (
            ["checkpoint.best=heldout.los"],
            "checkpoint.best is heldout.los, which no evaluation of this run gives; did you",
        ),
        (["checkpoint.best=requests.exact"], "which no evaluation of this run gives"),
    ],
)
def test_wrong_combinations_are_told_before_anything_starts(config: Path, overrides: list[str], message: str):
    with pytest.raises(UserError) as error:
        configs.load(config, overrides)
    assert message in str(error.value)


@pytest.mark.slow
def test_a_tiny_model_learns_to_prefer_the_better_of_recorded_answers(tmp_path: Path):
    """Held-out tasks, mined pairs: the accuracy rises from 0.5 to more than 0.7."""
    records = started(ROOT / "configs/quickstart_dpo.yaml", tmp_path / "run", "track.to=[]")
    heldout = [record["accuracy"] for record in records if record["kind"] == "heldout"]
    assert heldout[0] == 0.5  # all rewards are equal at first
    assert heldout[-1] > 0.7
