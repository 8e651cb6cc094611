"""The attention kernels, by their interpreter, against the attention that runs everywhere."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xlam_jax.models.attention import Places, attend
from xlam_jax.models.kernels import Kernels

ROWS, KV_HEADS, GROUP = 2, 2, 2


def places(tokens: int) -> Places:
    """Three sequences a row that end inside of blocks, and padding after them."""
    segments, positions = np.zeros((ROWS, tokens), np.int32), np.zeros((ROWS, tokens), np.int32)
    for row in range(ROWS):
        start = 0
        for segment, size in enumerate([37, 91, tokens - 128 - 13 * (row + 1)], start=1):
            segments[row, start : start + size], positions[row, start : start + size] = segment, np.arange(size)
            start += size
    return Places(*map(jnp.asarray, (positions, segments, positions, segments)))


def results(kernels: Kernels, tokens: int, size: int, window: int | None, dtype: Any) -> list[np.ndarray]:
    """What real queries get, and the gradients of a random sum of it."""
    where = places(tokens)
    keys = jax.random.split(jax.random.key(0), 4)
    heads = [(KV_HEADS, GROUP, size), (KV_HEADS, size), (KV_HEADS, size), (KV_HEADS, GROUP, size)]
    drawn = [jax.random.normal(key, (ROWS, tokens, *shape)) for key, shape in zip(keys, heads, strict=True)]
    *inputs, weight = (one.astype(dtype) for one in drawn)
    real = (where.q_segments_BT > 0)[:, :, None, None, None]

    @jax.jit
    def run(*inputs: jax.Array) -> Any:
        def loss(q, k, v):
            out = jnp.where(real, attend(q, k, v, where, window=window, kernels=kernels), 0)
            return jnp.sum((out * weight).astype(jnp.float32)), out

        return jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(*inputs)

    (_, out), gradients = run(*inputs)
    return [np.asarray(one.astype(jnp.float32)) for one in (out, *gradients)]


@pytest.mark.parametrize(
    ("kernel", "tokens", "size", "window", "dtype", "tolerance"),
    [
        ("splash", 256, 128, None, "float32", 2e-6),
        ("splash", 256, 64, 50, "float32", 2e-6),
        ("splash", 256, 64, None, "bfloat16", 1e-2),
        ("splash", 2048, 64, 300, "float32", 2e-6),  # several blocks: some seen whole, some not at all
        ("pallas", 256, 64, None, "float32", 2e-6),
        ("pallas", 256, 32, None, "bfloat16", 1e-2),
    ],
)
def test_a_kernel_gives_what_xla_gives(
    kernel: str, tokens: int, size: int, window: int | None, dtype: str, tolerance: float
):
    expected = results(Kernels(), tokens, size, window, jnp.dtype(dtype))
    computed = results(Kernels(attention=kernel, interpret=True), tokens, size, window, jnp.dtype(dtype))
    for array, like in zip(computed, expected, strict=True):
        np.testing.assert_allclose(array, like, rtol=0, atol=tolerance * np.abs(like).max())
