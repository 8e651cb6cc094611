"""Adapters: the model with them equals the model with their products added to its weights, gradients too."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models

from xlam_jax.models.config import Lora, ModelConfig
from xlam_jax.models.nf4 import NF4, dense
from xlam_jax.models.params import Params, binder, freeze, initialize, join, shapes, trainable
from xlam_jax.weights.merge import merge
from xlam_jax.weights.run import read_layers

EVERY = ("q", "k", "v", "o", "w1", "w3", "w2", "embedding")


def with_adapters(family: str, seed: int = 0, **overrides) -> tuple[ModelConfig, Params, Params]:
    """A tiny model with adapters on every weight, none of them zero: config, base, adapters."""
    model = tiny_models.hf_model(family, **overrides)
    config = tiny_models.model_config(model)
    targets = EVERY + (("router",) if config.experts else ()) + (() if config.tie_embeddings else ("head",))
    config = replace(config, lora=Lora(targets=targets, rank=3, alpha=6.0, rank_stabilized=family == "llama"))
    rng = np.random.default_rng(seed)
    adapters = jax.tree.map(
        lambda leaf: rng.normal(scale=0.1, size=leaf.shape).astype(np.float32), trainable(config, shapes(config))[0]
    )
    return config, tiny_models.params_of(model), adapters


def lora_of(config: ModelConfig) -> Lora:
    assert config.lora
    return config.lora


def computed(
    config: ModelConfig,
    params: Params,
    weight_BTV: np.ndarray | np.float32,
    tokens_BT: np.ndarray,
    remat: str = "none",
):
    """Logits, and the gradients of sum(weight × logits) in all parameters."""
    positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1], dtype=jnp.int32), tokens_BT.shape)
    bind = binder(config, dtype=jnp.float32, remat=remat)

    def loss(params: Params):
        model = bind(params)
        logits = model.logits(model(jnp.asarray(tokens_BT), positions_BT, jnp.ones_like(tokens_BT))[0])
        return jnp.sum(logits * weight_BTV), logits

    gradients, logits = jax.jit(jax.grad(loss, has_aux=True))(params)
    return np.asarray(logits), jax.device_get(gradients)


def flat(tree: Params) -> dict[str, np.ndarray]:
    return {**tree.get("blocks", {}), **{name: leaf for name, leaf in tree.items() if name != "blocks"}}


def close(ours: np.ndarray, expected: np.ndarray, what: str, tolerance: float = 1e-5) -> None:
    error, scale = np.abs(ours - expected).max(), np.abs(expected).max()
    assert error <= tolerance * scale, f"{what}: off by {error:.3g} at a scale of {scale:.3g}"


@pytest.mark.parametrize(
    ("family", "overrides", "remat"),
    [
        ("mistral", {"tie_word_embeddings": True, "num_key_value_heads": 1}, "none"),
        ("llama", {"head_dim": 12}, "minimal"),
        ("mixtral", {"num_local_experts": 4}, "none"),
        pytest.param("qwen2", {}, "none", marks=pytest.mark.slow),
        pytest.param("qwen3", {}, "dots", marks=pytest.mark.slow),
        pytest.param("qwen3_moe", {}, "none", marks=pytest.mark.slow),
    ],
)
def test_adapters_equal_merged_weights(family: str, overrides: dict, remat: str):
    config, base, adapters = with_adapters(family, **overrides)
    tokens_BT = tiny_models.tokens(2, 24)
    weight_BTV = np.random.default_rng(1).normal(size=(2, 24, config.vocab_size)).astype(np.float32)
    logits, gradients = computed(config, join(base, adapters), weight_BTV, tokens_BT, remat)
    plain = replace(config, lora=None)
    merged, of_weights = computed(plain, read_layers(plain, merge(config, base, adapters)), weight_BTV, tokens_BT)
    close(logits, merged, "logits")
    # d(A·B): what a gradient of the merged weight says of its factors
    got, weights, factors = flat(gradients), flat(of_weights), flat(adapters)
    for name in lora_of(config).targets:
        a, b = factors[f"{name}_a"], factors[f"{name}_b"]
        stacked = 0 if name in ("embedding", "head") else 2 if config.experts and name in ("w1", "w2", "w3") else 1
        lead, rank = a.shape[:stacked], a.shape[-1]
        a, b = a.reshape(*lead, -1, rank), b.reshape(*lead, rank, -1)
        of_weight = weights[name].T if name == "head" else weights[name]
        of_weight = of_weight.reshape(*lead, a.shape[-2], b.shape[-1]) * lora_of(config).scale
        da, db = of_weight @ b.swapaxes(-1, -2), a.swapaxes(-1, -2) @ of_weight
        close(got[f"{name}_a"], da.reshape(factors[f"{name}_a"].shape), f"gradient of A of {name}", 1e-4)
        close(got[f"{name}_b"], db.reshape(factors[f"{name}_b"].shape), f"gradient of B of {name}", 1e-4)


@pytest.mark.parametrize(
    "family", ["qwen2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("qwen3", "qwen3_moe"))]
)
def test_four_bit_weights_equal_the_weights_that_they_stand_for(family: str):
    """Biases and norms stay as they are."""
    config, base, adapters = with_adapters(family)
    frozen = jax.jit(partial(freeze, dtype=jnp.float32, quantized=True))(base)
    plain = jax.tree.map(lambda leaf: dense(leaf, jnp.float32), frozen, is_leaf=lambda leaf: isinstance(leaf, NF4))
    for name, leaf in flat(frozen).items():
        assert isinstance(leaf, NF4) == (config.weight(name).frozen == "nf4")
        assert isinstance(leaf, NF4) or np.array_equal(leaf, flat(base)[name])
    tokens_BT = jnp.asarray(tiny_models.tokens(2, 16))
    positions_BT, ones = jnp.broadcast_to(jnp.arange(16, dtype=jnp.int32), (2, 16)), jnp.ones((2, 16), jnp.int32)
    bind = binder(config, dtype=jnp.float32)

    @jax.jit
    def hidden(params: Params) -> jax.Array:
        return bind(params)(tokens_BT, positions_BT, ones)[0]

    close(hidden(join(frozen, adapters)), hidden(join(plain, adapters)), "hidden states")


@pytest.mark.parametrize("zero", ["A", "B"])
def test_new_adapters_change_nothing(zero: str):
    config, base, _ = with_adapters("mixtral")
    config = replace(config, lora=replace(lora_of(config), zero=zero))
    adapters = trainable(config, initialize(config, 0))[0]
    zeros = {name for name, leaf in flat(adapters).items() if not np.any(leaf)}
    assert zeros == {f"{name}_{zero.lower()}" for name in lora_of(config).targets}
    tokens_BT, weight = tiny_models.tokens(1, 16), np.float32(1)
    with_them, gradients = computed(config, join(base, adapters), weight, tokens_BT)
    without, _ = computed(replace(config, lora=None), base, weight, tokens_BT)
    assert np.array_equal(with_them, without)
    moving = flat(trainable(config, gradients)[0])
    assert all(np.any(moving[name]) for name in zeros)  # the zero factor is the first to learn


def test_dropout_is_of_the_key_alone():
    config, base, adapters = with_adapters("mistral")
    config = replace(config, lora=replace(lora_of(config), dropout=0.5))
    tokens_BT = jnp.asarray(tiny_models.tokens(2, 16))
    positions_BT, ones = jnp.broadcast_to(jnp.arange(16, dtype=jnp.int32), (2, 16)), jnp.ones((2, 16), jnp.int32)
    bind = binder(config, dtype=jnp.float32)

    whole = jax.tree.map(jnp.asarray, join(base, adapters))

    @jax.jit
    def hidden(key: jax.Array | None) -> jax.Array:
        return bind(whole)(tokens_BT, positions_BT, ones, key=key)[0]

    one, same, other, none = (hidden(key) for key in (jax.random.key(1), jax.random.key(1), jax.random.key(2), None))
    assert np.array_equal(one, same)
    assert not np.array_equal(one, other)
    assert not np.array_equal(one, none)
