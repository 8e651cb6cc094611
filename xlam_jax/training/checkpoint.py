"""Checkpoints: the one place that knows Orbax.

A run folder, and a converted model alike, look so:

    config.json            the Hugging Face config of the model
    tokenizer/             the tokenizer with its chat template
    checkpoints/<step>/    Orbax: the items params, opt and data, with the run's configuration as metadata

A step folder gets its name only once it is whole (Orbax writes beside and renames), so a folder with a number for a
name can be trusted.
"""

import json
import logging
import shutil
import threading
from pathlib import Path
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from xlam_jax.errors import UserError
from xlam_jax.models.params import Params

# Orbax logs every phase of every save, and every error once a thread; what fails is raised by `save` and `wait`.
logging.getLogger("absl").setLevel(logging.CRITICAL)

STEPS = "checkpoints"
TOKENIZER = "tokenizer"
HF_CONFIG = "config.json"


class Checkpoints:
    """The checkpoints of one run: saved in the background, the newest `keep` of them kept."""

    def __init__(self, run: Path, *, keep: int, metadata: dict[str, Any]):
        _let_wait_tell()
        self._folder = run / STEPS
        self._metadata = metadata
        self._orbax = ocp.training.Checkpointer(
            str(self._folder.absolute()),
            preservation_policy=ocp.training.preservation_policies.LatestN(n=keep),  # pyright: ignore[reportArgumentType]
            cleanup_tmp_directories=True,
        )

    def latest(self) -> int | None:
        """The newest step that is whole, or None."""
        newest = self._orbax.latest
        return None if newest is None else newest.step

    def save(self, step: int, params: Params, opt: Any, data: dict[str, Any]) -> None:
        """Starts saving; returns as soon as the arrays are copied. Raises `UserError` when an earlier save failed."""
        items = {"params": params, "opt": opt, "data": {"states": _encode(data)}}
        try:
            self._orbax.save_checkpointables_async(step, items, force=True, custom_metadata=self._metadata)
        except Exception as error:
            raise self._explain(error) from error

    def wait(self) -> None:
        """Returns when the last save is whole. Raises `UserError` when it could not be written."""
        try:
            self._orbax.wait()
        except Exception as error:
            raise self._explain(error) from error

    def restore(self, step: int, params: Any, opt: Any) -> tuple[Params, Any, dict[str, Any]]:
        """Loads a step; `params` and `opt` are trees of `jax.ShapeDtypeStruct`s that say shapes and shardings."""
        return_items = self._orbax.load_checkpointables(step, {"params": params, "opt": opt, "data": None})
        return return_items["params"], return_items["opt"], _decode(return_items["data"]["states"])

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

    Raises `UserError` when they can't be read or are those of a model of other shapes than `target`.
    """
    path = str(step_dir.absolute())
    try:
        stored = ocp.checkpointables_metadata(path).metadata["params"]
        if target is None:
            # Arrays that take no memory: for Orbax an abstract numpy array is a numpy array.
            target = jax.tree.map(lambda leaf: np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape), stored)
        else:
            same_shapes(step_dir, stored, target)
        return ocp.load_checkpointables(path, {"params": target})["params"]
    except (ValueError, OSError, KeyError) as error:
        raise UserError(
            f"{step_dir}: the parameters can't be read ({str(error).strip().splitlines()[0][:300]}); "
            "the folder is damaged or not a checkpoint of this project; use another step"
        ) from error


def same_shapes(step_dir: Path, stored: Any, wanted: Any) -> None:
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
        raise UserError(f"{step_dir}: a checkpoint of another model: " + "; ".join(differences[:5]))


def load_hf_config(step_dir: Path) -> dict[str, Any]:
    """The Hugging Face config of the model in a step folder."""
    from xlam_jax.models.config import read_hf_config

    return read_hf_config(step_dir.parent.parent / HF_CONFIG)


def tokenizer_dir(step_dir: Path) -> Path | None:
    """The tokenizer kept beside a step folder, if there is one."""
    folder = step_dir.parent.parent / TOKENIZER
    return folder if folder.is_dir() else None


def write_model(folder: Path, params: Params, hf_config: dict[str, Any], tokenizer: Path | None) -> None:
    """Writes a model alone, as step 0 of a folder of the same shape as a run's. `folder` must not exist yet."""
    ocp.save_checkpointables(str((folder / STEPS / "0").absolute()), {"params": params})
    write_hf_config(folder, hf_config)
    if tokenizer is not None:
        shutil.copytree(tokenizer, folder / TOKENIZER)


def write_hf_config(folder: Path, hf_config: dict[str, Any]) -> None:
    """Writes `config.json` into a folder, beside and renamed."""
    part = folder / f"{HF_CONFIG}.part"
    part.write_text(json.dumps(hf_config, indent=2) + "\n", encoding="utf-8")
    part.replace(folder / HF_CONFIG)


def abstract(tree: Any) -> Any:
    """Shapes, dtypes and shardings of a tree of arrays: the target of a restore."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), tree)
