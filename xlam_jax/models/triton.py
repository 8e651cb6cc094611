"""Grouped matrix products on a GPU, in Pallas for Triton: each tile of rows belongs to one expert.

Axes: A rows (whole tiles), E experts, I inputs, O outputs.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

ROWS = 64
"""Rows of a tile."""


def side(size: int, most: int) -> int:
    """The side of a tile along an axis: the largest power of two up to `most` that divides it."""
    return min(most, size & -size)


def product(
    x_AI: jax.Array, weight: jax.Array, rows_E: jax.Array, out: Any, *, transposed: bool, interpret: bool
) -> jax.Array:
    """x [A, I] times the weight of each row's expert, [E, I, O], or [E, O, I] when transposed: [A, O] in `out`.

    `rows_E` are whole tiles. Rows after those of the last expert are undefined.
    """
    rows, inputs = x_AI.shape
    outputs = weight.shape[1 if transposed else 2]
    block_in, block_out = side(inputs, 64), side(outputs, 128)
    last_E = jnp.cumsum(rows_E) // ROWS
    expert_A = jnp.sum(jnp.arange(rows // ROWS)[:, None] >= last_E, axis=1, dtype=jnp.int32)
    call = pl.pallas_call(
        partial(_product, block_in=block_in, block_out=block_out, transposed=transposed),
        grid=(rows // ROWS, outputs // block_out),
        in_specs=[
            pl.BlockSpec((1,), lambda tile, _: (tile,)),
            pl.BlockSpec((ROWS, inputs), lambda tile, _: (tile, 0)),
            pl.BlockSpec(weight.shape, lambda *_: (0, 0, 0)),
        ],
        out_specs=pl.BlockSpec((ROWS, block_out), lambda tile, column: (tile, column)),
        out_shape=jax.ShapeDtypeStruct((rows, outputs), out),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=3),
        interpret=interpret,
        name="grouped_product",
        cost_estimate=_cost(rows, inputs, outputs, x_AI, weight),
    )
    return call(expert_A, x_AI, weight)


def _product(expert_ref, x_ref, weight_ref, out_ref, *, block_in: int, block_out: int, transposed: bool) -> None:
    expert = expert_ref[0]
    columns = pl.ds(pl.program_id(1) * block_out, block_out)

    @pl.when(expert < weight_ref.shape[0])
    def _() -> None:
        def add(step: jax.Array, total: jax.Array) -> jax.Array:
            inner = pl.ds(step * block_in, block_in)
            if transposed:
                return total + _dot(x_ref[:, inner], weight_ref[expert, columns, inner].T)
            return total + _dot(x_ref[:, inner], weight_ref[expert, inner, columns])

        total = jnp.zeros((ROWS, block_out), jnp.float32)
        total = jax.lax.fori_loop(0, x_ref.shape[1] // block_in, add, total)
        out_ref[...] = total.astype(out_ref.dtype)


def outer(x_AI: jax.Array, dy_AO: jax.Array, rows_E: jax.Array, *, interpret: bool) -> jax.Array:
    """xᵀ dy over each expert's rows, [E, I, O] in f32; zeros for an expert without rows. `rows_E` are whole tiles."""
    (rows, inputs), outputs, experts = x_AI.shape, dy_AO.shape[1], len(rows_E)
    block_in, block_out = side(inputs, 64), side(outputs, 128)
    last_E = (jnp.cumsum(rows_E) // ROWS).astype(jnp.int32)
    call = pl.pallas_call(
        _outer,
        grid=(experts, inputs // block_in, outputs // block_out),
        in_specs=[
            pl.BlockSpec((1,), lambda expert, *_: (expert,)),
            pl.BlockSpec((1,), lambda expert, *_: (expert,)),
            pl.BlockSpec((rows, block_in), lambda _, row, __: (0, row)),
            pl.BlockSpec((rows, block_out), lambda _, __, column: (0, column)),
        ],
        out_specs=pl.BlockSpec((1, block_in, block_out), lambda expert, row, column: (expert, row, column)),
        out_shape=jax.ShapeDtypeStruct((experts, inputs, outputs), jnp.float32),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=3),
        interpret=interpret,
        name="grouped_outer",
        cost_estimate=_cost(rows, inputs, outputs, x_AI, dy_AO),
    )
    return call(last_E - rows_E // ROWS, last_E, x_AI, dy_AO)


def _outer(first_ref, last_ref, x_ref, dy_ref, out_ref) -> None:
    def add(tile: jax.Array, total: jax.Array) -> jax.Array:
        rows = pl.ds(tile * ROWS, ROWS)
        return total + _dot(x_ref[rows, :].T, dy_ref[rows, :])

    total = jnp.zeros(out_ref.shape[1:], jnp.float32)
    out_ref[0] = jax.lax.fori_loop(first_ref[0], last_ref[0], add, total)


def _dot(one: jax.Array, other: jax.Array) -> jax.Array:
    """A product in f32; f32 operands are not rounded for the tensor cores."""
    precision = jax.lax.Precision.HIGHEST if one.dtype == jnp.float32 else None
    return jax.lax.dot(one, other, precision=precision, preferred_element_type=jnp.float32)


def _cost(rows: int, inputs: int, outputs: int, *read: jax.Array) -> pl.CostEstimate:
    return pl.CostEstimate(
        flops=2 * rows * inputs * outputs,
        bytes_accessed=sum(one.size * one.dtype.itemsize for one in read),
        transcendentals=0,
    )
