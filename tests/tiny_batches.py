"""Packed rows of random tokens, of unequal lengths and with unequal numbers of trained tokens."""

import jax.numpy as jnp
import numpy as np

from xlam_jax.training.step import Batch


def sequences(rows: int, length: int, vocab: int, seed: int = 0) -> Batch:
    """Returns rows of one to three sequences. The first row has far more trained tokens than the others, the last
    none."""
    rng = np.random.default_rng(seed)
    sizes = [rng.integers(length // 6, length // 3, 1 + row % 3) for row in range(rows)]
    trained = [0.9] + [0.1 + 0.3 * (row % 2) for row in range(rows - 2)] + [0.0]
    return _packed(length, vocab, sizes, trained, rng)


def pairs(rows: int, length: int, vocab: int, seed: int = 0) -> Batch:
    """Returns rows of one to three pairs of unequal sides; the second half of a side is trained."""
    rng = np.random.default_rng(seed)
    sizes = [rng.integers(length // 12, length // 6, 2 * (1 + row % 3)) for row in range(rows)]
    return _packed(length, vocab, sizes, [0.5] * rows, rng)


PAIRS = 3
"""Pairs that a row of `pairs` holds at most."""


def _packed(length: int, vocab: int, sizes: list, trained: list[float], rng: np.random.Generator) -> Batch:
    rows = len(sizes)
    segments_BT, positions_BT = (np.zeros((rows, length), np.int32) for _ in range(2))
    weights_BT = np.zeros((rows, length), np.float32)
    for row, (lengths, share) in enumerate(zip(sizes, trained, strict=True)):
        at = 0
        for segment, size in enumerate(lengths):
            segments_BT[row, at : at + size] = segment + 1
            positions_BT[row, at : at + size] = np.arange(size)
            weights_BT[row, at + size - round(share * size) : at + size] = 1
            at += size
        assert at <= length
    tokens_BT = rng.integers(3, vocab, (rows, length), dtype=np.int32)
    return Batch(
        tokens_BT=jnp.asarray(tokens_BT),
        labels_BT=jnp.asarray(np.roll(tokens_BT, -1, axis=1)),
        weights_BT=jnp.asarray(weights_BT),
        positions_BT=jnp.asarray(positions_BT),
        segments_BT=jnp.asarray(segments_BT),
    )
