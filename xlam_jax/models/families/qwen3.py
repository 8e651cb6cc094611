"""Qwen3: a dense decoder with a norm over each head of queries and keys (Yang et al., 2505.09388)."""

from typing import Any

from xlam_jax.models.families.base import Family, read_common, read_window_of_last_layers
from xlam_jax.models.hf_values import Values
from xlam_jax.models.weights_table import ATTENTION, decoder_table, head_norm

DEFAULTS = {
    "num_key_value_heads": 32,
    "head_dim": 128,
    "max_position_embeddings": 32_768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
}
"""What transformers takes for keys that a config.json lacks."""
SLIDING_WINDOW, FULL_LAYERS = 4096, 28
"""The same for sliding_window and max_window_layers."""
HEAD_NORMS = (head_norm("q_norm", "self_attn.q_norm"), head_norm("k_norm", "self_attn.k_norm"))
"""They are applied before the rotary positions."""


def _read(values: Values) -> dict[str, Any]:
    return read_common(values, DEFAULTS, nullable={"num_key_value_heads"}) | {
        "sliding_window": read_window_of_last_layers(values, SLIDING_WINDOW, FULL_LAYERS)
    }


FAMILY = Family(
    name="qwen3",
    architecture="Qwen3ForCausalLM",
    read=_read,
    weights=decoder_table(attention=(*ATTENTION, *HEAD_NORMS)),
    own_keys=frozenset({"sliding_window", "use_sliding_window", "max_window_layers"}),
)
