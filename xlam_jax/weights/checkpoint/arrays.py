"""Reads the arrays of a step, whole or layer by layer, and verifies what it reads.

TensorStore opens them as Orbax lays them out: one zarr array each, all in one key-value store or each in a folder.
"""

import errno
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from xlam_jax.errors import UserError
from xlam_jax.models.params import Params
from xlam_jax.weights.checkpoint import checksums
from xlam_jax.weights.checkpoint.layout import DamagedError
from xlam_jax.weights.checkpoint.metadata import ARRAYS, read_metadata, warn_unverified

_TRANSIENT = (errno.EPERM, errno.ENOMEM, errno.EACCES, errno.ENFILE, errno.EMFILE)


def load_params(step_dir: Path) -> Params:
    """Reads the parameters of a step as numpy arrays, or their moving average where the run kept one.

    Raises `DamagedError`.
    """
    return jax.tree.map(np.asarray, open_params(step_dir))


def open_params(step_dir: Path) -> Params:
    """The parameters that `load_params` returns, as `StoredParameter`s: none is read yet. Raises `DamagedError`."""
    items, metadata = read_metadata(step_dir)
    if ARRAYS not in metadata:
        warn_unverified(step_dir)
    items = metadata.get(ARRAYS, items)
    item = "ema" if "ema" in items else "params"
    names = list(metadata[ARRAYS][item]) if ARRAYS in metadata else _stored_names(step_dir, item)
    params: Params = {}
    for name, stored in open_arrays(step_dir, item, names, metadata).items():
        *parents, last = name.split(".")
        node = params
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = stored
    return params


def check_params(step_dir: Path, like: Any) -> None:
    """Raises `UserError` when the parameters of a step have other names or shapes than `like`; reads none of them."""
    check_shapes(step_dir, open_params(step_dir), like)


def check_shapes(folder: str | Path, stored: Any, wanted: Any) -> None:
    """Raises `UserError` naming the parameters whose shapes differ from those wanted."""
    has_shape = lambda node: hasattr(node, "shape")  # noqa: E731
    has, needs = (
        {name: tuple(leaf.shape) for name, leaf in named_leaves(tree, is_leaf=has_shape).items()}
        for tree in (stored, wanted)
    )
    differences = [
        f"{name} is {has.get(name, 'missing')} in the checkpoint and {needs.get(name, 'unknown')} in the model"
        for name in sorted(has.keys() | needs.keys())
        if has.get(name) != needs.get(name)
    ]
    if differences:
        raise UserError(f"{folder}: a checkpoint of another model: " + "; ".join(differences[:5]))


def named_leaves(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> dict[str, Any]:
    """The leaves of a tree by their paths, joined by dots: the names that Orbax gives its arrays."""
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


class StoredParameter:
    """One array of a step, whose layers are read on access and verified as they are read."""

    def __init__(self, step_dir: Path, item: str, name: str, store: Any, sums: str | None = None, dtype: Any = None):
        """`store`: the opened TensorStore array. `sums`: its checksums, where the metadata have them."""
        self._step_dir, self._item, self._name, self._store, self._sums = step_dir, item, name, store, sums
        self.shape = tuple(store.shape)
        self.dtype = np.dtype(dtype or store.dtype.numpy_dtype)
        self.size, self.ndim = math.prod(self.shape), len(self.shape)

    def astype(self, dtype: Any) -> "StoredParameter":
        """The same array, converted when it is read."""
        return StoredParameter(self._step_dir, self._item, self._name, self._store, self._sums, dtype)

    def __getitem__(self, at: Any) -> np.ndarray:
        """Reads a slice given by integers and slices; whole layers are read to verify it. Raises `DamagedError`."""
        at = () if at is Ellipsis else at if isinstance(at, tuple) else (at,)
        if self._sums is None:
            return self._raw(at).astype(self.dtype, copy=False)
        lead = checksums.leading_axes(self._name, self.ndim)
        units = self._raw(at[:lead])
        indices = np.arange(math.prod(self.shape[:lead])).reshape(self.shape[:lead])[at[:lead]]
        flat = units.reshape(indices.size, *self.shape[lead:])
        for unit, values in zip(indices.reshape(-1), flat, strict=True):
            if checksums.of_unit(values) != self._sums[16 * unit : 16 * unit + 16]:
                raise DamagedError(self._step_dir, mismatch([f"{self._item}/{self._name}"]))
        return units[(slice(None),) * indices.ndim + at[lead:]].astype(self.dtype, copy=False)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Reads all of it."""
        return self[...].astype(dtype or self.dtype, copy=False)

    def placed(self, sharding: jax.sharding.Sharding) -> jax.Array:
        """Reads it onto the devices: each host reads the shards of its own devices. All hosts call it together."""
        array = self.unverified(sharding)
        if self._sums is not None and checksums.of_tree({self._name: array})[self._name] != self._sums:
            raise DamagedError(self._step_dir, mismatch([f"{self._item}/{self._name}"]))
        return array if array.dtype == self.dtype else jax.device_put(array.astype(self.dtype), sharding)

    def unverified(self, sharding: jax.sharding.Sharding) -> jax.Array:
        """What `placed` reads, in the dtype of the file, before the comparison of checksums that needs all hosts."""
        return jax.make_array_from_callback(self.shape, sharding, self._raw)

    def _raw(self, at: Any) -> np.ndarray:
        try:
            return self._store[at].read().result()
        except ValueError as error:
            raise _unreadable(self._step_dir, f"{self._item}/{self._name}", error) from None


def open_arrays(step_dir: Path, item: str, names: list[str], metadata: dict[str, Any]) -> dict[str, StoredParameter]:
    """Opens arrays of an item by their names.

    Raises `DamagedError` when one can't be opened, or has another shape or dtype than was saved.
    """
    import tensorstore

    folder, form = (step_dir / item).absolute(), _storage_format(step_dir, item)
    saved = metadata[ARRAYS][item] if ARRAYS in metadata else {}
    pending = {}
    for name in names:
        at = (
            {"driver": "ocdbt", "base": f"file://{folder}/", "path": f"{name}/"}
            if form["use_ocdbt"]
            else {"driver": "file", "path": f"{folder}/{name}/"}
        )
        spec = {"driver": "zarr3" if form["use_zarr3"] else "zarr", "kvstore": at, "recheck_cached_data": False}
        spec["fill_missing_data_reads"] = False  # a lost file is an error, and not zeros
        pending[name] = tensorstore.open(spec, read=True)
    opened = {}
    for name, future in pending.items():
        try:
            store = future.result()
        except ValueError as error:
            raise _unreadable(step_dir, f"{item}/{name}", error) from None
        stored = StoredParameter(step_dir, item, name, store, saved.get(name, {}).get("sums"))
        if name in saved and (list(stored.shape), str(stored.dtype)) != (saved[name]["shape"], saved[name]["dtype"]):
            raise DamagedError(
                step_dir,
                f"{item}/{name} is {stored.dtype} {stored.shape}, and was saved as {saved[name]['dtype']} "
                f"{tuple(saved[name]['shape'])}",
            )
        opened[name] = stored
    return opened


def _stored_names(step_dir: Path, item: str) -> list[str]:
    """The names of an item's arrays, as Orbax stores them."""
    form = _storage_format(step_dir, item)
    try:
        return [".".join(key["key"] for key in array["key_metadata"]) for array in form["tree_metadata"].values()]
    except (KeyError, TypeError, AttributeError) as error:
        raise DamagedError(step_dir, f"{item}/_METADATA can't be parsed ({error!r})") from None


def _storage_format(step_dir: Path, item: str) -> dict[str, Any]:
    """Orbax's description of how an item is stored."""
    try:
        form = json.loads((step_dir / item / "_METADATA").read_bytes())
        if not {"use_ocdbt", "use_zarr3"} <= form.keys():
            raise KeyError("use_ocdbt, use_zarr3")
    except PermissionError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedError(step_dir, f"{item}/_METADATA can't be read ({error})") from None
    return form


def mismatch(names: list[str]) -> str:
    """The reason of a `DamagedError` for arrays whose values differ from their checksums."""
    rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"the values of {', '.join(names[:3])}{rest} differ from the checksums of what was saved"


def _unreadable(step_dir: Path, name: str, error: Exception) -> UserError:
    """The error for an array that can't be read: damage, or what keeps an intact file from being read."""
    reason = str(error).strip().splitlines()[0][:300]
    if "PERMISSION_DENIED" in reason or system_error(error) in _TRANSIENT:
        return UserError(f"{step_dir / name}: can't be read ({reason})")
    return DamagedError(step_dir, f"{name} can't be read ({reason})")


def system_error(error: BaseException | None) -> int | None:
    """The operating system's error number in an error or its causes. TensorStore states it in its messages only."""
    while error is not None:
        if isinstance(error, OSError) and error.errno:
            return error.errno
        if match := re.search(r"(?:os_error_code='|OS error |Errno )(\d+)\b", str(error)):
            return int(match[1])
        error = error.__cause__ or error.__context__
    return None
