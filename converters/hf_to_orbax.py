"""Hugging Face weights → Orbax: `python -m converters.hf_to_orbax --hf DIR --out DIR`."""

import atexit
import re
import shutil
import sys
import tempfile
from collections.abc import Iterable, Mapping, Set
from fnmatch import fnmatch
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from converters.hf_map import EMBEDDING, HEAD, Tensor, parameter, tensors
from converters.shards import DTYPES, Shard, ahead
from converters.work import add_arguments, check_finite, compare, dtype_of
from xlam_jax import strict_json
from xlam_jax.cli import Parser, run
from xlam_jax.errors import UserError
from xlam_jax.models import hf_keys
from xlam_jax.models.config import ModelConfig, read_hf_config
from xlam_jax.models.generation_config import copy_generation_config
from xlam_jax.outputs import ResumableFolder, refuse_address, refuse_existing, resumable_folder
from xlam_jax.progress import BYTES, Throughput

if TYPE_CHECKING:
    import jax

    from xlam_jax.models.params import Params

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

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


class Source(NamedTuple):
    """Where a tensor stands."""

    shard: Shard
    key: str
    part: tuple[int, tuple[int, ...]] | None = None
    """Of that tensor only these elements, (how many stand before, shape)."""

    @property
    def dtype(self) -> np.dtype:
        """As it is stored."""
        return DTYPES[self.shard.tensors[self.key].dtype]

    def read(self) -> np.ndarray:
        """The values, as they stand there."""
        return self.shard.read(self.key, self.part)


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
        self.sources = _locate(self.name, shards, list(tensors(self.config)), index)
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


QUANTIZED = re.compile(
    r"\.(qweight|qzeros|g_idx|scales|weight_packed|weight_scale(_inv|_2)?|weight_zero_point|(input|output|[qkv])_scale"
    r"|weight\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\..+)|SCB|W_q|codes|codebooks)$"
)
"""Tensors that only quantized weights have: of GPTQ, AWQ, compressed-tensors, FP8, bitsandbytes, HQQ and AQLM."""


def quantized_tensor(shards: Mapping[str, Shard]) -> str | None:
    """The name and dtype of a tensor by which weights are known to be quantized; None for plain ones."""
    for shard in shards.values():
        for key, stored in shard.tensors.items():
            if QUANTIZED.search(key) or (stored.dtype not in DTYPES and not key.endswith(BUFFER)):
                return f"{key} is {stored.dtype}"
    return None


def refuse_quantized(folder: str, shards: Mapping[str, Shard], hf_config: Mapping[str, Any]) -> None:
    """Raises `UserError` for quantized weights."""
    tensor, method = quantized_tensor(shards), hf_keys.quantization_method(hf_config)
    if tensor:
        named = f" (config.json: quantization {method})" if method else ""
        raise UserError(
            f"{folder}: {tensor}; quantized weights are not read{named}. Use the model's unquantized weights, in "
            "bfloat16, float16 or float32; train.trainable: qlora quantizes them itself"
        )


WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
"""What torch.compile, FSDP and activation checkpointing add to the names of the modules that they wrap."""
PREFIXES = ("base_model.model.", "module.", "model.")
"""What PEFT, data parallelism and training frameworks put before every name."""
ADAPTER = re.compile(r"\.(lora_[AB]|lora_embedding_[AB]|base_layer|lora_magnitude_vector)\b")


def remove_wrappers(folder: str, shards: Mapping[str, Shard]) -> dict[str, str]:
    """Gives tensors that were saved from a wrapped model the names of transformers; returns stored name → name of the
    tensors that were renamed. Raises `UserError` where two would have one name, and for unmerged adapters."""
    stored = [key for shard in shards.values() for key in shard.tensors]
    if adapter := next((key for key in stored if ADAPTER.search(key)), None):
        raise UserError(
            f"{folder}: {adapter} belongs to an adapter that is not merged into the weights; save the model with "
            "peft's merge_and_unload, or give the base's folder as model.init_from and the adapter's as lora.init_from"
        )
    names = {key: WRAPPERS.sub("", key) for key in stored}
    while EMBEDDING_KEY not in names.values():
        shared = (
            one for one in PREFIXES if f"{one}{EMBEDDING_KEY}" in names.values() or _is_below(one, names.values())
        )
        prefix = next((one for one in shared if all(name.startswith(one) for name in names.values())), None)
        if prefix is None:
            break
        names = {key: name.removeprefix(prefix) for key, name in names.items()}
    renamed = {key: name for key, name in names.items() if key != name}
    origins: dict[str, str] = {}
    for key, name in names.items():
        if name in origins and renamed:
            raise UserError(
                f"{folder}: {origins[name]} and {key} are both {name} without the names of wrappers; remove one of them"
            )
        origins[name] = key
    for shard in shards.values() if renamed else ():
        shard.tensors = {names[key]: tensor for key, tensor in shard.tensors.items()}
    return renamed


def _is_below(prefix: str, names: Iterable[str]) -> bool:
    """Whether the embedding is stored under this prefix and further ones."""
    return any(name.startswith(prefix) and name.endswith(f".{EMBEDDING_KEY}") for name in names)


FUSED = {"w1": ("gate_up_proj", 0), "w3": ("gate_up_proj", 1), "w2": ("down_proj", 0)}
"""Where all experts of a layer are kept in two tensors, [expert, gate then up, model] and [expert, model, MLP]: which
holds a weight, and in which half."""


def _fused(tensor: Tensor, config_experts: int, shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, Any] | None:
    """The fused tensor that holds an expert's weight, and where in it; None where there is none."""
    found = re.fullmatch(r"(model\.layers\.\d+\.)block_sparse_moe\.experts\.(\d+)\.(w[123])\.weight", tensor.key)
    if not found or not config_experts:
        return None
    which, half = FUSED[found[3]]
    rows, columns = tensor.shape
    for key in (f"{found[1]}{block}.experts.{which}" for block in ("mlp", "block_sparse_moe")):
        both = 2 if which == "gate_up_proj" else 1
        if shapes.get(key) == (config_experts, both * rows, columns):
            return key, ((int(found[2]) * both + half) * rows * columns, tensor.shape)
    return None


HEAD_KEY, EMBEDDING_KEY = HEAD[0][2], EMBEDDING[0][2]
BUFFER = "rotary_emb.inv_freq"
"""A buffer that transformers before 4.32 saved."""
ROWS = 2**24
"""Values of the head and the embedding that are compared at a time."""


def _is_copy_of_embedding(shards: Mapping[str, Shard], found: Mapping[str, list[str]]) -> bool:
    """Whether the head of a tied model, which some tools save too, equals the embedding value by value."""
    (head_file, *_), (embedding_file, *_) = found[HEAD_KEY], found[EMBEDDING_KEY]
    head, embedding = shards[head_file].tensors[HEAD_KEY], shards[embedding_file].tensors[EMBEDDING_KEY]
    if head.shape != embedding.shape:
        return False
    size = prod(head.shape)
    for first in range(0, size, ROWS):
        part = first, (min(ROWS, size - first),)
        if not np.array_equal(
            shards[head_file].read(HEAD_KEY, part), shards[embedding_file].read(EMBEDDING_KEY, part), equal_nan=False
        ):
            return False
    return True


def _locate(
    folder: str, files: "dict[str, Shard]", wanted: list[Tensor], index: Mapping[str, str]
) -> list[tuple[Tensor, Source]]:
    """Where each tensor is stored; everything that is wrong is reported at once."""
    found: dict[str, list[str]] = {}
    for name, file in files.items():
        for key in file.tensors:
            if not key.endswith(BUFFER):
                found.setdefault(key, []).append(name)
    if HEAD_KEY in found and EMBEDDING_KEY in found and all(tensor.key != HEAD_KEY for tensor in wanted):
        if not _is_copy_of_embedding(files, found):
            raise UserError(
                f"{folder}: tie_word_embeddings is true in config.json, and {HEAD_KEY} in {found[HEAD_KEY][0]} is not "
                f"equal to {EMBEDDING_KEY}; set tie_word_embeddings to false to read both, or remove the first"
            )
        del found[HEAD_KEY]
    shapes = {key: files[names[0]].tensors[key].shape for key, names in found.items()}
    experts = 1 + max((tensor.at[1] for tensor in wanted if len(tensor.at) > 1), default=-1)
    places: dict[str, tuple[str, Any]] = {}
    for tensor in wanted:
        other = _other_name(tensor.key)
        key = tensor.key if tensor.key in found or other not in found else other
        places[tensor.key] = (_fused(tensor, experts, shapes) if key not in found else None) or (key, None)
    used = {key for key, _ in places.values()}
    wrong = [f"{key} is missing" for key in sorted(used - found.keys())]
    wrong += [f"{key} in {found[key][0]} is not part of this model" for key in sorted(found.keys() - used)]
    wrong += [f"{key} is in {' and in '.join(names)}" for key, names in sorted(found.items()) if len(names) > 1]
    for key in sorted(used & found.keys()) if index else ():
        if len(found[key]) == 1 and index.get(key) != found[key][0]:
            wrong.append(f"{key} is in {found[key][0]}, and {INDEX} names {index.get(key, 'no file')} for it")
    absent = index.keys() - used - {key for file in files.values() for key in file.tensors}
    wrong += [f"{key} is not in {index[key]}, which {INDEX} names for it" for key in sorted(absent)]
    for tensor in wanted:
        key, part = places[tensor.key]
        if key in found:
            stored = files[found[key][0]].tensors[key]
            if part is None and stored.shape != tensor.shape:
                wrong.append(f"{key} has shape {stored.shape}, config.json means {tensor.shape}")
    if wrong:
        shown = "\n  ".join(wrong[:20]) + (f"\n  … and {len(wrong) - 20} more" if len(wrong) > 20 else "")
        raise UserError(
            f"{folder}: the weights do not fit config.json, {len(wrong)} tensor(s) differ:\n  {shown}\n"
            "config.json and the safetensors files must come from the same model; download the folder again"
        )
    return [
        (tensor, Source(files[found[key][0]], key, part)) for tensor in wanted for key, part in [places[tensor.key]]
    ]


def _other_name(key: str) -> str:
    """The router's, beside fused experts."""
    return key.replace(".block_sparse_moe.gate.", ".mlp.gate.")


def copy_tokenizer(folder: Path, to: Path) -> bool:
    """Copies a Hugging Face folder's tokenizer and chat template; returns whether there is one."""
    files = {path for pattern in TOKENIZER_FILES for path in folder.glob(pattern) if path.is_file()}
    to.mkdir(parents=True, exist_ok=True)
    for path in files:
        target = to / path.relative_to(folder)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, target)
    return any(path.name.startswith("tokenizer") for path in files)


def main() -> None:
    """The command line."""
    parser = Parser(
        prog="python -m converters.hf_to_orbax", description="Converts a Hugging Face folder to an Orbax checkpoint."
    )
    parser.add_argument(
        "--hf",
        required=True,
        help="folder with config.json and safetensors, an address that fsspec opens, or a hub name",
    )
    parser.add_argument("--out", required=True, help="folder to make; it must not exist")
    add_arguments(parser)
    args = parser.parse_args()
    refuse_address(args.out)
    refuse_existing(Path(args.out))
    opened = HFWeights(args.hf)
    for line in opened.warnings:
        print(f"warning: {line}", file=sys.stderr)

    dtype = dtype_of(args.dtype)
    source = {"hf": opened.name, "dtype": args.dtype, "files": opened.stamps()}
    with resumable_folder(Path(args.out), source) as work:
        _convert(opened, dtype, work, args.workers)
        if args.verify:
            _verify(opened, dtype, work.folder, args.workers)
    print(f"{args.out}: {opened.hf_config['architectures'][0]} with {opened.config.parameters():,} parameters")


def _convert(opened: HFWeights, dtype: np.dtype | None, work: ResumableFolder, workers: int) -> None:
    from xlam_jax.training.checkpoint import TOKENIZER, NewModel, write_hf_config

    params = opened.params(dtype)
    leading = {tensor.path: len(tensor.at) for tensor, _ in opened.sources}
    copy_tokenizer(opened.files, work.folder / TOKENIZER)
    copy_generation_config(opened.files, work.folder)
    write_hf_config(work.folder, opened.hf_config)
    model = NewModel(work.folder, params, leading.__getitem__)
    for path in leading:
        model.open(path)

    def move(item: tuple[Tensor, Source]) -> None:
        tensor, where = item
        value = tensor.from_hf(where.read()).astype(parameter(params, tensor.path).dtype, copy=False)
        check_finite(opened.name, tensor.key, value)
        model.write(tensor.path, tensor.at, value)

    sizes = {
        tensor.key: prod(tensor.shape) * parameter(params, tensor.path).dtype.itemsize for tensor, _ in opened.sources
    }
    left = [pair for pair in opened.sources if pair[0].key not in work.done]
    with Throughput("converting", sum(sizes.values()), unit=BYTES) as progress:
        progress.skip(sum(sizes[key] for key in work.done))
        for (tensor, _), _ in ahead(move, left, workers):
            work.finish(tensor.key)
            progress.add(sizes[tensor.key])


def _verify(opened: HFWeights, dtype: np.dtype | None, folder: Path, workers: int) -> None:
    """Raises `UserError` naming the tensors that can't be got back from a converted folder bit for bit, and where a
    small model's logits differ."""
    from converters.logits import compare_logits
    from xlam_jax.training.checkpoint import STEPS, open_params

    params = open_params(folder / STEPS / "0")

    def same(item: tuple[Tensor, Source]) -> bool:
        tensor, where = item
        kept = parameter(params, tensor.path)
        return where.read().astype(kept.dtype, copy=False).tobytes() == tensor.to_hf(kept).tobytes()

    compare(opened.name, same, opened.sources, workers)
    if "://" not in opened.name and dtype is None:
        compare_logits(opened.files, opened.hf_config, params, folder)


if __name__ == "__main__":
    run(main)
