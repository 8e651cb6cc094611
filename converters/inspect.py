"""Prints what a checkpoint contains: `python -m converters.inspect DIR`."""

from collections import Counter
from math import prod
from pathlib import Path
from typing import Any

from xlam_jax.cli import Parser, run
from xlam_jax.config import from_saved
from xlam_jax.models.config import ModelConfig


def main() -> None:
    """The command line."""
    parser = Parser(
        prog="python -m converters.inspect",
        description="Print a checkpoint's model family, size, dtypes, layout, step and config.",
    )
    parser.add_argument(
        "folder", metavar="DIR", help="Hugging Face folder, its URL or name on the hub, GGUF file, run or step folder"
    )
    folder = parser.parse_args().folder

    from xlam_jax.weights import checkpoint

    facts = inspect_run(Path(folder)) if checkpoint.is_checkpoint(Path(folder)) else inspect_hf(folder)
    width = max(map(len, facts))
    for name, fact in facts.items():
        print(f"{name:{width}}  {fact}")


def inspect_hf(folder: str) -> dict[str, str]:
    """Returns name → fact for a Hugging Face folder. Raises `UserError` for an invalid folder, or unfitting weights."""
    from xlam_jax.weights.hf import TOKENIZER_FILES, HFWeights

    opened = HFWeights(folder)
    files = opened.sizes()
    values = Counter({source.dtype.name: 0 for _, source in opened.sources})
    for tensor, source in opened.sources:
        values[source.dtype.name] += prod(tensor.shape)
    kind = f"Hugging Face, {len(files)} safetensors file(s)" if opened.gguf is None else "GGUF, read dequantized"
    fused = any(source.part for _, source in opened.sources)
    return {
        "folder": f"{folder}: {kind}, {_gb(sum(files.values()))}",
        **_model(opened.hf_config, opened.config),
        "dtype": _dtypes(values),
        "layout": "experts of a layer fused in one tensor" if fused else "one tensor per matrix",
        "tokenizer": _tokenizer(opened.files, TOKENIZER_FILES) if opened.gguf is None else opened.gguf.name,
        **({"warnings": "\n".join(opened.warnings)} if opened.warnings else {}),
    }


def inspect_run(folder: Path) -> dict[str, str]:
    """Returns name → fact for a run folder or a step folder. Raises `UserError` if it is damaged."""
    import jax

    from xlam_jax.models.params import shapes
    from xlam_jax.weights import checkpoint
    from xlam_jax.weights.hf import TOKENIZER_FILES

    step = checkpoint.resolve(folder)
    hf_config = checkpoint.load_hf_config(step)
    leaves: list[Any] = jax.tree.leaves(checkpoint.open_params(step))
    values = Counter({leaf.dtype.name: 0 for leaf in leaves})
    for leaf in leaves:
        values[leaf.dtype.name] += leaf.size
    items = sorted(entry.name for entry in step.iterdir() if entry.is_dir() and (entry / "_METADATA").exists())
    size = sum(path.stat().st_size for path in step.rglob("*") if path.is_file())
    others = [number for number in checkpoint.whole_steps(step.parent.parent) if number != int(step.name)]
    also = f"; other steps: {', '.join(map(str, others))}" if others else ""
    facts = {
        "folder": f"{folder}: Orbax, items {', '.join(items)}, {_gb(size)}",
        "step": f"{step.name}{also}",
        **_model(hf_config, ModelConfig.from_hf(hf_config)),
        "dtype": _dtypes(values),
        "tokenizer": _tokenizer(checkpoint.tokenizer_dir(step), TOKENIZER_FILES),
    }
    saved = checkpoint.load_metadata(step).get("config")
    run_config = from_saved(saved, f"{step}: its config") if saved else None
    if run_config is None or run_config.train.trainable == "full":
        checkpoint.check_params(step, shapes(ModelConfig.from_hf(hf_config)))
    if run_config is None:
        return facts | {"config": "none: a converted model"}
    train, lora, kind = run_config.train, run_config.lora, run_config.objective.kind
    trainable: str = train.trainable
    if trainable != "full":
        trainable += f" (rank {lora.rank} on {', '.join(lora.targets)}): the step contains only the adapters"
    start = run_config.model.init_from or "random weights"
    return facts | {"config": f"{kind}, {trainable}, from {start}, {train.steps:,} steps of {train.batch_size} rows"}


def _model(hf_config: dict[str, Any], model: ModelConfig) -> dict[str, str]:
    experts = f", {model.experts} experts, {model.experts_per_token} per token" if model.experts else ""
    window = f", window {model.sliding_window:,}" if model.sliding_window else ""
    return {
        "family": f"{hf_config['architectures'][0]}, {model.parameters():,} parameters",
        "sizes": f"{model.layers} layers, hidden size {model.hidden_size:,}, MLP {model.mlp_size:,}, "
        f"{model.heads} query heads, {model.kv_heads} key-value heads, head size {model.head_dim}, "
        f"vocabulary {model.vocab_size:,}{experts}{window}",
    }


def _dtypes(values: Counter[str]) -> str:
    return ", ".join(f"{name} ({count:,} values)" for name, count in values.most_common())


def _tokenizer(folder: Path | None, patterns: tuple[str, ...]) -> str:
    names = sorted({path.name for pattern in patterns for path in folder.glob(pattern)}) if folder else []
    return ", ".join(names) or "none"


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.2f} MB"


if __name__ == "__main__":
    run(main)
