"""Checksums of arrays by value: independent of sharding, chunks and files.

An array is cut into units along its leading axes (a layer, or an expert of a layer). Each unit has a checksum of 64
bits, so that a reader can verify each layer as it reads it. A unit's checksum is two sums mod 2³² over its words, each
mixed with its position. The mix is a bijection of the word, so a change of one word is always detected.

The fingerprint of a run's base (`weights.fingerprint`) is an older sum, kept because checkpoints store it.
"""

from collections.abc import Mapping
from functools import cache, partial
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from xlam_jax.models.families import stacked_axes

PIECE = 2**16
"""Words that NumPy mixes at a time, few enough that its temporaries stay in the cache."""


def leading_axes(name: str, ndim: int) -> int:
    """How many leading axes of an array index its units. `name`: its path in a tree, joined by dots."""
    names = name.split(".")
    if "blocks" not in names:
        return 0
    return min(ndim, stacked_axes(names[-1], ndim))


def of_unit(values: np.ndarray) -> str:
    """The checksum of one unit: 16 hexadecimal digits."""
    flat = np.ascontiguousarray(values).reshape(-1)
    words = flat.view(f"uint{8 * min(4, flat.dtype.itemsize)}")
    sums = [0, 0]
    for start in range(0, len(words), PIECE):
        piece = words[start : start + PIECE].astype(np.uint32, copy=False)
        positions = (np.arange(start, start + len(piece), dtype=np.uint64) % 2**32).astype(np.uint32)
        for at, mixed in enumerate(_mix(piece, positions)):
            sums[at] += int(mixed.sum(dtype=np.uint64))
    return _hexadecimal(np.array([total % 2**32 for total in sums]))


def of_array(name: str, values: np.ndarray) -> str:
    """The checksums of an array's units, concatenated in row-major order."""
    lead = leading_axes(name, values.ndim)
    return "".join(of_unit(values[at]) for at in np.ndindex(*values.shape[:lead]))


def of_tree(arrays: Mapping[str, Any]) -> dict[str, str]:
    """`of_array` of each array by name, computed on the arrays' devices in one program. All hosts call it together."""
    if not arrays:
        return {}
    leads = tuple(leading_axes(name, array.ndim) for name, array in arrays.items())
    shardings = [array.sharding for array in arrays.values() if isinstance(array, jax.Array)]
    mesh = next((sharding.mesh for sharding in shardings if isinstance(sharding, jax.sharding.NamedSharding)), None)
    everywhere = None if mesh is None else jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    sums = jax.device_get(_compiled(everywhere)(list(arrays.values()), leads))
    return {name: _hexadecimal(units) for name, units in zip(arrays, sums, strict=True)}


def of_items(items: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, str]]:
    """The checksums of each item's arrays by name. Arrays on devices take one program; all hosts call it together."""
    on_devices = {
        f"{item}.{name}": array
        for item, arrays in items.items()
        for name, array in arrays.items()
        if isinstance(array, jax.Array)
    }
    sums = of_tree(on_devices)
    return {
        item: {
            name: sums[f"{item}.{name}"] if f"{item}.{name}" in sums else of_array(name, array)
            for name, array in arrays.items()
        }
        for item, arrays in items.items()
    }


@cache
def _compiled(sharding: Any) -> Any:
    return jax.jit(_sums, static_argnums=1, out_shardings=sharding)


def _sums(arrays: list[Any], leads: tuple[int, ...]) -> list[jax.Array]:
    """The sums of each array's units: u32 [units, 2] each."""
    return [_units(jnp.asarray(array), lead) for array, lead in zip(arrays, leads, strict=True)]


def _units(array: jax.Array, lead: int) -> jax.Array:
    words = array.astype(jnp.uint8) if array.dtype == jnp.bool_ else array
    words = jax.lax.bitcast_convert_type(words, jnp.dtype(f"uint{8 * min(4, words.dtype.itemsize)}"))
    words = words.astype(jnp.uint32)  # elements of eight bytes have two words, along a further axis
    shape = words.shape[lead:]
    positions = jnp.zeros(shape, jnp.uint32)
    for axis, size in enumerate(shape):
        positions = positions * np.uint32(size % 2**32) + jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
    axes = tuple(range(lead, words.ndim))
    total = partial(jnp.sum, axis=axes, dtype=jnp.uint32)
    return jnp.stack([total(mixed).reshape(prod(words.shape[:lead])) for mixed in _mix(words, positions)], axis=-1)


def _mix(words: Any, positions: Any) -> tuple[Any, Any]:
    """Mixes each word with its position, in two ways; u32 arrays of NumPy or JAX."""
    mixed = words ^ (positions * np.uint32(0x9E3779B1))
    # the finalizer of MurmurHash3: less mixing misses changes of many sign bits
    mixed = (mixed ^ (mixed >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    mixed = (mixed ^ (mixed >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    mixed = mixed ^ (mixed >> np.uint32(16))
    return mixed, mixed * (positions * np.uint32(2) + np.uint32(1))


def _hexadecimal(sums: Any) -> str:
    return "".join(f"{int(word):08x}" for word in np.asarray(sums).reshape(-1))
