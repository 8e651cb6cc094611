"""Kernels that know nothing of the mesh, inside a `shard_map` that watches along which axes each array varies.

The Pallas kernels that come with JAX don't say along which mesh axes their results vary, and a `shard_map` that checks
it refuses them. `call` traces such a function by itself, as it would be on one device, and makes it one operation
whose results vary wherever its operands do: what is true of any computation that has no collective.
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
    """`function(*arguments)` outside of every trace and mesh: those are of a thread, and a new one is inside none."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function, *arguments).result()


def call(function: Callable[..., Any], *operands: Any) -> Any:
    """`function(*operands)` for trees of arrays; a function without collectives, that nothing differentiates."""
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
