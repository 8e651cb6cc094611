"""Ministral 3: a dense decoder as Mistral's, with YaRN and queries that are scaled by their position."""

from typing import Any

from xlam_jax.models.families.base import Family, read_common, read_window
from xlam_jax.models.hf_rope import SCALING_KEYS
from xlam_jax.models.hf_values import Values
from xlam_jax.models.weights_table import decoder_table

DEFAULTS = {
    "num_key_value_heads": 8,
    "max_position_embeddings": 262_144,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10_000.0,
}
"""What transformers takes for keys that a config.json lacks."""
HEAD_DIM = 128
"""The same for head_dim."""
ROPE = {
    "rope_type": "yarn",
    "rope_theta": 1_000_000.0,
    "factor": 16.0,
    "original_max_position_embeddings": 16_384,
    "llama_4_scaling_beta": 0.1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
"""The same for rope_parameters."""


def _read(values: Values) -> dict[str, Any]:
    own: dict[str, Any] = {"head_dim": values.size("head_dim", HEAD_DIM)}  # null is refused, as in transformers
    if all(values.get(key) is None for key in SCALING_KEYS):
        own["rope_parameters"] = ROPE
    read = read_common(values.with_defaults(own), DEFAULTS, scales_queries=True)
    return read | {"sliding_window": read_window(values, None)}


FAMILY = Family(
    name="ministral3",
    architecture="Ministral3ForCausalLM",
    read=_read,
    weights=decoder_table(),
    own_keys=frozenset({"sliding_window"}),
)
