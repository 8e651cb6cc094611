"""A run that adds tokens and uses a chat template of a file: kill and resume, export, and what is refused."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import Commands, as_killed, assert_same_run, same_arrays
from test_train import TRAIN
from tool_template import TEMPLATE

from xlam_jax import config as configs
from xlam_jax.data.parse import read_jsonl
from xlam_jax.data.render import render
from xlam_jax.data.tokenizer import open_tokenizer, with_added_tokens
from xlam_jax.data.trajectory import Trajectory, to_messages
from xlam_jax.weights import checkpoint
from xlam_jax.weights import run as weights
from xlam_jax.weights.hf import load_hf

LORA = ("train.trainable=lora", "lora.rank=4", "lora.train_tokens=true")
QLORA = ("train.trainable=qlora", "lora.rank=4", "lora.train_tokens=true", "lora.targets=[q,head,embedding]")
OLD, NEW = 2048, 2112


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory, exported: Path) -> tuple[str, ...]:
    """The overrides of a run from the exported model, whose template writes calls between added tokens."""
    path = tmp_path_factory.mktemp("template") / "tools.jinja"
    path.write_text(TEMPLATE, encoding="utf-8")
    added = "data.added_tokens=[<call>, {text: </call>}, {text: <note>, special: false}]"
    return (
        added, f"data.chat_template={path}", "data.format=native", f"model.init_from={exported}",
        f"data.tokenizer={exported}", "train.steps=6",
    )  # fmt: skip


@pytest.mark.parametrize("method", [LORA, pytest.param(QLORA, marks=pytest.mark.slow)], ids=["lora", "qlora"])
def test_new_rows_train_resume_and_are_exported(
    commands: Commands, tiny_config: Path, exported: Path, tokens: tuple[str, ...], tmp_path: Path, method
):
    whole, killed, folder = tmp_path / "whole", tmp_path / "killed", tmp_path / "hf"
    common = ("--config", tiny_config, *tokens, *method)
    said = commands.call(TRAIN, *common, f"output_dir={whole}", at={"step 4/6  loss": lambda: as_killed(whole, killed)})
    assert "added tokens: ids 2048 to 2050 of 2,112 in the vocabulary" in said.stderr
    resumed = commands.call(TRAIN, *common, f"output_dir={killed}").stderr
    assert re.search(r"continuing \S+ after step 3\n", resumed)
    assert_same_run(whole, killed)

    trained = checkpoint.load_params(checkpoint.resolve(whole))
    for name in ("embedding_rows", "head_rows"):
        assert trained[name].shape == (3, 32)
        assert np.all(np.any(trained[name][:2], axis=1))
    assert not np.any(trained["embedding_rows"][2])  # no row of the data has <note>
    commands.call("converters.orbax_to_hf", "--checkpoint", whole, "--out", folder)
    hf_config, after = load_hf(folder)
    before = load_hf(exported)[1]
    assert hf_config["vocab_size"] == NEW
    for name in ("embedding", "head"):
        assert after[name].shape == (NEW, 32)
        mean = before[name].astype(np.float32).mean(axis=0)
        if method is LORA:
            assert np.array_equal(after[name][:OLD], before[name])
            assert np.array_equal(after[name][OLD : OLD + 3], mean + trained[f"{name}_rows"])
            assert np.array_equal(after[name][OLD + 3 :], np.broadcast_to(mean, (61, 32)))
    assert same_arrays(after, weights.load_whole(checkpoint.resolve(whole)))
    message = commands.fails(
        "converters.orbax_to_hf", "--checkpoint", whole, "--out", tmp_path / "peft", "--lora", "adapter"
    )
    assert "adds 3 tokens to the vocabulary of its base (data.added_tokens), and vLLM does not read" in message
    assert "--lora merge" in message
    if method is LORA:
        assert_served_alike(folder, configs.load(tiny_config, [*tokens, *method]), whole)


def assert_served_alike(folder: Path, resolved: configs.Resolved, run: Path) -> None:
    """Checks that transformers loads an export with the ids, and the logits, of the run."""
    import jax.numpy as jnp
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from xlam_jax.models.params import binder, join

    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    data = resolved.config.data
    [(_, row), *_] = read_jsonl(Path("examples/quickstart/seal_tools.jsonl"))
    assert isinstance(row, Trajectory)
    ids = render(row, open_tokenizer(data), "native").input_ids
    assert tokenizer.apply_chat_template(to_messages(row), tools=row.tools)["input_ids"] == ids.tolist()
    assert {OLD, OLD + 1} < set(ids.tolist())
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32", attn_implementation="eager").eval()
    resolved = with_added_tokens(resolved)
    base = weights.read_base(resolved)
    assert base is not None
    frozen = {name: np.asarray(leaf) if name != "blocks" else leaf for name, leaf in base.items()}
    frozen["blocks"] = {name: np.asarray(leaf) for name, leaf in frozen["blocks"].items()}
    params = join(frozen, checkpoint.load_params(checkpoint.resolve(run)))
    ours = binder(resolved.model, dtype=jnp.float32)(params)
    ids = ids[None, :128]
    hidden_BTD, _, _ = ours(ids, np.arange(ids.shape[1], dtype=np.int32)[None], np.ones_like(ids))
    import torch

    with torch.no_grad():
        theirs = model(torch.from_numpy(ids.astype(np.int64))).logits.numpy()
    np.testing.assert_allclose(np.asarray(ours.logits(hidden_BTD)), theirs, atol=2e-4, rtol=1e-4)


def test_full_training_starts_from_mean_rows(tiny_config: Path, exported: Path, tokens: tuple[str, ...]):
    resolved = with_added_tokens(configs.load(tiny_config, list(tokens)))
    base = weights.read_initial(resolved, None)
    assert base is not None
    before = load_hf(exported)[1]
    for name in ("embedding", "head"):
        assert np.array_equal(np.asarray(base[name])[:OLD], before[name])
        assert np.array_equal(np.asarray(base[name])[OLD], before[name].astype(np.float32).mean(axis=0))


def test_another_vocabulary_is_another_run(
    commands: Commands, tiny_config: Path, tokens: tuple[str, ...], tmp_path: Path
):
    common = ("--config", tiny_config, *tokens, f"output_dir={tmp_path / 'run'}")
    assert "the tokenizer" in commands.fails(TRAIN, *common, "data.added_tokens=[</s>]")
    assert "is missing or broken" not in commands.fails(TRAIN, *common, "data.chat_template=nothing.jinja")
    assert not (tmp_path / "run").exists()


def test_the_plan_counts_new_rows():
    from xlam_jax import plan
    from xlam_jax.planning.hardware import parse

    def planned(*overrides: str) -> plan.Plan:
        lora = ["train.trainable=lora", "data.added_tokens=[<a>, <b>]", *overrides]
        resolved = plan._load(Path("configs/quickstart.yaml"), lora)
        topology = parse("gpu:h100:1")
        return plan.plan(resolved, topology, plan.make_layout(resolved, topology))

    without, with_rows = planned(), planned("lora.train_tokens=true")
    assert with_rows.trainable == without.trainable + 2 * 2 * 128
    assert with_rows.parameters == without.parameters + 2 * 2 * 128
    assert with_rows.arguments > without.arguments
    assert with_rows.estimated_flops > without.estimated_flops
