"""Rows of added tokens: the mean of the base's, trained next to adapters, merged, and absent from the reference."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tiny_models
from test_lora import close, computed, flat

from xlam_jax.models.config import AddedTokens, Lora, ModelConfig
from xlam_jax.models.params import Params, initialize, is_adapter, join, shapes, split, trainable
from xlam_jax.parallel import mesh as meshes
from xlam_jax.weights.added_tokens import ExtendedRows, extend, new_rows
from xlam_jax.weights.merge import merge
from xlam_jax.weights.run import read_layers

ADDED = AddedTokens(tiny_models.VOCAB, 3)


def extended(family: str, targets: tuple[str, ...] = ("q",), **overrides) -> tuple[ModelConfig, Params, Params]:
    """A tiny model with added tokens: config, its base without them, and with them."""
    model = tiny_models.hf_model(family, **overrides)
    base, lora = tiny_models.params_of(model), Lora(targets=targets, rank=3, alpha=6.0, train_tokens=True)
    config = tiny_models.model_config(model)
    config = replace(config, vocab_size=ADDED.vocab_size(config.vocab_size), added=ADDED, lora=lora)
    whole = {name: np.asarray(leaf) if name != "blocks" else leaf for name, leaf in extend(base, config).items()}
    return config, base, whole


@pytest.mark.parametrize(
    ("first", "count", "base", "rows"), [(97, 3, 97, 128), (97, 31, 97, 128), (97, 32, 97, 192), (90, 3, 97, 97)]
)
def test_the_vocabulary_is_enlarged_to_a_multiple(first: int, count: int, base: int, rows: int):
    assert AddedTokens(first, count).vocab_size(base) == rows


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_new_rows_are_numpys_mean(dtype):
    rows = np.random.default_rng(0).normal(size=(1000, 24)).astype(dtype)
    lazy = ExtendedRows(rows, AddedTokens(1000, 2), 1024)
    mean = rows.astype(np.float32).mean(axis=0).astype(dtype)
    assert np.array_equal(np.asarray(lazy)[:1000], rows)
    assert np.array_equal(np.asarray(lazy)[1000:], np.broadcast_to(mean, (24, 24)))
    assert (np.asarray(lazy).shape, np.asarray(lazy).dtype) == (lazy.shape, lazy.dtype) == ((1024, 24), dtype)
    close(mean.astype(np.float64), rows.astype(np.float64).mean(axis=0), "mean", 1e-5 if dtype == np.float32 else 1e-2)
    # f32 parameters of a bf16 base are the rounded rows, as those of a folder would be
    as_f32 = lazy.astype(np.float32)
    assert np.array_equal(np.asarray(as_f32), np.asarray(lazy).astype(np.float32))
    sharding = jax.sharding.NamedSharding(meshes.make_mesh({}, jax.devices()[:1]), meshes.EVERYWHERE)
    assert np.array_equal(np.asarray(as_f32.placed(sharding)), np.asarray(as_f32))


def test_unused_rows_of_the_base_are_replaced():
    rows = np.random.default_rng(0).normal(size=(12, 4)).astype(np.float32)
    whole = np.asarray(ExtendedRows(rows, AddedTokens(8, 2), 12))
    assert np.array_equal(whole[[*range(8), 10, 11]], rows[[*range(8), 10, 11]])
    assert np.array_equal(whole[8:10], np.broadcast_to(rows[:8].mean(axis=0), (2, 4)))


@pytest.mark.parametrize("rows", [96, 129])
def test_a_base_of_another_size_is_not_extended(rows: int):
    config, base, _ = extended("mistral")
    base = base | {"embedding": np.zeros((rows, 32), np.float32)}
    assert extend(base, config)["embedding"] is base["embedding"]


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        pytest.param("mistral", {"tie_word_embeddings": True}, marks=pytest.mark.slow),
        ("llama", {"num_hidden_layers": 1}),
    ],
)
def test_new_tokens_change_no_logits_of_the_others(family: str, overrides: dict):
    config, base, whole = extended(family, **overrides)
    tokens_BT = tiny_models.tokens(2, 16)
    adapters = trainable(config, initialize(config, 0))[0]
    names = {name for name in flat(adapters) if name.endswith("_rows")}
    assert names == ({"embedding_rows"} if config.tie_embeddings else {"embedding_rows", "head_rows"})
    assert not any(np.any(flat(adapters)[name]) for name in names)
    assert {name: leaf.shape for name, leaf in new_rows(config).items()} == dict.fromkeys(names, (3, 32))
    before, _ = computed(
        tiny_models.model_config(tiny_models.hf_model(family, **overrides)), base, np.ones(1), tokens_BT
    )
    after, _ = computed(config, join(whole, adapters), np.ones(1), tokens_BT)
    close(after[..., : tiny_models.VOCAB], before, "logits of old tokens", 1e-6)
    mean = before.mean(axis=-1, keepdims=True)
    close(after[..., tiny_models.VOCAB :], np.broadcast_to(mean, (2, 16, 31)), "logits of new rows", 1e-4)


@pytest.mark.parametrize(
    ("family", "targets", "overrides"),
    [
        ("mistral", ("q", "embedding"), {"tie_word_embeddings": True}),
        ("llama", ("v", "head", "embedding"), {"num_hidden_layers": 1}),
        pytest.param("mixtral", ("q",), {"num_local_experts": 4}, marks=pytest.mark.slow),
    ],
)
def test_trained_rows_equal_merged_weights(family: str, targets: tuple[str, ...], overrides: dict):
    config, _, whole = extended(family, targets, **overrides)
    rng = np.random.default_rng(0)
    adapters = jax.tree.map(
        lambda leaf: rng.normal(scale=0.1, size=leaf.shape).astype(np.float32), trainable(config, shapes(config))[0]
    )
    tokens_BT = rng.integers(ADDED.first - 3, ADDED.first + 3, (2, 16)).astype(np.int32)  # half of them are new
    weight_BTV = rng.normal(size=(2, 16, config.vocab_size)).astype(np.float32)
    logits, gradients = computed(config, join(whole, adapters), weight_BTV, tokens_BT)
    plain = replace(config, lora=None)
    merged, of_weights = computed(plain, read_layers(plain, merge(config, whole, adapters)), weight_BTV, tokens_BT)
    close(logits, merged, "logits")
    for name in (name for name in flat(gradients) if name.endswith("_rows")):
        expected = of_weights[name.removesuffix("_rows")][ADDED.first : ADDED.first + ADDED.number]
        close(flat(gradients)[name], expected, f"gradient of {name}", 1e-4)
    # the reference policy of adapters_off has the base's mean rows
    frozen = split(join(whole, adapters), is_adapter)[1]
    reference, _ = computed(plain, frozen, weight_BTV, tokens_BT)
    assert np.array_equal(reference, computed(plain, whole, weight_BTV, tokens_BT)[0])


def test_bf16_rows_are_rounded_once():
    """In the computation, as in the merged weights."""
    config, _, whole = extended("llama")
    rng = np.random.default_rng(1)
    whole = jax.tree.map(lambda leaf: leaf.astype(ml_dtypes.bfloat16), whole)
    rows = {name: rng.normal(size=leaf.shape).astype(np.float32) for name, leaf in new_rows(config).items()}
    merged = merge(config, {name: whole[name] for name in ("embedding", "head")}, rows)
    for name in ("embedding", "head"):
        expected = whole[name].astype(np.float32)
        expected[ADDED.first : ADDED.first + 3] += rows[f"{name}_rows"]
        assert np.array_equal(merged[name][()], expected.astype(ml_dtypes.bfloat16))
        assert merged[name].dtype == jnp.bfloat16
