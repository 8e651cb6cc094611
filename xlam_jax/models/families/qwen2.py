"""Qwen2 and Qwen2.5: a dense decoder with biases of queries, keys and values (Yang et al., 2407.10671)."""

from collections.abc import Mapping
from typing import Any

from xlam_jax.models.families.base import Family, read_common, read_window_of_last_layers
from xlam_jax.models.hf_values import Values
from xlam_jax.models.weights_table import ATTENTION, decoder_table, head_bias

DEFAULTS = {
    "num_key_value_heads": 32,
    "max_position_embeddings": 32_768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
}
"""What transformers takes for keys that a config.json lacks."""
SLIDING_WINDOW, FULL_LAYERS = 4096, 28
"""The same for sliding_window and max_window_layers."""
BIASES = (
    head_bias("q_bias", "NGK", "self_attn.q_proj"),
    head_bias("k_bias", "NK", "self_attn.k_proj"),
    head_bias("v_bias", "NK", "self_attn.v_proj"),
)
"""No key of the config.json removes them."""


def read(values: Values, defaults: Mapping[str, Any] = DEFAULTS) -> dict[str, Any]:
    """Returns the fields of `ModelConfig`. `defaults`: as for `read_common`. Raises `UserError` for invalid values."""
    return read_common(values, defaults, nullable={"num_key_value_heads"}) | {
        "sliding_window": read_window_of_last_layers(values, SLIDING_WINDOW, FULL_LAYERS)
    }


FAMILY = Family(
    name="qwen2",
    architecture="Qwen2ForCausalLM",
    read=read,
    weights=decoder_table(attention=(*ATTENTION, *BIASES)),
    own_keys=frozenset({"sliding_window", "use_sliding_window", "max_window_layers"}),
)
