"""Converts Hugging Face weights to Orbax: `python -m converters.hf_to_orbax --hf DIR --out DIR`."""

import sys
from math import prod
from pathlib import Path

import numpy as np

from converters.arguments import add_arguments
from xlam_jax.cli import Parser, run
from xlam_jax.models.generation_config import copy_generation_config
from xlam_jax.outputs import ResumableFolder, refuse_address, refuse_existing, resumable_folder
from xlam_jax.progress import BYTES, Throughput
from xlam_jax.weights.hf import HFWeights, copy_tokenizer
from xlam_jax.weights.hf_map import Tensor, parameter
from xlam_jax.weights.locate import Source
from xlam_jax.weights.shards import map_ordered
from xlam_jax.weights.transfer import check_finite, check_tensors, parse_dtype


def main() -> None:
    """The command line."""
    parser = Parser(
        prog="python -m converters.hf_to_orbax", description="Convert a Hugging Face folder to an Orbax checkpoint."
    )
    parser.add_argument(
        "--hf",
        required=True,
        help="folder with config.json and safetensors, a URL that fsspec opens, a name on the hub, or a GGUF file",
    )
    parser.add_argument("--out", required=True, help="folder to write; it must not exist")
    add_arguments(parser)
    args = parser.parse_args()
    refuse_address(args.out)
    refuse_existing(Path(args.out))
    opened = HFWeights(args.hf)
    for line in opened.warnings:
        print(f"warning: {line}", file=sys.stderr)

    dtype = parse_dtype(args.dtype)
    source = {"hf": opened.name, "dtype": args.dtype, "files": opened.stamps()}
    with resumable_folder(Path(args.out), source) as work:
        _convert(opened, dtype, work, args.workers)
        if args.verify:
            _verify(opened, dtype, work.folder, args.workers)
    print(f"{args.out}: {opened.hf_config['architectures'][0]} with {opened.config.parameters():,} parameters")


def _convert(opened: HFWeights, dtype: np.dtype | None, work: ResumableFolder, workers: int) -> None:
    from xlam_jax.data.tokenizer import load_tokenizer
    from xlam_jax.weights.checkpoint import TOKENIZER, NewModel, write_hf_config

    params = opened.params(dtype)
    leading = {tensor.path: len(tensor.at) for tensor, _ in opened.sources}
    if opened.gguf is None:
        copy_tokenizer(opened.files, work.folder / TOKENIZER)
        copy_generation_config(opened.files, work.folder)
    else:
        load_tokenizer(str(opened.gguf)).save_pretrained(str(work.folder / TOKENIZER))
    write_hf_config(work.folder, opened.hf_config)
    model = NewModel(work.folder, params, leading.__getitem__)
    for path in leading:
        model.open(path)

    def convert(item: tuple[Tensor, Source]) -> None:
        tensor, source = item
        value = tensor.from_hf(source.read()).astype(parameter(params, tensor.path).dtype, copy=False)
        check_finite(opened.name, tensor.key, value)
        model.write(tensor.path, tensor.at, value)

    sizes = {
        tensor.key: prod(tensor.shape) * parameter(params, tensor.path).dtype.itemsize for tensor, _ in opened.sources
    }
    remaining = [pair for pair in opened.sources if pair[0].key not in work.done]
    with Throughput("converting", sum(sizes.values()), unit=BYTES) as progress:
        progress.skip(sum(sizes[key] for key in work.done))
        for (tensor, _), _ in map_ordered(convert, remaining, workers):
            work.finish(tensor.key)
            progress.add(sizes[tensor.key])


def _verify(opened: HFWeights, dtype: np.dtype | None, folder: Path, workers: int) -> None:
    """Raises `UserError` for tensors that differ from the source in any bit, and if a small model's logits differ."""
    from xlam_jax.enums import STEPS_FOLDER
    from xlam_jax.weights.checkpoint import open_params
    from xlam_jax.weights.logits import compare_logits

    params = open_params(folder / STEPS_FOLDER / "0")

    def is_equal(item: tuple[Tensor, Source]) -> bool:
        tensor, source = item
        converted = parameter(params, tensor.path)
        return source.read().astype(converted.dtype, copy=False).tobytes() == tensor.to_hf(converted).tobytes()

    check_tensors(opened.name, is_equal, opened.sources, workers)
    if "://" not in opened.name and dtype is None:
        compare_logits(opened.gguf or opened.files, opened.hf_config, params, folder)


if __name__ == "__main__":
    run(main)
