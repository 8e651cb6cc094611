"""The costs of a step, computed from the config alone: exact if they are counts, approximate if a compiler decides.

Axes: B rows, T tokens, D model width, V vocabulary, E experts.
"""

from collections.abc import Collection, Sequence
from math import prod
from typing import Any, NamedTuple

from xlam_jax.config import Resolved
from xlam_jax.models.attention import computed_pairs as xla_pairs
from xlam_jax.models.flash import KernelOptions
from xlam_jax.models.flash import computed_pairs as kernel_pairs
from xlam_jax.models.weights_table import LOGICAL_AXES
from xlam_jax.parallel.mesh import RULES
from xlam_jax.planning.hlo import Collective, Instruction, Shape
from xlam_jax.training.cost import adapter_elements_per_token, used_elements
from xlam_jax.training.setup import Layout

MATMULS = {
    "splash_mha_fwd": 2,
    "splash_mha_dkv": 5,
    "splash_mha_dq": 3,
    "flash_forward": 2,
    "flash_dkv": 4,
    "flash_dq": 3,
}
"""Matrix products per pair of a query and a key in each kernel of attention; splash's dkv has one less if dq is a
separate kernel."""

QKV, HIDDEN = ("q", "k", "v"), ("w1", "w3")
"""Weights whose products a remat policy keeps under the names "qkv" and "hidden"."""


class Estimate(NamedTuple):
    """The costs of one step on one device."""

    arguments: float
    """Bytes of state, frozen weights and batch."""
    temporaries: float
    """Bytes, approximately."""
    flops: float
    collectives: list[Collective]
    """The minimum that the layout needs, without those of a few numbers."""
    bytes: float
    """Minimum memory traffic: weights, activations and state once per use."""


class _Step(NamedTuple):
    """The sizes from which the costs are computed, on one device."""

    resolved: Resolved
    layout: Layout
    rows: float
    """Rows of the batch."""
    tokens: float
    """Tokens of the batch."""
    trained: int
    """Elements of the trainable parameters that this device stores."""
    blocks: int
    """Elements of the blocks' weights without adapters, gathered along fsdp."""

    @property
    def keeps_hidden(self) -> bool:
        """Whether the MLP's hidden activations are kept for the backward pass."""
        remat = self.resolved.config.model.remat
        by_name = not self.resolved.model.experts or self.layout.kernels.experts != "xla"
        return remat == "none" or (remat == "dots" and by_name)

    @property
    def hidden(self) -> float:
        """Elements of the MLP's hidden activations per token."""
        model = self.resolved.model
        return 2 * model.mlp_size * (model.experts_per_token or 1) / self.layout.mesh.shape["tensor"]

    @property
    def reduced_bytes(self) -> int:
        """Bytes per element of a gradient that is summed over devices."""
        return 2 if self.resolved.config.model.reduce_dtype == "bfloat16" else 4

    @property
    def gathers(self) -> int:
        """How often a block's weights are gathered per microbatch."""
        return 1 if self.resolved.config.model.remat == "none" else 2


def arguments(layout: Layout, batch: Any) -> float:
    """Bytes of a step's arguments on one device."""
    import jax

    leaves = jax.tree.leaves((layout.state, layout.frozen, batch))
    return float(sum(prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves))


def estimate(resolved: Resolved, layout: Layout, batch: Any) -> Estimate:
    """Estimates the costs of a step. `layout` and `batch` are abstract."""
    from xlam_jax.models.params import is_adapter

    config, mesh = resolved.config, layout.mesh.shape
    rows = config.train.batch_size / (mesh["data"] * mesh["fsdp"] * mesh["expert"])
    weights = _parameters(layout)
    step = _Step(
        resolved,
        layout,
        rows=rows,
        tokens=rows * config.data.sequence_length / mesh["context"],
        trained=sum(prod(leaf.sharding.shard_shape(leaf.shape)) for path, leaf in weights if path[0].idx == 0),
        blocks=sum(
            prod(leaf.sharding.shard_shape(leaf.shape)) * mesh["fsdp"]
            for path, leaf in weights
            if _in_blocks(path) and not is_adapter(str(getattr(path[-1], "key", "")))
        ),
    )
    temporaries, traffic = _temporaries(step), _traffic(step)
    return Estimate(arguments(layout, batch), temporaries, _flops(step), _collectives(step), traffic)


def _parameters(layout: Layout) -> list[Any]:
    """Paths and leaves of the trainable and frozen parameters; a path starts with 0 or 1."""
    import jax

    return jax.tree_util.tree_leaves_with_path((layout.state.params, layout.frozen))


def _in_blocks(path: Any) -> bool:
    import jax

    return "blocks" in jax.tree_util.keystr(path)


def _flops(step: _Step) -> float:
    """Floating-point operations, with those that the backward pass repeats."""
    resolved, layout = step.resolved, step.layout
    model, remat, tensor = resolved.model, resolved.config.model.remat, layout.mesh.shape["tensor"]
    products = _products(step)
    of_layer = sum(flops for name, flops in products.items() if model.weight(name).in_block)
    head = products["embedding" if model.tie_embeddings else "head"]
    pairs = attention_pairs(resolved, layout)
    per_pair = 2 * model.head_dim * (model.heads / tensor) * step.rows / step.tokens if step.tokens else 0.0
    forward = 2 * pairs["forward"] * per_pair
    backward = pairs["backward_products"] * per_pair
    again = 0.0 if step.keeps_hidden else sum(products[name] for name in HIDDEN)
    again += 0.0 if remat == "none" else products.get("router", 0.0)
    again += 0.0 if remat in ("none", "dots") else sum(products[name] for name in (*QKV, "o"))
    again += forward if remat == "full" else 0.0
    passes = 3 if model.lora is None else 2
    flops = model.layers * (passes * of_layer + forward + backward + again) + (passes + 1) * head
    if model.lora:
        flops += 3 * 2 * adapter_elements_per_token(model) / tensor
    if layout.objective.adapters_off:
        flops += model.layers * (of_layer + forward) + head
    return flops * step.tokens


def _products(step: _Step) -> dict[str, float]:
    """Operations per token of the product with each weight, forward, on one device; of a block's weights, per layer."""
    model, mesh = step.resolved.model, step.layout.mesh.shape
    products: dict[str, float] = {}
    for weight in model.weights:
        elements = used_elements(model, weight) / (model.layers if weight.in_block else 1)
        is_split = "tensor" in {RULES[LOGICAL_AXES[axis]] for axis in weight.axes}
        products[weight.name] = 2 * elements / (mesh["tensor"] if is_split else 1)
    return products


def _collectives(step: _Step) -> list[Collective]:
    """The minimum exchange between devices, one element per kind of exchange and parameter."""
    import jax

    config, model, mesh = step.resolved.config, step.resolved.model, step.layout.mesh.shape
    remat, parts, width = config.model.remat, config.train.microbatches, step.layout.dtype.itemsize
    collectives: list[Collective] = []

    def add(kind: str, axis: str, size: float, times: int) -> None:
        share = (mesh[axis] - 1) / mesh[axis]
        if share and size:
            collectives.append(Collective(kind, (axis,), int(size * share), times, ()))

    for path, leaf in _parameters(step.layout):
        if "fsdp" not in jax.tree.leaves(tuple(leaf.sharding.spec)):
            continue
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        gathered = prod(leaf.sharding.shard_shape(leaf.shape)) * mesh["fsdp"]
        times = parts * (step.gathers if "blocks" in name else 1)
        add("all-gather", "fsdp", gathered * min(leaf.dtype.itemsize, 4 if "router" in name else width), times)
        if name.startswith("0."):
            add("reduce-scatter", "fsdp", gathered * step.reduced_bytes, parts)
    activations = step.tokens / parts * model.hidden_size
    repeated = remat not in ("none", "dots")
    add("all-reduce", "tensor", 2 * activations * width, 2 * model.layers * parts * (2 + repeated))
    kv = 2 * step.tokens / parts * mesh["context"] * model.head_dim * model.kv_heads / mesh["tensor"]
    add("all-gather", "context", kv * 4, model.layers * parts * (1 + repeated))
    add("reduce-scatter", "context", kv * 4, model.layers * parts)
    if model.experts:
        size = activations * model.experts_per_token * width
        add("all-to-all", "expert", size, model.layers * parts * (5 if remat == "none" else 6))
    add("all-reduce", "data", 2.0 * 4 * step.trained, 1)
    return collectives


def _temporaries(step: _Step) -> float:
    """Bytes of activations, gradients and gathered weights, approximately."""
    config, model, tensor = step.resolved.config, step.resolved.model, step.layout.mesh.shape["tensor"]
    remat, parts, width = config.model.remat, config.train.microbatches, step.layout.dtype.itemsize
    attention = (model.heads + 2 * model.kv_heads) * model.head_dim / tensor
    kept = model.hidden_size * (remat != "offload")
    named = {"full": 0, "offload": 0, "minimal": model.heads / tensor * model.head_dim}
    kept += named.get(remat, attention + 2 * model.hidden_size)
    kept += step.hidden if step.keeps_hidden else 0
    temporaries = model.layers * kept * step.tokens / parts * width
    temporaries += 4 * step.trained * (2 if parts > 1 else 1)
    temporaries += step.blocks / model.layers * (2 * width + (0 if model.lora else step.reduced_bytes))
    activations = step.tokens / parts * model.hidden_size
    return temporaries + 3 * step.hidden * step.tokens / parts * width + 8 * activations * 4


def _traffic(step: _Step) -> float:
    """Bytes that move between the device's memory and its processors."""
    model, parts, width = step.resolved.model, step.resolved.config.train.microbatches, step.layout.dtype.itemsize
    traffic = 3 * parts * step.gathers * step.blocks * width + 8 * 4 * step.trained
    return traffic + model.layers * step.tokens * (12 * model.hidden_size + 4 * step.hidden) * width


def attention_pairs(resolved: Resolved, layout: Layout) -> dict[str, float]:
    """Returns the number of pairs of a query and a key that a forward pass computes per row, on one device and for one
    head, and the number of pairs times matrix products of a backward pass."""
    keys = resolved.config.data.sequence_length
    tokens, window = keys // layout.mesh.shape["context"], resolved.model.sliding_window
    if layout.kernels.attention == "xla":
        pairs = xla_pairs(tokens, keys, window)
        return {"forward": pairs, "backward_products": 5 * pairs}
    by_kernel = _pairs_by_kernel(resolved, layout)
    forward, *backward = by_kernel
    products = sum(_matmuls(kernel, by_kernel) * by_kernel[kernel] for kernel in backward)
    return {"forward": by_kernel[forward], "backward_products": products}


def _pairs_by_kernel(resolved: Resolved, layout: Layout) -> dict[str, float]:
    kernels, model, keys = layout.kernels, resolved.model, resolved.config.data.sequence_length
    options = KernelOptions(kernels.attention, model.sliding_window, kernels.interpret, kernels.on_chip)
    return kernel_pairs(keys // layout.mesh.shape["context"], keys, model.head_dim, options)


def _matmuls(kernel: str, by_kernel: Collection[str]) -> int:
    return MATMULS[kernel] - (kernel == "splash_mha_dkv" and "splash_mha_dq" in by_kernel)


def kernel_flops(
    resolved: Resolved, layout: Layout, instruction: Instruction, operands: Sequence[Shape]
) -> float | None:
    """Operations of a kernel whose text does not contain them; None for other instructions."""
    kernel = instruction.kernel
    if kernel == "grouped_product":  # of the experts' numbers of rows, of x [A, I] and of weights: [A, O]
        return 2.0 * operands[1].elements * instruction.results[0].sizes[1]
    if kernel == "grouped_outer":  # of the experts' first and last rows, of x [A, I] and of dy [A, O]: [E, I, O]
        return 2.0 * operands[2].elements * operands[3].sizes[1]
    kernel = next((name for name in MATMULS if kernel.startswith(name)), "")  # splash appends its variant
    if not kernel:
        return None
    config, model, mesh = resolved.config, resolved.model, layout.mesh.shape
    rows = config.train.batch_size // (mesh["data"] * mesh["fsdp"] * mesh["expert"] * config.train.microbatches)
    by_kernel = _pairs_by_kernel(resolved, layout)
    matmuls, pairs = _matmuls(kernel, by_kernel), by_kernel[kernel]
    return 2.0 * matmuls * pairs * (model.heads // mesh["tensor"]) * rows * model.head_dim
