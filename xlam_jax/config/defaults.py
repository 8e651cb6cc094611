"""Defaults that depend on other fields, on the model, or on the name of the config's file."""

from pathlib import Path
from typing import Any

from xlam_jax.config.files import Draft
from xlam_jax.config.schema import Config
from xlam_jax.enums import PAIR_LOSSES, STEPS_FOLDER
from xlam_jax.gguf_file import find_gguf
from xlam_jax.models.config import ModelConfig

MOST_STREAMS = 8
SEQUENCE_LENGTH = 4096
ROUTER_AUX_WEIGHT = 0.001
"""Default of transformers for a mixture whose config.json has no router_aux_loss_coef."""
LEARNING_RATES = {
    ("sft", "full"): 5e-6,
    ("sft", "adapters"): 5e-5,
    ("pairs", "full"): 5e-7,
    ("pairs", "adapters"): 1e-5,
}
"""Peak learning rates by kind of objective and of training. sft: ActionStudio's full and LoRA recipes (2503.22673);
pairs: Zephyr's DPO (2310.16944) for full training, and the default of xLAM's DPO script for adapters."""
FROM_RANDOM = 3e-4
"""Peak learning rate of full training from random weights (Llama, 2302.13971)."""
LION = 0.2
"""Factor for Lion, which needs a learning rate 3 to 10 times lower than AdamW (2302.06675)."""
_REMOVED_IF_NULL = (
    "model.config", "data.tokenizer", "data.sequence_length", "data.streams", "train.steps", "train.epochs",
    "train.learning_rate", "train.router_aux_weight",
)  # fmt: skip


def fill_defaults(draft: Draft, path: Path) -> None:
    """Sets the defaults that need no model. A value of a wrong type is left to validation."""
    for name in _REMOVED_IF_NULL:
        draft.remove_null(name)
    draft.set_default("output_dir", str(Path("runs") / path.stem), "the name of the config")
    _fill_from_weights(draft)
    if not draft.get("train.steps") and draft.get("train.epochs") is None:
        draft.set_default("train.epochs", 1.0, "without train.steps")
    rate, reason = default_learning_rate(draft)
    draft.set_default("train.learning_rate", rate, reason)
    rows = draft.get("train.batch_size")
    if type(rows) is int and rows > 0:
        streams = max(count for count in range(1, MOST_STREAMS + 1) if rows % count == 0)
        draft.set_default("data.streams", streams, "a divisor of train.batch_size")


def _fill_from_weights(draft: Draft) -> None:
    """Sets the model's config and the tokenizer to those in the folder of `model.init_from`."""
    weights = draft.get("model.init_from")
    if not isinstance(weights, str):
        draft.missing["model.config"] = "give a config.json, or the folder of the weights as model.init_from"
        draft.missing["data.tokenizer"] = "give a tokenizer's folder, or mistral:v1 or mistral:v3"
        return
    gguf = find_gguf(weights)
    if gguf is not None:
        draft.set_default("model.config", str(gguf), "in the file with the weights")
        draft.set_default("data.tokenizer", str(gguf), "in the file with the weights")
        return
    folder = Path(weights)
    folders = [folder, folder.parent.parent] if folder.parent.name == STEPS_FOLDER else [folder]
    for candidate in folders:
        if (candidate / "config.json").is_file():
            draft.set_default("model.config", str(candidate), "next to the weights")
        for tokenizer in (candidate, candidate / "tokenizer"):
            if (tokenizer / "tokenizer_config.json").is_file():
                draft.set_default("data.tokenizer", str(tokenizer), "next to the weights")
    draft.missing["model.config"] = f"model.init_from, {weights}, has no config.json here; give one"
    draft.missing["data.tokenizer"] = (
        f"model.init_from, {weights}, has no tokenizer_config.json here; give a tokenizer's folder, or mistral:v1 or "
        "mistral:v3"
    )


def default_learning_rate(draft: Draft) -> tuple[float, str]:
    """Returns the default of `train.learning_rate` for the kind of training, and the reason for it."""
    trainable = draft.get("train.trainable", "full")
    on = "pairs" if draft.get("objective.kind", "sft") in PAIR_LOSSES else "sft"
    kind = "full" if trainable == "full" else "adapters"
    rate, reason = LEARNING_RATES[on, kind], f"for {on}, {kind}"
    if (on, kind) == ("sft", "full") and draft.get("model.init_from") is None:
        rate, reason = FROM_RANDOM, "for random weights"
    if draft.get("train.optimizer") == "lion":
        rate, reason = rate * LION, f"{reason}, lion"
    return rate, reason


def fill_placeholders(draft: Draft) -> list[str]:
    """Sets fields whose defaults depend on the model to valid placeholders, until the model is known. Returns the names
    of the fields, for `fill_from_model`."""
    absent = [name for name in ("data.sequence_length", "train.router_aux_weight") if draft.get(name) is None]
    draft.set_default("data.sequence_length", SEQUENCE_LENGTH)
    return absent


def fill_from_model(draft: Draft, absent: list[str], hf_config: dict[str, Any], model: ModelConfig) -> None:
    """Sets the defaults of `absent` fields that depend on the model."""
    if "data.sequence_length" in absent and model.max_positions < SEQUENCE_LENGTH:
        draft.values["data"]["sequence_length"] = model.max_positions
        draft.origins["data.sequence_length"] = "default: the model's max_position_embeddings"
    if "train.router_aux_weight" in absent and model.experts:
        weight = hf_config.get("router_aux_loss_coef", ROUTER_AUX_WEIGHT)
        draft.set_default("train.router_aux_weight", weight, "the model's router_aux_loss_coef")


def router_warnings(config: Config, hf_config: dict[str, Any], model: ModelConfig, origin: str) -> list[str]:
    """Returns a warning if the load-balancing weight of a mixture's config.json differs from the run's."""
    used = config.train.router_aux_weight
    if not model.experts or (unused := hf_config.get("router_aux_loss_coef", used)) == used:
        return []
    return [f"{origin}: router_aux_loss_coef is {unused}; train.router_aux_weight, {used}, is used"]
