"""Mixtral: each token's MLP is a weighted sum of a few experts' (Jiang et al., 2401.04088)."""

from typing import Any

from xlam_jax.models.families.base import Family, read_common, read_experts, read_window
from xlam_jax.models.hf_values import Values
from xlam_jax.models.weights_table import decoder_table, mixture

DEFAULTS = {
    "num_key_value_heads": 8,
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1_000_000.0,
}
"""What transformers takes for keys that a config.json lacks."""
EXPERTS, EXPERTS_PER_TOKEN = 8, 2
"""The same for num_local_experts and num_experts_per_tok."""
MIXTURE = mixture("block_sparse_moe", ("w1", "w3", "w2"), fused_in=("mlp", "block_sparse_moe"))
"""In transformers 5, a layer's mixture has the name "mlp"."""


def _read(values: Values) -> dict[str, Any]:
    if type(values.get("router_jitter_noise")) is int:
        raise values.error("router_jitter_noise", expected="a decimal number is needed, such as 0.0")
    return read_common(values, DEFAULTS) | {
        **read_experts(values, EXPERTS, EXPERTS_PER_TOKEN),
        "sliding_window": read_window(values, None),
    }


FAMILY = Family(
    name="mixtral",
    architecture="MixtralForCausalLM",
    read=_read,
    weights=decoder_table(mlp=MIXTURE),
    own_keys=frozenset({"sliding_window", "num_local_experts", "num_experts", "num_experts_per_tok"}),
    aliases={"num_experts": "num_local_experts"},
    noise=frozenset({"attention_dropout", "router_jitter_noise"}),
)
