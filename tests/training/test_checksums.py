"""Checksums of arrays by value."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xlam_jax.weights.checkpoint import checksums

DTYPES = (np.float32, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, np.int32, np.uint8, np.bool_)


def test_numpy_and_devices_agree_on_every_dtype_and_shape():
    draw = np.random.default_rng(0)
    shapes = {
        "blocks.w1": (3, 2, 5, 7),
        "mu.blocks.q": (3, 4, 2),
        "blocks.count": (),
        "head": (300, 400),
        "none": (0, 3),
    }
    arrays = {
        f"{name}.{np.dtype(dtype).name}" if name != "blocks.w1" else name: draw.integers(0, 100, shape).astype(dtype)
        for dtype in DTYPES
        for name, shape in shapes.items()
    }
    sums = checksums.of_tree({name: jnp.asarray(array) for name, array in arrays.items()})
    assert sums == {name: checksums.of_array(name, array) for name, array in arrays.items()}
    assert len(sums["blocks.w1"]) == 16 * 3 * 2
    assert len(sums["mu.blocks.q.float32"]) == 16 * 3
    assert checksums.of_tree({}) == {}


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=50), st.data())
def test_a_changed_word_and_an_exchange_are_detected(words: list[int], data: st.DataObject):
    array = np.array(words, np.uint32)
    at, other = (data.draw(st.integers(0, len(words) - 1)) for _ in range(2))
    changed, exchanged = array.copy(), array.copy()
    changed[at] ^= np.uint32(data.draw(st.integers(1, 2**32 - 1)))
    exchanged[[at, other]] = exchanged[[other, at]]
    assert checksums.of_unit(changed) != checksums.of_unit(array)
    assert (checksums.of_unit(exchanged) == checksums.of_unit(array)) == (words[at] == words[other])


@pytest.mark.parametrize("size", [8, 32, 4096, 2**17])
@pytest.mark.parametrize("value", [1.0, -0.0, 2.0**-126])
def test_a_block_of_equal_values_that_becomes_zeros_is_detected(size: int, value: float):
    """A sum that is linear in the words misses 32 ones."""
    array = np.full(size, value, np.float32)
    for end in (2, size // 2, size):
        zeroed = array.copy()
        zeroed[:end] = 0.0
        assert checksums.of_unit(zeroed) != checksums.of_unit(array)
