"""Reads the tensors of a GGUF file, dequantized, under their Hugging Face names and in their Hugging Face layout."""

from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from xlam_jax.errors import UserError
from xlam_jax.gguf_file import TensorPlace, open_gguf
from xlam_jax.outputs import SourceError
from xlam_jax.weights.shards import TensorEntry

SUFFIXES = (".weight", ".bias")
EXACT = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
"""Types that are read as they are; every other is dequantized to float32."""
INTERLEAVED = {"llama": {"self_attn.q_proj": "num_attention_heads", "self_attn.k_proj": "num_key_value_heads"}}
"""Architecture → projections whose rows llama.cpp reorders, as it rotates neighbours, not halves, of a head; and the
key of config.json with their number of heads."""


class GGUFShard:
    """The tensors of a GGUF file, as `Shard` gives those of a safetensors file. Thread-safe."""

    def __init__(self, path: Path, hf_config: Mapping[str, Any], keys: Sequence[str]):
        """`hf_config`: from `read_gguf_config`. `keys`: Hugging Face names of the model's tensors; the others keep the
        names of the file. Raises `UserError` as `GGUFFile`, and for a tensor type that cannot be dequantized."""
        self._file = open_gguf(path)
        self.url, self.size = str(path), self._file.size
        self.stamp = f"{self.size} bytes, {path.stat().st_mtime}"
        """Identifies the version of the file."""
        architecture = self._file.metadata["general.architecture"]
        self._names = _names(architecture, hf_config["num_hidden_layers"], keys)
        heads = INTERLEAVED.get(architecture, {})
        self._heads = {
            key: hf_config.get(heads[projection], hf_config["num_attention_heads"])
            for key in keys
            for projection in heads
            if projection in key
        }
        stored = {self._names.get(name, name): place for name, place in self._file.tensors.items()}
        self._places = stored
        for key, place in stored.items():
            _check_type(self.url, key, place.type)
        self.tensors = {key: _entry(place) for key, place in stored.items()}

    def read(self, key: str, part: tuple[int, tuple[int, ...]] | None = None) -> np.ndarray:
        """Reads a tensor, or `part` of it: (number of elements before the part, shape of the part).

        Raises `UserError` if the file has become shorter; `SourceError` if it cannot be read.
        """
        place = self._places[key]
        values = _dequantize(self._read_bytes(key, place), place)
        if key in self._heads:
            values = _halves(values, self._heads[key])
        if part is None:
            return values
        first, shape = part
        return values.reshape(-1)[first : first + prod(shape)].reshape(shape)

    def _read_bytes(self, key: str, place: TensorPlace) -> np.ndarray:
        try:
            data = np.fromfile(self.url, np.uint8, place.stop - place.start, offset=place.start)
        except OSError as error:
            raise SourceError(
                f"{self.url}: {key} can't be read ({error.strerror or error}); run again to continue"
            ) from None
        if data.size != place.stop - place.start:
            raise UserError(f"{self.url}: {key} ends after {data.size} bytes; the file changed while it was read")
        return data


def _names(architecture: str, layers: int, keys: Sequence[str]) -> dict[str, str]:
    """Returns GGUF name → Hugging Face name. Keys without a GGUF name are absent."""
    import gguf

    model = next(model for model, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    table = gguf.get_tensor_name_map(model, layers)
    named = ((table.get_name(key, SUFFIXES), key) for key in keys)
    return {name: key for name, key in named if name is not None}


def _check_type(url: str, key: str, name: str) -> None:
    """Raises `UserError` unless tensors of this type can be dequantized."""
    import gguf

    tensor_type = gguf.GGMLQuantizationType[name]
    _, size = gguf.GGML_QUANT_SIZES[tensor_type]
    try:
        if name not in EXACT:
            gguf.dequantize(np.zeros((1, size), np.uint8), tensor_type)
    except NotImplementedError:
        raise UserError(f"{url}: {key} is {name}, which the package gguf cannot dequantize; use another file") from None


def _entry(place: TensorPlace) -> TensorEntry:
    dtype = place.type if place.type in EXACT else "F32"
    return TensorEntry(dtype, place.shape, place.start, place.stop)


def _dequantize(data: np.ndarray, place: TensorPlace) -> np.ndarray:
    """Returns the values of a tensor. `data`: its bytes."""
    import gguf

    if place.type in EXACT:
        return data.view(EXACT[place.type]).reshape(place.shape)
    rows = data.reshape(*place.shape[:-1], -1)
    return gguf.dequantize(rows, gguf.GGMLQuantizationType[place.type])


def _halves(values: np.ndarray, heads: int) -> np.ndarray:
    """Returns the rows (outputs) of a projection in the order of transformers, which rotates the halves of a head
    together, from that of llama.cpp, which rotates neighbours."""
    pairs = values.reshape(heads, values.shape[0] // heads // 2, 2, -1)
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(values.shape)
