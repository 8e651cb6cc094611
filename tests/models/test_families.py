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
