"""A model taken apart: its parameters as a plain tree of arrays, and the function that puts them back.

The tree is what steps, checkpoints and converters pass around:
`{"embedding", "final_norm", "head"?, "blocks": {"q", "k", "v", "o", "w1", "w2", "w3", "router"?, …}}`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from xlam_jax.models.config import ModelConfig
from xlam_jax.models.decoder import Decoder

Params = dict[str, Any]
"""A nested dictionary whose leaves are arrays (or their shapes, shardings, logical axes)."""


def _abstract(config: ModelConfig, dtype: Any = jnp.float32, remat: str = "none") -> tuple[Any, nnx.State]:
    model = nnx.eval_shape(lambda: Decoder(config, dtype=dtype, remat=remat, rngs=nnx.Rngs(params=0)))
    graphdef, state = nnx.split(model)
    return graphdef, state


def shapes(config: ModelConfig) -> Params:
    """The parameters as `jax.ShapeDtypeStruct`s in f32."""
    return nnx.to_pure_dict(_abstract(config)[1])


def logical_axes(config: ModelConfig) -> Params:
    """The logical axes of each parameter, a tuple of names."""
    state = _abstract(config)[1]
    leaves = {path: param.get_metadata("logical") for path, param in nnx.to_flat_state(state)}
    tree: Params = {}
    for path, logical in leaves.items():
        node = tree
        for key in path[:-1]:
            node = node.setdefault(str(key), {})
        node[str(path[-1])] = logical
    return tree


def initialize(config: ModelConfig, seed: int) -> Params:
    """Random parameters in f32. Traceable: jit it with output shardings and nothing is built twice."""
    model = Decoder(config, rngs=nnx.Rngs(params=seed))
    return nnx.to_pure_dict(nnx.split(model)[1])


def binder(config: ModelConfig, *, dtype: Any, remat: str = "none") -> Callable[[Params], Decoder]:
    """Returns the function that makes a `Decoder`, computing in `dtype`, around a tree of parameters."""
    return partial(_bind, *_abstract(config, dtype, remat))


def _bind(graphdef: Any, abstract: nnx.State, params: Params) -> Decoder:
    state = jax.tree.map(lambda leaf: leaf, abstract)  # a copy: the next call replaces its leaves
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(graphdef, state)
