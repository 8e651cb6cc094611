"""Llama: a dense decoder (Touvron et al., 2302.13971)."""

from typing import Any

from xlam_jax.models.families.base import Family, read_common
from xlam_jax.models.hf_values import Values
from xlam_jax.models.weights_table import decoder_table

DEFAULTS = {"max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "rope_theta": 10_000.0}
"""What transformers takes for keys that a config.json lacks."""


def _read(values: Values) -> dict[str, Any]:
    hidden_size, heads = values.size("hidden_size"), values.size("num_attention_heads")
    values.check_multiple("hidden_size", hidden_size, "num_attention_heads", heads)  # also if head_dim is given
    return read_common(values, DEFAULTS)


FAMILY = Family(
    name="llama",
    architecture="LlamaForCausalLM",
    read=_read,
    weights=decoder_table(),
    nullable_noise=frozenset({"attention_dropout"}),
)
