"""Checkpoints: the one place that knows Orbax.

A run folder, and a converted model alike, look so:

    config.json            the Hugging Face config of the model
    generation_config.json stop tokens and sampling defaults, where the source of the weights has them
    tokenizer/             the tokenizer with its chat template
    checkpoints/<step>/    Orbax: the items params, opt and data, and ema where a run keeps an average of its params;
                           with the run's configuration as metadata

A step folder gets its name only once it is whole (Orbax writes beside and renames), so a folder with a number for a
name can be trusted.
"""

import json
import logging
import math
import shutil
import threading
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from xlam_jax.errors import UserError
from xlam_jax.models.params import Params
from xlam_jax.outputs import write_text

# Orbax logs every phase of every save, and every error once a thread; what fails is raised by `save` and `wait`.
logging.getLogger("absl").setLevel(logging.CRITICAL)

STEPS = "checkpoints"
TOKENIZER = "tokenizer"
HF_CONFIG = "config.json"
CHUNK = 2**25
"""Bytes of a chunk of a model that is written layer by layer, at most."""


LARGE = 2**24
"""Bytes of a parameter that is stored layer by layer; smaller ones take a chunk of each device's part."""


class Checkpoints:
    """The checkpoints of one run: saved in the background, the newest `keep` of them kept, and the one whose `best`
    metric is the best."""

    def __init__(self, run: Path, *, keep: int, metadata: dict[str, Any], best: str | None = None):
        _let_wait_tell()
        self._folder = run / STEPS
        self._metadata = metadata
        self._best = best
        policies = ocp.training.preservation_policies
        kept: list[Any] = [policies.LatestN(n=keep)]
        if best:
            kept.append(
                policies.BestN(
                    get_metric_fn=lambda metrics: _rank(metrics, best), n=1, keep_checkpoints_without_metrics=False
                )
            )
        self._orbax = ocp.training.Checkpointer(
            str(self._folder.absolute()),
            preservation_policy=policies.AnyPreservationPolicy(kept),  # pyright: ignore[reportArgumentType]
            cleanup_tmp_directories=True,
        )

    def latest(self) -> int | None:
        """The newest step that is whole, or None."""
        newest = self._orbax.latest
        return None if newest is None else newest.step

    def steps(self) -> list[int]:
        """The steps that are kept, whole, in order."""
        return sorted(one.step for one in self._orbax.checkpoints)

    def best(self) -> tuple[int, float] | None:
        """The step with the best metric, and the metric; None where no kept step has it."""
        name = self._best or ""
        values: dict[int, Any] = {one.step: one.metrics for one in self._orbax.checkpoints}
        ranked = [(_rank(metrics, name), step) for step, metrics in values.items() if name in (metrics or {})]
        step = max(ranked)[1] if ranked else None
        return None if step is None else (step, values[step][name])

    def save(self, step: int, items: dict[str, Any], data: dict[str, Any], metrics: Any = None) -> None:
        """Starts saving trees of arrays by name; returns as soon as they are copied. Raises `UserError` when an earlier
        save failed."""
        items = {**items, "data": {"states": _encode(data)}}
        context = ocp.Context()
        context.array.saving.scoped_storage_options_creator = _by_layers
        try:
            with context:
                self._orbax.save_checkpointables_async(
                    step, items, force=True, metrics=metrics, custom_metadata=self._metadata
                )
        except Exception as error:
            raise self._explain(error) from error

    def wait(self) -> None:
        """Returns when the last save is whole. Raises `UserError` when it could not be written."""
        try:
            self._orbax.wait()
        except Exception as error:
            raise self._explain(error) from error

    def restore(self, step: int, items: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Loads a step; `items` are trees of `jax.ShapeDtypeStruct`s that say shapes and shardings."""
        loaded = self._orbax.load_checkpointables(step, {**items, "data": None})
        return loaded, _decode(loaded.pop("data")["states"])

    def saved_metadata(self, step: int) -> dict[str, Any]:
        """What was saved beside a step."""
        return load_metadata(self._folder / str(step))

    def close(self) -> None:
        """Ends the background threads."""
        self._orbax.close()

    def _explain(self, error: Exception) -> Exception:
        """Turns a full disk into a message; anything else stays what it is."""
        text = _chain(error)
        full = "No space left" in text or "RESOURCE_EXHAUSTED" in text
        if not full:
            return error
        whole = sorted(_steps(self._folder))
        kept = f"step {whole[-1]} is whole and stays" if whole else "no earlier checkpoint exists"
        free = shutil.disk_usage(self._folder).free
        return UserError(
            f"{self._folder}: the disk is full ({free / 1e6:.1f} MB free), the checkpoint could not be written; "
            f"{kept}. Free some space and run the same command again to continue from there."
        )


def _by_layers(key: Any, value: Any) -> Any:
    """Large parameters are stored in chunks of a layer (and expert): an export reads them one after the other."""
    names = [str(getattr(part, "key", getattr(part, "name", ""))) for part in key]
    if "blocks" not in names or value.nbytes < LARGE:
        return None
    lead = 2 if value.ndim == 4 and names[-1] in ("w1", "w2", "w3") else 1
    return ocp.options.ArrayOptions.Saving.StorageOptions(shard_axes=tuple(range(lead)))


def better(metric: str, value: float, than: float) -> bool:
    """Whether a value of a metric is better than another: losses and divergences are to be low, all else high."""
    return value < than if metric.endswith(("loss", "kl")) else value > than


def _rank(metrics: Any, name: str) -> float:
    """Grows as the metric gets better; the least for a step that was saved without it."""
    if name not in (metrics or {}):
        return -math.inf
    return metrics[name] if better(name, 1.0, 0.0) else -metrics[name]


def _let_wait_tell() -> None:
    """Keeps Python from printing what ends an Orbax thread: `save` and `wait` raise the same error where it is met."""
    usual = threading.excepthook

    def hook(told: threading.ExceptHookArgs) -> None:
        if not type(told.thread).__module__.startswith("orbax."):
            usual(told)

    threading.excepthook = hook


def _chain(error: BaseException | None) -> str:
    parts = []
    while error is not None:
        parts.append(str(error))
        error = error.__cause__ or error.__context__
    return "\n".join(parts)


def _encode(data: dict[str, Any]) -> np.ndarray:
    return np.frombuffer(json.dumps(data).encode(), np.uint8)


def _decode(states: Any) -> dict[str, Any]:
    return json.loads(np.asarray(states).tobytes().decode())


def whole_steps(run: Path) -> list[int]:
    """The steps of a run folder that are whole, in order."""
    return sorted(_steps(run / STEPS))


def _steps(folder: Path) -> list[int]:
    return [int(entry.name) for entry in folder.iterdir() if entry.name.isdigit()] if folder.is_dir() else []


def resolve(path: Path) -> Path:
    """The step folder meant by `path`: itself, or the newest whole one of a run folder.

    Raises `UserError` when there is none.
    """
    if not path.exists():
        raise UserError(f"{path}: no such folder; a run folder or one of its {STEPS}/STEP folders is expected")
    if path.name.isdigit() and path.parent.name == STEPS:
        return path
    steps = _steps(path / STEPS)
    if not steps:
        raise UserError(
            f"{path}: holds no {STEPS}/STEP folder; give a run folder, a step folder of one, or train first"
        )
    return path / STEPS / str(max(steps))


def load_metadata(step_dir: Path) -> dict[str, Any]:
    """What was saved beside a step: the run's `config`, the `model`'s, and the fingerprint of its `base`."""
    metadata: Any = ocp.checkpointables_metadata(str(step_dir.absolute())).custom_metadata
    return metadata or {}


def is_checkpoint(path: Path) -> bool:
    """Whether `resolve` would find a step here."""
    return (path.name.isdigit() and path.parent.name == STEPS) or bool(_steps(path / STEPS))


def load_params(step_dir: Path, target: Any = None) -> Params:
    """Loads the parameters of a step; `target` (shapes with shardings) places them, else they come as numpy arrays.
    Where the run kept a moving average of them, it is that.

    Raises `UserError` when they can't be read or are those of a model of other shapes than `target`.
    """
    path = str(step_dir.absolute())
    try:
        item, stored = _stored(step_dir)
        if target is None:
            # Arrays that take no memory: for Orbax an abstract numpy array is a numpy array.
            target = jax.tree.map(lambda leaf: np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape), stored)
        else:
            same_shapes(step_dir, stored, target)
        return ocp.load_checkpointables(path, {item: target})[item]
    except (ValueError, OSError, KeyError) as error:
        raise _unreadable(step_dir, error) from error


def check_params(step_dir: Path, like: Any) -> None:
    """Raises `UserError` when the parameters of a step are not those of a model of these shapes; reads none of them."""
    same_shapes(step_dir, _stored(step_dir)[1], like)


def stamp(step_dir: Path) -> str:
    """What tells a step from every other one, of other runs too; a copy has the same. Orbax notes the nanoseconds."""
    note = step_dir / "_CHECKPOINT_METADATA"
    held = note.read_bytes() if note.is_file() else str(step_dir.stat().st_mtime_ns).encode()
    return f"step {step_dir.name}, {sha256(held).hexdigest()[:16]}"


def _stored(step_dir: Path) -> tuple[str, Any]:
    """The item that holds a step's parameters, and their shapes."""
    items: Any = ocp.checkpointables_metadata(str(step_dir.absolute())).metadata
    item = "ema" if "ema" in items else "params"
    return item, items[item]


def same_shapes(folder: str | Path, stored: Any, wanted: Any) -> None:
    """Raises `UserError` naming the parameters whose shapes differ from those wanted."""

    def by_name(tree: Any) -> dict[str, tuple[int, ...]]:
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        return {jax.tree_util.keystr(path, simple=True, separator="."): tuple(leaf.shape) for path, leaf in leaves}

    has, needs = by_name(stored), by_name(wanted)
    differences = [
        f"{name} is {has.get(name, 'missing')} in the checkpoint and {needs.get(name, 'unknown')} in the model"
        for name in sorted(has.keys() | needs.keys())
        if has.get(name) != needs.get(name)
    ]
    if differences:
        raise UserError(f"{folder}: a checkpoint of another model: " + "; ".join(differences[:5]))


def load_hf_config(step_dir: Path) -> dict[str, Any]:
    """The Hugging Face config of the model in a step folder."""
    from xlam_jax.models.config import read_hf_config

    return read_hf_config(step_dir.parent.parent / HF_CONFIG)


def load_generation_config(step_dir: Path) -> dict[str, Any] | None:
    """The generation config that the weights came with, next to a step folder; None where they came without."""
    from xlam_jax.models.generation_config import GENERATION_CONFIG, read_generation_config

    return read_generation_config(step_dir.parent.parent / GENERATION_CONFIG)


def tokenizer_dir(step_dir: Path) -> Path | None:
    """The tokenizer kept beside a step folder, if there is one."""
    folder = step_dir.parent.parent / TOKENIZER
    return folder if folder.is_dir() else None


class StoredParameter:
    """One of a step's parameters, read by its layers when they are asked for."""

    def __init__(self, name: str, store: Any, dtype: np.dtype | None = None):
        self._name, self._store = name, store
        self.shape = tuple(store.shape)
        self.dtype = dtype or store.dtype.numpy_dtype
        self.size, self.ndim = math.prod(self.shape), len(self.shape)

    def astype(self, dtype: Any) -> "StoredParameter":
        """The same, converted when it is read."""
        return StoredParameter(self._name, self._store, np.dtype(dtype))

    def __getitem__(self, at: Any) -> np.ndarray:
        """A slice. Raises `UserError` when it is damaged."""
        try:
            return self._store[at].read().result().astype(self.dtype, copy=False)
        except ValueError as error:
            raise UserError(
                f"{self._name}: can't be read ({str(error).strip().splitlines()[0][:300]}); the folder is damaged: use "
                "another step, or convert the weights again"
            ) from None

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """All of it."""
        return self[...].astype(dtype or self.dtype, copy=False)

    def placed(self, sharding: jax.sharding.Sharding) -> jax.Array:
        """Laid out over the devices: each host reads what belongs to its own."""
        return jax.make_array_from_callback(self.shape, sharding, lambda index: self[index])


def open_params(step_dir: Path) -> Params:
    """The parameters of a step as `load_params` has them, none of them read yet: `StoredParameter`s.

    They are opened by TensorStore, as Orbax lays them out: one zarr array each, in one store of keys or a folder each.
    Raises `UserError` when they can't be.
    """
    import tensorstore

    try:
        item, stored = _stored(step_dir)
        folder = (step_dir / item).absolute()
        form = json.loads((folder / "_METADATA").read_text(encoding="utf-8"))

        def opened(path: Any, _: Any) -> StoredParameter:
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            at = (
                {"driver": "ocdbt", "base": f"file://{folder}/", "path": f"{name}/"}
                if form["use_ocdbt"]
                else {"driver": "file", "path": f"{folder}/{name}/"}
            )
            spec = {"driver": "zarr3" if form["use_zarr3"] else "zarr", "kvstore": at, "recheck_cached_data": False}
            spec["fill_missing_data_reads"] = False  # a lost file is an error, and not zeros
            return StoredParameter(f"{folder}/{name}", tensorstore.open(spec, read=True).result())

        return jax.tree_util.tree_map_with_path(opened, stored)
    except (ValueError, OSError, KeyError) as error:
        raise _unreadable(step_dir, error) from error


def _unreadable(step_dir: Path, error: Exception) -> UserError:
    return UserError(
        f"{step_dir}: the parameters can't be read ({str(error).strip().splitlines()[0][:300]}); "
        "the folder is damaged or not a checkpoint of this project; use another step"
    )


class NewModel:
    """A model alone, written layer by layer as step 0 of a folder of the same shape as a run's.

    Orbax makes the step, with arrays of one element; then TensorStore makes each anew in its true shape: a folder of
    uncompressed zarr chunks with checksums, none of which spans two layers (or experts).
    """

    def __init__(self, folder: Path, like: Params, split: Callable[[tuple[str, ...]], int]):
        """Begins one in `folder`, or goes on with it. `like`: shapes and dtypes. `split`: of a parameter's path, how
        many leading axes index its layers."""
        self._folder = (folder / STEPS / "0").absolute()
        if not self._folder.is_dir():
            context = ocp.Context()
            context.array.saving.use_ocdbt = False
            with context:
                leaf = lambda node: not isinstance(node, dict)  # noqa: E731
                tiny = jax.tree.map(lambda one: np.zeros((1,), one.dtype), like, is_leaf=leaf)
                ocp.save_checkpointables(str(self._folder), {"params": tiny})
        self._split = split
        self._stores: dict[tuple[str, ...], Any] = {}
        self._like = like

    def open(self, path: tuple[str, ...]) -> None:
        """Opens a parameter; made anew where it is not whole in its true shape yet."""
        import tensorstore

        one: Any = self._like
        for name in path:
            one = one[name]
        lead = self._split(path)
        rows = max(1, CHUNK // (math.prod(one.shape[lead + 1 :]) * one.dtype.itemsize))
        chunk = [1] * lead + [min(rows, one.shape[lead]), *one.shape[lead + 1 :]]
        at = self._folder / "params" / ".".join(path)
        spec = {
            "driver": "zarr3",
            "kvstore": {"driver": "file", "path": f"{at}/"},
            "metadata": {
                "shape": list(one.shape),
                "data_type": str(one.dtype),
                "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk}},
                "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
            },
            "context": {"file_io_sync": False},
            "store_data_equal_to_fill_value": True,
        }
        described = json.loads((at / "zarr.json").read_text(encoding="utf-8"))
        if described["shape"] != list(one.shape) or described["chunk_grid"]["configuration"]["chunk_shape"] != chunk:
            shutil.rmtree(at)
        self._stores[path] = tensorstore.open(spec, create=True, open=True).result()

    def write(self, path: tuple[str, ...], at: tuple[int, ...], layer: np.ndarray) -> None:
        """Writes a layer; returns when it is in its files."""
        self._stores[path][at].write(layer).result()


def write_hf_config(folder: Path, hf_config: dict[str, Any]) -> None:
    """Writes `config.json` into a folder, beside and renamed."""
    write_text(folder / HF_CONFIG, json.dumps(hf_config, indent=2) + "\n")


def abstract(tree: Any) -> Any:
    """Shapes, dtypes and shardings of a tree of arrays: the target of a restore."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), tree)
