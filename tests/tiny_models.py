"""Random tiny models of each family on both sides: transformers (PyTorch, eager attention) and ours."""

from typing import Any

import jax
import numpy as np
import torch
import transformers

from xlam_jax.models.config import ModelConfig
from xlam_jax.models.families import FAMILIES, family_named
from xlam_jax.models.params import Params, shapes
from xlam_jax.weights.hf_map import tensors

VOCAB = 97
CONFIGS = {family.name: transformers.CONFIG_MAPPING[family.name] for family in FAMILIES}
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    # Large enough that attention is peaked and the experts disagree, so that errors are visible.
    "initializer_range": 0.2,
}


YARN = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 2.0,
    "beta_slow": 0.25,
}
MINISTRAL3 = YARN | {
    "original_max_position_embeddings": 8,
    "mscale": 1.0,
    "mscale_all_dim": 0.5,
    "truncate": False,
    "llama_4_scaling_beta": 0.5,
}
"""Larger numbers than the published ones, so that the factors of queries and keys are visible at a few positions."""
OWN: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": None},
    "qwen3": {"head_dim": 12},
    "qwen3_moe": {"head_dim": 12, "num_experts": 8, "moe_intermediate_size": 24, "num_experts_per_tok": 3},
    # PyTorch computes no gradient for the embedding of padding, which Ministral3Config sets to token 11.
    "ministral3": {"pad_token_id": None, "head_dim": 16, "rope_parameters": MINISTRAL3},
}
"""Values of a family in place of transformers' defaults."""


def hf_model(family: str, *, seed: int = 0, **overrides: Any) -> Any:
    """Returns a transformers model with random weights; its norm scales and biases are random too, so that
    they matter."""
    torch.manual_seed(seed)
    sizes = SIZES | OWN.get(family, {}) | overrides
    config = CONFIGS[family](architectures=[family_named(family).architecture], **sizes)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5)
            if name.endswith("bias"):
                parameter.uniform_(-0.5, 0.5)
    return model


def skew_routing(model: Any) -> None:
    """Makes every layer of a Mixtral send nearly all tokens to experts 0 and 1."""
    with torch.no_grad():
        model.model.embed_tokens.weight += 1.0
        for layer in model.model.layers:
            layer.mlp.gate.weight[0] += 0.5
            layer.mlp.gate.weight[1] += 0.3


def model_config(model: Any) -> ModelConfig:
    """Returns our config, as read from the model's config.json."""
    return ModelConfig.from_hf(model.config.to_dict())


MIXTURES = {"mixtral": ("block_sparse_moe", "w1", "w3", "w2")}
"""Family → the names in its files of a layer's mixture and of the matrices of an expert."""


def file_tensors(named: dict[str, torch.Tensor], family: str) -> dict[str, np.ndarray]:
    """Returns the parameters (or gradients) of a transformers model with the names and shapes of its files."""
    block, gate, up, down = MIXTURES.get(family, ("mlp", "gate_proj", "up_proj", "down_proj"))
    out = {}
    for name, value in named.items():
        array = value.detach().numpy()
        name = name.replace(".mlp.gate.", f".{block}.gate.")
        experts = name.partition("mlp.experts")[0] + f"{block}.experts"
        if name.endswith("gate_up_proj"):
            for e, both in enumerate(array):
                out[f"{experts}.{e}.{gate}.weight"], out[f"{experts}.{e}.{up}.weight"] = np.split(both, 2)
        elif name.endswith("mlp.experts.down_proj"):
            out |= {f"{experts}.{e}.{down}.weight": one for e, one in enumerate(array)}
        else:
            out[name] = array
    return out


def params_of(model: Any) -> Params:
    """Returns the weights of the model in our layout."""
    config = model_config(model)
    named = file_tensors(dict(model.named_parameters()), config.family)
    params = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), shapes(config))
    for tensor in tensors(config):
        leaf = params
        for name in tensor.path:
            leaf = leaf[name]
        leaf[tensor.at] = tensor.from_hf(named[tensor.key])
    return params


def tokens(rows: int, length: int, seed: int = 0) -> np.ndarray:
    """Returns random token ids without the special ones (0 to 2)."""
    return np.random.default_rng(seed).integers(3, VOCAB, (rows, length), dtype=np.int32)
