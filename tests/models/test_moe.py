"""The mixture of experts against a reference that computes each token by itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xlam_jax.models.moe import TILE, Linear, experts_mlp, route

EXPERTS, PER_TOKEN, TOKENS, WIDTH, HIDDEN = 4, 2, 320, 16, 24


def routing(kind: str) -> np.ndarray:
    """Experts of each token [S, k]; EXPERTS itself means none."""
    random = np.random.default_rng(0)
    expert_SK = np.stack([random.permutation(EXPERTS)[:PER_TOKEN] for _ in range(TOKENS)])
    if kind == "balanced":
        expert_SK = (np.arange(TOKENS)[:, None] + np.arange(PER_TOKEN)) % EXPERTS
    if kind == "skewed":  # every token to expert 3: 320 rows where 160 are the balanced share, more than one tile
        expert_SK = np.stack([np.full(TOKENS, 3), np.where(random.random(TOKENS) < 0.9, 1, 0)], axis=1)
    if kind == "padded":
        expert_SK[random.random(TOKENS) < 0.4] = EXPERTS
    if kind == "all padding":
        expert_SK[:] = EXPERTS
    return expert_SK.astype(np.int32)


def arguments(dtype=jnp.float32) -> list[jax.Array]:
    keys = jax.random.split(jax.random.key(0), 5)
    shapes = [
        (TOKENS, WIDTH),
        (EXPERTS, WIDTH, HIDDEN),
        (EXPERTS, WIDTH, HIDDEN),
        (EXPERTS, HIDDEN, WIDTH),
        (TOKENS, PER_TOKEN, WIDTH),
    ]
    draws = [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]
    return [(draw * 0.3).astype(dtype) for draw in draws]


def reference(x_SD, w1_EDF, w3_EDF, w2_EFD, expert_SK):
    """Every token through every expert, in f32, then the chosen ones are picked."""
    x_SD, w1_EDF, w3_EDF, w2_EFD = (value.astype(jnp.float32) for value in (x_SD, w1_EDF, w3_EDF, w2_EFD))
    gate_SEF = jnp.einsum("SD,EDF->SEF", x_SD, w1_EDF)
    y_SED = jnp.einsum("SEF,EFD->SED", jax.nn.silu(gate_SEF) * jnp.einsum("SD,EDF->SEF", x_SD, w3_EDF), w2_EFD)
    chosen_SKE = expert_SK[:, :, None] == jnp.arange(EXPERTS)
    return jnp.einsum("SKE,SED->SKD", chosen_SKE.astype(jnp.float32), y_SED)


@jax.jit
def expected(weight_SKD, expert_SK, *inputs):
    def loss(x_SD, w1_EDF, w3_EDF, w2_EFD):
        y_SKD = reference(x_SD, w1_EDF, w3_EDF, w2_EFD, expert_SK)
        return jnp.sum(y_SKD * weight_SKD.astype(jnp.float32)), y_SKD

    return jax.value_and_grad(loss, argnums=(0, 1, 2, 3), has_aux=True)(*inputs)


@jax.jit
def computed(weight_SKD, expert_SK, *inputs):
    dtype = inputs[0].dtype

    def loss(x_SD, w1_EDF, w3_EDF, w2_EFD):
        where = route(expert_SK, EXPERTS)
        y_SKD = experts_mlp(x_SD, Linear(w1_EDF), Linear(w3_EDF), Linear(w2_EFD), where, dtype)
        return jnp.sum(y_SKD.astype(jnp.float32) * weight_SKD.astype(jnp.float32)), y_SKD

    return jax.value_and_grad(loss, argnums=(0, 1, 2, 3), has_aux=True)(*inputs)


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    # bf16 has 8 bits: each of the products and activations in a chain of four rounds by up to 2⁻⁹ of its value. The
    # worst element of thousands stays within 2⁻⁶ of the scale; a token at the wrong expert is off by the whole scale.
    [(jnp.float32, 1e-5), (jnp.bfloat16, 2**-6)],
    ids=["f32", "bf16"],
)
@pytest.mark.parametrize("kind", ["balanced", "random", "skewed", "padded", "all padding"])
def test_values_and_gradients(kind: str, dtype, tolerance: float):
    *inputs, weight_SKD = arguments(dtype)
    expert_SK = routing(kind)
    (_, y_SKD), gradients = computed(weight_SKD, expert_SK, *inputs)
    (_, expected_SKD), expected_gradients = expected(weight_SKD, expert_SK, *inputs)
    for name, ours, target in [
        ("y", y_SKD, expected_SKD),
        *zip(("x", "w1", "w3", "w2"), gradients, expected_gradients, strict=True),
    ]:
        ours, target = np.asarray(ours, np.float32), np.asarray(target, np.float32)
        assert np.abs(ours - target).max() <= tolerance * np.abs(target).max(), name


def test_the_overflow_of_one_expert_fills_tiles():
    where = jax.jit(route, static_argnums=1)(routing("skewed"), EXPERTS)
    capacity = TOKENS * PER_TOKEN // EXPERTS
    over = np.maximum(np.bincount(routing("skewed").ravel(), minlength=EXPERTS) - capacity, 0)
    assert int(where.tiles) == sum(-(-over // TILE)) >= 2


@pytest.mark.parametrize("kind", ["balanced", "random", "skewed", "padded"])
def test_each_assignment_has_a_row_of_its_own_that_holds_its_token(kind: str):
    expert_SK = routing(kind)
    where = jax.jit(route, static_argnums=1)(expert_SK, EXPERTS)
    token_of_row = np.concatenate([np.asarray(where.token_EC).ravel(), np.asarray(where.tile_token_AR).ravel()])
    expert_of_row = np.concatenate(
        [
            np.repeat(np.arange(EXPERTS), where.token_EC.shape[1]),
            np.repeat(where.tile_expert_A, where.tile_token_AR.shape[1]),
        ]
    )
    row_SK = np.asarray(where.row_SK)
    real = expert_SK < EXPERTS
    assert (row_SK[~real] == -1).all()
    assert len(set(row_SK[real].tolist())) == real.sum()
    token_SK = np.broadcast_to(np.arange(TOKENS)[:, None], expert_SK.shape)
    np.testing.assert_array_equal(token_of_row[row_SK[real]], token_SK[real])
    np.testing.assert_array_equal(expert_of_row[row_SK[real]], expert_SK[real])
    assert (token_of_row < TOKENS).sum() == real.sum(), "no row computes a token that was not sent to it"


def test_the_same_bits_each_time():
    *inputs, weight_SKD = arguments(jnp.bfloat16)
    first, second = (computed(weight_SKD, routing("skewed"), *inputs) for _ in range(2))
    for one, other in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()
