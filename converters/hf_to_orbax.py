"""Hugging Face weights → Orbax: `python -m converters.hf_to_orbax --hf DIR --out DIR`."""

import argparse
import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from converters.folders import new_folder, refuse_existing
from converters.hf_map import Tensor, tensors
from xlam_jax.errors import UserError, run
from xlam_jax.models.config import ModelConfig, read_hf_config

if TYPE_CHECKING:
    from xlam_jax.models.params import Params

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
FLOATS = {"F32", "BF16", "F16", "F64"}

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.*",
)


def load_hf(folder: Path, *, dtype: Any = None) -> "tuple[dict[str, Any], Params]":
    """Reads a Hugging Face folder: its config, and its weights as numpy arrays in our layout.

    The weights keep the dtype of the file (bfloat16 as `ml_dtypes.bfloat16`) unless `dtype` says another. Files are
    mapped into memory and read tensor by tensor. Raises one `UserError` that names everything that is missing, extra,
    twice there, or of another shape than the config says.
    """
    with _opened(folder) as (hf_config, where):
        params: Params = {}
        for tensor, file in where:
            value = file.get_tensor(tensor.key)
            node = params
            for name in tensor.path[:-1]:
                node = node.setdefault(name, {})
            if tensor.path[-1] not in node:
                node[tensor.path[-1]] = np.empty(tensor.stacked_shape, dtype or value.dtype)
            node[tensor.path[-1]][tensor.at] = tensor.from_hf(value)
    return hf_config, params


def check_hf(folder: Path) -> ModelConfig:
    """Checks a Hugging Face folder as `load_hf` does, without reading the weights, and returns what model it holds."""
    with _opened(folder) as (hf_config, _):
        return ModelConfig.from_hf(hf_config)


@contextmanager
def _opened(folder: Path) -> Iterator[tuple[dict[str, Any], list[tuple[Tensor, Any]]]]:
    """Gives the config, and each tensor with the open file that holds it."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; a Hugging Face folder with config.json and safetensors is expected")
    hf_config = read_hf_config(folder / "config.json")
    config = ModelConfig.from_hf(hf_config, str(folder / "config.json"))
    with ExitStack() as open_files:
        files = {name: open_files.enter_context(_open(folder / name)) for name in _weight_files(folder)}
        yield hf_config, _locate(folder, files, list(tensors(config)))


def _weight_files(folder: Path) -> list[str]:
    if (folder / SINGLE).is_file():
        return [SINGLE]
    index = folder / INDEX
    if not index.is_file():
        others = sorted(path.name for pattern in ("*.safetensors", "*.bin", "*.pth") for path in folder.glob(pattern))
        found = f"; it holds {', '.join(others[:4])}" + (", …" if len(others) > 4 else "") if others else ""
        raise UserError(
            f"{folder}: neither {SINGLE} nor {INDEX} is there{found}; download the folder again, or load and save the "
            "model with transformers to get them"
        )
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(weight_map.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index}: no weight_map in it ({error!r}); download the file again") from None
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise UserError(
            f"{index}: names {len(names)} shards, of which {len(missing)} are not there: {', '.join(missing)}; "
            "download them too"
        )
    return names


def _open(path: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="np")
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path}: truncated or damaged, {path.stat().st_size} bytes ({error}); download this file again"
        ) from None


def _locate(folder: Path, files: dict[str, Any], wanted: list[Tensor]) -> list[tuple[Tensor, Any]]:
    """The file of each tensor; everything that is wrong is told at once."""
    found: dict[str, list[str]] = {}
    for name, file in files.items():
        for key in file.keys():  # noqa: SIM118 (safe_open has no iterator)
            if not key.endswith("rotary_emb.inv_freq"):  # a buffer that transformers before 4.32 saved
                found.setdefault(key, []).append(name)
    keys = {tensor.key for tensor in wanted}
    wrong = [f"{key} is missing" for key in sorted(keys - found.keys())]
    wrong += [f"{key} in {found[key][0]} is not part of this model" for key in sorted(found.keys() - keys)]
    wrong += [f"{key} is in {' and in '.join(names)}" for key, names in sorted(found.items()) if len(names) > 1]
    dtypes: dict[tuple[str, ...], Counter[str]] = {}
    for tensor in wanted:
        if tensor.key in found:
            stored = files[found[tensor.key][0]].get_slice(tensor.key)
            dtypes.setdefault(tensor.path, Counter())[stored.get_dtype()] += 1
            if tuple(stored.get_shape()) != tensor.shape:
                wrong.append(f"{tensor.key} has shape {tuple(stored.get_shape())}, config.json means {tensor.shape}")
            if stored.get_dtype() not in FLOATS:
                wrong.append(f"{tensor.key} is {stored.get_dtype()}; quantized weights are not read")
    wrong += [
        f"{path[-1]} of the layers comes in {' and '.join(sorted(kinds))}; one dtype is needed"
        for path, kinds in dtypes.items()
        if len(kinds) > 1
    ]
    if wrong:
        shown = "\n  ".join(wrong[:20]) + (f"\n  … and {len(wrong) - 20} more" if len(wrong) > 20 else "")
        raise UserError(
            f"{folder}: the weights do not fit config.json, {len(wrong)} tensor(s) differ:\n  {shown}\n"
            "config.json and the safetensors files must come from the same model; download the folder again"
        )
    return [(tensor, files[found[tensor.key][0]]) for tensor in wanted]


def copy_tokenizer(folder: Path, to: Path) -> bool:
    """Copies a Hugging Face folder's tokenizer and chat template; returns whether there is one."""
    files = {path for pattern in TOKENIZER_FILES for path in folder.glob(pattern) if path.is_file()}
    to.mkdir(parents=True, exist_ok=True)
    for path in files:
        shutil.copyfile(path, to / path.name)
    return any(path.name.startswith("tokenizer") for path in files)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m converters.hf_to_orbax", description="Converts a Hugging Face folder to an Orbax checkpoint."
    )
    parser.add_argument("--hf", type=Path, required=True, help="folder with config.json and safetensors")
    parser.add_argument("--out", type=Path, required=True, help="folder to make; it must not exist")
    args = parser.parse_args()
    refuse_existing(args.out)
    hf_config, params = load_hf(args.hf)

    from xlam_jax.training.checkpoint import write_model

    with new_folder(args.out) as part, tempfile.TemporaryDirectory() as scratch:
        tokenizer = Path(scratch) / "tokenizer"
        write_model(part, params, hf_config, tokenizer if copy_tokenizer(args.hf, tokenizer) else None)
    print(f"{args.out}: {hf_config['architectures'][0]} with {_count(params):,} parameters")


def _count(params: Any) -> int:
    return sum(_count(node) for node in params.values()) if isinstance(params, dict) else params.size


if __name__ == "__main__":
    run(main)
