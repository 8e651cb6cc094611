"""A run that adds tokens and uses a chat template of a file: kill and resume, export, and what is refused."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models
import torch
from support import Commands, as_killed, assert_same_run, same_arrays
from test_train import TRAIN
from tool_template import TEMPLATE
from transformers import AutoModelForCausalLM, AutoTokenizer

from xlam_jax import config as configs
from xlam_jax.data.parse import read_jsonl
from xlam_jax.data.render import render
from xlam_jax.data.tokenizer import open_tokenizer, with_added_tokens
from xlam_jax.data.trajectory import Trajectory, to_messages
from xlam_jax.models.params import binder, join, shapes, trainable
from xlam_jax.weights import checkpoint
from xlam_jax.weights import run as weights
from xlam_jax.weights.hf import load_hf
from xlam_jax.weights.peft import write_peft

LORA = ("train.trainable=lora", "lora.rank=4", "lora.train_tokens=true")
QLORA = ("train.trainable=qlora", "lora.rank=4", "lora.train_tokens=true", "lora.targets=[q,head,embedding]")
OLD, NEW = 2048, 2112


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with one layer, as a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("base")
    tiny_models.hf_model("llama", vocab_size=OLD, num_hidden_layers=1).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def config(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config that trains it with a template that writes calls between added tokens."""
    folder = tmp_path_factory.mktemp("config")
    (folder / "tools.jinja").write_text(TEMPLATE, encoding="utf-8")
    (folder / "config.yaml").write_text(
        f"""
model: {{init_from: {base}, compute_dtype: float32}}
data:
  sources: [{{name: seal_tools, files: [examples/quickstart/seal_tools.jsonl]}}]
  tokenizer: examples/quickstart/tokenizer
  format: native
  chat_template: {folder}/tools.jinja
  unreadable_calls: allow  # no wire format has these tags
  added_tokens: [<call>, {{text: </call>}}, {{text: <note>, special: false}}]
train: {{steps: 6, batch_size: 2, learning_rate: 5.0e-3}}
eval: {{every: 0}}
checkpoint: {{every: 3}}
track: {{to: []}}
""",
        encoding="utf-8",
    )
    return folder / "config.yaml"


@pytest.mark.parametrize("method", [LORA, pytest.param(QLORA, marks=pytest.mark.slow)], ids=["lora", "qlora"])
def test_new_rows_train_resume_and_are_exported(commands: Commands, config: Path, base: Path, tmp_path: Path, method):
    whole, killed, folder = tmp_path / "whole", tmp_path / "killed", tmp_path / "hf"
    common = ("--config", config, *method)
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
    before = load_hf(base)[1]
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
    changed = commands.fails(TRAIN, *common, f"output_dir={whole}", "data.added_tokens=[<call>]")
    assert "contains a run of another config" in changed
    assert "data.added_tokens.1.text: '</call>' in the run, None now" in changed
    if method is LORA:
        assert_served_alike(folder, configs.load(config, list(method)), whole)


def assert_served_alike(folder: Path, resolved: configs.Resolved, run: Path) -> None:
    """Checks that transformers loads an export with the ids, and the logits, of the run."""
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    data = resolved.config.data
    [(_, row), *_] = read_jsonl(Path("examples/quickstart/seal_tools.jsonl"))
    assert isinstance(row, Trajectory)
    ids = render(row, open_tokenizer(data), "native").input_ids
    assert tokenizer.apply_chat_template(to_messages(row), tools=row.tools)["input_ids"] == ids.tolist()
    assert {OLD, OLD + 1} < set(ids.tolist())
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32", attn_implementation="eager").eval()
    resolved = with_added_tokens(resolved)
    frozen = weights.read_base(resolved)
    assert frozen is not None
    params = join(frozen, checkpoint.load_params(checkpoint.resolve(run)))
    params = jax.tree.map(jnp.asarray, params, is_leaf=lambda leaf: hasattr(leaf, "shape"))
    ours = binder(resolved.model, dtype=jnp.float32)(params)
    ids = ids[None, :128]
    tokens_BT = jnp.asarray(ids)
    hidden_BTD, _, _ = ours(tokens_BT, jnp.arange(ids.shape[1], dtype=jnp.int32)[None], jnp.ones_like(tokens_BT))
    with torch.no_grad():
        expected = model(torch.from_numpy(ids.astype(np.int64))).logits.numpy()
    np.testing.assert_allclose(np.asarray(ours.logits(hidden_BTD)), expected, atol=2e-4, rtol=1e-4)


def test_full_training_starts_from_mean_rows(config: Path, base: Path):
    resolved = with_added_tokens(configs.load(config))
    initial = weights.read_initial(resolved, None)
    assert initial is not None
    before = load_hf(base)[1]
    for name in ("embedding", "head"):
        assert np.array_equal(np.asarray(initial[name])[:OLD], before[name])
        assert np.array_equal(np.asarray(initial[name])[OLD], before[name].astype(np.float32).mean(axis=0))


def test_adapters_of_a_folder_get_new_rows(config: Path, tmp_path: Path):
    resolved = with_added_tokens(configs.load(config, [*LORA, f"lora.init_from={tmp_path / 'peft'}"]))
    plain = replace(resolved.model, added=None, vocab_size=OLD)
    rng = np.random.default_rng(0)
    adapters = jax.tree.map(
        lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), trainable(plain, shapes(plain))[0]
    )
    write_peft(tmp_path / "peft", plain, adapters, None)
    initial = weights.read_initial(resolved, weights.read_base(resolved))
    assert initial is not None
    checkpoint.check_shapes(config, initial, trainable(resolved.model, shapes(resolved.model))[0])
    assert same_arrays(initial["blocks"], adapters["blocks"])
    assert not any(np.any(initial[f"{name}_rows"]) for name in ("embedding", "head"))


def test_wrong_tokens_and_templates_are_refused_before_the_run(commands: Commands, config: Path, tmp_path: Path):
    common = ("--config", config, f"output_dir={tmp_path / 'run'}")
    assert "has the token '</s>' already, with id 2" in commands.fails(TRAIN, *common, "data.added_tokens=[</s>]")
    assert "nothing.jinja cannot be read" in commands.fails(TRAIN, *common, "data.chat_template=nothing.jinja")
    assert not (tmp_path / "run").exists()


def test_the_plan_counts_new_rows():
    from xlam_jax import plan
    from xlam_jax.planning.hardware import parse

    def planned(*overrides: str) -> plan.Plan:
        lora = ["train.trainable=lora", "data.added_tokens=[<a>, <b>]", *overrides]
        resolved = plan.load(Path("configs/quickstart.yaml"), lora)
        topology = parse("gpu:h100:1")
        return plan.plan(resolved, topology, plan.make_layout(resolved, topology))

    without, with_rows = planned(), planned("lora.train_tokens=true")
    assert with_rows.trainable == without.trainable + 2 * 2 * 128
    assert with_rows.parameters == without.parameters + 2 * 2 * 128
    assert with_rows.arguments > without.arguments
    assert with_rows.estimated_flops > without.estimated_flops
