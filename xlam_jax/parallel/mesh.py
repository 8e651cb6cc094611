"""The mesh: named axes over devices, and the one table from logical axes to mesh axes.

Everything that touches parameters runs inside one `jax.shard_map` over the whole mesh, so each collective is written
where it happens: `gather` (fsdp), `psum` (tensor, data). Nothing is left to a partitioner, and a lost sharding can't
go unseen: arrays on two sides of a collective have different shapes or different varying axes.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from xlam_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")

BATCH_AXES = ("data", "fsdp")
"""Mesh axes that split the rows of a batch."""

RULES: Mapping[str, str | None] = {
    "layers": None,
    "embed": "fsdp",
    "vocab": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "experts": None,
    "q_group": None,
    "head_dim": None,
    "norm": None,
    "rank": None,
}
"""Logical axis of a parameter → mesh axis that it is stored along."""


def make_mesh(sizes: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """Lays the devices (default: all) out along the axes; one size may be -1 and takes what is left.

    Raises `UserError` when the product is not the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    shape = [sizes[axis] for axis in AXES]
    if -1 in shape:
        known = int(np.prod([size for size in shape if size != -1]))
        if len(devices) % known:
            raise UserError(_misfit(sizes, len(devices)))
        shape[shape.index(-1)] = len(devices) // known
    if int(np.prod(shape)) != len(devices):
        raise UserError(_misfit(sizes, len(devices)))
    return jax.make_mesh(tuple(shape), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def _misfit(sizes: Mapping[str, int], devices: int) -> str:
    layout = " × ".join(f"{axis} {sizes[axis]}" for axis in AXES)
    return (
        f"mesh: {layout} does not fit the {devices} {jax.default_backend()} device(s) found; "
        "set the axes so that their product is that number (-1 fills one), "
        "or mesh.cpu_devices to split a CPU into more"
    )


def spec(logical: tuple[str, ...], mesh: Mesh) -> PartitionSpec:
    """The partition of a parameter with these logical axes. An axis of one device splits nothing and is left out, so
    that no collective is ever made for it."""
    return PartitionSpec(*(axis if (axis := RULES[name]) and mesh.shape[axis] > 1 else None for name in logical))


def batch_spec(mesh: Mesh) -> PartitionSpec:
    """The partition of a batch's rows."""
    return PartitionSpec(tuple(axis for axis in BATCH_AXES if mesh.shape[axis] > 1) or None)


def shardings(specs: Any, mesh: Mesh) -> Any:
    """Turns a tree of partition specs into named shardings on `mesh`."""
    return jax.tree.map(
        lambda one: NamedSharding(mesh, one), specs, is_leaf=lambda node: isinstance(node, PartitionSpec)
    )


# What follows is called inside the shard_map, or with no mesh at all (generation); then, and for an axis of one
# device, it is the identity.


def _manual(axis: str) -> bool:
    mesh = jax.sharding.get_abstract_mesh()
    return axis in mesh.manual_axes and mesh.shape[axis] > 1


def gather(shard: Any, logical: tuple[str, ...], dtype: jnp.dtype) -> Any:
    """All-gathers a parameter over fsdp along its `embed` axis, in `dtype` on the wire; its gradient is summed and
    scattered in the parameter's own precision. A parameter without that axis is whole already; the parts of a quantized
    one travel as they are."""
    if not _manual("fsdp") or "embed" not in logical:
        return shard
    axis = logical.index("embed")
    if not isinstance(shard, jax.Array):
        return jax.tree.map(
            lambda part: jax.lax.all_gather(part, "fsdp", axis=axis, tiled=True) if part.ndim > axis else part, shard
        )
    return _gather(axis, dtype, shard)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _gather(axis: int, dtype: jnp.dtype, shard: jax.Array) -> jax.Array:
    whole = jax.lax.all_gather(shard.astype(dtype), "fsdp", axis=axis, tiled=True)
    return whole.astype(shard.dtype)  # back up, so that the cotangent is not rounded; the pair of casts cancels


def _gather_forward(axis: int, dtype: jnp.dtype, shard: jax.Array) -> tuple[jax.Array, None]:
    return _gather(axis, dtype, shard), None


def _gather_backward(axis: int, dtype: jnp.dtype, _: None, whole: jax.Array) -> tuple[jax.Array]:
    return (jax.lax.psum_scatter(whole, "fsdp", scatter_dimension=axis, tiled=True),)


_gather.defvjp(_gather_forward, _gather_backward)


def psum(partial: Any, *axes: str) -> Any:
    """Sums over the named mesh axes."""
    axes = tuple(axis for axis in axes if _manual(axis))
    if not axes:
        return partial
    return jax.tree.map(lambda leaf: jax.lax.psum(vary(leaf, axes), axes), partial)


def pmax(partial: jax.Array, axis: str) -> jax.Array:
    """The maximum over a mesh axis."""
    return jax.lax.pmax(vary(partial, (axis,)), axis) if _manual(axis) else partial


def index(axis: str) -> jax.Array | int:
    """This device's place along a mesh axis."""
    return jax.lax.axis_index(axis) if _manual(axis) else 0


def varying(array: jax.Array) -> frozenset[str]:
    """The mesh axes along which an array differs from device to device."""
    return jax.typeof(array).mat.varying


def vary(array: jax.Array, axes: tuple[str, ...] | frozenset[str]) -> jax.Array:
    """Marks an array as different on each device along `axes`; its gradient is then summed over them."""
    missing = tuple(axis for axis in AXES if axis in axes and axis not in varying(array))
    return jax.lax.pcast(array, missing, to="varying") if missing else array


def alike(*arrays: Any) -> tuple[Any, ...]:
    """Marks arrays, or trees of them, as varying along the union of their axes: a custom gradient rule needs that."""
    axes = frozenset().union(*(varying(array) for array in jax.tree.leaves(arrays)))
    return jax.tree.map(lambda array: vary(array, axes), arrays)
