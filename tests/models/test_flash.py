"""The attention kernels, by their interpreter, against the attention that runs everywhere."""

from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xlam_jax.models import flash_gpu
from xlam_jax.models.attention import Places, attend
from xlam_jax.models.kernels import Kernels
from xlam_jax.models.tiles import SCOPED_VMEM
from xlam_jax.parallel.mesh import dealt

ROWS, KV_HEADS = 2, 2
PACKED = [[37, 91, -20, 50, -30], [37, -128, 91]]
"""Tokens of each row's sequences, which end inside of blocks; of padding if negative. The last one fills the row."""
WHOLE = [[], []]
SMALL_TILES = flash_gpu.Tiles(
    flash_gpu.Tile(32, 16, 4, 2), dkv=flash_gpu.Tile(16, 32, 4, 2), dq=flash_gpu.Tile(64, 32, 4, 2)
)
"""Smaller than those of any device, so that short rows have many blocks, also some that are seen whole."""

SIZES = [(size, shared) for shared, by_size in flash_gpu.TILES.items() for size in by_size]


def places(tokens: int, packed: list[list[int]] = PACKED) -> Places:
    segments, positions = np.zeros((ROWS, tokens), np.int32), np.zeros((ROWS, tokens), np.int32)
    for row, sizes in enumerate(packed):
        ends = np.cumsum([0, *map(abs, sizes)])
        spans = [*pairwise(ends), (ends[-1], tokens)]
        for segment, ((start, end), size) in enumerate(zip(spans, [*sizes, 1], strict=True), start=1):
            segments[row, start:end] = segment if size > 0 else 0
            positions[row, start:end] = np.arange(end - start)
    return Places(*map(jnp.asarray, (positions, segments, positions, segments)))


def inputs(tokens: int, size: int, group: int, dtype: str) -> list[jax.Array]:
    """Queries, keys, values and the gradient of the outputs."""
    keys = jax.random.split(jax.random.key(0), 4)
    heads = [(KV_HEADS, group, size), (KV_HEADS, size), (KV_HEADS, size), (KV_HEADS, group, size)]
    drawn = [jax.random.normal(key, (ROWS, tokens, *shape)) for key, shape in zip(keys, heads, strict=True)]
    return [array.astype(dtype) for array in drawn]


def results(kernels: Kernels, where: Places, window: int | None, operands: list[jax.Array]) -> list[np.ndarray]:
    """What real queries get, and the gradients of a weighted sum of it."""
    real = (where.q_segments_BT > 0)[:, :, None, None, None]
    *arrays, weight = operands

    @jax.jit
    def run(*arrays: jax.Array) -> Any:
        def loss(q, k, v):
            out = jnp.where(real, attend(q, k, v, where, window=window, kernels=kernels), 0)
            return jnp.sum((out * weight).astype(jnp.float32)), out

        return jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(*arrays)

    (_, out), gradients = run(*arrays)
    return [np.asarray(array.astype(jnp.float32)) for array in (out, *gradients)]


def assert_near(computed: list[np.ndarray], expected: list[np.ndarray], tolerance: float) -> None:
    for array, like in zip(computed, expected, strict=True):
        np.testing.assert_allclose(array, like, rtol=0, atol=tolerance * np.abs(like).max())


TOLERANCE = {"float32": 2e-6, "bfloat16": 1e-2}


@pytest.mark.parametrize(
    ("kernel", "tokens", "size", "group", "window", "dtype", "packed"),
    [
        ("splash", 256, 128, 2, None, "float32", PACKED),
        ("splash", 256, 64, 2, 50, "float32", PACKED),
        ("splash", 256, 64, 2, None, "bfloat16", PACKED),
        ("splash", 2048, 64, 2, 300, "float32", PACKED),  # several blocks: some seen whole, some not at all
        ("pallas", 384, 64, 1, None, "float32", PACKED),
        ("pallas", 384, 64, 4, 50, "float32", PACKED),  # shorter than a block
        ("pallas", 1024, 32, 2, 300, "float32", WHOLE),
        ("pallas", 512, 128, 4, None, "float32", WHOLE),
        ("pallas", 384, 256, 1, 100, "float32", PACKED),
        ("pallas", 384, 32, 4, None, "bfloat16", PACKED),
        ("pallas", 384, 64, 4, 50, "bfloat16", PACKED),
        ("pallas", 512, 128, 4, 200, "bfloat16", WHOLE),
    ],
)
def test_a_kernel_gives_what_xla_gives(
    kernel: str, tokens: int, size: int, group: int, window: int | None, dtype: str, packed: list[list[int]]
):
    where, operands = places(tokens, packed), inputs(tokens, size, group, dtype)
    expected = results(Kernels(), where, window, operands)
    for on_chip in flash_gpu.TILES if kernel == "pallas" else [SCOPED_VMEM]:
        computed = results(Kernels(attention=kernel, interpret=True, on_chip=on_chip), where, window, operands)
        assert_near(computed, expected, TOLERANCE[dtype])


@pytest.mark.parametrize(
    "tiles", [SMALL_TILES, *(tiles for sizes in flash_gpu.TILES.values() for tiles in sizes.values())]
)
@pytest.mark.parametrize("window", [None, 10, 150])
def test_queries_of_a_context_shard_give_what_those_of_the_row_give(tiles: flash_gpu.Tiles, window: int | None):
    tokens, shards = 512, 2
    where, (q, k, v, dout) = places(tokens), inputs(tokens, 32, 2, "float32")
    expected = results(Kernels(), where, window, [q, k, v, dout])

    def by_head(array: jax.Array) -> jax.Array:
        return array.reshape(ROWS, array.shape[1], -1, 32).swapaxes(1, 2)

    @jax.jit
    def of_shard(at_T: jax.Array) -> Any:
        spans = flash_gpu.find_spans(where.q_segments_BT[:, at_T], where.k_segments_BS, at_T, window)
        real = (where.q_segments_BT[:, at_T] > 0)[:, None, :, None]
        queries, keys, values = by_head(q[:, at_T]), by_head(k), by_head(v)
        out, log = flash_gpu.forward(queries, keys, values, spans, tiles.forward, True)
        douts = jnp.where(real, by_head(dout[:, at_T]), 0)
        return out, *flash_gpu.backward((queries, keys, values, out, log), douts, spans, tiles, True)

    order = np.arange(tokens).reshape(2 * shards, -1)[dealt(shards)].reshape(shards, -1)
    (out_a, dq_a, *dkv_a), (out_b, dq_b, *dkv_b) = (of_shard(jnp.asarray(at_T)) for at_T in order)
    back = np.argsort(order.reshape(-1))
    of_queries = [jnp.concatenate(halves, axis=2)[:, :, back] for halves in ((out_a, out_b), (dq_a, dq_b))]
    of_keys = [one + other for one, other in zip(dkv_a, dkv_b, strict=True)]
    computed = [np.asarray(array) for array in (*of_queries, *of_keys)]
    assert_near(computed, [np.asarray(by_head(jnp.asarray(array))) for array in expected], 2e-6)


def test_padding_gets_zeros_and_gives_no_gradient():
    where = places(384)
    q, k, v, dout = (array.reshape(ROWS, 384, -1, 32).swapaxes(1, 2) for array in inputs(384, 32, 2, "bfloat16"))
    spans = flash_gpu.find_spans(where.q_segments_BT, where.k_segments_BS, jnp.arange(384), None)
    tiles = flash_gpu.tiles_for(32, flash_gpu.LARGE_SHARED)
    out, log = flash_gpu.forward(q, k, v, spans, tiles.forward, True)
    padding = np.asarray(where.q_segments_BT == 0)
    for array in (out, *flash_gpu.backward((q, k, v, out, log), dout, spans, tiles, True)):
        of_padding = np.asarray(array.astype(jnp.float32)).swapaxes(1, 2)[padding]
        assert len(of_padding)
        assert not of_padding.any()


@pytest.mark.parametrize("window", [None, 100])
def test_a_kernel_visits_only_blocks_that_are_seen(window: int | None):
    """Against the mask of all pairs."""
    where, at_T = places(512), np.arange(512)
    spans = flash_gpu.find_spans(where.q_segments_BT, where.k_segments_BS, jnp.asarray(at_T), window)
    segments_BT = np.asarray(where.q_segments_BT)
    distance_TS = at_T[:, None] - at_T
    seen_BTS = (segments_BT[:, :, None] == segments_BT[:, None]) & (segments_BT > 0)[:, :, None] & (distance_TS >= 0)
    seen_BTS &= distance_TS < (window or 512)
    for kernel, pairs in flash_gpu.computed_pairs(spans, 512, SMALL_TILES).items():
        tile = getattr(SMALL_TILES, kernel.removeprefix("flash_"))
        blocks = seen_BTS.reshape(ROWS, 512 // tile.queries, tile.queries, 512 // tile.keys, tile.keys)
        assert pairs == blocks.any(axis=(2, 4)).sum() * tile.queries * tile.keys


def test_packed_rows_compute_less():
    """A row of 8 sequences computes about an eighth of the pairs of a row of one."""
    tokens, tiles = 16384, flash_gpu.tiles_for(128, flash_gpu.LARGE_SHARED)
    at_T = jnp.arange(tokens)

    def pairs(sequences: int) -> dict[str, float]:
        segments_BT = (1 + at_T * sequences // tokens)[None]
        return flash_gpu.computed_pairs(flash_gpu.find_spans(segments_BT, segments_BT, at_T, None), tokens, tiles)

    whole, packed = pairs(1), pairs(8)
    for kernel, count in whole.items():
        assert tokens**2 / 2 <= count <= 1.02 * tokens**2 / 2
        assert 1 / 8 <= packed[kernel] / count <= 1.06 / 8


def test_a_repeated_call_gives_the_same_bits():
    where, operands = places(384), inputs(384, 64, 4, "bfloat16")
    kernels = Kernels(attention="pallas", interpret=True)
    first, second = (results(kernels, where, 50, operands) for _ in range(2))
    for array, again in zip(first, second, strict=True):
        np.testing.assert_array_equal(array, again)
