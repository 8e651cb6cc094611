"""A model taken apart: its parameters as a plain tree of arrays, and the function that puts them back.

The tree is what steps, checkpoints and converters pass around:
`{"embedding", "final_norm", "head"?, "blocks": {"q", "k", "v", "o", "w1", "w2", "w3", "router"?, …}}`.
With adapters each named weight `w` has two factors beside it, `w_a` and `w_b`.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from xlam_jax.models.config import ModelConfig
from xlam_jax.models.decoder import Decoder
from xlam_jax.models.kernels import XLA, Kernels
from xlam_jax.models.nf4 import NF4, quantize
from xlam_jax.parallel import mesh as meshes

Params = dict[str, Any]
"""A nested dictionary whose leaves are arrays (or their shapes, shardings, logical axes)."""


@cache
def _abstract(config: ModelConfig, **how: Any) -> tuple[Any, nnx.State]:
    model = nnx.eval_shape(lambda: Decoder(config, **how, rngs=nnx.Rngs(params=0, lora=0)))
    graphdef, state = nnx.split(model)
    return graphdef, state


def shapes(config: ModelConfig) -> Params:
    """The parameters as `jax.ShapeDtypeStruct`s in f32."""
    return nnx.to_pure_dict(_abstract(config)[1])


def logical_axes(config: ModelConfig) -> Params:
    """The logical axes of each parameter, a tuple of names."""
    return _metadata(config, "logical")


def matrix_axes(config: ModelConfig) -> Params:
    """Of each parameter that trains, the axes that a matrix product sums over and those that it makes; None for what
    is no matrix of a block. The other axes stack matrices."""

    def marked(tree: Params, block: bool) -> Params:
        return {
            name: marked(value, block=True)
            if isinstance(value, dict)
            else value
            if block and "router" not in name
            else None
            for name, value in tree.items()
        }

    return marked(trainable(config, _metadata(config, "matrix"))[0], block=False)


def _metadata(config: ModelConfig, key: str) -> Params:
    tree: Params = {}
    for path, param in nnx.to_flat_state(_abstract(config)[1]):
        node = tree
        for name in path[:-1]:
            node = node.setdefault(str(name), {})
        node[str(path[-1])] = param.get_metadata(key)
    return tree


def initialize(config: ModelConfig, seed: int) -> Params:
    """Random parameters in f32. Traceable: jit it with output shardings and nothing is built twice."""
    model = Decoder(config, rngs=nnx.Rngs(params=seed, lora=seed))
    return nnx.to_pure_dict(nnx.split(model)[1])


def binder(
    config: ModelConfig, *, dtype: Any, remat: str = "none", neftune: float = 0.0, kernels: Kernels = XLA
) -> Callable[[Params], Decoder]:
    """Returns the function that makes a `Decoder`, computing in `dtype`, around a tree of parameters."""
    return partial(_bind, *_abstract(config, dtype=dtype, remat=remat, neftune=neftune, kernels=kernels))


def _bind(graphdef: Any, abstract: nnx.State, params: Params) -> Decoder:
    state = jax.tree.map(lambda leaf: leaf, abstract)  # a copy: the next call replaces its leaves
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(graphdef, state)


# ---- what trains, and what does not ---------------------------------------------------------------------------------

QUANTIZED = ("q", "k", "v", "o", "w1", "w2", "w3")
"""The weights that QLoRA quantizes; embeddings, norms and routers are small and stay as they are."""
KEPT_F32 = ("attention_norm", "mlp_norm", "final_norm", "router")
"""Frozen parameters that are used in f32."""


def is_adapter(name: str) -> bool:
    """Whether a parameter is a factor of an adapter."""
    return name.endswith(("_a", "_b"))


def split(params: Params, trains: Callable[[str], bool]) -> tuple[Params, Params]:
    """The tree in two, by the last name of each path; a level that is empty in one of them is left out there."""
    yes: Params = {}
    no: Params = {}
    for name, value in params.items():
        if isinstance(value, dict):
            inner_yes, inner_no = split(value, trains)
            yes |= {name: inner_yes} if inner_yes else {}
            no |= {name: inner_no} if inner_no else {}
        elif trains(name):
            yes[name] = value
        else:
            no[name] = value
    return yes, no


def join(one: Params, other: Params) -> Params:
    """The tree of two that `split` made."""
    both = dict(one)
    for name, value in other.items():
        both[name] = join(both[name], value) if name in both else value
    return both


def trainable(config: ModelConfig, params: Params) -> tuple[Params, Params]:
    """What is trained of a model's tree, and what stays as it is: adapters and the rest, or everything and nothing."""
    return split(params, is_adapter) if config.lora else (params, {})


def freeze(frozen: Params, dtype: Any, *, quantized: bool) -> Params:
    """Frozen parameters as they are kept: in the compute dtype or in four bits, norms and routers in f32."""
    return {
        name: freeze(value, dtype, quantized=quantized)
        if isinstance(value, dict)
        else quantize(value)
        if quantized and name in QUANTIZED
        else value.astype(jnp.float32 if name in KEPT_F32 else dtype)
        for name, value in frozen.items()
    }


def frozen_axes(frozen: Params, *, quantized: bool) -> Params:
    """The logical axes of what `freeze` gives, from those of the parameters."""
    return {
        name: frozen_axes(value, quantized=quantized)
        if isinstance(value, dict)
        else NF4(value, value, value[:-1])
        if quantized and name in QUANTIZED
        else value
        for name, value in frozen.items()
    }


# ---- where they lie -------------------------------------------------------------------------------------------------


def param_specs(model: ModelConfig, mesh: Mesh) -> Any:
    """The partition of each parameter that trains."""
    return _specs(trainable(model, logical_axes(model))[0], mesh)


def frozen_specs(model: ModelConfig, mesh: Mesh, *, quantized: bool) -> Any:
    """The partition of each parameter that does not train, as `freeze` keeps it."""
    return _specs(frozen_axes(trainable(model, logical_axes(model))[1], quantized=quantized), mesh)


def _specs(axes: Params, mesh: Mesh) -> Any:
    return jax.tree.map(lambda logical: meshes.spec(logical, mesh), axes, is_leaf=lambda node: type(node) is tuple)
