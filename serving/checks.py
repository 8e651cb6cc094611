"""Checks of model and adapter folders before vLLM starts, which would report problems after minutes, or never."""

from pathlib import Path
from typing import Any

from xlam_jax.errors import UserError


def load_config(folder: Path) -> dict[str, Any]:
    """Reads the config.json of a model folder, {} if there is none. Raises `UserError` if it is invalid."""
    from xlam_jax.models.config import read_hf_config

    path = folder / "config.json"
    return read_hf_config(path) if path.is_file() else {}


def check_adapter(folder: Path, values: bool) -> None:
    """Raises `UserError` for settings that vLLM ignores, and for damaged weights; with `values`, also for NaN."""
    from xlam_jax.weights.peft_config import WEIGHTS, read_config
    from xlam_jax.weights.shards import Shard
    from xlam_jax.weights.transfer import check_values

    read_config(folder).refuse_patterns()
    if (folder / WEIGHTS).is_file():
        shard = Shard(str(folder / WEIGHTS))
        if values:
            check_values([shard])


def check_folder(folder: Path, values: bool) -> None:
    """Raises `UserError` for problems that vLLM would report after minutes, or never.

    These are truncated or missing weights, wrong shapes, NaN and infinity, a config.json of another model, and a
    tokenizer with more tokens than the embedding.
    """
    from xlam_jax.models import families, hf_keys
    from xlam_jax.weights.hf import HFWeights
    from xlam_jax.weights.locate import quantized_tensor
    from xlam_jax.weights.shards import Shard
    from xlam_jax.weights.transfer import check_values

    config = load_config(folder)
    shards = [Shard(str(path)) for path in sorted(folder.glob("*.safetensors"))]
    method = hf_keys.quantization_method(config)
    if families.family_of(config) and method is None:
        if renamed := HFWeights(folder).renamed:
            raise UserError(
                f"{folder}: the tensor name {next(iter(renamed))} has the prefix of a wrapper, which vLLM does not "
                "read; convert the folder with converters.hf_to_orbax, and serve the result"
            )
    elif families.family_of(config) and not quantized_tensor({shard.url: shard for shard in shards}):
        raise UserError(
            f"{folder / 'config.json'}: has a quantization_config ({method}), and the weights are not quantized; "
            "remove it from config.json, or vLLM serves different weights"
        )
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        raise UserError(f"{folder}: has no tokenizer; put the model's tokenizer files there")
    _check_tokenizer(folder / "tokenizer.json", config.get("vocab_size"))
    if values:
        check_values(shards)


def _check_tokenizer(path: Path, vocab_size: object) -> None:
    """Raises `UserError` if the tokenizer cannot be read, or has a token id beyond the embedding."""
    from tokenizers import Tokenizer

    if not path.is_file():
        return
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises plain exceptions
        raise UserError(f"{path}: can't be read ({error}); put the model's own tokenizer there") from None
    if isinstance(vocab_size, int) and (beyond := max(tokenizer.get_vocab().values(), default=0)) >= vocab_size:
        raise UserError(
            f"{path}: has token {beyond} ({tokenizer.id_to_token(beyond)!r}), and the embedding of config.json ends "
            f"before {vocab_size}; they don't belong together: put the model's own tokenizer there"
        )
