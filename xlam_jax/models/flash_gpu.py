"""Attention on a GPU, in Pallas for Triton (Dao, 2307.08691): one kernel forward, two backward, none of which writes
scores to memory or adds with atomics, so that results are deterministic.

Segments are contiguous in a row, so the keys that a query attends to are one span of the row. The spans are computed
outside the kernels; they are the only mask, for packed rows, windows and context shards alike. From them follows, for
each block of queries or keys, the range of blocks that its kernel visits, and within it the range of blocks that are
seen whole, which need no mask.

Axes: B rows, T queries, S keys, N key/value heads, H query heads (N × G), G queries per key/value head, K head size,
X blocks of the axis that a kernel's grid divides, Y blocks of the axis that it loops over. In a kernel, T and S are one
block's queries and keys.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from xlam_jax.models.kernels import SHARED
from xlam_jax.models.triton import dot, shared_memory


class Tile(NamedTuple):
    """The block sizes and compiler options of a kernel."""

    queries: int
    keys: int
    warps: int
    stages: int
    """Depth of the loop's software pipeline."""


class Tiles(NamedTuple):
    """The tiles of the three kernels: forward, gradients of keys and values, gradients of queries."""

    forward: Tile
    dkv: Tile
    dq: Tile


LARGE_SHARED = shared_memory("9.0")
"""Bytes of shared memory that Hopper GPUs and Blackwell GPUs for data centers give a block of threads."""

# Chosen among the tiles without register spills (tests/planning/test_flash_kernels.py), not yet by time on a device:
# larger tiles read less from shared memory per product, and 8 warps can keep a multiprocessor's tensor cores busy.
TILES = {
    LARGE_SHARED: {
        64: Tiles(Tile(128, 64, 8, 3), dkv=Tile(64, 128, 8, 3), dq=Tile(128, 64, 8, 3)),
        128: Tiles(Tile(128, 64, 8, 3), dkv=Tile(64, 128, 8, 2), dq=Tile(128, 64, 8, 2)),
        256: Tiles(Tile(128, 32, 8, 2), dkv=Tile(16, 64, 8, 2), dq=Tile(64, 32, 8, 2)),
    },
    SHARED: {
        64: Tiles(Tile(128, 64, 4, 3), dkv=Tile(64, 128, 8, 2), dq=Tile(128, 64, 8, 2)),
        128: Tiles(Tile(128, 64, 8, 3), dkv=Tile(32, 128, 8, 2), dq=Tile(128, 32, 8, 2)),
        256: Tiles(Tile(64, 32, 8, 2), dkv=Tile(16, 32, 4, 2), dq=Tile(32, 32, 4, 2)),
    },
}
"""Bytes of shared memory of a block → largest head size → tiles."""

LOG2_E = 1.4426950408889634
MASKED, LOWEST = -1e30, -1e20
"""Score of a key that a query does not see, and the initial maximum of the scaled scores: exp2(MASKED × scale - LOWEST)
is 0 for every head size, so that the sum of a query that sees no key stays 0."""


class Spans(NamedTuple):
    """The keys that each query sees, by their index in the row: from `first` to `last`. For a query that sees none, the
    number of keys and -1."""

    first_BT: jax.Array
    last_BT: jax.Array


def tiles_for(size: int, shared: int) -> Tiles:
    """The tiles for a head size, on a GPU that gives a block `shared` bytes of shared memory."""
    by_size = TILES[LARGE_SHARED if shared >= LARGE_SHARED else SHARED]
    return by_size[next(largest for largest in by_size if size <= largest)]


def find_spans(q_segments_BT: jax.Array, k_segments_BS: jax.Array, positions_T: jax.Array, window: int | None) -> Spans:
    """`positions_T`: the index of each query in the row. Queries of padding (segment 0) see no keys."""
    start_BT = jnp.take(_starts(k_segments_BS), positions_T, axis=1)
    if window:
        start_BT = jnp.maximum(start_BT, positions_T - window + 1)
    real_BT = q_segments_BT > 0
    return Spans(jnp.where(real_BT, start_BT, k_segments_BS.shape[1]), jnp.where(real_BT, positions_T, -1))


def _starts(segments_BS: jax.Array) -> jax.Array:
    """The index of the first token of each token's segment: a cumulative maximum in two levels, because XLA computes
    the one of JAX in many small kernels on a GPU."""
    rows, tokens = segments_BS.shape
    side = min(1 << tokens.bit_length() // 2, tokens & -tokens)  # about √tokens, and a divisor
    differs_BS = segments_BS != jnp.pad(segments_BS, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]
    start_BCI = jnp.where(differs_BS, jnp.arange(tokens, dtype=jnp.int32), 0).reshape(rows, -1, side)
    latest_BCI = _running_maximum(start_BCI)
    earlier_BC = jnp.pad(_running_maximum(latest_BCI[:, :, -1]), ((0, 0), (1, 0)))[:, :-1]
    return jnp.maximum(latest_BCI, earlier_BC[:, :, None]).reshape(rows, tokens)


def _running_maximum(values_XI: jax.Array) -> jax.Array:
    """Along the last axis, of numbers ≥ 0."""
    at_I = jnp.arange(values_XI.shape[-1])
    return jnp.max(jnp.where(at_I <= at_I[:, None], values_XI[..., None, :], 0), axis=-1)


def _blocks(spans: Spans, keys: int, tile: Tile) -> tuple[jax.Array, jax.Array]:
    """Whether any query of a block sees any key of a block, and whether all see all: both [B, blocks of queries, blocks
    of keys]."""
    first_BX1T, last_BX1T = (array_BT.reshape(len(array_BT), -1, 1, tile.queries) for array_BT in spans)
    start_Y = jnp.arange(0, keys, tile.keys)
    end_Y = start_Y + tile.keys - 1
    any_BXY = (jnp.min(first_BX1T, axis=3) <= end_Y) & (jnp.max(last_BX1T, axis=3) >= start_Y)
    all_BXY = (jnp.max(first_BX1T, axis=3) <= start_Y) & (jnp.min(last_BX1T, axis=3) >= end_Y)
    return any_BXY, all_BXY


def _ranges(any_BXY: jax.Array, all_BXY: jax.Array) -> jax.Array:
    """The blocks Y that each block X visits, and those of them that are seen whole: [B, X, 4], as start, start of the
    whole ones, end of the whole ones, end."""
    start_BX = jnp.argmax(any_BXY, axis=2)
    end_BX = any_BXY.shape[2] - jnp.argmax(any_BXY[:, :, ::-1], axis=2)
    end_BX = jnp.where(any_BXY.any(axis=2), end_BX, 0)
    whole_BX = jnp.where(all_BXY.any(axis=2), jnp.argmax(all_BXY, axis=2), start_BX)
    return jnp.stack([start_BX, whole_BX, whole_BX + all_BXY.sum(axis=2), end_BX], axis=2).astype(jnp.int32)


def computed_pairs(spans: Spans, keys: int, tiles: Tiles) -> dict[str, float]:
    """The number of query and key pairs that are computed, for one head: kernel → pairs."""
    named = {"flash_forward": tiles.forward, "flash_dkv": tiles.dkv, "flash_dq": tiles.dq}
    return {
        name: float(jnp.sum(_blocks(spans, keys, tile)[0])) * tile.queries * tile.keys for name, tile in named.items()
    }


def forward(
    q_BHTK: jax.Array, k_BNSK: jax.Array, v_BNSK: jax.Array, spans: Spans, tile: Tile, interpret: bool
) -> tuple[jax.Array, jax.Array]:
    """The outputs, [B, H, T, K], and the natural logarithm of each query's sum of exponentials, [B, H, T] in f32.
    Zeros and a very low number for queries that see no key."""
    specs = _QuerySpecs(q_BHTK, k_BNSK, tile)
    ranges_BX4 = _ranges(*_blocks(spans, k_BNSK.shape[2], tile))
    log_BHT = jax.ShapeDtypeStruct(q_BHTK.shape[:3], jnp.float32)
    call = _kernel(
        "flash_forward",
        _forward,
        tile,
        grid=specs.grid,
        in_specs=[specs.ranges, specs.span, specs.span, specs.q, specs.kv, specs.kv],
        out_specs=[specs.q, specs.log],
        out_shape=[jax.ShapeDtypeStruct(q_BHTK.shape, q_BHTK.dtype), log_BHT],
        interpret=interpret,
    )
    return call(ranges_BX4, *spans, q_BHTK, k_BNSK, v_BNSK)


class Operands(NamedTuple):
    """The operands of the backward kernels."""

    first_BT: jax.Array
    last_BT: jax.Array
    q_BHTK: jax.Array
    k_BNSK: jax.Array
    v_BNSK: jax.Array
    dout_BHTK: jax.Array
    log_BHT: jax.Array
    shift_BHT: jax.Array
    """Sum of dout × out over each head: what the softmax's gradient subtracts."""


def backward(
    saved: tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array],
    dout_BHTK: jax.Array,
    spans: Spans,
    tiles: Tiles,
    interpret: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The gradients of q, k and v. `saved`: q, k, v, and the results of `forward`."""
    q_BHTK, k_BNSK, v_BNSK, out_BHTK, log_BHT = saved
    shift_BHT = jnp.sum(dout_BHTK.astype(jnp.float32) * out_BHTK.astype(jnp.float32), axis=-1)
    operands = Operands(*spans, q_BHTK, k_BNSK, v_BNSK, dout_BHTK, log_BHT, shift_BHT)
    dk_BNSK, dv_BNSK = _dkv(operands, tiles.dkv, interpret)
    return _dq(operands, tiles.dq, interpret), dk_BNSK, dv_BNSK


def _dq(operands: Operands, tile: Tile, interpret: bool) -> jax.Array:
    q_BHTK, k_BNSK = operands.q_BHTK, operands.k_BNSK
    specs = _QuerySpecs(q_BHTK, k_BNSK, tile)
    ranges_BX4 = _ranges(*_blocks(Spans(*operands[:2]), k_BNSK.shape[2], tile))
    call = _kernel(
        "flash_dq",
        _dq_of_queries,
        tile,
        grid=specs.grid,
        in_specs=[specs.ranges, specs.span, specs.span, specs.q, specs.kv, specs.kv, specs.q, specs.log, specs.log],
        out_specs=specs.q,
        out_shape=jax.ShapeDtypeStruct(q_BHTK.shape, q_BHTK.dtype),
        interpret=interpret,
    )
    return call(ranges_BX4, *operands)


def _dkv(operands: Operands, tile: Tile, interpret: bool) -> tuple[jax.Array, jax.Array]:
    (rows, heads, tokens, size), (kv_heads, keys) = operands.q_BHTK.shape, operands.k_BNSK.shape[1:3]
    group = heads // kv_heads
    any_BXY, all_BXY = _blocks(Spans(*operands[:2]), keys, tile)
    ranges = pl.BlockSpec((None, None, 4), lambda block, _, row: (row, block, 0))
    span = pl.BlockSpec((None, tokens), lambda _, __, row: (row, 0))
    q = pl.BlockSpec((None, group, tokens, size), lambda _, head, row: (row, head, 0, 0))
    log = pl.BlockSpec((None, group, tokens), lambda _, head, row: (row, head, 0))
    kv = pl.BlockSpec((None, None, tile.keys, size), lambda block, head, row: (row, head, block, 0))
    call = _kernel(
        "flash_dkv",
        _dkv_of_keys,
        tile,
        grid=(keys // tile.keys, kv_heads, rows),
        in_specs=[ranges, span, span, q, kv, kv, q, log, log],
        out_specs=[kv, kv],
        out_shape=[jax.ShapeDtypeStruct(array.shape, array.dtype) for array in (operands.k_BNSK, operands.v_BNSK)],
        interpret=interpret,
    )
    return call(_ranges(any_BXY.swapaxes(1, 2), all_BXY.swapaxes(1, 2)), *operands)


class _QuerySpecs:
    """The grid and the operands' blocks of a kernel that computes a block of queries with a range of blocks of keys."""

    def __init__(self, q_BHTK: jax.Array, k_BNSK: jax.Array, tile: Tile):
        (rows, heads, tokens, size), (kv_heads, keys) = q_BHTK.shape, k_BNSK.shape[1:3]
        group, blocks = heads // kv_heads, tokens // tile.queries

        def at(block: Any) -> Any:
            return blocks - 1 - block  # the last queries see the most keys: they are started first

        self.grid = (blocks, heads, rows)
        self.ranges = pl.BlockSpec((None, None, 4), lambda block, _, row: (row, at(block), 0))
        self.span = pl.BlockSpec((None, tile.queries), lambda block, _, row: (row, at(block)))
        self.q = pl.BlockSpec((None, None, tile.queries, size), lambda block, head, row: (row, head, at(block), 0))
        self.log = pl.BlockSpec((None, None, tile.queries), lambda block, head, row: (row, head, at(block)))
        self.kv = pl.BlockSpec((None, None, keys, size), lambda _, head, row: (row, head // group, 0, 0))


def _kernel(name: str, body: Callable[..., None], tile: Tile, **call: Any) -> Any:
    compiler_params = plgpu.CompilerParams(num_warps=tile.warps, num_stages=tile.stages)
    return pl.pallas_call(partial(body, tile=tile), name=name, compiler_params=compiler_params, **call)


# ---- The kernels ----------------------------------------------------------------------------------------------------


def _visit(ranges_ref: Any, add: Callable[[Any, Any, Any, bool], Any], carry: Any, times: int = 1) -> Any:
    """Adds the blocks of a range to `carry`, `times` times: first those that are seen whole, then those that need a
    mask, so that each loop has one body, which Triton can pipeline. `add` is called with the turn (0 … times − 1), the
    block, the carry, and whether the block needs a mask."""
    start, whole, end_whole, end = (ranges_ref[place] for place in range(4))
    without = end_whole - whole

    def loop(count: Any, block_at: Callable[[Any], Any], masked: bool, carry: Any) -> Any:
        def step(place: Any, carry: Any) -> Any:
            if times == 1:
                return add(0, block_at(place), carry, masked)
            return add(jax.lax.div(place, count), block_at(jax.lax.rem(place, count)), carry, masked)

        return jax.lax.fori_loop(0, times * count, step, carry)

    def around(place: Any) -> Any:
        block = start + place
        return jnp.where(block < whole, block, block + without)

    carry = loop(without, lambda place: whole + place, False, carry)
    return loop(end - start - without, around, True, carry)


def _forward(
    ranges_ref, first_ref, last_ref, q_ref, k_ref, v_ref, out_ref, log_ref, *, tile: Tile
) -> None:  # fmt: skip
    q_TK, first_T1, last_T1 = q_ref[...], first_ref[...][:, None], last_ref[...][:, None]
    exponent = q_ref.shape[-1] ** -0.5 * LOG2_E

    def add(_, block: Any, carry: Any, masked: bool) -> Any:
        peak_T, total_T, out_TK = carry
        keys = pl.ds(block * tile.keys, tile.keys)
        scores_TS = dot(q_TK, k_ref[keys, :].T)
        if masked:
            at_1S = block * tile.keys + jnp.arange(tile.keys)[None]
            scores_TS = jnp.where((first_T1 <= at_1S) & (at_1S <= last_T1), scores_TS, MASKED)
        new_T = jnp.maximum(peak_T, jnp.max(scores_TS, axis=1) * exponent)
        kept_T = jnp.exp2(peak_T - new_T)
        weights_TS = jnp.exp2(scores_TS * exponent - new_T[:, None])
        total_T = total_T * kept_T + jnp.sum(weights_TS, axis=1)
        out_TK = out_TK * kept_T[:, None] + dot(weights_TS.astype(v_ref.dtype), v_ref[keys, :])
        return new_T, total_T, out_TK

    zeros_T = jnp.zeros(q_TK.shape[:1], jnp.float32)
    peak_T, total_T, out_TK = _visit(ranges_ref, add, (zeros_T + LOWEST, zeros_T, jnp.zeros(q_TK.shape, jnp.float32)))
    total_T = jnp.where(total_T > 0, total_T, 1.0)
    out_ref[...] = (out_TK / total_T[:, None]).astype(out_ref.dtype)
    log_ref[...] = peak_T / LOG2_E + jnp.log(total_T)


def _dq_of_queries(
    ranges_ref, first_ref, last_ref, q_ref, k_ref, v_ref, dout_ref, log_ref, shift_ref, dq_ref, *, tile: Tile
) -> None:  # fmt: skip
    q_TK, dout_TK, first_T1, last_T1 = q_ref[...], dout_ref[...], first_ref[...][:, None], last_ref[...][:, None]
    log_T1, shift_T1 = log_ref[...][:, None] * LOG2_E, shift_ref[...][:, None]
    scale = q_ref.shape[-1] ** -0.5

    def add(_, block: Any, dq_TK: jax.Array, masked: bool) -> jax.Array:
        keys = pl.ds(block * tile.keys, tile.keys)
        k_SK = k_ref[keys, :]
        weights_TS = jnp.exp2(dot(q_TK, k_SK.T) * (scale * LOG2_E) - log_T1)
        if masked:
            at_1S = block * tile.keys + jnp.arange(tile.keys)[None]
            weights_TS = jnp.where((first_T1 <= at_1S) & (at_1S <= last_T1), weights_TS, 0.0)
        dscores_TS = weights_TS * (dot(dout_TK, v_ref[keys, :].T) - shift_T1)
        return dq_TK + dot(dscores_TS.astype(k_SK.dtype), k_SK)

    dq_TK = _visit(ranges_ref, add, jnp.zeros(q_TK.shape, jnp.float32))
    dq_ref[...] = (dq_TK * scale).astype(dq_ref.dtype)


def _dkv_of_keys(
    ranges_ref, first_ref, last_ref, q_ref, k_ref, v_ref, dout_ref, log_ref, shift_ref, dk_ref, dv_ref, *, tile: Tile
) -> None:  # fmt: skip
    k_SK, v_SK, scale = k_ref[...], v_ref[...], q_ref.shape[-1] ** -0.5
    at_S1 = pl.program_id(0) * tile.keys + jnp.arange(tile.keys)[:, None]

    def add(head: Any, block: Any, carry: Any, masked: bool) -> Any:
        # Scores are computed transposed, so that they are the first operand of the products with dout and q: the one
        # that a tensor core may read from registers.
        dk_SK, dv_SK = carry
        queries = pl.ds(block * tile.queries, tile.queries)
        q_TK, dout_TK = q_ref[head, queries, :], dout_ref[head, queries, :]
        log_1T, shift_1T = log_ref[head, queries][None] * LOG2_E, shift_ref[head, queries][None]
        weights_ST = jnp.exp2(dot(k_SK, q_TK.T) * (scale * LOG2_E) - log_1T)
        if masked:
            first_1T, last_1T = first_ref[queries][None], last_ref[queries][None]
            weights_ST = jnp.where((first_1T <= at_S1) & (at_S1 <= last_1T), weights_ST, 0.0)
        dv_SK = dv_SK + dot(weights_ST.astype(dout_TK.dtype), dout_TK)
        dscores_ST = weights_ST * (dot(v_SK, dout_TK.T) - shift_1T)
        return dk_SK + dot(dscores_ST.astype(q_TK.dtype), q_TK), dv_SK

    zeros_SK = jnp.zeros(k_SK.shape, jnp.float32)
    dk_SK, dv_SK = _visit(ranges_ref, add, (zeros_SK, zeros_SK), times=q_ref.shape[0])
    dk_ref[...] = (dk_SK * scale).astype(dk_ref.dtype)
    dv_ref[...] = dv_SK.astype(dv_ref.dtype)
