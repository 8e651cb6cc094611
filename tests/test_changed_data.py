"""A run that is resumed with other data, another tokenizer, or another number of CPUs."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import ROOT, Commands, assert_same_run, train_losses
from test_train import TRAIN

FILES = ("hammer.jsonl", "seal_tools.jsonl")
QUICKSTART = Path("examples/quickstart")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A working directory with modifiable copies of the tiny config's inputs."""
    (tmp_path / QUICKSTART).mkdir(parents=True)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    shutil.copytree(ROOT / QUICKSTART / "tokenizer", tmp_path / QUICKSTART / "tokenizer")
    for name in FILES:
        shutil.copy(ROOT / QUICKSTART / name, tmp_path / QUICKSTART / name)
    return tmp_path


@pytest.fixture
def stopped(trained: tuple[Path, str], tmp_path: Path) -> Path:
    """The tiny run, as left by a kill before its last checkpoint: at step 9 of 10."""
    run = tmp_path / "run"
    shutil.copytree(trained[0], run)
    shutil.rmtree(run / "checkpoints" / "10")
    return run


def swap_ids(file: Path) -> None:
    """Swaps the ids of two ordinary tokens."""
    values = json.loads(file.read_text(encoding="utf-8"))
    vocabulary = values["model"]["vocab"]
    first, second = [token for token in vocabulary if token.isalpha() and len(token) > 2][:2]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    file.write_text(json.dumps(values), encoding="utf-8")


def test_rows_that_were_removed(commands: Commands, tiny_config: Path, folder: Path, stopped: Path):
    file = folder / QUICKSTART / FILES[0]
    rows = file.read_text(encoding="utf-8").splitlines(keepends=True)
    file.write_text("".join(rows[:-14]), encoding="utf-8")
    common = ("--config", tiny_config, f"output_dir={stopped}")
    refused = commands.call(TRAIN, *common, code=2, folder=folder).stderr
    before = json.loads((stopped / "run.json").read_text(encoding="utf-8"))["sources"]["hammer"]["trajectories"]
    message = refused[refused.index("error: ") :]
    assert f"data.sources, hammer: {before} examples to train on" in message
    assert "seal_tools" not in message
    assert "data.on_change=warn" in message
    assert not (stopped / "checkpoints" / "10").exists()

    said = commands.call(TRAIN, *common, "data.on_change=warn", folder=folder).stderr
    assert "warning: " in said
    assert "hammer: continues with example " in said
    assert list(train_losses(stopped)) == list(range(1, 11))
    about = json.loads((stopped / "run.json").read_text(encoding="utf-8"))
    (change,) = about["data_changes"]
    assert change["step"] == 9
    assert change["sources"]["hammer"]["before"]["train"]["examples"] == before
    now = change["sources"]["hammer"]["now"]["train"]["examples"]
    assert before - 14 <= now < before
    assert change["sources"]["hammer"]["continues"]["now"]["examples"] == now
    assert list(change["sources"]) == ["hammer"]
    # later checkpoints belong to the new data
    assert "is finished" in commands.call(TRAIN, *common, folder=folder).stderr


def test_a_tokenizer_whose_ids_were_swapped(commands: Commands, tiny_config: Path, folder: Path, stopped: Path):
    swap_ids(folder / QUICKSTART / "tokenizer" / "tokenizer.json")
    common = ("--config", tiny_config, f"output_dir={stopped}")
    kept = (stopped / "tokenizer" / "tokenizer.json").read_bytes()
    message = commands.call(TRAIN, *common, code=2, folder=folder).stderr
    assert "data.tokenizer: examples/quickstart/tokenizer with 2,048 tokens, digest " in message
    assert (stopped / "tokenizer" / "tokenizer.json").read_bytes() == kept


@pytest.fixture
def one_cpu() -> Iterator[None]:
    """Restricts processes started in the body to one CPU."""
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    yield
    os.sched_setaffinity(0, allowed)


def test_fewer_cpus_change_no_bit(commands: Commands, tiny_config: Path, trained, stopped: Path, one_cpu):
    threads = json.loads((stopped / "run.json").read_text(encoding="utf-8"))["cpu_threads"]
    said = commands.run(TRAIN, "--config", tiny_config, f"output_dir={stopped}").stderr
    assert "CPU threads" not in said
    assert json.loads((stopped / "run.json").read_text(encoding="utf-8"))["cpu_threads"] == threads
    assert_same_run(trained[0], stopped)
