"""The TFDS builder: TFDS's reader and ours see the same trajectories; nothing half-built, nothing overwritten."""

import json
from pathlib import Path
from typing import Any

import pytest
import tensorflow_datasets as tfds
from support import Commands
from tensorflow_datasets.core import constants, registered

from xlam_jax.config import Source
from xlam_jax.data import sources
from xlam_jax.data.parse import parse_trajectory, read_jsonl
from xlam_jax.data.tfds_builder import build
from xlam_jax.data.tfds_dataset import UnifiedTrajectories
from xlam_jax.errors import UserError


@pytest.fixture(scope="module")
def built(quickstart: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder with the bundled WebShop trajectories."""
    folder = tmp_path_factory.mktemp("tfds")
    build(Source(name="webshop", files=[str(quickstart / "webshop.jsonl")]), folder)
    return folder


@pytest.fixture
def data_dir(built: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which TFDS looks."""
    monkeypatch.setattr(constants, "DATA_DIR", str(built))
    monkeypatch.setenv("TFDS_DATA_DIR", str(built))
    return built


def test_our_reader_gives_what_the_files_hold(quickstart, data_dir):
    files = [item for _, item in read_jsonl(quickstart / "webshop.jsonl")]
    items = list(sources.read(Source(name="w", tfds="unified_trajectories/webshop:1.0.0")))
    assert [item.trajectory for item in items] == files
    assert items[3].where == "unified_trajectories/webshop:1.0.0:train[3]"


def test_tfds_itself_reads_it(quickstart, built):
    rows: Any = tfds.data_source("unified_trajectories/webshop", split="train", data_dir=str(built))
    first = json.loads((quickstart / "webshop.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert rows[0]["unique_trajectory_id"].decode() == first["unique_trajectory_id"]
    assert json.loads(rows[0]["conversation"]) == first["conversation"]
    assert tfds.builder("unified_trajectories/webshop", data_dir=str(built)).info.splits["train"].num_examples == 30


def test_scores_and_missing_values_come_back_as_they_were(row, write_jsonl, tmp_path, monkeypatch):
    bare = {key: row[key] for key in ("unique_trajectory_id", "tools", "conversation")}
    path = write_jsonl(row | {"score": 0.7}, bare)  # 0.7 in 32 bits is less than 0.7
    build(Source(name="made", files=[str(path)]), tmp_path / "tfds")
    monkeypatch.setattr(constants, "DATA_DIR", str(tmp_path / "tfds"))
    items = sources.read(Source.model_validate({"name": "m", "tfds": "unified_trajectories/made"}))
    assert [item.trajectory for item in items] == [parse_trajectory(row | {"score": 0.7}), parse_trajectory(bare)]


def test_what_is_there_is_not_overwritten(quickstart, built):
    source = Source(name="webshop", files=[str(quickstart / "hammer.jsonl")])
    with pytest.raises(UserError, match=r"webshop/1\.0\.0: exists already and is not overwritten"):
        build(source, built)


def test_a_build_that_fails_leaves_nothing_that_tfds_would_read(row, write_jsonl, tmp_path):
    source = Source(name="made", files=[str(write_jsonl(row, b"broken", row))])
    with pytest.raises(UserError, match=r"rows\.jsonl:2: malformed-json"):
        build(source, tmp_path / "tfds")
    assert not [path for path in (tmp_path / "tfds").rglob("*") if path.is_file()]
    builder, dropped = build(source, tmp_path / "tfds", drop_invalid=True)
    assert dropped == {"malformed-json": 1}
    assert builder.info.splits["train"].num_examples == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"split": "test"}, "split is 'test', and unified_trajectories/webshop has train"),
        (
            {"tfds": "unified_trajectories/webshp"},
            "cannot be opened .*which contains unified_trajectories/webshop; traj",
        ),
        ({"tfds": "no_such_dataset"}, "tfds no_such_dataset: cannot be opened .*TFDS_DATA_DIR"),
    ],
)
def test_what_is_missing_is_reported(data_dir, changes, message):
    source = Source.model_validate({"name": "w", "tfds": "unified_trajectories/webshop", **changes})
    with pytest.raises(UserError, match=f"data.sources: w: .*{message}|data.sources: w: {message}"):
        next(sources.read(source))


def test_the_command(commands: Commands, quickstart, tmp_path):
    arguments = ("--files", quickstart / "hammer.jsonl", "--data-dir", tmp_path / "tfds")
    out = commands.run("xlam_jax.data.tfds_builder", "--name", "hammer", "--split", "test", *arguments).stdout
    assert "180 trajectories, dropped: none" in out
    assert "tfds: unified_trajectories/hammer:1.0.0" in out
    rows = tfds.data_source("unified_trajectories/hammer", split="test", data_dir=str(tmp_path / "tfds"))
    assert len(rows) == 180
    message = commands.fails("xlam_jax.data.tfds_builder", "--name", "a/b", *arguments)
    assert "--name is 'a/b'" in message


def test_the_builder_is_registered_once():
    assert registered.imported_builder_cls("unified_trajectories") is UnifiedTrajectories
