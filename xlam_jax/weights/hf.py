"""Hugging Face folders: their weights, read layer by layer, their tokenizer and the files next to them."""

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
from xlam_jax.models import hf_keys
from xlam_jax.models.config import ModelConfig, read_hf_config
from xlam_jax.weights.hf_map import Tensor, tensors
from xlam_jax.weights.locate import INDEX, Source, locate, refuse_quantized, remove_wrappers
from xlam_jax.weights.shards import Shard

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
    "additional_chat_templates/*.jinja",  # of a tokenizer with several
)


class Parameter:
    """One of our parameters in a Hugging Face folder: its layers are read when they are asked for."""

    def __init__(self, parts: list[tuple[Tensor, "Source"]], dtype: np.dtype | None = None):
        self._parts = {tensor.at: (tensor, source) for tensor, source in parts}
        tensor, _ = parts[0]
        self.shape = tensor.stacked_shape
        self.stored = widest({source.dtype for _, source in parts})
        self.dtype = dtype or self.stored
        self.size = prod(self.shape)
        self.ndim = len(self.shape)

    def astype(self, dtype: Any) -> "Parameter":
        """The same, its layers converted when they are read."""
        return Parameter(list(self._parts.values()), np.dtype(dtype))

    def __getitem__(self, at: tuple[int, ...]) -> np.ndarray:
        """The slice at an index along the leading axes: layer, then expert."""
        tensor, source = self._parts[at]
        return tensor.from_hf(source.read()).astype(self.dtype, copy=False)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """All of it."""
        whole = np.empty(self.shape, dtype or self.dtype)
        for at in self._parts:
            whole[at] = self[at]
        return whole

    def placed(self, sharding: Any) -> "jax.Array":
        """Laid out over the devices. Each host reads every layer once, and holds only what belongs to its devices."""
        import jax

        indices = sharding.addressable_devices_indices_map(self.shape)
        sizes = [tuple(one.indices(size)[:2] for one, size in zip(index, self.shape, strict=True))
                 for index in indices.values()]  # fmt: skip
        held = {bounds: np.empty([stop - start for start, stop in bounds], self.dtype) for bounds in sizes}
        for at in self._parts:
            lead = len(at)
            wanted = [
                bounds for bounds in held if all(lo <= i < hi for i, (lo, hi) in zip(at, bounds[:lead], strict=True))
            ]
            if wanted:
                layer = self[at]
                for bounds in wanted:
                    inside = tuple(i - lo for i, (lo, _) in zip(at, bounds[:lead], strict=True))
                    held[bounds][inside] = layer[tuple(slice(lo, hi) for lo, hi in bounds[lead:])]
        arrays = [jax.device_put(held[bounds], device) for bounds, device in zip(sizes, indices, strict=True)]
        return jax.make_array_from_single_device_arrays(self.shape, sharding, arrays)


def widest(dtypes: Set[np.dtype]) -> np.dtype:
    """The narrowest dtype that holds every value of several dtypes: layers may be stored in different ones."""
    if len(dtypes) == 1:
        return next(iter(dtypes))
    return np.dtype(np.float64 if np.dtype(np.float64) in dtypes else np.float32)


class HFWeights:
    """A Hugging Face folder, checked; of its weights only what is asked for is read."""

    def __init__(self, folder: str | Path):
        """`folder` may be anything that fsspec opens, or a name on the Hugging Face hub, which is downloaded.

        Raises one `UserError` that names everything that is missing, extra, twice there, or of another shape than the
        config says.
        """
        self.name = str(folder)
        self.files = small_files(self.name)
        self._url = self.name.rstrip("/") if "://" in self.name else str(self.files)
        origin = f"{self.name}/config.json"
        hf_config = read_hf_config(self.files / "config.json")
        self.config = ModelConfig.from_hf(hf_config, origin)
        names, index = _weight_files(self.files, self.name)
        shards = {name: Shard(f"{self._url}/{name}") for name in names}
        refuse_quantized(self.name, shards, hf_config)
        self.renamed = remove_wrappers(self.name, shards)
        """What was removed from the names of tensors; empty where they are those of transformers."""
        if self.renamed:
            index = {self.renamed.get(key, key): file for key, file in index.items()}
        self.sources = locate(self.name, shards, list(tensors(self.config)), index)
        self.hf_config, dropped = hf_keys.without_quantization(hf_config, origin)
        self.warnings = [*dropped, *hf_keys.warnings_of(hf_config, self.config.family, origin)]
        """What config.json asks for and this project does not do, a line each."""
        if self.renamed:
            stored, key = next(iter(self.renamed.items()))
            self.warnings.append(f"{self.name}: {len(self.renamed)} tensors have names of a wrapper; {stored} is {key}")

    def sizes(self) -> dict[str, int]:
        """Bytes of each file with weights."""
        return {where.shard.url: where.shard.size for _, where in self.sources}

    def stamps(self) -> dict[str, str]:
        """What tells each file with weights from another of its name."""
        return {where.shard.url: where.shard.stamp for _, where in self.sources}

    def params(self, dtype: Any = None) -> "Params":
        """The parameters, none of them read yet, in the dtype of the file unless `dtype` says another."""
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
    """Reads a Hugging Face folder: its config, and its weights as numpy arrays in our layout (`HFWeights`).

    The weights keep the dtype of the file (bfloat16 as `ml_dtypes.bfloat16`) unless `dtype` says another.
    """
    import jax

    opened = HFWeights(folder)
    leaf = lambda node: isinstance(node, Parameter)  # noqa: E731
    return opened.hf_config, jax.tree.map(np.asarray, opened.params(dtype), is_leaf=leaf)


def small_files(name: str) -> Path:
    """A local folder with all but the weights (and with those, where there is no other)."""
    folder = Path(name)
    if folder.is_dir():
        return folder
    if "://" in name:
        return _fetched(name)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not folder.parent.is_dir():
        from huggingface_hub import snapshot_download

        try:
            return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", *TOKENIZER_FILES]))
        except (OSError, ValueError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise UserError(f"{name}: no such folder, and not to be had from the Hugging Face hub ({reason})") from None
    raise UserError(f"{name}: no such folder; a Hugging Face folder with config.json and safetensors is expected")


def _fetched(url: str) -> Path:
    """A local copy of the small files of a remote folder, for as long as this process runs."""
    from fsspec.core import url_to_fs

    held = tempfile.TemporaryDirectory(prefix="xlam-hf-")
    atexit.register(held.cleanup)
    folder = Path(held.name)
    try:
        files, path = url_to_fs(url)
        for found in files.ls(path, detail=False):
            if not found.endswith(".safetensors"):
                if any(fnmatch(Path(found).name, pattern) for pattern in ("*.json", *TOKENIZER_FILES)):
                    files.get_file(found, str(folder / Path(found).name))
            else:
                (folder / Path(found).name).touch()  # that it is there
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"{url}: can't be read ({error}); a folder that fsspec opens is expected") from None
    return folder


def _weight_files(folder: Path, name: str) -> tuple[list[str], dict[str, str]]:
    """The files with weights, and which of them the index names for each tensor: {} where one file has all."""
    single, index = (folder / SINGLE).is_file(), (folder / INDEX).is_file()
    if single and index:
        raise UserError(
            f"{name}: both {SINGLE} and {INDEX} are there; transformers reads the first and vLLM the second: remove "
            "the one that is not meant"
        )
    if single:
        return [SINGLE], {}
    if not index:
        others = sorted(path.name for pattern in ("*.safetensors", "*.bin", "*.pth") for path in folder.glob(pattern))
        found = f"; it holds {', '.join(others[:4])}" + (", …" if len(others) > 4 else "") if others else ""
        raise UserError(
            f"{name}: neither {SINGLE} nor {INDEX} is there{found}; download the folder again, or load and save the "
            "model with transformers to get them"
        )
    weight_map = _weight_map(folder / INDEX, f"{name}/{INDEX}")
    names = sorted(set(weight_map.values()))
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise UserError(
            f"{name}/{INDEX}: names {len(names)} shards, of which {len(missing)} are not there: {', '.join(missing)}; "
            "download them too"
        )
    return names, weight_map


def _weight_map(path: Path, origin: str) -> dict[str, str]:
    """The index of a folder with several files: tensor → name of a file next to it."""
    try:
        index = strict_json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{origin}: not valid JSON ({error}); download the file again") from None
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{origin}: no weight_map in it; download the file again")
    for key, file in weight_map.items():
        if not isinstance(file, str) or not re.fullmatch(r"[\w.-]+\.safetensors", file):
            raise UserError(
                f"{origin}: names {file!r} for {key}; the name of a .safetensors file in the same folder is expected"
            )
    return weight_map


def copy_tokenizer(folder: Path, to: Path) -> bool:
    """Copies a Hugging Face folder's tokenizer and chat template; returns whether there is one."""
    files = {path for pattern in TOKENIZER_FILES for path in folder.glob(pattern) if path.is_file()}
    to.mkdir(parents=True, exist_ok=True)
    for path in files:
        target = to / path.relative_to(folder)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, target)
    return any(path.name.startswith("tokenizer") for path in files)
