"""Qwen3: a dense decoder with a norm over each head of queries and keys (Yang et al., 2505.09388)."""

from typing import Any

from xlam_jax.models.families import qwen2
from xlam_jax.models.families.base import Family
from xlam_jax.models.hf_values import Values
from xlam_jax.models.weights_table import ATTENTION, decoder_table, head_norm

DEFAULTS = qwen2.DEFAULTS | {"head_dim": 128}
"""What transformers takes for keys that a config.json lacks."""
HEAD_NORMS = (head_norm("q_norm", "self_attn.q_norm"), head_norm("k_norm", "self_attn.k_norm"))
"""They are applied before the rotary positions."""


def _read(values: Values) -> dict[str, Any]:
    return qwen2.read(values, DEFAULTS)


FAMILY = Family(
    name="qwen3",
    architecture="Qwen3ForCausalLM",
    read=_read,
    weights=decoder_table(attention=(*ATTENTION, *HEAD_NORMS)),
    own_keys=qwen2.FAMILY.own_keys,
)
