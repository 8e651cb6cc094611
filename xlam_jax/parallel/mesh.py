"""The mesh: named axes over devices, and the one table from logical axes to mesh axes.

Everything that touches parameters runs inside one `jax.shard_map` over the whole mesh, so each collective is written
where it happens: `gather` (fsdp), `gather_tokens` (context), `exchange` (expert), `psum` (tensor), `total` (all that
split a batch). Nothing is left to a partitioner, and a lost sharding can't go unseen: arrays on two sides of a
collective have different shapes or different varying axes.
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

from xlam_jax.enums import MESH_AXES as AXES
from xlam_jax.errors import UserError

BATCH_AXES = ("data", "fsdp", "expert")
"""Mesh axes that split the rows of a batch."""

TOKEN_AXES = (*BATCH_AXES, "context")
"""Mesh axes that split the tokens of a batch."""

EVERYWHERE = PartitionSpec()
"""The partition of what is the same on all devices."""

RULES: Mapping[str, str | None] = {
    "layers": None,
    "embed": "fsdp",
    "vocab": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "experts": "expert",
    "routes": None,
    "q_group": None,
    "head_dim": None,
    "norm": None,
    "rank": None,
}
"""Logical axis of a parameter → mesh axis that it is stored along."""


THREADS = "PJRT_NPROC"
"""The variable that sets the number of XLA's CPU threads."""


def cpu_threads() -> int:
    """How many threads XLA's CPU backend takes, read as it does: from two variables, else the CPUs that this process
    may use. XLA splits sums among them, so with another number they differ in their last bits."""
    for name in (THREADS, "NPROC"):
        if (text := os.environ.get(name, "")).isdigit():
            return int(text)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def keep_cpu_threads(threads: int, devices: int) -> None:
    """Has XLA take as many threads as an earlier process of the same run did, unless the user has set a number, or it
    would not do for so many devices (`split_cpu`). Has an effect before JAX first looks at them."""
    is_set = any(os.environ.get(name, "").isdigit() for name in (THREADS, "NPROC"))
    if not is_set and (devices == 1 or threads > 4 * devices):
        os.environ[THREADS] = str(threads)


def split_cpu(devices: int) -> None:
    """Splits the CPU into this many devices; has an effect before JAX first looks at them.

    XLA runs all of them on one pool of threads, by default one for each device, and a device that waits for another in
    a collective keeps its thread. With no thread left, the one that is waited for never runs and XLA ends the process
    after 40 s; the pool is made large enough that this can't be.
    """
    os.environ.setdefault(THREADS, str(4 * devices + (os.cpu_count() or 1)))
    jax.config.update("jax_num_cpu_devices", devices)


def make_mesh(sizes: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """Lays the devices (default: all) out along the axes; an axis that is not named has size 1, and one size may be -1
    and takes what is left.

    Devices of several TPU slices are laid out so that only the data axis crosses from one to another. Raises
    `UserError` when the product is not the number of devices, or when the data axis does not divide among the slices.
    """
    devices = jax.devices() if devices is None else devices
    shape = [sizes.get(axis, 1) for axis in AXES]
    if -1 in shape:
        known = int(np.prod([size for size in shape if size != -1]))
        if len(devices) % known:
            raise UserError(_misfit(sizes, devices))
        shape[shape.index(-1)] = len(devices) // known
    if int(np.prod(shape)) != len(devices):
        raise UserError(_misfit(sizes, devices))
    types = (AxisType.Auto,) * len(AXES)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        return jax.make_mesh(tuple(shape), AXES, axis_types=types, devices=devices)
    if shape[0] % slices:
        raise UserError(
            f"mesh.data is {shape[0]} and the devices are of {slices} slices, which only the data axis joins; "
            f"make it a multiple of {slices}"
        )
    inside, between = [shape[0] // slices, *shape[1:]], [slices] + [1] * (len(AXES) - 1)
    return Mesh(mesh_utils.create_hybrid_device_mesh(inside, between, devices), AXES, axis_types=types)


def _misfit(sizes: Mapping[str, int], devices: Sequence[Any]) -> str:
    layout = " × ".join(f"{axis} {sizes.get(axis, 1)}" for axis in AXES)
    platform = devices[0].platform
    split = ", or mesh.cpu_devices to split a CPU into more" if platform == "cpu" else ""
    return (
        f"mesh: {layout} does not fit the {len(devices)} {platform} device(s); "
        f"set the axes so that their product is that number (-1 fills one){split}"
    )


def spec(logical: tuple[str, ...], mesh: Mesh) -> PartitionSpec:
    """The partition of a parameter with these logical axes. An axis of one device splits nothing and is left out, so
    that no collective is ever made for it."""
    return PartitionSpec(*(axis if (axis := RULES[name]) and mesh.shape[axis] > 1 else None for name in logical))


def row_spec(mesh: Mesh) -> PartitionSpec:
    """The partition of what there is one of for each row of a batch, [B, …]."""
    return PartitionSpec(tuple(axis for axis in BATCH_AXES if mesh.shape[axis] > 1) or None)


def batch_spec(mesh: Mesh) -> PartitionSpec:
    """The partition of what there is one of for each token of a batch, [B, T, …]."""
    return PartitionSpec(*row_spec(mesh), "context" if mesh.shape["context"] > 1 else None)


def dealt(shards: int) -> list[int]:
    """The pieces of a row in the order in which they are dealt to context shards: shard i of c gets pieces i and
    2c − 1 − i of 2c, so that each has as much causal attention to compute as the others."""
    return [piece for shard in range(shards) for piece in (shard, 2 * shards - 1 - shard)]


def rows_here(mesh: Mesh, count: int) -> list[int]:
    """Which rows of a batch of so many the devices of this host hold. All hosts' together are the batch; hosts whose
    devices share rows hold the same."""
    by_device = NamedSharding(mesh, row_spec(mesh)).addressable_devices_indices_map((count,))
    return sorted({row for index in by_device.values() if index for row in range(*index[0].indices(count))})


def put_rows(mesh: Mesh, mine: np.ndarray, count: int) -> jax.Array:
    """The batch [count, T] on the devices, from the rows that this host holds; where the tokens of a row are on several
    devices, they are dealt."""
    place = {row: at for at, row in enumerate(rows_here(mesh, count))}
    shards = mesh.shape["context"]
    if shards > 1:
        mine = mine.reshape(len(mine), 2 * shards, -1)[:, dealt(shards)].reshape(mine.shape)

    def of_device(index: Any) -> np.ndarray:
        return mine[[place[row] for row in range(*index[0].indices(count))], index[1]]

    whole = (count, mine.shape[1])
    return jax.make_array_from_callback(whole, NamedSharding(mesh, batch_spec(mesh)), of_device)


def shardings(specs: Any, mesh: Mesh) -> Any:
    """Turns a tree of partition specs into named shardings on `mesh`."""
    return jax.tree.map(
        lambda one: NamedSharding(mesh, one), specs, is_leaf=lambda node: isinstance(node, PartitionSpec)
    )


# What follows is called inside the shard_map, or with no mesh at all (generation); then, and for an axis of one
# device, it is the identity.


def splits(axis: str) -> bool:
    """Whether an axis of the mesh has several devices here."""
    mesh = jax.sharding.get_abstract_mesh()
    return axis in mesh.manual_axes and mesh.shape[axis] > 1


class Wire(NamedTuple):
    """How the gradients of weights travel along fsdp."""

    inner: int = 1
    """They are summed and scattered in two turns: first between groups of so many neighbours, then inside of them. A
    TPU sums over all chips of a slice at once by an all-reduce, which moves twice as much."""
    dtype: str = "float32"
    """The precision that they are summed in."""


WIRE = Wire()


def gather(shard: Any, logical: tuple[str, ...], dtype: jnp.dtype, wire: Wire = WIRE) -> Any:
    """All-gathers a parameter over fsdp along its `embed` axis, in `dtype` on the wire; its gradient is summed and
    scattered as `wire` says. A parameter without that axis is whole already; the parts of a quantized one travel as
    they are."""
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
    given, whole = whole.dtype, whole.astype(wire.dtype)
    devices = jax.sharding.get_abstract_mesh().shape[along]
    turns: list[list[list[int]] | None] = [None]
    if 1 < wire.inner < devices:
        groups = np.arange(devices).reshape(-1, wire.inner)
        turns = [groups.T.tolist(), groups.tolist()]
    for groups in turns:
        whole = jax.lax.psum_scatter(whole, along, scatter_dimension=axis, axis_index_groups=groups, tiled=True)
    return (whole.astype(given),)


_gather.defvjp(_gather_forward, _gather_backward)


def gather_tokens(shard_BT: jax.Array) -> jax.Array:
    """All-gathers [B, T, …] over the context shards, places in the order of the row; the gradient of floating-point
    values is summed and scattered in f32."""
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
    """The same for small arrays of which each shard is to know that all have the same: a sum over shards."""
    if not splits("context"):
        return shard_BT
    shards = jax.sharding.get_abstract_mesh().shape["context"]
    rows, tokens = shard_BT.shape
    mine = index("context")
    whole_BT = vary(jnp.zeros((rows, tokens * shards), shard_BT.dtype), varying(shard_BT) | {"context"})
    for piece, at in zip(jnp.split(shard_BT, 2, axis=1), (mine, 2 * shards - 1 - mine), strict=True):
        whole_BT = jax.lax.dynamic_update_slice_in_dim(whole_BT, piece, at * (tokens // 2), axis=1)
    return psum(whole_BT, "context")


def exchange(slots_ECD: jax.Array, *, back: bool = False) -> jax.Array:
    """Sends each expert's slots to the device that has its weights, [E, C, D] → [E / devices, devices × C, D]; and
    `back` again."""
    if not splits("expert"):
        return slots_ECD
    split, joined = (1, 0) if back else (0, 1)
    return jax.lax.all_to_all(vary(slots_ECD, ("expert",)), "expert", split, joined, tiled=True)


def total(values: Any) -> Any:
    """Sums what the shards of a batch hold of each value: along the axes by which it differs from shard to shard. What
    is the same on all of them is whole already."""
    return jax.tree.map(lambda leaf: psum(leaf, *(axis for axis in TOKEN_AXES if axis in varying(leaf))), values)


def psum(partial: Any, *axes: str) -> Any:
    """Sums over the named mesh axes."""
    axes = tuple(axis for axis in axes if splits(axis))
    if not axes:
        return partial
    return jax.tree.map(lambda leaf: jax.lax.psum(vary(leaf, axes), axes), partial)


def pmax(partial: jax.Array, axis: str) -> jax.Array:
    """The maximum over a mesh axis."""
    return jax.lax.pmax(vary(partial, (axis,)), axis) if splits(axis) else partial


def index(axis: str) -> jax.Array | int:
    """This device's place along a mesh axis."""
    return jax.lax.axis_index(axis) if splits(axis) else 0


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
