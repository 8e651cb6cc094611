"""The key sets of published config.json files: Llama 3, Mistral Nemo and Small, and Ministral 3."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
import transformers
from test_parity import assert_parity

from xlam_jax.models import hf_keys
from xlam_jax.models.config import ModelConfig, read_hf_config

DENSE = {
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "use_cache": True,
}


def llama(factor: float, **sizes: Any) -> dict[str, Any]:
    rope = {
        "factor": factor,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    }
    return DENSE | {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "bos_token_id": 128000,
        "eos_token_id": [128001, 128008, 128009],
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "model_type": "llama",
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": rope,
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.45.0.dev0",
        "vocab_size": 128256,
        **sizes,
    }


def mistral(**sizes: Any) -> dict[str, Any]:
    return DENSE | {
        "architectures": ["MistralForCausalLM"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "head_dim": 128,
        "hidden_size": 5120,
        "model_type": "mistral",
        "num_attention_heads": 32,
        "num_hidden_layers": 40,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.43.0.dev0",
        "vocab_size": 131072,
        **sizes,
    }


def wrapped(text: dict[str, Any], **outer: Any) -> dict[str, Any]:
    return {
        "architectures": ["Mistral3ForConditionalGeneration"],
        "image_token_index": 10,
        "model_type": "mistral3",
        "multimodal_projector_bias": False,
        "projector_hidden_act": "gelu",
        "spatial_merge_size": 2,
        "text_config": DENSE | {"head_dim": 128, "sliding_window": None, "vocab_size": 131072} | text,
        "transformers_version": "5.0.0.dev0",
        "vision_config": {"model_type": "pixtral", "hidden_size": 1024, "rope_theta": 10000.0},
        "vision_feature_layer": -1,
        **outer,
    }


def ministral3(theta: float, **sizes: Any) -> dict[str, Any]:
    rope = {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 16.0,
        "llama_4_scaling_beta": 0.1,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 16384,
        "rope_theta": theta,
        "rope_type": "yarn",
        "type": "yarn",
    }
    text = {"max_position_embeddings": 262144, "model_type": "ministral3", "num_attention_heads": 32}
    return wrapped(text | {"rope_parameters": rope, **sizes}, dtype="bfloat16")


SMALL_3_1 = {
    "hidden_size": 5120,
    "intermediate_size": 32768,
    "max_position_embeddings": 131072,
    "model_type": "mistral",
    "num_attention_heads": 32,
    "num_hidden_layers": 40,
    "rope_theta": 1000000000.0,
}
PUBLISHED: dict[str, tuple[dict[str, Any], int]] = {
    "Llama-3.1-8B-Instruct": (
        llama(8.0, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32),
        8_030_261_248,
    ),
    "Llama-3.3-70B-Instruct": (
        llama(
            8.0,
            head_dim=128,
            hidden_size=8192,
            intermediate_size=28672,
            num_hidden_layers=80,
            num_attention_heads=64,
        ),
        70_553_706_496,
    ),
    "Llama-3.2-1B-Instruct": (
        llama(
            32.0,
            head_dim=64,
            hidden_size=2048,
            intermediate_size=8192,
            num_hidden_layers=16,
            num_attention_heads=32,
            tie_word_embeddings=True,
        ),
        1_235_814_400,
    ),
    "Llama-3.2-3B-Instruct": (
        llama(
            32.0,
            head_dim=128,
            hidden_size=3072,
            intermediate_size=8192,
            num_hidden_layers=28,
            num_attention_heads=24,
            tie_word_embeddings=True,
        ),
        3_212_749_824,
    ),
    "Mistral-Nemo-Instruct-2407": (
        mistral(intermediate_size=14336, max_position_embeddings=1024000, rope_theta=1000000.0),
        12_247_782_400,
    ),
    "Mistral-Small-24B-Instruct-2501": (
        mistral(intermediate_size=32768, max_position_embeddings=32768, rope_theta=100000000.0),
        23_572_403_200,
    ),
    "Mistral-Small-3.1-24B-Instruct-2503": (wrapped(SMALL_3_1, torch_dtype="bfloat16"), 23_572_403_200),
    "Ministral-3-3B": (
        ministral3(1e6, hidden_size=3072, intermediate_size=9216, num_hidden_layers=26, tie_word_embeddings=True),
        3_429_006_336,
    ),
    "Ministral-3-8B": (
        ministral3(1e6, hidden_size=4096, intermediate_size=14336, num_hidden_layers=34),
        8_489_553_920,
    ),
    "Ministral-3-14B": (
        ministral3(1e9, hidden_size=5120, intermediate_size=16384, num_hidden_layers=40),
        13_506_073_600,
    ),
}
"""Name → its config.json, and the number of parameters of its text model in transformers."""


def read(folder: Path, name: str) -> dict[str, Any]:
    path = folder / "config.json"
    path.write_text(json.dumps(PUBLISHED[name][0]))
    return read_hf_config(path)


def transformers_config(hf: dict[str, Any]) -> Any:
    return tiny_models.CONFIGS[hf["model_type"]](**hf)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_is_read_whole(name: str, tmp_path: Path):
    hf = read(tmp_path, name)
    config = ModelConfig.from_hf(hf)
    assert hf_keys.warnings_of(hf, config.family, name) == []
    with torch.device("meta"):
        model: Any = transformers.AutoModelForCausalLM.from_config(transformers_config(hf))
    assert config.parameters() == model.num_parameters() == PUBLISHED[name][1]


def shrink(hf: dict[str, Any]) -> dict[str, Any]:
    """The same keys with small sizes; positions exceed the original length several times."""
    wide = hf["hidden_size"] != hf["num_attention_heads"] * hf.get("head_dim", 128)
    small = tiny_models.SIZES | {"hidden_size": 40 if wide else 32, "head_dim": 8}
    small |= {
        key: {**hf[key], "original_max_position_embeddings": 8}
        for key in ("rope_scaling", "rope_parameters")
        if key in hf
    }
    return hf | {key: value for key, value in small.items() if key in hf}


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_logits_and_gradients_of_a_small_one(name: str, tmp_path: Path):
    config = transformers_config(shrink(read(tmp_path, name)))
    config.pad_token_id = None
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval().float()
    tokens = tiny_models.tokens(2, 40)
    assert_parity(model, tokens, np.ones_like(tokens))
