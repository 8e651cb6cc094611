"""What a checkpoint is: `python -m converters.inspect DIR`."""

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
        description="Tells what a checkpoint holds: its family, size, dtypes, layout, step and config.",
    )
    parser.add_argument("folder", metavar="DIR", help="Hugging Face folder, its address or hub name, run, or step")
    folder = parser.parse_args().folder

    from xlam_jax.weights import checkpoint

    facts = stored(Path(folder)) if checkpoint.is_checkpoint(Path(folder)) else foreign(folder)
    width = max(map(len, facts))
    for name, fact in facts.items():
        print(f"{name:{width}}  {fact}")


def foreign(folder: str) -> dict[str, str]:
    """Of a Hugging Face folder. Raises `UserError` where it is none, or its weights do not fit its config."""
    from xlam_jax.weights.hf import TOKENIZER_FILES, HFWeights

    opened = HFWeights(folder)
    files = opened.sizes()
    held = Counter({where.dtype.name: 0 for _, where in opened.sources})
    for tensor, where in opened.sources:
        held[where.dtype.name] += prod(tensor.shape)
    fused = any(where.part for _, where in opened.sources)
    return {
        "folder": f"{folder}: Hugging Face, {len(files)} safetensors file(s), {_gb(sum(files.values()))}",
        **_model(opened.hf_config, opened.config),
        "dtype": _dtypes(held),
        "layout": "experts of a layer fused in one tensor" if fused else "one tensor for each matrix",
        "tokenizer": _tokenizer(opened.files, TOKENIZER_FILES),
        **({"warnings": "\n".join(opened.warnings)} if opened.warnings else {}),
    }


def stored(folder: Path) -> dict[str, str]:
    """Of a run folder or a step of one. Raises `UserError` where it is damaged."""
    import jax

    from xlam_jax.models.params import shapes
    from xlam_jax.weights import checkpoint
    from xlam_jax.weights.hf import TOKENIZER_FILES

    step = checkpoint.resolve(folder)
    hf_config = checkpoint.load_hf_config(step)
    leaves: list[Any] = jax.tree.leaves(checkpoint.open_params(step))
    held = Counter({leaf.dtype.name: 0 for leaf in leaves})
    for leaf in leaves:
        held[leaf.dtype.name] += leaf.size
    items = sorted(entry.name for entry in step.iterdir() if entry.is_dir() and (entry / "_METADATA").exists())
    size = sum(path.stat().st_size for path in step.rglob("*") if path.is_file())
    others = [one for one in checkpoint.whole_steps(step.parent.parent) if one != int(step.name)]
    also = f"; also there: {', '.join(map(str, others))}" if others else ""
    facts = {
        "folder": f"{folder}: Orbax, items {', '.join(items)}, {_gb(size)}",
        "step": f"{step.name}{also}",
        **_model(hf_config, ModelConfig.from_hf(hf_config)),
        "dtype": _dtypes(held),
        "tokenizer": _tokenizer(checkpoint.tokenizer_dir(step), TOKENIZER_FILES),
    }
    saved = checkpoint.load_metadata(step).get("config")
    run_config = from_saved(saved, f"{step}: its config") if saved else None
    if run_config is None or run_config.train.trainable == "full":
        checkpoint.check_params(step, shapes(ModelConfig.from_hf(hf_config)))
    if run_config is None:
        return facts | {"config": "none: a converted model"}
    train, lora, kind = run_config.train, run_config.lora, run_config.objective.kind
    what: str = train.trainable
    if what != "full":
        what += f" (rank {lora.rank} on {', '.join(lora.targets)}): the step holds the adapters alone"
    start = run_config.model.init_from or "random weights"
    return facts | {"config": f"{kind}, {what}, from {start}, {train.steps:,} steps of {train.batch_size} rows"}


def _model(hf_config: dict[str, Any], model: ModelConfig) -> dict[str, str]:
    experts = f", {model.experts} experts of which {model.experts_per_token} see a token" if model.experts else ""
    window = f", window {model.sliding_window:,}" if model.sliding_window else ""
    return {
        "family": f"{hf_config['architectures'][0]}, {model.parameters():,} parameters",
        "sizes": f"{model.layers} layers, hidden size {model.hidden_size:,}, MLP {model.mlp_size:,}, "
        f"{model.heads} heads over {model.kv_heads} of keys, head size {model.head_dim}, "
        f"vocabulary {model.vocab_size:,}{experts}{window}",
    }


def _dtypes(held: Counter[str]) -> str:
    return ", ".join(f"{name} ({count:,} values)" for name, count in held.most_common())


def _tokenizer(folder: Path | None, patterns: tuple[str, ...]) -> str:
    found = sorted({path.name for pattern in patterns for path in folder.glob(pattern)}) if folder else []
    return ", ".join(found) or "none"


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.2f} MB"


if __name__ == "__main__":
    run(main)
