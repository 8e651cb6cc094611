"""Writes small GGUF files, as llama.cpp's converter writes them, from models and tokenizers of transformers."""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CONTROL, NORMAL = 3, 1
"""Types of tokens."""


def interleaved(rows: np.ndarray, heads: int) -> np.ndarray:
    """Returns the rows of a projection of queries or keys as llama.cpp stores them for the Llama architecture."""
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, -1)
    return halves.swapaxes(1, 2).reshape(rows.shape)


def random_blocks(shape: tuple[int, ...], name: str, seed: int) -> np.ndarray:
    """Returns random bytes of a tensor of a type that `gguf` cannot write: every scale is a finite number."""
    tensor_type = gguf.GGMLQuantizationType[name]
    block, size = gguf.GGML_QUANT_SIZES[tensor_type]
    generator = np.random.default_rng(seed)
    blocks = generator.integers(0, 256, (*shape[:-1], shape[-1] // block, size), dtype=np.uint8)
    scale = np.frombuffer(np.float16(0.01).tobytes(), np.uint8)
    places = {"Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (size - 2,), "Q3_K": (size - 2,), "Q2_K": (size - 4, size - 2)}
    for at in places[name]:
        blocks[..., at : at + 2] = scale
    return blocks.reshape(*shape[:-1], -1)


def write_gguf(
    path: Path,
    model: Any,
    *,
    architecture: str = "llama",
    quantization: str = "F32",
    tokenizer: PreTrainedTokenizerFast | None = None,
    metadata: dict[str, Any] | None = None,
) -> Path:
    """Writes a model's matrices in a quantization, and its vectors in float32. `metadata`: entries that are integers,
    decimals or texts."""
    config = model.config
    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_name("small")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if architecture == "llama":
        writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    for key, value in (metadata or {}).items():
        add = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32}[type(value)]
        add(key, value)
    if tokenizer is not None:
        _add_tokenizer(writer, tokenizer)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.upper()], config.num_hidden_layers)
    for at, (key, tensor) in enumerate(model.state_dict().items()):
        if key == "lm_head.weight" and config.tie_word_embeddings:
            continue
        value = tensor.float().numpy()
        for projection, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if projection in key and architecture == "llama":
                value = interleaved(value, heads)
        _add_tensor(writer, names.get_name(key, (".weight", ".bias")), value, quantization, at)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_tensor(writer: gguf.GGUFWriter, name: str | None, value: np.ndarray, quantization: str, seed: int) -> None:
    assert name is not None
    if value.ndim == 1 or quantization == "F32":
        writer.add_tensor(name, value)
        return
    tensor_type = gguf.GGMLQuantizationType[quantization]
    try:
        blocks = gguf.quantize(value, tensor_type)
    except NotImplementedError:
        blocks = random_blocks(value.shape, quantization, seed)
    writer.add_tensor(name, blocks, raw_dtype=tensor_type)


def _add_tokenizer(writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerFast) -> None:
    tokens = [text for text, _ in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])]
    special = set(tokenizer.all_special_tokens)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types([CONTROL if token in special else NORMAL for token in tokens])
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(merge) for merge in merges])
    writer.add_add_bos_token(False)
    writer.add_eos_token_id(tokens.index("<|im_end|>"))
    writer.add_pad_token_id(tokens.index("<|endoftext|>"))
    writer.add_chat_template(CHATML)
