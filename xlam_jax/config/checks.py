"""Checks of a config against its model: sizes, adapters, and divisibility by the mesh."""

from dataclasses import replace
from typing import Any

from xlam_jax.config.schema import Config
from xlam_jax.errors import UserError, nearest
from xlam_jax.models.config import Lora, ModelConfig


def model_of(config: Config, hf_config: dict[str, Any], origin: str = "config.json") -> ModelConfig:
    """Returns the model that a run trains, with its adapters. Raises `UserError` if `lora.targets` names a weight that
    the model does not have."""
    model = ModelConfig.from_hf(hf_config, origin, config.model.overrides)
    return model if config.train.trainable == "full" else replace(model, lora=_adapters(config, model))


def _adapters(config: Config, model: ModelConfig) -> Lora:
    section = config.lora
    matrices = sorted((weight for weight in model.weights if weight.is_matrix), key=lambda weight: not weight.in_block)
    names = [weight.name for weight in matrices]
    for at, target in enumerate(section.targets):
        if target not in names:
            meant = next((row.name for row in matrices if target in (row.short_module, *row.aliases)), None)
            hint = f"; this project's name for it is {meant}" if meant else nearest(target, names)
            raise UserError(f"lora.targets.{at}: the model has no weight '{target}'{hint} (known: {', '.join(names)})")
    with_dropout = [weight.name for weight in matrices if weight.dropout_id is not None]
    without = [target for target in section.targets if target not in with_dropout]
    if section.dropout and without:
        raise UserError(
            f"lora.dropout is {section.dropout}, and adapters on {', '.join(without)} do not support dropout; "
            f"set it to 0, or lora.targets to some of {', '.join(with_dropout)}"
        )
    return Lora(
        targets=tuple(section.targets),
        rank=section.rank,
        alpha=section.alpha,
        rank_stabilized=section.rank_stabilized,
        dropout=section.dropout,
        zero=section.zero,
        train_tokens=section.train_tokens,
    )


def check_model(config: Config, model: ModelConfig) -> None:
    """Raises `UserError` if rows are longer than the model supports, or the model cannot be divided over the mesh."""
    if config.data.sequence_length > model.max_positions:
        raise UserError(
            f"data.sequence_length is {config.data.sequence_length}, more than the model's max_position_embeddings, "
            f"{model.max_positions}; shorten the rows or choose another model"
        )
    check_divisible(config, model, {f"mesh.{axis}": max(1, size) for axis, size in config.mesh.sizes.items()})


def check_divisible(config: Config, model: ModelConfig, sizes: dict[str, int]) -> None:
    """Raises `UserError` for a size that is not a multiple of the mesh axis that splits it.

    `sizes`: number of devices along each axis, by its name in the config. Called again when a size of -1 is resolved.
    """
    rows = sizes["mesh.data"] * sizes["mesh.fsdp"] * sizes["mesh.expert"] * config.train.microbatches
    by_rows = "mesh.data × mesh.fsdp × mesh.expert × train.microbatches"
    if sizes["mesh.expert"] > 1 and not model.experts:
        raise UserError(f"mesh.expert is {sizes['mesh.expert']}, and the model has no experts; set it to 1")
    pieces = 2 * sizes["mesh.context"] if sizes["mesh.context"] > 1 else 1
    split = [
        ("train.batch_size", config.train.batch_size, by_rows, rows),
        ("data.sequence_length", config.data.sequence_length, "2 × mesh.context", pieces),
        ("the model's number of experts", model.experts, "mesh.expert", sizes["mesh.expert"]),
        ("the model's hidden_size", model.hidden_size, "mesh.fsdp", sizes["mesh.fsdp"]),
        ("the model's num_key_value_heads", model.kv_heads, "mesh.tensor", sizes["mesh.tensor"]),
        ("the model's MLP width", model.mlp_size, "mesh.tensor", sizes["mesh.tensor"]),
        ("the model's vocab_size", model.vocab_size, "mesh.tensor", sizes["mesh.tensor"]),
    ]
    for name, size, axis, parts in split:
        if size % parts:
            raise UserError(f"{name} ({size}) must be a multiple of {axis} ({parts})")
    if config.train.trainable == "qlora":
        _check_blocks(model, sizes)


def _check_blocks(model: ModelConfig, sizes: dict[str, int]) -> None:
    """Checks that each shard of a four-bit weight contains whole quantization blocks (values that share a scale)."""
    from xlam_jax.models.nf4 import block_size

    sides = (("hidden_size", model.hidden_size, "fsdp"), ("MLP width", model.mlp_size, "tensor"))
    for name, size, axis in sides:
        block, parts = block_size(size), sizes[f"mesh.{axis}"]
        if size // block % parts:
            raise UserError(
                f"the model's {name} is {size}, {size // block} blocks of {block} four-bit weights, which mesh.{axis}, "
                f"{parts}, does not divide; choose a divisor of {size // block}"
            )
