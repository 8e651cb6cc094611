"""Training with adapters as a user meets it: kill and resume, export, another base, wrong input."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from support import Commands, as_killed, assert_same_run, same_arrays, train_losses
from test_train import TRAIN, terminate

from xlam_jax.weights import checkpoint
from xlam_jax.weights import run as weights
from xlam_jax.weights.hf import load_hf

LORA = (
    "train.trainable=lora", "lora.rank=4", "lora.alpha=8", "lora.dropout=0.2", "train.neftune=5", "train.moments=8bit",
    "train.learning_rate=0.005",
)  # fmt: skip
QLORA = (
    "train.trainable=qlora", "lora.rank=4", "lora.targets=[q,v,w1,w2,w3,router,head]", "model.compute_dtype=bfloat16",
)  # fmt: skip


@pytest.mark.parametrize("method", [pytest.param(LORA, marks=pytest.mark.slow), QLORA], ids=["lora", "qlora"])
def test_killed_runs_end_with_the_same_bits(commands: Commands, tiny_config: Path, tmp_path: Path, method):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    common = ("--config", tiny_config, *method)
    commands.call(TRAIN, *common, f"output_dir={whole}", at={"step 7/10  loss": lambda: as_killed(whole, killed)})
    resumed = commands.call(TRAIN, *common, f"output_dir={killed}").stderr
    assert re.search(r"continuing \S+ after step [36]\n", resumed)
    assert_same_run(whole, killed)


def test_adapters_train_beside_a_base_that_stays(commands: Commands, tiny_config: Path, exported: Path, tmp_path: Path):
    run, merged, adapter = tmp_path / "run", tmp_path / "merged", tmp_path / "adapter"
    own_base = tmp_path / "mine"
    shutil.copytree(exported, own_base)
    sampling = {"do_sample": True, "temperature": 0.6, "eos_token_id": [9]}
    (own_base / "generation_config.json").write_text(json.dumps(sampling), encoding="utf-8")
    common = ("--config", tiny_config, f"output_dir={run}", f"model.init_from={own_base}", *LORA)
    said = commands.call(TRAIN, *common).stderr
    assert f"weights from {own_base}" in said
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    heldout = [record["loss"] for record in records if record["kind"] == "heldout"]
    assert heldout[-1] < heldout[0]
    step = checkpoint.resolve(run)
    names = {name for name in checkpoint.load_params(step)["blocks"]}
    assert names == {f"{target}_{factor}" for target in "qkvo" for factor in "ab"}  # without the base
    commands.call("converters.orbax_to_hf", "--checkpoint", run, "--out", merged)
    commands.call("converters.orbax_to_hf", "--checkpoint", run, "--out", adapter, "--lora", "adapter")
    assert (adapter / "adapter_config.json").is_file()
    for file in (run / "tokenizer").iterdir():  # with the chat template
        assert (adapter / file.name).read_bytes() == (merged / file.name).read_bytes() == file.read_bytes()
    for folder in (adapter, merged):
        generation = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))
        assert generation.items() >= (sampling | {"eos_token_id": [2, 9]}).items()
    before, after, whole = load_hf(exported)[1], load_hf(merged)[1], weights.load_whole(step)
    assert same_arrays(after, whole)
    for name in before["blocks"]:
        assert np.array_equal(before["blocks"][name], after["blocks"][name]) == (name not in "qkvo")
    # another run continues to train the adapters of a PEFT folder
    again = tmp_path / "again"
    fresh = ("--config", tiny_config, f"model.init_from={own_base}", f"lora.init_from={adapter}", *LORA)
    commands.call(TRAIN, *fresh, f"output_dir={again}", at={"step 1/10  loss": terminate}, code=75)
    assert train_losses(again)[1] < train_losses(run)[1]
    # adapters are refused on another base
    other = load_hf(own_base)[1]
    from safetensors.numpy import load_file, save_file

    tensors = load_file(own_base / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * 1.01
    save_file(tensors, own_base / "model.safetensors", metadata={"format": "pt"})
    assert not same_arrays(other, load_hf(own_base)[1])
    message = commands.fails(TRAIN, *common, "train.log_every=2")
    assert "its adapters were trained with base weights of fingerprint" in message
    assert "with base weights of fingerprint" in commands.fails(
        "converters.orbax_to_hf", "--checkpoint", run, "--out", tmp_path / "not"
    )
    assert not (tmp_path / "not").exists()


def test_wrong_adapters_are_refused_at_once(commands: Commands, tiny_config: Path, trained, tmp_path: Path):
    common = ("--config", tiny_config, "train.trainable=lora", f"output_dir={tmp_path / 'run'}")
    assert "no weight 'q_proj'; this project's name for it is q (known: q, k" in commands.fails(
        TRAIN, *common, "lora.targets=[q_proj]"
    )
    assert "no weight 'w11'; did you mean" in commands.fails(TRAIN, *common, "lora.targets=[w11]")
    assert "adapters on w1 do not support dropout" in commands.fails(
        TRAIN, *common, "lora.targets=[q,w1]", "lora.dropout=0.1"
    )
    assert "no such file; a PEFT adapter with adapter_config.json" in commands.fails(
        TRAIN, *common, f"lora.init_from={tmp_path}"
    )
    assert not (tmp_path / "run").exists()
    assert "without adapters; remove --lora merge" in commands.fails(
        "converters.orbax_to_hf", "--checkpoint", trained[0], "--out", tmp_path / "hf", "--lora", "merge"
    )
