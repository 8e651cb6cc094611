"""Orbax checkpoint → Hugging Face folder: `python -m converters.orbax_to_hf --checkpoint DIR --out DIR`."""

import argparse
import json
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from converters.folders import new_folder, refuse_existing
from converters.hf_map import Tensor, tensors
from converters.hf_to_orbax import INDEX, SINGLE
from xlam_jax.errors import UserError, run
from xlam_jax.models.config import ModelConfig

if TYPE_CHECKING:
    from xlam_jax.models.params import Params

DTYPES = ("bfloat16", "float16", "float32")
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def write_hf(
    folder: Path, hf_config: dict[str, Any], params: "Params", *, dtype: Any = None, max_shard_bytes: int = 5 * 10**9
) -> None:
    """Writes config.json, generation_config.json and safetensors into a new folder; one shard is held at a time.

    The weights keep their dtype unless `dtype` says another.
    """
    config = ModelConfig.from_hf(hf_config)
    shards = _shards(list(tensors(config)), params, dtype, max_shard_bytes)
    folder.mkdir(parents=True)
    kept = {key: value for key, value in hf_config.items() if key not in ("dtype", "torch_dtype")}
    _write_json(folder / "config.json", kept | {"dtype": str(np.dtype(dtype or params["embedding"].dtype))})
    written = []
    for name, shard in shards.items():
        written.append(_write_shard(folder / name, shard, params, dtype))
        shutil.copymode(folder / "config.json", folder / name)  # safetensors makes files that only their owner reads
    if len(shards) > 1:
        index = {
            "metadata": {"total_parameters": config.parameters(), "total_size": sum(written)},
            "weight_map": {tensor.key: name for name, shard in shards.items() for tensor in shard},
        }
        _write_json(folder / INDEX, index)
    tokens = ("bos_token_id", "eos_token_id", "pad_token_id")
    generation = {key: hf_config[key] for key in tokens if hf_config.get(key) is not None}
    _write_json(folder / "generation_config.json", {"_from_model_config": True} | generation)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _parameter(params: "Params", tensor: Tensor) -> np.ndarray:
    node = params
    for name in tensor.path:
        node = node[name]
    return node  # type: ignore[return-value]


def _shards(wanted: list[Tensor], params: "Params", dtype: Any, limit: int) -> dict[str, list[Tensor]]:
    """The tensors of each file, filled in order up to `limit` bytes; a larger tensor has a file to itself."""
    groups: list[list[Tensor]] = [[]]
    size = 0
    for tensor in wanted:
        item = np.dtype(dtype or _parameter(params, tensor).dtype).itemsize
        nbytes = int(np.prod(tensor.shape)) * item
        if groups[-1] and size + nbytes > limit:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += nbytes
    if len(groups) == 1:
        return {SINGLE: groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups, 1)}


def _write_shard(path: Path, shard: list[Tensor], params: "Params", dtype: Any) -> int:
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    values = {}
    for tensor in shard:
        value = tensor.to_hf(_parameter(params, tensor))
        values[tensor.key] = value if dtype is None else value.astype(dtype)
    try:
        save_file(values, path, metadata={"format": "pt"})
    except SafetensorError as error:  # how the package tells of a full disk
        raise OSError(str(error)) from error
    return sum(value.nbytes for value in values.values())


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]B)", text.strip(), re.IGNORECASE)
    if not match or not float(match[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write it like 5GB or 500MB")
    return int(float(match[1]) * UNITS[match[2].upper()])


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m converters.orbax_to_hf", description="Exports a checkpoint to a Hugging Face folder."
    )
    parser.add_argument("--checkpoint", type=Path, required=True, help="run folder (its newest step) or step folder")
    parser.add_argument("--out", type=Path, required=True, help="folder to make; it must not exist")
    parser.add_argument("--dtype", choices=DTYPES, help="dtype to write (default: as the checkpoint holds it)")
    parser.add_argument("--max-shard-size", type=_bytes, default="5GB", help="largest file, like 500MB (default: 5GB)")
    parser.add_argument(
        "--lora",
        choices=("merge", "adapter"),
        help="of a run with adapters: a whole model with them added (the default), or a PEFT folder of them alone",
    )
    args = parser.parse_args()
    refuse_existing(args.out)

    import ml_dtypes

    from converters.peft import write_peft
    from xlam_jax.training import checkpoint, weights

    step = checkpoint.resolve(args.checkpoint)
    with_adapters = weights.saved_run(step)
    if args.lora and with_adapters is None:
        raise UserError(f"{step}: holds a whole model without adapters; leave --lora {args.lora} out")
    if args.lora == "adapter" and with_adapters is not None:
        with new_folder(args.out) as part:
            base = with_adapters.config.model.init_from
            write_peft(part, with_adapters.model, checkpoint.load_params(step), base)
        print(f"{args.out}: the adapters of step {step.name} of {args.checkpoint}, for {base or 'a random base'}")
        return
    hf_config = checkpoint.load_hf_config(step)
    params = weights.load_whole(step)
    dtype = None if args.dtype is None else np.dtype(getattr(ml_dtypes, args.dtype, args.dtype))
    tokenizer = checkpoint.tokenizer_dir(step)
    with new_folder(args.out) as part:
        write_hf(part, hf_config, params, dtype=dtype, max_shard_bytes=args.max_shard_size)
        if tokenizer is not None:
            shutil.copytree(tokenizer, part, dirs_exist_ok=True)
    print(f"{args.out}: step {step.name} of {args.checkpoint}" + ("" if tokenizer else ", without a tokenizer"))


if __name__ == "__main__":
    run(main)
