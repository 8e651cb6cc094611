"""The weight table of every family: consistent in itself, and equal to the parameters that the decoder creates."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest
import tiny_models
import torch
import transformers
from test_parity import assert_close, our_logits, positions

from xlam_jax.models import families
from xlam_jax.models.config import ModelConfig
from xlam_jax.models.families import FAMILIES, frozen_storage, rows_named, stacked_axes
from xlam_jax.models.families.base import Family, read_common
from xlam_jax.models.hf_values import Values
from xlam_jax.models.params import shapes
from xlam_jax.models.weights_table import ATTENTION, LOGICAL_AXES, decoder_table, head_bias, head_norm
from xlam_jax.parallel.mesh import RULES
from xlam_jax.weights.hf_map import parameter as parameter_at
from xlam_jax.weights.hf_map import tensors

EACH_FAMILY = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)


def config_of(family: Family, sizes: Mapping[str, Any] | None = None) -> ModelConfig:
    return ModelConfig.from_hf({"architectures": [family.architecture], **tiny_models.SIZES, **(sizes or {})})


@EACH_FAMILY
def test_rows_are_consistent(family: Family):
    names = [weight.name for weight in family.weights]
    assert len(names) == len(set(names))
    ids = [weight.dropout_id for weight in family.weights if weight.dropout_id is not None]
    assert len(ids) == len(set(ids)), "each adapter has its own dropout masks"
    for weight in family.weights:
        assert all(LOGICAL_AXES[axis] in RULES for axis in weight.axes), weight
        unstacked = weight.axes[len(weight.stacked) :]
        assert sorted(weight.hf_axes.replace(" ", "")) == sorted(unstacked), weight
        assert len(set(weight.axes)) == len(weight.axes), weight
        assert weight.is_matrix or not (weight.peft or weight.vllm), "vectors have no adapters"
        assert weight.peft or not weight.vllm, "vLLM reads PEFT folders"
        assert {row.frozen for row in rows_named(weight.name)} == {frozen_storage(weight.name)}
        assert not weight.in_block or stacked_axes(weight.name, len(weight.axes)) == len(weight.stacked)


@EACH_FAMILY
@pytest.mark.parametrize("tied", [False, True])
def test_the_decoder_creates_the_weights_of_the_table(family: Family, tied: bool):
    config = replace(config_of(family), tie_embeddings=tied)
    sizes = config.axis_sizes
    leaves = jax.tree_util.tree_leaves_with_path(shapes(config))
    created = {tuple(part.key for part in path): leaf.shape for path, leaf in leaves}
    assert created == {weight.path: weight.shape(sizes) for weight in config.weights}
    assert sum(leaf.size for _, leaf in leaves) == config.parameters()
    assert (("head",) in created) is not tied
    stored = {tensor.path: tensor.stacked_shape for tensor in tensors(config)}
    assert stored == created


def test_axes_that_index_layers_and_experts():
    assert [stacked_axes("w1", ndim) for ndim in (3, 4)] == [1, 2]
    assert stacked_axes("w1_a", 4) == 1, "as in every checkpoint so far"
    assert [stacked_axes(name, 5) for name in ("q", "unknown")] == [1, 1]


def test_rows_of_weights_and_of_adapters():
    config = config_of(next(family for family in FAMILIES if family.name == "mixtral"))
    assert config.weight("w1_b") is config.weight("w1")
    assert config.weight("w1").per_expert
    assert not config.weight("q").per_expert
    with pytest.raises(KeyError):
        config.weight("w4")


def read(values: Values) -> dict[str, Any]:
    return read_common(values, {"max_position_embeddings": 512, "rms_norm_eps": 1e-6, "rope_theta": 10_000.0})


BIASES = (
    head_bias("q_bias", "NGK", "self_attn.q_proj"),
    head_bias("k_bias", "NK", "self_attn.k_proj"),
    head_bias("v_bias", "NK", "self_attn.v_proj"),
)
NORMS = (head_norm("q_norm", "self_attn.q_norm"), head_norm("k_norm", "self_attn.k_norm"))
NEW_FAMILIES = {
    "qwen2": (transformers.Qwen2Config, BIASES, {}),
    "qwen3": (transformers.Qwen3Config, NORMS, {"head_dim": 24}),
}


@pytest.mark.parametrize("name", NEW_FAMILIES)
def test_a_new_dense_family_is_rows_and_a_way_to_read_its_config(name: str, monkeypatch: pytest.MonkeyPatch):
    """Biases and norms of queries, keys and values, as transformers computes them."""
    config_class, rows, sizes = NEW_FAMILIES[name]
    architecture, table = f"{name.capitalize()}ForCausalLM", decoder_table(attention=(*ATTENTION, *rows))
    family = Family(name=name, architecture=architecture, read=read, weights=table)
    monkeypatch.setattr(families, "FAMILIES", (*FAMILIES, family))
    monkeypatch.setitem(tiny_models.CONFIGS, name, config_class)
    test_rows_are_consistent(family)
    model = tiny_models.hf_model(name, **sizes)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("bias"):
                parameter.uniform_(-0.5, 0.5)
    params, named = tiny_models.params_of(model), tiny_models.file_tensors(dict(model.named_parameters()))
    written = {
        tensor.key: tensor.to_hf(parameter_at(params, tensor.path)) for tensor in tensors(config_of(family, sizes))
    }
    assert written.keys() == named.keys()
    assert all(np.array_equal(written[key], named[key]) for key in named)
    tokens = tiny_models.tokens(2, 24)
    mask = np.ones_like(tokens)
    logits, _ = our_logits(model, tokens, positions(mask), mask)
    with torch.no_grad():
        expected = model(torch.from_numpy(tokens).long()).logits.numpy()
    assert_close(logits, expected, name)
