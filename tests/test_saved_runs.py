"""Runs and exported folders of earlier versions open."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from support import ROOT, Commands

from xlam_jax.data.formats.xlam import earlier_template
from xlam_jax.generate import find_model
from xlam_jax.weights import checkpoint
from xlam_jax.weights.hf import load_hf

SAVED = ROOT / "tests/saved"
TOKENIZER = ROOT / "examples/quickstart/tokenizer"
LOSSES = {4: 6.987415313720703, 5: 7.057799816131592}
"""Losses of the next steps, as the version that saved the run computed them without an interruption."""


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A copy of the run of an earlier version, whose tokenizer had the chat template of that time."""
    shutil.copytree(SAVED / "run", tmp_path / "run")
    shutil.copytree(TOKENIZER, tmp_path / "run/tokenizer")
    (tmp_path / "run/tokenizer/chat_template.jinja").write_text(earlier_template(True, True), encoding="utf-8")
    return tmp_path / "run"


def test_a_run_continues(run: Path, commands: Commands):
    commands.call("xlam_jax.train", "--config", SAVED / "run.yaml", f"output_dir={run}")
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = {record["step"]: record["loss"] for record in records if record["kind"] == "train"}
    assert sorted(losses) == [1, 2, 3, 4, 5]
    for step, loss in LOSSES.items():
        assert losses[step] == pytest.approx(loss, rel=1e-5)  # processors and compilers differ in the last bits


def test_a_checkpoint_is_exported_to_the_same_bytes(run: Path, commands: Commands, tmp_path: Path):
    commands.call("converters.orbax_to_hf", "--checkpoint", run, "--out", tmp_path / "hf", "--dtype", "bfloat16")
    name = "model.safetensors"
    assert (tmp_path / "hf" / name).read_bytes() == (SAVED / "exported" / name).read_bytes()


def test_an_exported_folder_opens(run: Path, tmp_path: Path):
    folder = shutil.copytree(SAVED / "exported", tmp_path / "hf")
    shutil.copytree(TOKENIZER, folder, dirs_exist_ok=True)
    assert find_model(folder).config == find_model(run).config
    stored, trained = load_hf(folder)[1], checkpoint.load_params(run / "checkpoints/3")
    assert np.array_equal(stored["embedding"], trained["embedding"].astype(stored["embedding"].dtype))
