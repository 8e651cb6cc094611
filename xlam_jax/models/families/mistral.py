"""Mistral: a dense decoder with a sliding attention window in v0.1 (Jiang et al., 2310.06825)."""

from typing import Any

from xlam_jax.models.families.base import Family, read_common, read_window
from xlam_jax.models.hf_values import Values
from xlam_jax.models.weights_table import decoder_table

DEFAULTS = {
    "num_key_value_heads": 8,
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
}
"""What transformers takes for keys that a config.json lacks."""
SLIDING_WINDOW = 4096
"""The same for sliding_window."""


def _read(values: Values) -> dict[str, Any]:
    return read_common(values, DEFAULTS) | {"sliding_window": read_window(values, SLIDING_WINDOW)}


FAMILY = Family(
    name="mistral",
    architecture="MistralForCausalLM",
    read=_read,
    weights=decoder_table(),
    own_keys=frozenset({"sliding_window"}),
)
