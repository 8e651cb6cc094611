"""NF4: frozen weights in four bits (QLoRA, Dettmers et al., 2305.14314).

A block of weights along the last axis shares one scale, its largest magnitude; each weight is the nearest of 16
quantiles of the normal distribution times that scale. The scales are quantized once more, to eight bits of their root
relative to the largest scale of their row: the root preserves the small scales of a row that has an outlier. A
quantized weight shards, gathers and stacks like the weight itself: blocks and rows are along the last axis, so the
shards of another axis never cut them.
"""

from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

CODEBOOK = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""The paper's appendix E: quantiles of the normal distribution scaled to [-1, 1]; exactly zero is one of them."""

BLOCK = 64
"""Weights that share a scale; fewer if the last axis is not a multiple of it."""


class NF4(NamedTuple):
    """A weight of shape [..., N] in blocks of b."""

    codes: Any
    """uint8 [..., N/2]: the first half of each block in the low four bits, the second half in the high ones."""
    scales: Any
    """uint8 [..., N/b]: 255 × √(scale of the block / scale of the row)."""
    rows: Any
    """f32 [...]: the largest scale of the row."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight."""
        return (*self.codes.shape[:-1], 2 * self.codes.shape[-1])


def block_size(size: int) -> int:
    """The largest power of two up to `BLOCK` that divides an axis."""
    return min(BLOCK, size & -size)


def quantize(weight: jax.Array) -> NF4:
    """Quantizes a weight [..., N], N even."""
    size = weight.shape[-1]
    block = block_size(size)
    blocks = weight.astype(jnp.float32).reshape(*weight.shape[:-1], size // block, block)
    scale = jnp.max(jnp.abs(blocks), axis=-1)
    row = jnp.max(scale, axis=-1)
    midpoints = jnp.array([(low + high) / 2 for low, high in pairwise(CODEBOOK)], jnp.float32)
    unit = blocks / jnp.where(scale > 0, scale, 1.0)[..., None]
    # Counting the midpoints below each weight needs one temporary of the size of the weight; a search needs no less.
    code = sum((unit > midpoint).astype(jnp.uint8) for midpoint in midpoints)
    low, high = jnp.split(code, 2, axis=-1)
    packed = (low | (high << 4)).reshape(*weight.shape[:-1], size // 2)
    scales = jnp.round(jnp.sqrt(scale / jnp.where(row > 0, row, 1.0)[..., None]) * 255).astype(jnp.uint8)
    return NF4(packed, scales, row)


def dequantize(weight: NF4, dtype: Any) -> jax.Array:
    """Computes the weights from their codes, [..., N] in `dtype`."""
    blocks = weight.scales.shape[-1]
    half = weight.codes.shape[-1] // blocks
    packed = weight.codes.reshape(*weight.codes.shape[:-1], blocks, half)
    code = jnp.concatenate([packed & 15, packed >> 4], axis=-1)
    scale = jnp.square(weight.scales.astype(jnp.float32)) * (weight.rows[..., None] / 255**2)
    return (_value(code) * scale[..., None]).astype(dtype).reshape(weight.shape)


def _value(code: jax.Array) -> jax.Array:
    """Looks codes up in the codebook by a tree of selections, which XLA fuses; gathers are slow on accelerators."""
    values = [jnp.float32(value) for value in CODEBOOK]
    for bit in range(4):
        one = (code >> bit) & 1 == 1
        values = [jnp.where(one, high, low) for low, high in zip(values[::2], values[1::2], strict=True)]
    return values[0]


def dense(weight: jax.Array | NF4, dtype: Any) -> jax.Array:
    """A weight in `dtype`, dequantized if needed."""
    return dequantize(weight, dtype) if isinstance(weight, NF4) else weight.astype(dtype)
