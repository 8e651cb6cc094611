"""Exports a checkpoint to a Hugging Face folder: `python -m converters.orbax_to_hf --checkpoint DIR --out DIR`."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from converters.arguments import add_arguments, parse_size
from xlam_jax.cli import Parser, run
from xlam_jax.errors import UserError
from xlam_jax.models import hf_keys
from xlam_jax.models.config import ModelConfig
from xlam_jax.models.generation_config import GENERATION_CONFIG, align, derived
from xlam_jax.outputs import ResumableFolder, new_folder, output, refuse_address, refuse_existing
from xlam_jax.progress import BYTES, Throughput
from xlam_jax.weights.hf import SINGLE
from xlam_jax.weights.hf_map import Tensor, parameter, tensors
from xlam_jax.weights.locate import INDEX
from xlam_jax.weights.shards import Shard, TensorSpec, make_header, map_ordered
from xlam_jax.weights.transfer import check_finite, check_tensors, parse_dtype

if TYPE_CHECKING:
    from xlam_jax.config import Resolved
    from xlam_jax.models.params import Params


def write_hf(
    work: ResumableFolder,
    hf_config: dict[str, Any],
    params: "Params",
    *,
    generation: dict[str, Any],
    of: str,
    dtype: Any = None,
    max_shard_bytes: int = 5 * 10**9,
    workers: int = 1,
) -> dict[str, list[Tensor]]:
    """Writes config.json, generation_config.json and safetensors. Returns the tensors of each safetensors file.

    `params`: arrays, or lazy arrays that are read layer by layer, so that only a few tensors are in memory. `of`: the
    source, for messages. `dtype`: None keeps that of the weights. `max_shard_bytes`: maximum size of a file. Raises
    `UserError` for NaN and infinity.
    """
    config = ModelConfig.from_hf(hf_config)
    hf_config, dropped = hf_keys.without_quantization({"model_type": config.family} | hf_config, f"config.json of {of}")
    for line in dropped:
        print(f"warning: {line}", file=sys.stderr)

    def spec(tensor: Tensor) -> TensorSpec:
        return TensorSpec(tensor.key, np.dtype(dtype or parameter(params, tensor.path).dtype), tensor.shape)

    def value(tensor: Tensor) -> np.ndarray:
        array = tensor.to_hf(parameter(params, tensor.path))
        if dtype is not None:
            with np.errstate(over="ignore"):  # check_finite reports it
                array = array.astype(dtype)
        check_finite(of, tensor.key, array)
        return array

    shards = _shards(list(tensors(config)), spec, max_shard_bytes)
    written_config = {key: value for key, value in hf_config.items() if key not in ("dtype", "torch_dtype")}
    written_config |= {"hidden_act": "silu"} if written_config.get("hidden_act") in hf_keys.SILU else {}
    written_dtype = str(np.dtype(dtype or params["embedding"].dtype))
    sizes = {name: [spec(tensor).bytes for tensor in shard] for name, shard in shards.items()}
    total = sum(sum(tensor_sizes) for tensor_sizes in sizes.values())
    with Throughput("exporting", total, unit=BYTES) as progress:
        progress.skip(sum(sum(sizes[name]) for name in shards if name in work.done))
        for name in (name for name in shards if name not in work.done):
            with work.create(name) as file:
                file.write(make_header(spec(tensor) for tensor in shards[name]))
                for tensor, array in map_ordered(value, shards[name], workers):
                    file.write(array.reshape(-1).view(np.uint8).data)
                    progress.add(spec(tensor).bytes)
            work.finish(name)
    if len(shards) > 1:
        index = {
            "metadata": {"total_parameters": config.parameters(), "total_size": total},
            "weight_map": {tensor.key: name for name, shard in shards.items() for tensor in shard},
        }
        _write_json(work.folder / INDEX, index)
    _write_json(work.folder / GENERATION_CONFIG, generation)
    _write_json(work.folder / "config.json", written_config | {"dtype": written_dtype})
    return shards


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _shards(wanted: list[Tensor], spec: Callable[[Tensor], TensorSpec], limit: int) -> dict[str, list[Tensor]]:
    """Distributes tensors in order over files of at most `limit` bytes. A larger tensor gets its own file."""
    groups: list[list[Tensor]] = [[]]
    size = 0
    for tensor in wanted:
        nbytes = spec(tensor).bytes
        if groups[-1] and size + nbytes > limit:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += nbytes
    if len(groups) == 1:
        return {SINGLE: groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups, 1)}


def main() -> None:
    """The command line."""
    parser = Parser(
        prog="python -m converters.orbax_to_hf", description="Export a checkpoint to a Hugging Face folder."
    )
    parser.add_argument("--checkpoint", type=Path, required=True, help="run folder (its newest step) or step folder")
    parser.add_argument("--out", required=True, help="folder to write, or a URL that fsspec opens; it must not exist")
    parser.add_argument(
        "--max-shard-size", type=parse_size, default="5GB", help="maximum file size, such as 500MB (default: 5GB)"
    )
    add_arguments(parser)
    parser.add_argument(
        "--lora",
        choices=("merge", "adapter"),
        help="for a run with adapters: merge them into the base (the default), or write only a PEFT folder",
    )
    args = parser.parse_args()
    if "://" not in args.out:
        refuse_existing(Path(args.out))

    from xlam_jax.weights import checkpoint
    from xlam_jax.weights import run as weights
    from xlam_jax.weights.logits import compare_logits

    step = checkpoint.resolve(args.checkpoint)
    tokenizer = checkpoint.tokenizer_dir(step)
    adapter_run = weights.saved_run(step)
    if args.lora and adapter_run is None:
        raise UserError(f"{step}: contains a whole model without adapters; remove --lora {args.lora}")
    hf_config, generation, changes = _trained_end_tokens(step, tokenizer)
    if args.lora == "adapter" and adapter_run is not None:
        refuse_address(args.out)
        base = _export_adapters(Path(args.out), step, adapter_run, tokenizer, generation, changes)
        print(f"{args.out}: the adapters of step {step.name} of {args.checkpoint}, for {base or 'a random base'}")
        return
    if changes:
        print(changes)
    params = weights.open_whole(step)
    dtype = parse_dtype(args.dtype)
    source = {"checkpoint": checkpoint.stamp(step), "dtype": args.dtype, "max_shard_size": args.max_shard_size}
    with output(args.out, source) as work:
        if tokenizer is not None:
            shutil.copytree(tokenizer, work.folder, dirs_exist_ok=True)
        shards = write_hf(
            work,
            hf_config,
            params,
            generation=generation,
            of=str(step),
            dtype=dtype,
            max_shard_bytes=args.max_shard_size,
            workers=args.workers,
        )
        if args.verify:
            written = args.out if "://" in args.out else str(work.folder)
            _verify(written, shards, params, dtype, args.workers)
            if "://" not in args.out:  # a remote config.json is written after this block
                compare_logits(work.folder, hf_config, params, step, dtype)
    print(f"{args.out}: step {step.name} of {args.checkpoint}" + ("" if tokenizer else ", without a tokenizer"))


def _export_adapters(
    out: Path, step: Path, run: "Resolved", tokenizer: Path | None, generation: dict[str, Any], changes: str
) -> str | None:
    """Writes the adapters of a step as a PEFT folder. Returns the name of their base model."""
    from xlam_jax.weights import checkpoint
    from xlam_jax.weights.peft import write_peft

    base = run.config.model.init_from
    with new_folder(out) as part:
        write_peft(part, run.model, checkpoint.load_params(step), base, of=str(step))
        if tokenizer is not None:
            shutil.copytree(tokenizer, part, dirs_exist_ok=True)
        _write_json(part / GENERATION_CONFIG, generation)
    if changed := run.config.model.overrides:
        print(
            f"warning: the adapters were trained with model.overrides {changed}; apply the same changes to the base's "
            "config.json where they are loaded, or export with --lora merge",
            file=sys.stderr,
        )
    if changes:
        print(
            f"{changes}. Servers of the base use the end tokens of its own files: pass them these files, with "
            f"`--tokenizer {out} --generation-config {out}` in vLLM"
        )
    return base


def _trained_end_tokens(step: Path, tokenizer: Path | None) -> tuple[dict[str, Any], dict[str, Any], str]:
    """Returns config.json and generation_config.json of an export, and a line that lists the changed token ids.

    The exported model of a run stops at the tokens that ended its trained turns. Converted weights keep the token ids
    of their source.
    """
    from xlam_jax.data.render import end_tokens
    from xlam_jax.data.tokenizer import load_tokenizer
    from xlam_jax.weights import checkpoint

    hf_config, generation = checkpoint.load_hf_config(step), checkpoint.load_generation_config(step)
    if tokenizer is None or not checkpoint.load_metadata(step).get("config"):
        return hf_config, derived(hf_config) if generation is None else generation, ""
    loaded = load_tokenizer(str(tokenizer))
    config, generation = align(hf_config, generation, end_tokens(loaded), loaded)
    changes = [
        f"{key} {hf_config.get(key)} is now {config[key]} ({loaded.convert_ids_to_tokens(config[key])})"
        for key in ("eos_token_id", "bos_token_id", "pad_token_id")
        if config.get(key) != hf_config.get(key) and (key == "eos_token_id" or hf_config.get(key) is not None)
    ]
    line = f"config.json: {', '.join(changes)}, as in the tokenizer used in training" if changes else ""
    return config, generation, line


def _verify(
    folder: str, shards: dict[str, list[Tensor]], params: "Params", dtype: np.dtype | None, workers: int
) -> None:
    """Raises `UserError` for tensors of a written folder that differ from `params` in any bit."""

    def is_equal(item: tuple[Tensor, Shard]) -> bool:
        tensor, shard = item
        value = tensor.to_hf(parameter(params, tensor.path))
        return shard.read(tensor.key).tobytes() == (value if dtype is None else value.astype(dtype)).tobytes()

    opened = {name: Shard(f"{folder.rstrip('/')}/{name}") for name in shards}
    check_tensors(
        folder, is_equal, [(tensor, opened[name]) for name, shard in shards.items() for tensor in shard], workers
    )


if __name__ == "__main__":
    run(main)
