"""Qwen3-MoE: Qwen3 with a mixture of many small experts in each layer (Yang et al., 2505.09388)."""

from typing import Any

from xlam_jax.models.families.base import Family, read_common, read_experts, read_optional_window
from xlam_jax.models.families.qwen3 import HEAD_NORMS
from xlam_jax.models.hf_values import Values
from xlam_jax.models.weights_table import ATTENTION, decoder_table, mixture

DEFAULTS = {
    "num_key_value_heads": 4,
    "max_position_embeddings": 32_768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
}
"""What transformers takes for keys that a config.json lacks."""
SLIDING_WINDOW, EXPERT_WIDTH, EXPERTS, EXPERTS_PER_TOKEN = 4096, 768, 128, 8
"""The same for sliding_window, moe_intermediate_size, num_experts and num_experts_per_tok."""
MIXTURE = mixture("mlp", ("gate_proj", "up_proj", "down_proj"), fused_in=("mlp",))


def _read(values: Values) -> dict[str, Any]:
    if values.size("decoder_sparse_step", 1) != 1:
        raise values.error("decoder_sparse_step", expected="only 1, a mixture in each layer, is implemented")
    return read_common(values, DEFAULTS) | {
        **read_experts(values, EXPERTS, EXPERTS_PER_TOKEN),
        "mlp_size": values.size("moe_intermediate_size", EXPERT_WIDTH),
        "normalize_gates": values.flag("norm_topk_prob", False),
        "sliding_window": read_optional_window(values, SLIDING_WINDOW),  # of all layers, whatever max_window_layers is
    }


FAMILY = Family(
    name="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    read=_read,
    weights=decoder_table(attention=(*ATTENTION, *HEAD_NORMS), mlp=MIXTURE),
    own_keys=frozenset(
        {
            *("sliding_window", "use_sliding_window", "num_local_experts", "num_experts", "num_experts_per_tok"),
            *("moe_intermediate_size", "norm_topk_prob", "decoder_sparse_step"),
        }
    ),
    aliases={"num_experts": "num_local_experts"},
)
