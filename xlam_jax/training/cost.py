"""What a step costs: floating-point operations, the device's peak, memory."""

from typing import Any, NamedTuple

from xlam_jax.models.config import ModelConfig

PEAK_FLOPS = {
    "A100": 312e12,
    "H100": 989e12,
    "H200": 989e12,
    "H20": 148e12,
    "B200": 2250e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7x": 2307e12,
}
"""Dense bf16 operations a second, by the makers' data sheets; a part of the name that JAX gives a device."""


def peak_flops(device_kind: str) -> float | None:
    """A device's peak, or None where it is not known (a CPU)."""
    names = [name for name in PEAK_FLOPS if name in device_kind]
    return PEAK_FLOPS[max(names, key=len)] if names else None


def flops_per_token(model: ModelConfig, sequence_length: int) -> float:
    """Model FLOPs of one token, forward and backward; rematerialization is not counted.

    2 operations a weight and token in the forward pass, and as many for each of the two products of the backward pass;
    a frozen weight has only one of these (Chowdhery et al., 2204.02311, appendix B). Attention: half of the scores, as
    they are causal, of a row of one segment; a window shortens it.
    """
    from xlam_jax.models.params import is_adapter

    mlp = 3 * model.hidden_size * model.mlp_size * (model.experts_per_token or 1)
    attention = 2 * model.hidden_size * model.head_dim * (model.heads + model.kv_heads)
    weights = model.layers * (attention + mlp + model.hidden_size * model.experts)
    weights += model.hidden_size * model.vocab_size
    seen = sequence_length / 2 if model.sliding_window is None else min(sequence_length / 2, model.sliding_window)
    scores = 2 * 2 * model.layers * model.heads * model.head_dim * seen
    if model.lora is None:
        return 6.0 * weights + 3 * scores
    share = (model.experts_per_token / model.experts) if model.experts else 1.0
    adapters = sum(
        size * (share if {"w1", "w2", "w3"} & {name.split(".")[-1][:2]} else 1.0)
        for name, size in trainable_sizes(model).items()
        if is_adapter(name)
    )
    return 4.0 * weights + 6.0 * adapters + 3 * scores


def trainable_sizes(model: ModelConfig) -> dict[str, int]:
    """Elements of each parameter that trains, by its path."""
    import jax

    from xlam_jax.models.params import shapes, trainable

    leaves = jax.tree_util.tree_leaves_with_path(trainable(model, shapes(model))[0])
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf.size for path, leaf in leaves}


class Memory(NamedTuple):
    """Bytes of one device that a compiled step needs."""

    arguments: int
    """State, frozen weights and batch."""
    temporaries: int
    outputs: int
    """What the step gives that is not written in place."""

    @property
    def peak(self) -> int:
        """All of it at the same time."""
        return self.arguments + self.temporaries + self.outputs


def memory(compiled: Any) -> Memory:
    """The memory that a compiled step says it needs."""
    told = compiled.memory_analysis()
    outputs = told.output_size_in_bytes - told.alias_size_in_bytes
    return Memory(told.argument_size_in_bytes, told.temp_size_in_bytes, max(0, outputs))
