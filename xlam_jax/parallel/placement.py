"""Puts arrays onto the devices of a mesh, in the dtype and sharding in which a run keeps them."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np


def place(params: Callable[[], Any] | Any, abstract: Any) -> Any:
    """Puts a tree of arrays onto devices, in the dtypes and shardings of `abstract`.

    `params`: arrays, objects that read them from files (`placed`), or a function that computes them. The function is
    compiled, so that each array is created in its shards.
    """
    if callable(params):
        return jax.jit(params, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, abstract))()
    return jax.tree.map(lambda array, like: put(array.astype(like.dtype), like.sharding), params, abstract)


def put(array: Any, sharding: jax.sharding.Sharding) -> jax.Array:
    """Shards an array over the devices of all hosts. Each host must have the whole array or be able to read it from a
    file (`placed`), unless it is on all devices already."""
    if hasattr(array, "placed"):
        return array.placed(sharding)
    if sharding.is_fully_addressable or (isinstance(array, jax.Array) and not array.is_fully_addressable):
        return jax.device_put(array, sharding)
    whole = np.asarray(array)  # device_put would send all of it to every host for a comparison
    return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])
