"""Grouped matrix products on a GPU, in Pallas for Triton: each tile of rows belongs to one expert.

A multiprocessor computes one large tile at a time, 128 × 256 where its shared memory permits: it reads each operand 128
to 256 times less often than it uses it. Tiles that run at the same time share rows and weights, which then come from
the L2 cache.

Axes: A rows (whole tiles), X tiles of rows, E experts, I inputs, O outputs.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

ROWS = (128, 64)
"""Possible rows of a tile. The longest that is used gives each expert 4 tiles if balanced, so that its last tile, which
is padded, is a small part."""
STEP = 64
"""Inputs, or rows of an outer product, that are multiplied at a time."""
NEIGHBOURS = 8
"""Tiles of rows that are computed together, for all outputs: their rows stay in the L2 cache."""
SHARED = {"8.0": 163, "8.7": 163, "9.0": 227, "10.0": 227, "10.3": 227}
"""Compute capability → KiB of shared memory that a block may have."""
LEAST_SHARED = 99
"""KiB of shared memory that a block may have on other GPUs with tensor cores for bfloat16."""


class Tile(NamedTuple):
    """How a kernel's block computes."""

    outputs: int
    """Maximum outputs of a tile."""
    warps: int
    stages: int
    """Steps whose operands are in shared memory: later ones are read while one is multiplied."""


def shared_memory(capability: str) -> int:
    """Bytes of shared memory that a block may have on a GPU of a compute capability, such as "9.0"."""
    return SHARED.get(capability, LEAST_SHARED) << 10


def row_tile(rows: int, experts: int) -> int:
    """The rows of a tile for a number of assignments (`rows`)."""
    return next((side for side in ROWS if side * 4 * experts <= rows), ROWS[-1])


def tile(rows: int, shared: int) -> Tile:
    """The tile for a block of `rows` rows with `shared` bytes of shared memory."""
    fitting = (tile for tile in TILES if (rows + tile.outputs) * STEP * 2 * tile.stages <= shared)
    return next(fitting, TILES[-1]) if rows == ROWS[0] else TILES[-1]


TILES = (Tile(256, 8, 4), Tile(256, 8, 3), Tile(128, 8, 3), Tile(128, 4, 3))
"""Tiles, the fastest first, with less and less shared memory; the last also for 64 rows."""


def side(size: int, most: int) -> int:
    """The side of a tile along an axis: the largest power of two up to `most` that divides it."""
    return min(most, size & -size)


def product(
    x_AI: jax.Array,
    weight: jax.Array,
    expert_X: jax.Array,
    out: Any,
    *,
    transposed: bool,
    shared: int,
    interpret: bool,
) -> jax.Array:
    """x [A, I] times the weight of each row's expert, [E, I, O], or [E, O, I] when transposed: [A, O] in `out`.

    `expert_X`: the expert of each tile of rows; rows of a tile without one (E or more) are undefined. `shared`: bytes
    of shared memory that a block may have.
    """
    (rows, inputs), tiles = x_AI.shape, len(expert_X)
    height, outputs = rows // tiles, weight.shape[1 if transposed else 2]
    chosen = tile(height, shared)
    block_in, block_out = side(inputs, STEP), side(outputs, chosen.outputs)
    columns = outputs // block_out

    def place(number: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The tile and the column of a block, in the order in which blocks start."""
        first = number // (NEIGHBOURS * columns) * NEIGHBOURS
        together = jnp.minimum(tiles - first, NEIGHBOURS)
        inside = number % (NEIGHBOURS * columns)
        return first + inside % together, inside // together

    call = pl.pallas_call(
        partial(_product, place=place, block_in=block_in, block_out=block_out, transposed=transposed),
        grid=(tiles * columns,),
        in_specs=[
            pl.BlockSpec((1,), lambda number: (place(number)[0],)),
            pl.BlockSpec((height, inputs), lambda number: (place(number)[0], 0)),
            pl.BlockSpec(weight.shape, lambda _: (0, 0, 0)),
        ],
        out_specs=pl.BlockSpec((height, block_out), place),
        out_shape=jax.ShapeDtypeStruct((rows, outputs), out),
        compiler_params=plgpu.CompilerParams(num_warps=chosen.warps, num_stages=chosen.stages),
        interpret=interpret,
        name="grouped_product",
        cost_estimate=_cost(rows, inputs, outputs, x_AI, weight),
    )
    return call(expert_X, x_AI, weight)


def _product(
    expert_ref, x_ref, weight_ref, out_ref, *, place: Any, block_in: int, block_out: int, transposed: bool
) -> None:
    expert = expert_ref[0]
    columns = pl.ds(place(pl.program_id(0))[1] * block_out, block_out)

    @pl.when(expert < weight_ref.shape[0])
    def _() -> None:
        def add(step: jax.Array, total: jax.Array) -> jax.Array:
            inner = pl.ds(step * block_in, block_in)
            if transposed:
                return total + dot(x_ref[:, inner], weight_ref[expert, columns, inner].T)
            return total + dot(x_ref[:, inner], weight_ref[expert, inner, columns])

        total = jnp.zeros(out_ref.shape, jnp.float32)
        total = jax.lax.fori_loop(0, x_ref.shape[1] // block_in, add, total)
        out_ref[...] = total.astype(out_ref.dtype)


def outer(x_AI: jax.Array, dy_AO: jax.Array, rows_E: jax.Array, *, shared: int, interpret: bool) -> jax.Array:
    """xᵀ dy over each expert's rows, [E, I, O] in f32; zeros for an expert without rows. `rows_E` are multiples of
    `STEP`. `shared`: bytes of shared memory that a block may have."""
    (rows, inputs), outputs, experts = x_AI.shape, dy_AO.shape[1], len(rows_E)
    block_in = side(inputs, ROWS[0])
    chosen = tile(block_in, shared)
    block_out = side(outputs, chosen.outputs)
    last_E = (jnp.cumsum(rows_E) // STEP).astype(jnp.int32)
    # Blocks of one expert follow each other: its rows, which all of them read, stay in the L2 cache.
    call = pl.pallas_call(
        _outer,
        grid=(inputs // block_in, outputs // block_out, experts),
        in_specs=[
            pl.BlockSpec((1,), lambda _, __, expert: (expert,)),
            pl.BlockSpec((1,), lambda _, __, expert: (expert,)),
            pl.BlockSpec((rows, block_in), lambda row, _, __: (0, row)),
            pl.BlockSpec((rows, block_out), lambda _, column, __: (0, column)),
        ],
        out_specs=pl.BlockSpec((1, block_in, block_out), lambda row, column, expert: (expert, row, column)),
        out_shape=jax.ShapeDtypeStruct((experts, inputs, outputs), jnp.float32),
        compiler_params=plgpu.CompilerParams(num_warps=chosen.warps, num_stages=chosen.stages),
        interpret=interpret,
        name="grouped_outer",
        cost_estimate=_cost(rows, inputs, outputs, x_AI, dy_AO),
    )
    return call(last_E - (rows_E // STEP).astype(jnp.int32), last_E, x_AI, dy_AO)


def _outer(first_ref, last_ref, x_ref, dy_ref, out_ref) -> None:
    def add(step: jax.Array, total: jax.Array) -> jax.Array:
        rows = pl.ds(step * STEP, STEP)
        return total + dot(x_ref[rows, :].T, dy_ref[rows, :])

    total = jnp.zeros(out_ref.shape[1:], jnp.float32)
    out_ref[0] = jax.lax.fori_loop(first_ref[0], last_ref[0], add, total)


def dot(one: jax.Array, other: jax.Array) -> jax.Array:
    """A product in f32; f32 operands are not rounded for the tensor cores."""
    precision = jax.lax.Precision.HIGHEST if one.dtype == jnp.float32 else None
    return jax.lax.dot(one, other, precision=precision, preferred_element_type=jnp.float32)


def _cost(rows: int, inputs: int, outputs: int, *read: jax.Array) -> pl.CostEstimate:
    return pl.CostEstimate(
        flops=2 * rows * inputs * outputs,
        bytes_accessed=sum(one.size * one.dtype.itemsize for one in read),
        transcendentals=0,
    )
