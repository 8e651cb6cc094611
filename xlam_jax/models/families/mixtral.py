"""Mixtral: each token's MLP is a weighted sum of a few experts' (Jiang et al., 2401.04088)."""

from typing import Any

from xlam_jax.models.families.base import Family, read_common, read_window
from xlam_jax.models.hf_values import MOST_LAYERS, Values
from xlam_jax.models.weights_table import BLOCK, Stored, Weight, decoder_table

DEFAULTS = {
    "num_key_value_heads": 8,
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1_000_000.0,
}
"""What transformers takes for keys that a config.json lacks."""
EXPERTS, EXPERTS_PER_TOKEN = 8, 2
"""The same for num_local_experts and num_experts_per_tok."""
_MOE = BLOCK + "block_sparse_moe."
_MOE_BLOCKS = ("mlp", "block_sparse_moe")
"""Names of a layer's mixture in transformers 5 and 4."""


def _expert_matrix(name: str, inputs: str, outputs: str, alias: str, fused: str, part: int, parts: int) -> Weight:
    """A matrix of every expert. `fused`: the tensor [experts, parts × outputs, inputs] in which transformers 5 stores
    all experts of a layer; the matrix is its `part`-th part."""
    return Weight(
        name=name,
        stacked="LE",
        inputs=inputs,
        outputs=outputs,
        key=f"{_MOE}experts.{{E}}.{name}.weight",
        hf_axes=f"{outputs} {inputs}",
        other_places=tuple(Stored(f"{BLOCK}{block}.experts.{fused}", part, parts) for block in _MOE_BLOCKS),
        frozen="nf4",
        aliases=(alias,),
    )


MIXTURE = (
    Weight(
        name="router",
        inputs="D",
        outputs="R",
        key=_MOE + "gate.weight",
        hf_axes="R D",
        other_places=(Stored(BLOCK + "mlp.gate.weight"),),
        frozen="float32",
    ),
    _expert_matrix("w1", "D", "F", "gate_proj", "gate_up_proj", 0, 2),
    _expert_matrix("w3", "D", "F", "up_proj", "gate_up_proj", 1, 2),
    _expert_matrix("w2", "F", "D", "down_proj", "down_proj", 0, 1),
)
"""The router, and gate_proj (w1), up_proj (w3) and down_proj (w2) of the experts."""


def _read(values: Values) -> dict[str, Any]:
    experts = values.size("num_local_experts", EXPERTS, most=MOST_LAYERS)
    per_token = values.size("num_experts_per_tok", EXPERTS_PER_TOKEN)
    if per_token > experts:
        raise values.error(
            "num_experts_per_tok", "num_local_experts", expected="the first must not be more than the second"
        )
    if type(values.get("router_jitter_noise")) is int:
        raise values.error("router_jitter_noise", expected="a decimal number is needed, such as 0.0")
    return read_common(values, DEFAULTS) | {
        "experts": experts,
        "experts_per_token": per_token,
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
