"""Checksums of arrays by value: independent of sharding, chunks and files.

An array is cut into units along its leading axes (a layer, or a layer's expert), each with a checksum of 64 bits: what
reads a model layer by layer verifies each layer as it is read. A unit's checksum is two sums mod 2³² over its words,
each mixed with its position. The mix is a bijection of the word, so a change of one word is always detected.

A run's fingerprint of its base (`weights.fingerprint`) is an older sum, kept because checkpoints name it.
"""

from collections.abc import Mapping
from functools import cache, partial
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

PIECE = 2**16
"""Words that NumPy mixes at a time: its temporaries stay in the cache."""


def leading_axes(name: str, ndim: int) -> int:
    """Number of an array's leading axes that index its units. `name`: its path in a tree, joined by dots."""
    names = name.split(".")
    if "blocks" not in names:
        return 0
    return min(ndim, 2 if ndim == 4 and names[-1] in ("w1", "w2", "w3") else 1)


def of_unit(values: np.ndarray) -> str:
    """The checksum of one unit: 16 hexadecimal digits."""
    flat = np.ascontiguousarray(values).reshape(-1)
    words = flat.view(f"uint{8 * min(4, flat.dtype.itemsize)}")
    sums = [0, 0]
    for start in range(0, len(words), PIECE):
        piece = words[start : start + PIECE].astype(np.uint32, copy=False)
        places = (np.arange(start, start + len(piece), dtype=np.uint64) % 2**32).astype(np.uint32)
        for at, mixed in enumerate(_mixed(piece, places)):
            sums[at] += int(mixed.sum(dtype=np.uint64))
    return _hexadecimal(np.array([total % 2**32 for total in sums]))


def of_array(name: str, values: np.ndarray) -> str:
    """The checksums of an array's units, one after the other in row-major order."""
    lead = leading_axes(name, values.ndim)
    return "".join(of_unit(values[at]) for at in np.ndindex(*values.shape[:lead]))


def of_tree(arrays: Mapping[str, Any]) -> dict[str, str]:
    """`of_array` of each array by its name, computed on its devices in one program. All hosts call it together."""
    if not arrays:
        return {}
    leads = tuple(leading_axes(name, array.ndim) for name, array in arrays.items())
    shardings = [array.sharding for array in arrays.values() if isinstance(array, jax.Array)]
    mesh = next((one.mesh for one in shardings if isinstance(one, jax.sharding.NamedSharding)), None)
    everywhere = None if mesh is None else jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    sums = jax.device_get(_compiled(everywhere)(list(arrays.values()), leads))
    return {name: _hexadecimal(of_one) for name, of_one in zip(arrays, sums, strict=True)}


@cache
def _compiled(sharding: Any) -> Any:
    return jax.jit(_sums, static_argnums=1, out_shardings=sharding)


def _sums(arrays: list[Any], leads: tuple[int, ...]) -> list[jax.Array]:
    """Of each array u32 [units, 2]."""
    return [_units(jnp.asarray(array), lead) for array, lead in zip(arrays, leads, strict=True)]


def _units(array: jax.Array, lead: int) -> jax.Array:
    words = array.astype(jnp.uint8) if array.dtype == jnp.bool_ else array
    words = jax.lax.bitcast_convert_type(words, jnp.dtype(f"uint{8 * min(4, words.dtype.itemsize)}"))
    words = words.astype(jnp.uint32)  # of eight bytes two, along an axis of their own
    shape = words.shape[lead:]
    places = jnp.zeros(shape, jnp.uint32)
    for axis, size in enumerate(shape):
        places = places * np.uint32(size % 2**32) + jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
    axes = tuple(range(lead, words.ndim))
    total = partial(jnp.sum, axis=axes, dtype=jnp.uint32)
    return jnp.stack([total(mixed).reshape(prod(words.shape[:lead])) for mixed in _mixed(words, places)], axis=-1)


def _mixed(words: Any, places: Any) -> tuple[Any, Any]:
    """The words, each mixed with its place, in two ways; u32 arrays of NumPy or JAX."""
    mixed = words ^ (places * np.uint32(0x9E3779B1))
    # the finalizer of MurmurHash3: less mixing misses changes of many sign bits
    mixed = (mixed ^ (mixed >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    mixed = (mixed ^ (mixed >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    mixed = mixed ^ (mixed >> np.uint32(16))
    return mixed, mixed * (places * np.uint32(2) + np.uint32(1))


def _hexadecimal(sums: Any) -> str:
    return "".join(f"{int(word):08x}" for word in np.asarray(sums).reshape(-1))
