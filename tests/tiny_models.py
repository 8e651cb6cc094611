"""Random tiny models of each family on both sides: transformers (PyTorch, eager attention) and ours."""

from typing import Any

import jax
import numpy as np
import torch
import transformers

from xlam_jax.models.config import ModelConfig
from xlam_jax.models.params import Params, shapes
from xlam_jax.weights.hf_map import tensors

VOCAB = 97
CONFIGS = {
    "mistral": transformers.MistralConfig,
    "mixtral": transformers.MixtralConfig,
    "llama": transformers.LlamaConfig,
    "ministral3": transformers.Ministral3Config,
}
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
    # PyTorch computes no gradient for the embedding of padding, which Ministral3Config sets to token 11.
    "ministral3": {"pad_token_id": None, "head_dim": 16, "rope_parameters": MINISTRAL3},
}
"""Values of a family in place of transformers' defaults."""


def hf_model(family: str, *, seed: int = 0, **overrides: Any) -> Any:
    """Returns a transformers model with random weights; its norm scales are random too, so that they matter."""
    torch.manual_seed(seed)
    config = CONFIGS[family](
        architectures=[f"{family.capitalize()}ForCausalLM"], **(SIZES | OWN.get(family, {}) | overrides)
    )
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5)
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


def file_tensors(named: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """Returns the parameters (or gradients) of a transformers model with the names and shapes of its files."""
    out = {}
    for name, value in named.items():
        array = value.detach().numpy()
        name = name.replace(".mlp.gate.", ".block_sparse_moe.gate.")
        experts = name.partition("mlp.experts")[0] + "block_sparse_moe.experts"
        if name.endswith("gate_up_proj"):
            for e, both in enumerate(array):
                out[f"{experts}.{e}.w1.weight"], out[f"{experts}.{e}.w3.weight"] = np.split(both, 2)
        elif name.endswith("mlp.experts.down_proj"):
            out |= {f"{experts}.{e}.w2.weight": one for e, one in enumerate(array)}
        else:
            out[name] = array
    return out


def params_of(model: Any) -> Params:
    """Returns the weights of the model in our layout."""
    config = model_config(model)
    named = file_tensors(dict(model.named_parameters()))
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
