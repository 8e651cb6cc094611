"""Writes a model layer by layer, as a converter reads it, in the format of a checkpoint."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from xlam_jax.enums import STEPS_FOLDER
from xlam_jax.models.params import Params
from xlam_jax.outputs import write_text
from xlam_jax.weights.checkpoint.arrays import named_leaves
from xlam_jax.weights.checkpoint.layout import HF_CONFIG
from xlam_jax.weights.checkpoint.metadata import ARRAYS, DIGEST, FILES, metadata_digest

CHUNK = 2**25
"""Maximum bytes of a chunk."""


class NewModel:
    """The parameters of a model, written layer by layer as step 0 of a folder that looks like a run folder.

    Orbax makes the step, with arrays of one element. Then TensorStore makes each array again in its true shape: a
    folder of uncompressed zarr chunks with checksums, none of which spans two layers (or experts).
    """

    def __init__(self, folder: Path, like: Params, split: Callable[[tuple[str, ...]], int]):
        """Begins a model in `folder`, or continues one. `like`: shapes and dtypes. `split`: returns for a parameter's
        path how many of its leading axes index its layers (and experts)."""
        self._folder = (folder / STEPS_FOLDER / "0").absolute()
        if not self._folder.is_dir():
            _write_step(folder, self._folder, like)
        self._split = split
        self._stores: dict[tuple[str, ...], Any] = {}
        self._like = like

    def open(self, path: tuple[str, ...]) -> None:
        """Opens a parameter; makes it again if it does not have its true shape yet."""
        import tensorstore

        like: Any = self._like
        for name in path:
            like = like[name]
        lead = self._split(path)
        rows = max(1, CHUNK // (math.prod(like.shape[lead + 1 :]) * like.dtype.itemsize))
        chunk = [1] * lead + [min(rows, like.shape[lead]), *like.shape[lead + 1 :]]
        at = self._folder / "params" / ".".join(path)
        spec = {
            "driver": "zarr3",
            "kvstore": {"driver": "file", "path": f"{at}/"},
            "metadata": {
                "shape": list(like.shape),
                "data_type": str(like.dtype),
                "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk}},
                "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
            },
            "context": {"file_io_sync": False},
            "store_data_equal_to_fill_value": True,
        }
        described = json.loads((at / "zarr.json").read_text(encoding="utf-8"))
        if described["shape"] != list(like.shape) or described["chunk_grid"]["configuration"]["chunk_shape"] != chunk:
            shutil.rmtree(at)
        self._stores[path] = tensorstore.open(spec, create=True, open=True).result()

    def write(self, path: tuple[str, ...], at: tuple[int, ...], layer: np.ndarray) -> None:
        """Writes a layer; returns when it is in its files."""
        self._stores[path][at].write(layer).result()


def _write_step(folder: Path, step_dir: Path, like: Params) -> None:
    """Has Orbax write a step with the arrays of `like`, of one element each."""
    from xlam_jax.weights.checkpoint.quiet_orbax import ocp

    context = ocp.Context()
    context.array.saving.use_ocdbt = False
    is_leaf = lambda node: not isinstance(node, dict)  # noqa: E731
    arrays = {  # without checksums: the chunks have their own
        name: {"shape": list(leaf.shape), "dtype": str(leaf.dtype)}
        for name, leaf in named_leaves(like, is_leaf).items()
    }
    metadata = {"model": json.loads((folder / HF_CONFIG).read_text(encoding="utf-8"))}
    metadata |= {ARRAYS: {"params": arrays}, FILES: {}}
    metadata |= {DIGEST: metadata_digest(metadata)}
    with context:
        tiny = jax.tree.map(lambda leaf: np.zeros((1,), leaf.dtype), like, is_leaf=is_leaf)
        ocp.save_checkpointables(str(step_dir), {"params": tiny}, custom_metadata=metadata)


def write_hf_config(folder: Path, hf_config: dict[str, Any]) -> None:
    """Writes `config.json` into a folder, atomically."""
    write_text(folder / HF_CONFIG, json.dumps(hf_config, indent=2) + "\n")
