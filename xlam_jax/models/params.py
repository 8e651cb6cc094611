"""The parameters of a model as a plain tree of arrays, and the function that builds a `Decoder` around them.

Steps, checkpoints and converters pass this tree around:
`{"embedding", "final_norm", "head"?, "blocks": {"q", "k", "v", "o", "w1", "w2", "w3", "router"?, …}}`, one leaf per row
of the weight table. An adapter on the weight `w` adds two factors next to it, `w_a` and `w_b`; if the rows of added
tokens are trained, `w_rows` is added to these rows of `w`.
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
from xlam_jax.models.families import frozen_storage
from xlam_jax.models.kernels import XLA, Kernels
from xlam_jax.models.nf4 import NF4, quantize
from xlam_jax.parallel import mesh as meshes

Params = dict[str, Any]
"""A nested dictionary whose leaves are arrays (or their shapes, shardings, logical axes)."""


@cache
def _abstract(config: ModelConfig, **options: Any) -> tuple[Any, nnx.State]:
    model = nnx.eval_shape(lambda: Decoder(config, **options, rngs=nnx.Rngs(params=0, lora=0)))
    graphdef, state = nnx.split(model)
    return graphdef, state


def shapes(config: ModelConfig) -> Params:
    """Returns the parameters as `jax.ShapeDtypeStruct`s in f32."""
    return nnx.to_pure_dict(_abstract(config)[1])


def logical_axes(config: ModelConfig) -> Params:
    """Returns the logical axes of each parameter, a tuple of names."""
    return _metadata(config, "logical")


def matrix_axes(config: ModelConfig) -> Params:
    """Returns the input and output axes of each trainable parameter, as indices; None for parameters that are not
    matrices of a block, and for routers. The other axes stack matrices."""

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
    """Draws random parameters in f32. Traceable: jit it with output shardings, and each device creates its own part."""
    model = Decoder(config, rngs=nnx.Rngs(params=seed, lora=seed))
    return nnx.to_pure_dict(nnx.split(model)[1])


def binder(
    config: ModelConfig, *, dtype: Any, remat: str = "none", neftune: float = 0.0, kernels: Kernels = XLA
) -> Callable[[Params], Decoder]:
    """Returns a function from a tree of parameters to a `Decoder` that computes in `dtype`."""
    return partial(_bind, *_abstract(config, dtype=dtype, remat=remat, neftune=neftune, kernels=kernels))


def _bind(graphdef: Any, abstract: nnx.State, params: Params) -> Decoder:
    state = jax.tree.map(lambda leaf: leaf, abstract)  # a copy: the next call replaces its leaves
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(graphdef, state)


# ---- trainable and frozen parameters --------------------------------------------------------------------------------


def is_adapter(name: str) -> bool:
    """Whether the parameter of this name trains next to a frozen weight: a factor of an adapter, or the trained rows of
    added tokens."""
    return name.endswith(("_a", "_b", "_rows"))


def split(params: Params, belongs: Callable[[str], bool]) -> tuple[Params, Params]:
    """Splits a tree in two by the last name of each path: leaves that belong, and the others. Branches that would be
    empty are dropped."""
    first: Params = {}
    second: Params = {}
    for name, value in params.items():
        if isinstance(value, dict):
            inner_first, inner_second = split(value, belongs)
            first |= {name: inner_first} if inner_first else {}
            second |= {name: inner_second} if inner_second else {}
        elif belongs(name):
            first[name] = value
        else:
            second[name] = value
    return first, second


def join(first: Params, second: Params) -> Params:
    """The inverse of `split`."""
    both = dict(first)
    for name, value in second.items():
        both[name] = join(both[name], value) if name in both else value
    return both


def trainable(config: ModelConfig, params: Params) -> tuple[Params, Params]:
    """Splits a model's tree into trainable and frozen parameters: adapters and the rest, or all and none."""
    return split(params, is_adapter) if config.lora else (params, {})


def freeze(frozen: Params, dtype: Any, *, quantized: bool) -> Params:
    """Converts frozen parameters to the form in which they are stored (`Weight.frozen`): the compute dtype `dtype`,
    f32, or four bits if `quantized`."""
    return {
        name: freeze(value, dtype, quantized=quantized)
        if isinstance(value, dict)
        else quantize(value)
        if quantized and frozen_storage(name) == "nf4"
        else value.astype(jnp.float32 if frozen_storage(name) == "float32" else dtype)
        for name, value in frozen.items()
    }


def frozen_axes(frozen: Params, *, quantized: bool) -> Params:
    """The logical axes of `freeze`'s result, from those of the parameters."""
    return {
        name: frozen_axes(value, quantized=quantized)
        if isinstance(value, dict)
        else NF4(value, value, value[:-1])
        if quantized and frozen_storage(name) == "nf4"
        else value
        for name, value in frozen.items()
    }


# ---- shardings ------------------------------------------------------------------------------------------------------


def param_specs(model: ModelConfig, mesh: Mesh) -> Any:
    """The `PartitionSpec` of each trainable parameter."""
    return _specs(trainable(model, logical_axes(model))[0], mesh)


def frozen_specs(model: ModelConfig, mesh: Mesh, *, quantized: bool) -> Any:
    """The `PartitionSpec` of each frozen parameter, in the form that `freeze` returns."""
    return _specs(frozen_axes(trainable(model, logical_axes(model))[1], quantized=quantized), mesh)


def _specs(axes: Params, mesh: Mesh) -> Any:
    return jax.tree.map(lambda logical: meshes.spec(logical, mesh), axes, is_leaf=lambda node: type(node) is tuple)
