"""Grouped products, by the kernels' interpreter, against the experts that run everywhere."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xlam_jax.models import grouped
from xlam_jax.models.linear import Adapter
from xlam_jax.models.moe import Linear, experts_mlp, route

TOKENS, PER_TOKEN, EXPERTS, WIDTH, HIDDEN, RANK = 150, 2, 4, 32, 48, 16
MANY = {"16 experts": (16, 4), "128 experts": (128, 8)}
"""Kind of routing → its experts, and those of each token."""


def routing(kind: str) -> np.ndarray:
    """Experts of each token [S, k]; EXPERTS itself means none."""
    random = np.random.default_rng(0)
    experts, per_token = MANY.get(kind, (EXPERTS, PER_TOKEN))
    expert_SK = np.stack([random.permutation(experts)[:per_token] for _ in range(TOKENS)])
    if kind == "one expert":
        expert_SK[:] = [3, 1]
    if kind == "padded, one without rows":
        expert_SK[random.random(TOKENS) < 0.4] = EXPERTS
        expert_SK[expert_SK == 2] = EXPERTS
    if kind == "all padding":
        expert_SK[:] = EXPERTS
    return expert_SK.astype(np.int32)


def results(kernel: str, kind: str, dtype: Any, *, lora: bool) -> Any:
    """The experts' sum, and the gradients of tokens, gates, weights and adapters."""
    random = np.random.default_rng(1)
    experts, per_token = MANY.get(kind, (EXPERTS, PER_TOKEN))

    def draw(*shape: int) -> jax.Array:
        return jnp.asarray(random.normal(size=shape) * 0.3, dtype)

    shapes = [(WIDTH, HIDDEN), (WIDTH, HIDDEN), (HIDDEN, WIDTH)]
    weights = [
        Linear(draw(experts, *one), Adapter(draw(experts, one[0], RANK), draw(experts, RANK, one[1])) if lora else None)
        for one in shapes
    ]
    x_SD, gate_SK = draw(TOKENS, WIDTH), jnp.asarray(random.uniform(size=(TOKENS, per_token)), jnp.float32)
    wanted_SD, expert_SK = draw(TOKENS, WIDTH).astype(jnp.float32), jnp.asarray(routing(kind))

    @jax.jit
    def run(x_SD: jax.Array, gate_SK: jax.Array, weights: list[Linear]) -> Any:
        def loss(x_SD, gate_SK, weights):
            w1_EDF, w3_EDF, w2_EFD = weights
            if kernel == "xla":
                y_SKD = experts_mlp(x_SD, w1_EDF, w3_EDF, w2_EFD, route(expert_SK, experts), dtype, frozen=False)
                y_SD = jnp.einsum("SKD,SK->SD", y_SKD.astype(jnp.float32), gate_SK)
            else:
                options = grouped.KernelOptions(kernel, dtype, frozen=False, interpret=True)
                groups = grouped.group(expert_SK, experts, kernel)
                y_SD = grouped.experts_sum(x_SD, gate_SK, w1_EDF, w3_EDF, w2_EFD, groups, options)
            return jnp.sum(y_SD * wanted_SD), y_SD

        return jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(x_SD, gate_SK, weights)

    (_, y_SD), gradients = run(x_SD, gate_SK, weights)
    return [np.asarray(leaf.astype(jnp.float32)) for leaf in jax.tree.leaves((y_SD, gradients))]


@pytest.mark.parametrize("kernel", ["megablox", "triton"])
@pytest.mark.parametrize(
    ("kind", "dtype", "lora", "tolerance"),
    [
        ("random", "float32", False, 2e-6),
        ("one expert", "float32", True, 2e-6),
        ("padded, one without rows", "float32", False, 2e-6),
        ("all padding", "float32", False, 0.0),
        ("padded, one without rows", "bfloat16", True, 2e-2),
        pytest.param("16 experts", "float32", True, 2e-6, marks=pytest.mark.slow),
        pytest.param("128 experts", "float32", False, 2e-6, marks=pytest.mark.slow),
    ],
)
def test_a_kernel_gives_what_xla_gives(kernel: str, kind: str, dtype: str, lora: bool, tolerance: float):
    expected = results("xla", kind, jnp.dtype(dtype), lora=lora)
    computed = results(kernel, kind, jnp.dtype(dtype), lora=lora)
    for array, like in zip(computed, expected, strict=True):
        np.testing.assert_allclose(array, like, rtol=0, atol=tolerance * np.abs(like).max())
