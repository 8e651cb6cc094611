"""The config.json that the metadata of a GGUF file describe."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from xlam_jax.errors import UserError
from xlam_jax.gguf_file import GGUFFile, open_gguf

ARCHITECTURES = {
    "llama": ("llama", "LlamaForCausalLM"),
    "qwen2": ("qwen2", "Qwen2ForCausalLM"),
    "qwen3": ("qwen3", "Qwen3ForCausalLM"),
}
"""`general.architecture` → `model_type` and architecture of a config.json. llama.cpp stores Mistral as llama."""
SIZES = {
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
}
"""Metadata key after the architecture → key of config.json."""
REQUIRED = ("block_count", "embedding_length", "feed_forward_length", "attention.head_count")
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "expert_count": (0,),
    "expert_used_count": (0,),
    "attention.causal": (True,),
    "use_parallel_residual": (False,),
    "rope.scaling.type": ("none", "linear"),
    "rope.scaling.attn_factor": (1.0,),
    "rope.scale_linear": (1.0,),
    "attention.scale": (0.0,),
    "logit_scale": (0.0, 1.0),
    "residual_scale": (0.0, 1.0),
    "embedding_scale": (0.0, 1.0),
}
"""Keys that change what a model computes, with the values under which they do not (linear scaling is read)."""
READ = {
    *SIZES, "vocab_size", "attention.key_length", "attention.value_length", "rope.dimension_count",
    "rope.scaling.factor", "rope.scaling.original_context_length", "rope.scaling.finetuned", "tensor_data_layout",
}  # fmt: skip
"""Keys that are read, or change nothing."""
TOKENS = {
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
    "padding_token_id": "pad_token_id",
}
"""Metadata key after `tokenizer.ggml.` → key of config.json."""
HEAD, EMBEDDING, ROPE_FACTORS = "output.weight", "token_embd.weight", "rope_freqs.weight"
"""Names of tensors."""
DTYPES = {"BF16": "bfloat16", "F16": "float16"}
"""Tensor types that are a dtype of config.json; every other is dequantized to float32."""


def read_gguf_config(path: Path) -> dict[str, Any]:
    """Returns the config.json of a GGUF file's model.

    Raises `UserError` as `GGUFFile`, for an architecture that is not read, and for metadata that this project's models
    cannot represent.
    """
    file = open_gguf(path)
    architecture = file.metadata.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise UserError(
            f"{path}: general.architecture is {architecture!r}; {', '.join(ARCHITECTURES)} are read from GGUF files; "
            "use the model's Hugging Face folder"
        )
    prefix = f"{architecture}."
    own = {key.removeprefix(prefix): value for key, value in file.metadata.items() if key.startswith(prefix)}
    _check(file, prefix, own)
    model_type, name = ARCHITECTURES[architecture]
    config = {"architectures": [name], "model_type": model_type, "vocab_size": _vocabulary(file, own)}
    config |= {key: own[source] for source, key in SIZES.items() if source in own}
    return config | _head_dim(path, model_type, own) | _rope(own) | _tokens(file) | _stored(file)


def _check(file: GGUFFile, prefix: str, own: Mapping[str, Any]) -> None:
    """Raises one `UserError` with everything that this project does not compute."""
    wrong = [f"{prefix}{key} is missing" for key in REQUIRED if key not in own]
    wrong += [
        f"{prefix}{key} is {str(value)[:100]}" + (", which differs between layers" if isinstance(value, list) else "")
        for key, value in own.items()
        if (key not in READ or isinstance(value, list)) and value not in NEUTRAL.get(key, ())
    ]
    if ROPE_FACTORS in file.tensors:
        wrong.append(f"{ROPE_FACTORS} scales rotary positions by factors whose parameters the file does not contain")
    if wrong:
        raise UserError(
            f"{file.path}: {'; '.join(wrong)}; this is not read from GGUF files: use the model's Hugging Face folder"
        )


def _vocabulary(file: GGUFFile, own: Mapping[str, Any]) -> int:
    if EMBEDDING not in file.tensors:
        raise UserError(f"{file.path}: {EMBEDDING} is missing; download this file again")
    rows = file.tensors[EMBEDDING].shape[0]
    if own.get("vocab_size", rows) != rows:
        raise UserError(f"{file.path}: vocab_size is {own['vocab_size']}, and {EMBEDDING} has {rows} rows")
    return rows


def _head_dim(path: Path, model_type: str, own: Mapping[str, Any]) -> dict[str, int]:
    """Returns `head_dim`, unless it follows from the other sizes and config.json of this type does not contain it."""
    derived = own["embedding_length"] // own["attention.head_count"]
    size = own.get("attention.key_length", own.get("rope.dimension_count", derived))
    for key in ("attention.value_length", "rope.dimension_count"):
        if own.get(key, size) != size:
            raise UserError(f"{path}: heads of {size} values, and {key} is {own[key]}; they must be equal")
    return {} if model_type == "qwen2" and size == derived else {"head_dim": size}


def _rope(own: Mapping[str, Any]) -> dict[str, Any]:
    if own.get("rope.scaling.type") != "linear":
        return {}
    return {"rope_scaling": {"rope_type": "linear", "factor": own.get("rope.scaling.factor", 1.0)}}


def _tokens(file: GGUFFile) -> dict[str, int]:
    ids = {key: file.metadata.get(f"tokenizer.ggml.{source}") for source, key in TOKENS.items()}
    return {key: value for key, value in ids.items() if value is not None}


def _stored(file: GGUFFile) -> dict[str, Any]:
    """Returns what the tensors say: whether the head is the embedding, and the dtype of the matrices."""
    dtypes = {DTYPES.get(place.type, "float32") for place in file.tensors.values() if len(place.shape) > 1}
    return {
        "tie_word_embeddings": HEAD not in file.tensors,
        "dtype": dtypes.pop() if len(dtypes) == 1 else "float32",
    }
