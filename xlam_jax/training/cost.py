"""The costs of a step: floating-point operations, peak rate of the device, memory."""

from typing import Any, NamedTuple

from xlam_jax.models.config import ModelConfig
from xlam_jax.models.weights_table import EMBEDDING, Weight

PEAK_FLOPS = {
    "A100": 312e12,
    "H100": 989e12,
    "H200": 989e12,
    "H20": 148e12,
    "B200": 2250e12,
    "L40S": 362e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7x": 2307e12 / 2,
}
"""Dense bf16 operations per second of a device in JAX, from data sheets, by a part of its name. A TPU7x chip is two
devices."""


def peak_flops(device_kind: str) -> float | None:
    """Returns the peak of a device in FLOP/s; None if it is unknown, as for CPUs."""
    names = [name for name in PEAK_FLOPS if name in device_kind]
    return PEAK_FLOPS[max(names, key=len)] if names else None


def flops_per_token(model: ModelConfig, sequence_length: int) -> float:
    """Returns the model FLOPs per token, forward and backward, without recomputation of activations.

    2 operations per weight and token in the forward pass, and 2 for each of the two products of the backward pass; a
    frozen weight has only one of these (Chowdhery et al., 2204.02311, appendix B). Attention: half of the scores of a
    row with one segment, as they are causal; fewer with a sliding window.
    """
    weights = sum(used_elements(model, weight) for weight in model.weights)
    window = model.sliding_window
    attended = sequence_length / 2 if window is None else min(sequence_length / 2, window)
    scores = 2 * 2 * model.layers * model.heads * model.head_dim * attended
    if model.lora is None:
        return 6.0 * weights + 3 * scores
    return 4.0 * weights + 6.0 * adapter_elements_per_token(model) + 3 * scores


def used_elements(model: ModelConfig, weight: Weight) -> int:
    """The number of a weight's elements that one token is multiplied with: of experts, only those of the token's; none
    of vectors, nor of an embedding that is only looked up."""
    if not weight.is_matrix or (weight.name == EMBEDDING.name and not model.tie_embeddings):
        return 0
    elements = weight.elements(model.axis_sizes)
    return elements * model.experts_per_token // model.experts if weight.per_expert else elements


def adapter_elements_per_token(model: ModelConfig) -> float:
    """The number of elements of adapters that one token is multiplied with."""
    from xlam_jax.models.params import is_adapter

    sizes = {path.split(".")[-1]: size for path, size in trainable_sizes(model).items()}
    share = model.experts_per_token / model.experts if model.experts else 1.0
    return sum(
        size * (share if model.weight(name).per_expert else 1.0) for name, size in sizes.items() if is_adapter(name)
    )


def trainable_sizes(model: ModelConfig) -> dict[str, int]:
    """Returns the number of elements of each trainable parameter, by path."""
    import jax

    from xlam_jax.models.params import shapes, trainable

    leaves = jax.tree_util.tree_leaves_with_path(trainable(model, shapes(model))[0])
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf.size for path, leaf in leaves}


class Memory(NamedTuple):
    """Memory of a compiled step on one device, in bytes."""

    arguments: int
    """State, frozen weights and batch."""
    temporaries: int
    outputs: int
    """Results that do not reuse the memory of an argument."""

    @property
    def peak(self) -> int:
        """The sum: all exist at the same time."""
        return self.arguments + self.temporaries + self.outputs


def memory(compiled: Any) -> Memory:
    """Returns the memory of a compiled step, from the compiler's analysis."""
    analysis = compiled.memory_analysis()
    outputs = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    return Memory(analysis.argument_size_in_bytes, analysis.temp_size_in_bytes, max(0, outputs))
