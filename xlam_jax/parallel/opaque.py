"""Calls kernels without mesh information inside a `shard_map` that checks varying axes.

The Pallas kernels that come with JAX do not declare along which mesh axes their results vary, so a `shard_map` that
checks this refuses them. `call` traces such a function separately, as on one device, and wraps it into one primitive
whose results vary along all axes of its operands. This is correct for any computation without collectives.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
from jax.extend.core import Primitive, jaxpr_as_fun
from jax.interpreters import mlir

from xlam_jax.parallel import mesh

_call = Primitive("opaque_call")
_call.multiple_results = True


def outside(function: Callable[..., Any], *arguments: Any) -> Any:
    """Returns `function(*arguments)`, evaluated in a new thread, and so outside of every trace and mesh context."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function, *arguments).result()


def call(function: Callable[..., Any], *operands: Any) -> Any:
    """Returns `function(*operands)` for trees of arrays. The function must not contain collectives, and cannot be
    differentiated."""
    if not jax.sharding.get_abstract_mesh().manual_axes:
        return function(*operands)
    leaves, tree = jax.tree.flatten(mesh.alike(*operands))
    shapes = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves]
    flat = jax.make_jaxpr(lambda *leaves: function(*tree.unflatten(leaves)), return_shape=True)
    jaxpr, results = outside(flat, *shapes)
    return jax.tree.unflatten(jax.tree.structure(results), _call.bind(*leaves, jaxpr=jaxpr))


@_call.def_abstract_eval
def _results(*operands: Any, jaxpr: Any) -> list[Any]:
    def like(result: Any) -> Any:
        whole = operands[0].sharding.update(spec=jax.sharding.PartitionSpec(*[None] * len(result.shape)))
        return operands[0].update(shape=result.shape, dtype=result.dtype, weak_type=False, sharding=whole)

    return [like(result) for result in jaxpr.out_avals]


def _lower(context: mlir.LoweringRuleContext, *operands: Any, jaxpr: Any) -> Any:
    return mlir.lower_fun(jaxpr_as_fun(jaxpr))(context.replace(avals_in=jaxpr.in_avals), *operands)


mlir.register_lowering(_call, _lower)
