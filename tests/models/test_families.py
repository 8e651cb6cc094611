"""The weight table of every family: consistent in itself, and equal to the parameters that the decoder creates."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax
import pytest
import tiny_models

from xlam_jax.models.config import ModelConfig
from xlam_jax.models.families import FAMILIES, frozen_storage, is_vector, rows_named, stacked_axes
from xlam_jax.models.families.base import Family
from xlam_jax.models.hf_keys import warnings_of
from xlam_jax.models.params import shapes
from xlam_jax.models.weights_table import LOGICAL_AXES
from xlam_jax.parallel.mesh import RULES
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
        assert weight.is_matrix or weight.frozen != "nf4", "vectors are not quantized"
        assert is_vector(weight.name) is not weight.is_matrix
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


PUBLISHED: dict[str, tuple[dict[str, Any], int]] = {
    "Qwen2.5-1.5B": (
        {
            **{"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu", "use_cache": True},
            **{"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12},
            **{"num_key_value_heads": 2, "vocab_size": 151_936, "tie_word_embeddings": True, "rms_norm_eps": 1e-6},
            **{"max_position_embeddings": 131_072, "rope_theta": 1_000_000.0, "torch_dtype": "bfloat16"},
            **{"sliding_window": 131_072, "use_sliding_window": False, "max_window_layers": 28},
            **{"bos_token_id": 151_643, "eos_token_id": 151_643, "attention_dropout": 0.0, "use_mrope": False},
        },
        1_543_714_304,
    ),
    "Qwen3-8B": (
        {
            **{"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_act": "silu", "use_cache": True},
            **{"hidden_size": 4096, "intermediate_size": 12_288, "num_hidden_layers": 36, "num_attention_heads": 32},
            **{"num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151_936, "tie_word_embeddings": False},
            **{"max_position_embeddings": 40_960, "rope_theta": 1_000_000, "rope_scaling": None, "rms_norm_eps": 1e-6},
            **{"sliding_window": None, "use_sliding_window": False, "max_window_layers": 36, "attention_bias": False},
            **{"bos_token_id": 151_643, "eos_token_id": 151_645, "attention_dropout": 0.0, "torch_dtype": "bfloat16"},
        },
        8_190_735_360,
    ),
    "Qwen3-30B-A3B": (
        {
            **{"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_act": "silu"},
            **{"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 48, "num_attention_heads": 32},
            **{"num_key_value_heads": 4, "head_dim": 128, "vocab_size": 151_936, "tie_word_embeddings": False},
            **{"moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True},
            **{"decoder_sparse_step": 1, "mlp_only_layers": [], "router_aux_loss_coef": 0.001, "use_cache": True},
            **{"max_position_embeddings": 40_960, "rope_theta": 1_000_000.0, "rope_scaling": None},
            **{"sliding_window": None, "use_sliding_window": False, "max_window_layers": 48, "attention_bias": False},
            **{"rms_norm_eps": 1e-6, "attention_dropout": 0.0, "output_router_logits": False},
        },
        30_532_122_624,
    ),
}
"""A config.json as published, and the number of parameters of its files."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name: str):
    hf, parameters = PUBLISHED[name]
    config = ModelConfig.from_hf(hf)
    assert config.parameters() == parameters
    assert config.sliding_window is None
    assert warnings_of(hf, config.family, name) == []


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
