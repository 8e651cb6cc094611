"""Orbax checkpoint → Hugging Face folder: `python -m converters.orbax_to_hf --checkpoint DIR --out DIR`."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from converters.arguments import add_arguments, size_of
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
from xlam_jax.weights.shards import Place, Shard, ahead, header_of
from xlam_jax.weights.transfer import check_finite, compare, dtype_of

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
    """Writes config.json, generation_config.json and safetensors; returns the tensors of each file of the latter.

    `params` are arrays, or what stands for them and is read layer by layer: a few tensors are in memory at a time. The
    weights keep their dtype unless `dtype` says another. Raises `UserError`, naming `of`, for values that are no
    numbers.
    """
    config = ModelConfig.from_hf(hf_config)
    hf_config, dropped = hf_keys.without_quantization({"model_type": config.family} | hf_config, f"config.json of {of}")
    for line in dropped:
        print(f"warning: {line}", file=sys.stderr)

    def place(tensor: Tensor) -> Place:
        return Place(tensor.key, np.dtype(dtype or parameter(params, tensor.path).dtype), tensor.shape)

    def value(tensor: Tensor) -> np.ndarray:
        given = tensor.to_hf(parameter(params, tensor.path))
        if dtype is not None:
            with np.errstate(over="ignore"):  # told below
                given = given.astype(dtype)
        check_finite(of, tensor.key, given)
        return given

    shards = _shards(list(tensors(config)), place, max_shard_bytes)
    kept = {key: value for key, value in hf_config.items() if key not in ("dtype", "torch_dtype")}
    kept |= {"hidden_act": "silu"} if kept.get("hidden_act") in hf_keys.SILU else {}
    held = str(np.dtype(dtype or params["embedding"].dtype))
    sizes = {name: [place(tensor).bytes for tensor in shard] for name, shard in shards.items()}
    total = sum(sum(each) for each in sizes.values())
    with Throughput("exporting", total, unit=BYTES) as progress:
        progress.skip(sum(sum(sizes[name]) for name in shards if name in work.done))
        for name in (one for one in shards if one not in work.done):
            with work.create(name) as file:
                file.write(header_of(place(tensor) for tensor in shards[name]))
                for tensor, array in ahead(value, shards[name], workers):
                    file.write(array.reshape(-1).view(np.uint8).data)
                    progress.add(place(tensor).bytes)
            work.finish(name)
    if len(shards) > 1:
        index = {
            "metadata": {"total_parameters": config.parameters(), "total_size": total},
            "weight_map": {tensor.key: name for name, shard in shards.items() for tensor in shard},
        }
        _write_json(work.folder / INDEX, index)
    _write_json(work.folder / GENERATION_CONFIG, generation)
    _write_json(work.folder / "config.json", kept | {"dtype": held})
    return shards


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _shards(wanted: list[Tensor], place: Callable[[Tensor], Place], limit: int) -> dict[str, list[Tensor]]:
    """The tensors of each file, filled in order up to `limit` bytes; a larger tensor has a file to itself."""
    groups: list[list[Tensor]] = [[]]
    size = 0
    for tensor in wanted:
        nbytes = place(tensor).bytes
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
        prog="python -m converters.orbax_to_hf", description="Exports a checkpoint to a Hugging Face folder."
    )
    parser.add_argument("--checkpoint", type=Path, required=True, help="run folder (its newest step) or step folder")
    parser.add_argument(
        "--out", required=True, help="folder to make, or an address that fsspec opens; it must not exist"
    )
    parser.add_argument("--max-shard-size", type=size_of, default="5GB", help="largest file, like 500MB (default: 5GB)")
    add_arguments(parser)
    parser.add_argument(
        "--lora",
        choices=("merge", "adapter"),
        help="of a run with adapters: a whole model with them added (the default), or a PEFT folder of them alone",
    )
    args = parser.parse_args()
    if "://" not in args.out:
        refuse_existing(Path(args.out))

    from xlam_jax.weights import checkpoint
    from xlam_jax.weights import run as weights
    from xlam_jax.weights.logits import compare_logits

    step = checkpoint.resolve(args.checkpoint)
    tokenizer = checkpoint.tokenizer_dir(step)
    with_adapters = weights.saved_run(step)
    if args.lora and with_adapters is None:
        raise UserError(f"{step}: holds a whole model without adapters; leave --lora {args.lora} out")
    hf_config, generation, changes = _trained_ends(step, tokenizer)
    if args.lora == "adapter" and with_adapters is not None:
        refuse_address(args.out)
        base = _export_adapters(Path(args.out), step, with_adapters, tokenizer, generation, changes)
        print(f"{args.out}: the adapters of step {step.name} of {args.checkpoint}, for {base or 'a random base'}")
        return
    if changes:
        print(changes)
    params = weights.open_whole(step)
    dtype = dtype_of(args.dtype)
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
            if "://" not in args.out:  # elsewhere config.json is written last
                compare_logits(work.folder, hf_config, params, step, dtype)
    print(f"{args.out}: step {step.name} of {args.checkpoint}" + ("" if tokenizer else ", without a tokenizer"))


def _export_adapters(
    out: Path, step: Path, run: "Resolved", tokenizer: Path | None, generation: dict[str, Any], changes: str
) -> str | None:
    """Writes the adapters of a step as a PEFT folder; returns the name of the base that they belong to."""
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
            f"warning: the adapters were trained with model.overrides {changed}; change the base's config.json in "
            "the same way where they are loaded, or export with --lora merge",
            file=sys.stderr,
        )
    if changes:
        print(
            f"{changes}. Servers of the base alone stop where its own files say: give them these files, with "
            f"`--tokenizer {out} --generation-config {out}` in vLLM"
        )
    return base


def _trained_ends(step: Path, tokenizer: Path | None) -> tuple[dict[str, Any], dict[str, Any], str]:
    """config.json and generation_config.json of an export, and a line that says which token ids of config.json change.

    A run stops at the tokens that ended its trained turns; converted weights keep what their source says.
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
    line = f"config.json: {', '.join(changes)}, as the tokenizer that was trained with has it" if changes else ""
    return config, generation, line


def _verify(
    folder: str, shards: dict[str, list[Tensor]], params: "Params", dtype: np.dtype | None, workers: int
) -> None:
    """Raises `UserError` naming the tensors that do not lie in a folder as they should, bit for bit."""

    def same(item: tuple[Tensor, Shard]) -> bool:
        tensor, shard = item
        value = tensor.to_hf(parameter(params, tensor.path))
        return shard.read(tensor.key).tobytes() == (value if dtype is None else value.astype(dtype)).tobytes()

    opened = {name: Shard(f"{folder.rstrip('/')}/{name}") for name in shards}
    compare(folder, same, [(tensor, opened[name]) for name, shard in shards.items() for tensor in shard], workers)


if __name__ == "__main__":
    run(main)
