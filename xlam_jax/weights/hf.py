"""Reads Hugging Face folders: weights layer by layer, tokenizer, and config files."""

import atexit
import re
import shutil
import tempfile
from collections.abc import Set
from fnmatch import fnmatch
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from xlam_jax import strict_json
from xlam_jax.errors import UserError
from xlam_jax.gguf_file import find_gguf
from xlam_jax.models import hf_keys
from xlam_jax.models.config import ModelConfig, read_model_config
from xlam_jax.models.hf_wrapper import text_model_line
from xlam_jax.weights.gguf import GGUFShard
from xlam_jax.weights.hf_map import Tensor, tensors
from xlam_jax.weights.locate import INDEX, Source, keep_text_model, locate, refuse_quantized, remove_wrappers
from xlam_jax.weights.shards import Shard, TensorFile

if TYPE_CHECKING:
    import jax

    from xlam_jax.models.params import Params

SINGLE = "model.safetensors"

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.*",
    "additional_chat_templates/*.jinja",  # a tokenizer with several templates
)
"""Glob patterns of tokenizer files."""


class Parameter:
    """A lazy parameter of this project's layout in a Hugging Face folder: indexing it reads a layer."""

    def __init__(self, parts: list[tuple[Tensor, "Source"]], dtype: np.dtype | None = None):
        """`parts`: the tensors that the parameter stacks. `dtype`: dtype to convert to; None: the stored one."""
        self._parts = {tensor.at: (tensor, source) for tensor, source in parts}
        tensor, _ = parts[0]
        self.shape = tensor.stacked_shape
        self.stored = widest({source.dtype for _, source in parts})
        self.dtype = dtype or self.stored
        self.size = prod(self.shape)
        self.ndim = len(self.shape)

    def astype(self, dtype: Any) -> "Parameter":
        """Returns the same parameter with another dtype; layers are converted when they are read."""
        return Parameter(list(self._parts.values()), np.dtype(dtype))

    def __getitem__(self, index: tuple[int, ...]) -> np.ndarray:
        """Reads the slice at an index of the leading axes: layer, then expert."""
        tensor, source = self._parts[index]
        return tensor.from_hf(source.read()).astype(self.dtype, copy=False)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Reads the whole parameter."""
        whole = np.empty(self.shape, dtype or self.dtype)
        for index in self._parts:
            whole[index] = self[index]
        return whole

    def placed(self, sharding: Any) -> "jax.Array":
        """Returns the parameter as a sharded array. A host reads each layer at most once, and keeps only its shards."""
        import jax

        slices = sharding.addressable_devices_indices_map(self.shape)
        device_bounds = [
            tuple(part.indices(size)[:2] for part, size in zip(index, self.shape, strict=True))
            for index in slices.values()
        ]
        buffers = {bounds: np.empty([stop - start for start, stop in bounds], self.dtype) for bounds in device_bounds}
        for index in self._parts:
            lead = len(index)
            targets = [
                bounds
                for bounds in buffers
                if all(start <= i < stop for i, (start, stop) in zip(index, bounds[:lead], strict=True))
            ]
            if targets:
                layer = self[index]
                for bounds in targets:
                    inside = tuple(i - start for i, (start, _) in zip(index, bounds[:lead], strict=True))
                    buffers[bounds][inside] = layer[tuple(slice(start, stop) for start, stop in bounds[lead:])]
        arrays = [jax.device_put(buffers[bounds], device) for bounds, device in zip(device_bounds, slices, strict=True)]
        return jax.make_array_from_single_device_arrays(self.shape, sharding, arrays)


def widest(dtypes: Set[np.dtype]) -> np.dtype:
    """Returns the narrowest float dtype that represents every value of several dtypes; layers may differ in theirs."""
    if len(dtypes) == 1:
        return next(iter(dtypes))
    return np.dtype(np.float64 if np.dtype(np.float64) in dtypes else np.float32)


class HFWeights:
    """A Hugging Face folder whose config and tensor names are checked. Weights are read only when needed."""

    def __init__(self, folder: str | Path):
        """`folder`: a local folder, a URL that fsspec opens, or a name on the Hugging Face hub, which is downloaded; or
        a local GGUF file, or a folder with one and no safetensors, which is dequantized.

        Raises one `UserError` that lists all missing, extra and duplicate tensors, and those whose shape differs from
        the config's.
        """
        self.name = str(folder)
        self.files = small_files(self.name)
        """The local folder with the config and tokenizer files; those of a GGUF file are in the file."""
        self.gguf = find_gguf(self.name)
        """The GGUF file that contains everything; None for a Hugging Face folder."""
        origin = f"{self.name}/config.json" if self.gguf is None else str(self.gguf)
        hf_config, _, wrapper = read_model_config(self.gguf or self.files / "config.json")
        self.config = ModelConfig.from_hf(hf_config, origin)
        shards, index = self._shards(hf_config)
        refuse_quantized(self.name, shards, hf_config)
        skipped: list[str] = []
        if wrapper is not None:
            text_names, skipped = keep_text_model(self.name, shards, wrapper)
            index = {text_names.get(key, key): file for key, file in index.items() if key not in skipped}
        self.renamed = remove_wrappers(self.name, shards)
        """Stored name → name without a wrapper's prefix; empty if the names are those of transformers."""
        if self.renamed:
            index = {self.renamed.get(key, key): file for key, file in index.items()}
        self.sources = locate(self.name, shards, list(tensors(self.config)), index)
        self.hf_config, dropped = hf_keys.without_quantization(hf_config, origin)
        self.warnings = [*dropped, *hf_keys.warnings_of(hf_config, self.config.family, origin)]
        """One line for each setting of config.json that this project ignores."""
        if wrapper is not None:
            line = text_model_line(wrapper, self.config.family, self.name)
            self.warnings.append(f"{line}; {len(skipped)} tensors of the vision encoder are skipped")
        if self.renamed:
            stored, key = next(iter(self.renamed.items()))
            self.warnings.append(
                f"{self.name}: {len(self.renamed)} tensor names have the prefix of a wrapper; {stored} is read as {key}"
            )

    def _shards(self, hf_config: dict[str, Any]) -> tuple[dict[str, TensorFile], dict[str, str]]:
        """Returns the weight files by name, and the index (tensor → file), which is empty for a single file."""
        if self.gguf is not None:
            keys = [tensor.key for tensor in tensors(self.config)]
            return {self.gguf.name: GGUFShard(self.gguf, hf_config, keys)}, {}
        url = self.name.rstrip("/") if "://" in self.name else str(self.files)
        names, index = _weight_files(self.files, self.name)
        return {name: Shard(f"{url}/{name}") for name in names}, index

    def sizes(self) -> dict[str, int]:
        """Returns the size of each weight file in bytes, by URL."""
        return {source.shard.url: source.shard.size for _, source in self.sources}

    def stamps(self) -> dict[str, str]:
        """Returns a stamp of each weight file, by URL, which changes if the file is replaced."""
        return {source.shard.url: source.shard.stamp for _, source in self.sources}

    def params(self, dtype: Any = None) -> "Params":
        """Returns lazy parameters. `dtype`: dtype to convert to; None: that of the files."""
        by_path: dict[tuple[str, ...], list[tuple[Tensor, Source]]] = {}
        for tensor, source in self.sources:
            by_path.setdefault(tensor.path, []).append((tensor, source))
        params: dict[str, Any] = {}
        for path, parts in by_path.items():
            node = params
            for name in path[:-1]:
                node = node.setdefault(name, {})
            node[path[-1]] = Parameter(parts, None if dtype is None else np.dtype(dtype))
        return params


def load_hf(folder: str | Path, *, dtype: Any = None) -> "tuple[dict[str, Any], Params]":
    """Reads a Hugging Face folder: its config, and its weights as numpy arrays in this project's layout.

    `dtype`: dtype to convert to; None: that of the files (bfloat16 as `ml_dtypes.bfloat16`). Raises `UserError` as
    `HFWeights`.
    """
    import jax

    opened = HFWeights(folder)
    is_leaf = lambda node: isinstance(node, Parameter)  # noqa: E731
    return opened.hf_config, jax.tree.map(np.asarray, opened.params(dtype), is_leaf=is_leaf)


def small_files(name: str) -> Path:
    """Returns a local folder with the tokenizer and config files of a folder, a URL or a model of the hub.

    A model of the hub is downloaded with its weights; the files of a URL are copied without them. A GGUF file has no
    such files: the result is its folder. Raises `UserError`.
    """
    folder = Path(name)
    if gguf := find_gguf(name):
        return gguf.parent
    if folder.is_dir():
        return folder
    if "://" in name:
        return _fetch_small_files(name)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not folder.parent.is_dir():
        from huggingface_hub import snapshot_download

        try:
            return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", *TOKENIZER_FILES]))
        except (OSError, ValueError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise UserError(
                f"{name}: no such folder, and it cannot be loaded from the Hugging Face hub ({reason}); check the name "
                "and the network"
            ) from None
    raise UserError(f"{name}: no such folder; a Hugging Face folder with config.json and safetensors is expected")


def _fetch_small_files(url: str) -> Path:
    """Copies the small files of a remote folder to a temporary one, which is removed when the process ends.

    The weight files are created empty, so that their existence can be checked.
    """
    from fsspec.core import url_to_fs

    temporary = tempfile.TemporaryDirectory(prefix="xlam-hf-")
    atexit.register(temporary.cleanup)
    folder = Path(temporary.name)
    try:
        files, path = url_to_fs(url)
        for remote in files.ls(path, detail=False):
            if not remote.endswith(".safetensors"):
                if any(fnmatch(Path(remote).name, pattern) for pattern in ("*.json", *TOKENIZER_FILES)):
                    files.get_file(remote, str(folder / Path(remote).name))
            else:
                (folder / Path(remote).name).touch()
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"{url}: can't be read ({error}); a folder that fsspec opens is expected") from None
    return folder


def _weight_files(folder: Path, name: str) -> tuple[list[str], dict[str, str]]:
    """Returns the names of the weight files, and the index (tensor → file), which is empty for a single file."""
    single, index = (folder / SINGLE).is_file(), (folder / INDEX).is_file()
    if single and index:
        raise UserError(
            f"{name}: contains both {SINGLE} and {INDEX}; transformers reads the first, and vLLM the second: remove "
            "the one that you don't need"
        )
    if single:
        return [SINGLE], {}
    if not index:
        others = sorted(
            path.name for pattern in ("*.safetensors", "*.bin", "*.pth", "*.gguf") for path in folder.glob(pattern)
        )
        contents = f"; it contains {', '.join(others[:4])}" + (", …" if len(others) > 4 else "") if others else ""
        raise UserError(
            f"{name}: contains neither {SINGLE} nor {INDEX}{contents}; download the folder again, or load and save the "
            "model with transformers to write them"
        )
    weight_map = _weight_map(folder / INDEX, f"{name}/{INDEX}")
    names = sorted(set(weight_map.values()))
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise UserError(
            f"{name}/{INDEX}: lists {len(names)} shards, of which {len(missing)} are missing: {', '.join(missing)}; "
            "download them too"
        )
    return names, weight_map


def _weight_map(path: Path, origin: str) -> dict[str, str]:
    """Reads the index of a folder with several weight files: tensor → file name. Raises `UserError`."""
    try:
        index = strict_json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{origin}: not valid JSON ({error}); download the file again") from None
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{origin}: contains no weight_map; download the file again")
    for key, file in weight_map.items():
        if not isinstance(file, str) or not re.fullmatch(r"[\w.-]+\.safetensors", file):
            raise UserError(
                f"{origin}: names {file!r} for {key}; the name of a .safetensors file in the same folder is expected"
            )
    return weight_map


def copy_tokenizer(folder: Path, to: Path) -> bool:
    """Copies a Hugging Face folder's tokenizer and chat template. Returns whether it contains a tokenizer."""
    files = {path for pattern in TOKENIZER_FILES for path in folder.glob(pattern) if path.is_file()}
    to.mkdir(parents=True, exist_ok=True)
    for path in files:
        target = to / path.relative_to(folder)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, target)
    return any(path.name.startswith("tokenizer") for path in files)
