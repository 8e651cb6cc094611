"""The device mesh: named axes over devices, the table from logical axes to mesh axes, and the collectives.

All computations with parameters run inside one `jax.shard_map` over the whole mesh, so each collective is explicit:
`gather` (fsdp), `gather_tokens` (context), `exchange` (expert), `psum` (tensor), `total` (all axes that split a batch).
No automatic partitioner is involved, and a lost sharding is an error: the arrays before and after a collective have
different shapes or different varying axes.

Axes: B rows, T tokens, E experts, C slots per expert, D model.
"""

import os
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from xlam_jax.enums import MESH_AXES
from xlam_jax.errors import UserError

BATCH_AXES = ("data", "fsdp", "expert")
"""Mesh axes that split the rows of a batch."""

TOKEN_AXES = (*BATCH_AXES, "context")
"""Mesh axes that split the tokens of a batch."""

EVERYWHERE = PartitionSpec()
"""PartitionSpec of replicated arrays."""

RULES: Mapping[str, str | None] = {
    "layers": None,
    "embed": "fsdp",
    "vocab": "tensor",
    "added_tokens": None,
    "kv_heads": "tensor",
    "mlp": "tensor",
    "experts": "expert",
    "routes": None,
    "q_group": None,
    "head_dim": None,
    "norm": None,
    "rank": None,
}
"""Logical axis of a parameter → mesh axis over which it is sharded; None: not sharded."""


THREADS = "PJRT_NPROC"
"""Environment variable with the number of XLA's CPU threads."""


def cpu_threads() -> int:
    """Returns the number of threads of XLA's CPU backend, determined as XLA does: from two environment variables, else
    the number of CPUs available to this process. XLA splits sums among the threads, so the number affects the last
    bits."""
    for name in (THREADS, "NPROC"):
        if (text := os.environ.get(name, "")).isdigit():
            return int(text)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def keep_cpu_threads(threads: int, devices: int) -> None:
    """Sets the number of XLA's CPU threads to that of an earlier process of the same run, unless the user has set it or
    `devices` CPU devices need more (`split_cpu`). Has no effect once JAX has initialized its devices."""
    is_set = any(os.environ.get(name, "").isdigit() for name in (THREADS, "NPROC"))
    if not is_set and (devices == 1 or threads > 4 * devices):
        os.environ[THREADS] = str(threads)


def split_cpu(devices: int) -> None:
    """Splits the CPU into this many devices. Has no effect once JAX has initialized its devices.

    XLA runs all devices on one thread pool, by default with one thread per device, and a device that waits in a
    collective blocks its thread. If all threads are blocked, the device that the others wait for never runs, and XLA
    ends the process after 40 s. The pool is therefore made large enough.
    """
    os.environ.setdefault(THREADS, str(4 * devices + (os.cpu_count() or 1)))
    jax.config.update("jax_num_cpu_devices", devices)


def make_mesh(sizes: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """Arranges the devices (default: all) along the axes. Axes that are not in `sizes` have size 1; one size may be -1
    and takes the remaining devices.

    With several TPU slices, only the data axis spans slices. Raises `UserError` if the product of the sizes is not the
    number of devices, or if the data axis is not a multiple of the number of slices.
    """
    devices = jax.devices() if devices is None else devices
    shape = [sizes.get(axis, 1) for axis in MESH_AXES]
    if -1 in shape:
        product = int(np.prod([size for size in shape if size != -1]))
        if len(devices) % product:
            raise UserError(_misfit(sizes, devices))
        shape[shape.index(-1)] = len(devices) // product
    if int(np.prod(shape)) != len(devices):
        raise UserError(_misfit(sizes, devices))
    types = (AxisType.Auto,) * len(MESH_AXES)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        return jax.make_mesh(tuple(shape), MESH_AXES, axis_types=types, devices=devices)
    if shape[0] % slices:
        raise UserError(
            f"mesh.data is {shape[0]} and the devices are of {slices} slices, which only the data axis joins; "
            f"make it a multiple of {slices}"
        )
    inside, between = [shape[0] // slices, *shape[1:]], [slices] + [1] * (len(MESH_AXES) - 1)
    return Mesh(mesh_utils.create_hybrid_device_mesh(inside, between, devices), MESH_AXES, axis_types=types)


def _misfit(sizes: Mapping[str, int], devices: Sequence[Any]) -> str:
    layout = " × ".join(f"{axis} {sizes.get(axis, 1)}" for axis in MESH_AXES)
    platform = devices[0].platform
    split = ", or mesh.cpu_devices to split a CPU into more" if platform == "cpu" else ""
    return (
        f"mesh: {layout} does not fit the {len(devices)} {platform} device(s); "
        f"set the axes so that their product is that number (-1 fills one){split}"
    )


def spec(logical: tuple[str, ...], mesh: Mesh) -> PartitionSpec:
    """Returns the PartitionSpec of a parameter with these logical axes. Mesh axes of size 1 are omitted, so that they
    cause no collectives."""
    return PartitionSpec(*(axis if (axis := RULES[name]) and mesh.shape[axis] > 1 else None for name in logical))


def row_spec(mesh: Mesh) -> PartitionSpec:
    """Returns the PartitionSpec of per-row arrays [B, …]."""
    return PartitionSpec(tuple(axis for axis in BATCH_AXES if mesh.shape[axis] > 1) or None)


def batch_spec(mesh: Mesh) -> PartitionSpec:
    """Returns the PartitionSpec of per-token arrays [B, T, …]."""
    return PartitionSpec(*row_spec(mesh), "context" if mesh.shape["context"] > 1 else None)


def dealt(shards: int) -> list[int]:
    """Returns the order of the pieces of a row over the context shards: of 2c pieces, shard i of c gets pieces i and
    2c − 1 − i, so that all shards have the same amount of causal attention."""
    return [piece for shard in range(shards) for piece in (shard, 2 * shards - 1 - shard)]


def rows_here(mesh: Mesh, count: int) -> list[int]:
    """Returns the indices of the rows of a batch of `count` rows that this host's devices need. Together, the hosts
    need all rows; hosts whose devices share rows need the same rows."""
    by_device = NamedSharding(mesh, row_spec(mesh)).addressable_devices_indices_map((count,))
    return sorted({row for index in by_device.values() if index for row in range(*index[0].indices(count))})


def put_rows(mesh: Mesh, local_BT: np.ndarray, count: int) -> jax.Array:
    """Returns the batch [count, T] on the devices. `local_BT`: this host's rows, in the order of `rows_here`. With
    context parallelism, the tokens of each row are reordered by `dealt`."""
    place = {row: at for at, row in enumerate(rows_here(mesh, count))}
    shards = mesh.shape["context"]
    if shards > 1:
        local_BT = local_BT.reshape(len(local_BT), 2 * shards, -1)[:, dealt(shards)].reshape(local_BT.shape)

    def shard_at(index: Any) -> np.ndarray:
        return local_BT[[place[row] for row in range(*index[0].indices(count))], index[1]]

    whole = (count, local_BT.shape[1])
    return jax.make_array_from_callback(whole, NamedSharding(mesh, batch_spec(mesh)), shard_at)


def shardings(specs: Any, mesh: Mesh) -> Any:
    """Converts a tree of partition specs into named shardings on `mesh`."""
    return jax.tree.map(
        lambda spec: NamedSharding(mesh, spec), specs, is_leaf=lambda node: isinstance(node, PartitionSpec)
    )


# The functions below are called inside the shard_map, or without a mesh (generation). Without a mesh, and for an axis
# of one device, they are the identity.


def splits(axis: str) -> bool:
    """Returns whether the surrounding `shard_map` splits a mesh axis over several devices."""
    mesh = jax.sharding.get_abstract_mesh()
    return axis in mesh.manual_axes and mesh.shape[axis] > 1


class Wire(NamedTuple):
    """How the gradients of weights are reduce-scattered over fsdp."""

    inner: int = 1
    """Size of the groups of neighbours for a reduce-scatter in two stages: first between groups, then inside each. A
    TPU sums over all chips of a slice in one stage by an all-reduce, which moves twice as much."""
    dtype: str = "float32"
    """Precision of the sum."""


WIRE = Wire()


def gather(shard: Any, logical: tuple[str, ...], dtype: jnp.dtype, wire: Wire = WIRE) -> Any:
    """All-gathers a parameter over fsdp along its `embed` axis, in `dtype`; its gradient is reduce-scattered as `wire`
    specifies. A parameter without that axis is not sharded; the parts of a quantized parameter are gathered
    unchanged."""
    if not splits("fsdp") or "embed" not in logical:
        return shard
    axis = logical.index("embed")
    if not isinstance(shard, jax.Array):
        return jax.tree.map(
            lambda part: jax.lax.all_gather(part, "fsdp", axis=axis, tiled=True) if part.ndim > axis else part, shard
        )
    return _gather("fsdp", axis, dtype, wire, shard)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _gather(along: str, axis: int, dtype: jnp.dtype, wire: Wire, shard: jax.Array) -> jax.Array:
    whole = jax.lax.all_gather(shard.astype(dtype), along, axis=axis, tiled=True)
    return whole.astype(shard.dtype)  # back up, so that the cotangent is not rounded; the pair of casts cancels


def _gather_forward(along: str, axis: int, dtype: jnp.dtype, wire: Wire, shard: jax.Array) -> tuple[jax.Array, None]:
    return _gather(along, axis, dtype, wire, shard), None


def _gather_backward(
    along: str, axis: int, dtype: jnp.dtype, wire: Wire, _: None, whole: jax.Array
) -> tuple[jax.Array]:
    dtype_of_cotangent, whole = whole.dtype, whole.astype(wire.dtype)
    devices = jax.sharding.get_abstract_mesh().shape[along]
    stages: list[list[list[int]] | None] = [None]
    if 1 < wire.inner < devices:
        groups = np.arange(devices).reshape(-1, wire.inner)
        stages = [groups.T.tolist(), groups.tolist()]
    for groups in stages:
        whole = jax.lax.psum_scatter(whole, along, scatter_dimension=axis, axis_index_groups=groups, tiled=True)
    return (whole.astype(dtype_of_cotangent),)


_gather.defvjp(_gather_forward, _gather_backward)


def gather_tokens(shard_BT: jax.Array) -> jax.Array:
    """All-gathers [B, T / shards, …] over the context shards to [B, T, …], in the original order of the row; the
    gradient of floating-point values is reduce-scattered in f32."""
    if not splits("context"):
        return shard_BT
    shard_BT = vary(shard_BT, ("context",))
    if jnp.issubdtype(shard_BT.dtype, jnp.floating):
        dtype = shard_BT.dtype
        whole_BT: jax.Array = _gather("context", 1, dtype, WIRE, shard_BT.astype(jnp.float32))  # pyright: ignore
        whole_BT = whole_BT.astype(dtype)
    else:
        whole_BT = jax.lax.all_gather(shard_BT, "context", axis=1, tiled=True)
    order = dealt(jax.sharding.get_abstract_mesh().shape["context"])
    pieces = jnp.split(whole_BT, len(order), axis=1)
    return jnp.concatenate([pieces[order.index(at)] for at in range(len(order))], axis=1)


def whole_rows(shard_BT: jax.Array) -> jax.Array:
    """Gathers a small array like `gather_tokens`, as a sum over shards, so that the result is known to be the same on
    all shards (not varying over `context`)."""
    if not splits("context"):
        return shard_BT
    shards = jax.sharding.get_abstract_mesh().shape["context"]
    rows, tokens = shard_BT.shape
    shard = index("context")
    whole_BT = vary(jnp.zeros((rows, tokens * shards), shard_BT.dtype), varying(shard_BT) | {"context"})
    for piece, at in zip(jnp.split(shard_BT, 2, axis=1), (shard, 2 * shards - 1 - shard), strict=True):
        whole_BT = jax.lax.dynamic_update_slice_in_dim(whole_BT, piece, at * (tokens // 2), axis=1)
    return psum(whole_BT, "context")


def exchange(slots_ECD: jax.Array, *, back: bool = False) -> jax.Array:
    """Sends the slots of each expert to the device that has its weights, [E, C, D] → [E / devices, devices × C, D];
    with `back`, the reverse."""
    if not splits("expert"):
        return slots_ECD
    split, joined = (1, 0) if back else (0, 1)
    return jax.lax.all_to_all(vary(slots_ECD, ("expert",)), "expert", split, joined, tiled=True)


def total(values: Any) -> Any:
    """Sums values over the shards of a batch: each leaf over those of `TOKEN_AXES` along which it varies. A leaf that
    does not vary is a complete sum already."""
    return jax.tree.map(lambda leaf: psum(leaf, *(axis for axis in TOKEN_AXES if axis in varying(leaf))), values)


def psum(partial: Any, *axes: str) -> Any:
    """Sums over the named mesh axes."""
    axes = tuple(axis for axis in axes if splits(axis))
    if not axes:
        return partial
    return jax.tree.map(lambda leaf: jax.lax.psum(vary(leaf, axes), axes), partial)


def pmax(partial: jax.Array, axis: str) -> jax.Array:
    """Returns the maximum over a mesh axis."""
    return jax.lax.pmax(vary(partial, (axis,)), axis) if splits(axis) else partial


def index(axis: str) -> jax.Array | int:
    """Returns this device's index along a mesh axis."""
    return jax.lax.axis_index(axis) if splits(axis) else 0


def varying(array: jax.Array) -> frozenset[str]:
    """Returns the mesh axes along which an array differs between devices."""
    return jax.typeof(array).mat.varying


def vary(array: jax.Array, axes: tuple[str, ...] | frozenset[str]) -> jax.Array:
    """Marks an array as different on each device along `axes`; its gradient is then summed over them."""
    missing = tuple(axis for axis in MESH_AXES if axis in axes and axis not in varying(array))
    return jax.lax.pcast(array, missing, to="varying") if missing else array


def alike(*arrays: Any) -> tuple[Any, ...]:
    """Marks arrays, or trees of them, as varying along the union of their axes: a custom gradient rule needs that."""
    axes = frozenset().union(*(varying(array) for array in jax.tree.leaves(arrays)))
    return jax.tree.map(lambda array: vary(array, axes), arrays)
