"""The one table from Hugging Face tensors to our parameters, used both ways.

Our parameters stack the layers (and experts) along leading axes; Hugging Face has one tensor each, with the heads
flattened into one axis, query head h = n × G + g. Each row of the table names the axes on both sides, so that reading
and writing are the same permutation, and nothing is ever scaled.

Axes: L layers, E experts, D model, N key/value heads, G queries a key/value head, K head size, F MLP width,
V vocabulary.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from xlam_jax.models.config import ModelConfig

BLOCK = "model.layers.{L}."

EMBEDDING = (("embedding", "VD", "model.embed_tokens.weight", "V D"),)

ATTENTION = (
    ("blocks.attention_norm", "LD", BLOCK + "input_layernorm.weight", "D"),
    ("blocks.q", "LDNGK", BLOCK + "self_attn.q_proj.weight", "NGK D"),
    ("blocks.k", "LDNK", BLOCK + "self_attn.k_proj.weight", "NK D"),
    ("blocks.v", "LDNK", BLOCK + "self_attn.v_proj.weight", "NK D"),
    ("blocks.o", "LNGKD", BLOCK + "self_attn.o_proj.weight", "D NGK"),
    ("blocks.mlp_norm", "LD", BLOCK + "post_attention_layernorm.weight", "D"),
)

DENSE = (
    ("blocks.w1", "LDF", BLOCK + "mlp.gate_proj.weight", "F D"),
    ("blocks.w3", "LDF", BLOCK + "mlp.up_proj.weight", "F D"),
    ("blocks.w2", "LFD", BLOCK + "mlp.down_proj.weight", "D F"),
)

EXPERTS = (
    ("blocks.router", "LDE", BLOCK + "block_sparse_moe.gate.weight", "E D"),
    ("blocks.w1", "LEDF", BLOCK + "block_sparse_moe.experts.{E}.w1.weight", "F D"),
    ("blocks.w3", "LEDF", BLOCK + "block_sparse_moe.experts.{E}.w3.weight", "F D"),
    ("blocks.w2", "LEFD", BLOCK + "block_sparse_moe.experts.{E}.w2.weight", "D F"),
)

FINAL_NORM = (("final_norm", "D", "model.norm.weight", "D"),)
HEAD = (("head", "VD", "lm_head.weight", "V D"),)


@dataclass(frozen=True)
class Tensor:
    """One tensor of a Hugging Face file, and its place in our tree."""

    key: str
    """Its name in the file, `model.layers.3.self_attn.q_proj.weight`."""
    shape: tuple[int, ...]
    """Its shape in the file."""
    path: tuple[str, ...]
    """The parameter that holds it, `("blocks", "q")`."""
    stacked_shape: tuple[int, ...]
    """The whole parameter's shape."""
    at: tuple[int, ...]
    """Its index along the parameter's leading axes: layer, then expert."""
    order: tuple[int, ...]
    """Where each axis of the file, heads unflattened, lies in the parameter's slice."""

    def to_hf(self, parameter: Any) -> np.ndarray:
        """The file's tensor, contiguous, out of the whole parameter, which may lie elsewhere: it is indexed once."""
        return transposed(parameter[self.at], self.order).reshape(self.shape)

    def from_hf(self, tensor: np.ndarray) -> np.ndarray:
        """The parameter's slice at `at`, contiguous, out of the file's tensor."""
        sizes = self.stacked_shape[len(self.at) :]
        unflattened = tensor.reshape([sizes[axis] for axis in self.order])
        return transposed(unflattened, tuple(int(axis) for axis in np.argsort(self.order)))


def parameter(params: Mapping[str, Any], path: tuple[str, ...]) -> Any:
    """The parameter at a path."""
    for name in path:
        params = params[name]
    return params


def transposed(array: np.ndarray, order: tuple[int, ...]) -> np.ndarray:
    """The axes in another order, contiguous. XLA does it many times faster than NumPy."""
    import jax

    if order == tuple(range(len(order))):
        return np.ascontiguousarray(array)
    words = array.view(f"uint{8 * array.dtype.itemsize}").transpose(order)
    with jax.enable_x64(True):  # for f64
        return np.asarray(jax.device_put(words, jax.local_devices(backend="cpu")[0])).view(array.dtype)


def tensors(config: ModelConfig) -> Iterator[Tensor]:
    """Every tensor of a model's Hugging Face files, layer by layer."""
    yield from _rows(config, EMBEDDING, {})
    for layer in range(config.layers):
        yield from _rows(config, ATTENTION + (EXPERTS if config.experts else DENSE), {"L": layer})
    yield from _rows(config, FINAL_NORM if config.tie_embeddings else FINAL_NORM + HEAD, {})


def _rows(config: ModelConfig, table: tuple[tuple[str, str, str, str], ...], at: dict[str, int]) -> Iterator[Tensor]:
    sizes = {
        "L": config.layers,
        "E": config.experts,
        "D": config.hidden_size,
        "N": config.kv_heads,
        "G": config.heads // config.kv_heads,
        "K": config.head_dim,
        "F": config.mlp_size,
        "V": config.vocab_size,
    }
    for path, ours, key, theirs in table:
        each_expert = [{"E": expert} for expert in range(config.experts)] if "{E}" in key else [{}]
        for expert in each_expert:
            index = at | expert
            yield Tensor(
                key=key.format(**index),
                shape=tuple(prod(sizes[axis] for axis in group) for group in theirs.split()),
                path=tuple(path.split(".")),
                stacked_shape=tuple(sizes[axis] for axis in ours),
                at=tuple(index.values()),
                order=tuple(ours[len(index) :].index(axis) for axis in theirs.replace(" ", "")),
            )
