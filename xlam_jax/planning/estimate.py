"""What a step costs, computed from the config alone: exact where it is a count, close where a compiler decides.

Axes: B rows, T tokens, D model, V vocabulary, E experts.
"""

from math import prod
from typing import Any, NamedTuple

from xlam_jax.config import Resolved
from xlam_jax.models.attention import computed_pairs as xla_pairs
from xlam_jax.models.flash import computed_pairs as splash_pairs
from xlam_jax.planning.hlo import Collective, Instruction
from xlam_jax.training.setup import Layout

MATMULS = {"splash_mha_fwd": 2, "splash_mha_dkv": 5, "splash_mha_dq": 3}
"""Matrix products over each pair that a splash kernel computes; dkv has one less where dq is a kernel of its own."""


class Estimate(NamedTuple):
    """Of one device and one step."""

    arguments: float
    """Bytes of state, frozen weights and batch."""
    temporaries: float
    """Bytes, roughly."""
    flops: float
    collectives: list[Collective]
    """The fewest that the layout needs; those of a few numbers are left out."""
    bytes: float
    """Of memory traffic, at the least: weights, activations and state once for each use."""


def arguments(layout: Layout, batch: Any) -> float:
    """Bytes of what a step is given, on one device."""
    import jax

    leaves = jax.tree.leaves((layout.state, layout.frozen, batch))
    return float(sum(prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves))


def estimate(resolved: Resolved, layout: Layout, batch: Any) -> Estimate:
    """Computes it."""
    import jax

    from xlam_jax.models.params import is_adapter

    config, model, mesh = resolved.config, resolved.model, layout.mesh.shape
    remat, kernels = config.model.remat, layout.kernels
    rows = config.train.batch_size / (mesh["data"] * mesh["fsdp"] * mesh["expert"])
    tokens = rows * config.data.sequence_length / mesh["context"]
    parts, heads = config.train.microbatches, model.heads / mesh["tensor"]
    width = layout.dtype.itemsize

    # ---- operations ------------------------------------------------------------------------------------------------
    chosen = model.experts_per_token or 1
    qkv = 2 * model.hidden_size * model.head_dim * (model.heads + 2 * model.kv_heads) / mesh["tensor"]
    out = 2 * model.hidden_size * model.head_dim * heads
    up, down = (n * 2 * model.hidden_size * model.mlp_size * chosen / mesh["tensor"] for n in (2, 1))
    router = 2 * model.hidden_size * model.experts
    head = 2 * model.hidden_size * model.vocab_size / mesh["tensor"]
    pairs = attention_pairs(resolved, layout)
    per_pair = 2 * model.head_dim * heads * rows / tokens if tokens else 0.0
    forward = 2 * pairs["forward"] * per_pair
    backward = (pairs["backward_products"]) * pairs["backward"] * per_pair
    kept_hidden = remat == "none" or (remat == "dots" and (not model.experts or kernels.experts != "xla"))
    again = 0.0 if kept_hidden else up
    again += 0.0 if remat == "none" else out + router
    again += 0.0 if remat in ("none", "dots") else qkv
    again += forward if remat == "full" else 0.0
    products = qkv + out + router + up + down
    passes = 3 if model.lora is None else 2
    layer = passes * products + forward + backward + again
    flops = model.layers * layer + (passes + 1) * head
    if model.lora:
        flops += 3 * _adapter_flops(resolved, mesh["tensor"])
    if layout.objective.adapters_off:
        flops += model.layers * (products + forward) + head
    flops *= tokens

    # ---- exchanges -------------------------------------------------------------------------------------------------
    exchanged: list[Collective] = []

    def add(kind: str, axis: str, size: float, times: int) -> None:
        share = (mesh[axis] - 1) / mesh[axis]
        if share and size:
            exchanged.append(Collective(kind, (axis,), int(size * share), times, ()))

    weights = jax.tree_util.tree_leaves_with_path((layout.state.params, layout.frozen))
    gathers = 1 if remat == "none" else 2
    rounded = 2 if config.model.reduce_dtype == "bfloat16" else 4
    for path, leaf in weights:
        if "fsdp" not in jax.tree.leaves(tuple(leaf.sharding.spec)):
            continue
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        here = prod(leaf.sharding.shard_shape(leaf.shape)) * mesh["fsdp"]
        turns = parts * (gathers if "blocks" in name else 1)
        add("all-gather", "fsdp", here * min(leaf.dtype.itemsize, 4 if "router" in name else width), turns)
        if name.startswith("0."):
            add("reduce-scatter", "fsdp", here * rounded, parts)
    activations = tokens / parts * model.hidden_size
    passes_over = 2 + (remat not in ("none", "dots"))
    add("all-reduce", "tensor", 2 * activations * width, 2 * model.layers * parts * passes_over)
    kv = 2 * tokens / parts * mesh["context"] * model.head_dim * model.kv_heads / mesh["tensor"]
    add("all-gather", "context", kv * 4, model.layers * parts * (1 + (remat not in ("none", "dots"))))
    add("reduce-scatter", "context", kv * 4, model.layers * parts)
    if model.experts:
        add("all-to-all", "expert", activations * chosen * width, model.layers * parts * (5 if remat == "none" else 6))
    trained = sum(prod(leaf.sharding.shard_shape(leaf.shape)) for path, leaf in weights if path[0].idx == 0)
    add("all-reduce", "data", 2.0 * 4 * trained, 1)

    # ---- memory ----------------------------------------------------------------------------------------------------
    local = sum(
        prod(leaf.sharding.shard_shape(leaf.shape)) * mesh["fsdp"]
        for path, leaf in weights
        if "blocks" in jax.tree_util.keystr(path) and not is_adapter(str(getattr(path[-1], "key", "")))
    )
    one_layer = local / model.layers
    hidden = 2 * model.mlp_size * chosen / mesh["tensor"]
    attended = (model.heads + 2 * model.kv_heads) * model.head_dim / mesh["tensor"]
    kept = model.hidden_size * (remat != "offload")
    kept += {"full": 0, "offload": 0, "minimal": heads * model.head_dim}.get(remat, attended + model.hidden_size)
    kept += hidden if kept_hidden else 0
    temporaries = model.layers * kept * tokens / parts * width
    temporaries += 4 * trained * (2 if parts > 1 else 1)
    temporaries += one_layer * (2 * width + (0 if model.lora else rounded))
    temporaries += 3 * hidden * tokens / parts * width + 8 * activations * 4
    traffic = 3 * parts * gathers * local * width + 8 * 4 * trained
    traffic += model.layers * tokens * (12 * model.hidden_size + 4 * hidden) * width
    return Estimate(arguments(layout, batch), temporaries, flops, exchanged, traffic)


def _adapter_flops(resolved: Resolved, tensor: int) -> float:
    """Of one token, forward: 2 for each weight of an adapter."""
    from xlam_jax.training.cost import trainable_sizes

    model = resolved.model
    share = model.experts_per_token / model.experts if model.experts else 1.0
    return sum(
        2 * size * (share if {"w1", "w2", "w3"} & {name.split(".")[-1][:2]} else 1.0) / tensor
        for name, size in trainable_sizes(model).items()
    )


def attention_pairs(resolved: Resolved, layout: Layout) -> dict[str, float]:
    """Pairs of a query and a key that are computed for a row, on one device and for one head: in a forward and in a
    backward pass, and the matrix products of the latter."""
    keys = resolved.config.data.sequence_length
    tokens, window = keys // layout.mesh.shape["context"], resolved.model.sliding_window
    if layout.kernels.attention == "splash":
        pairs = splash_pairs(tokens, keys, window)
        if "splash_mha_dq" in pairs:
            products = 4 * pairs["splash_mha_dkv"] + 3 * pairs["splash_mha_dq"]
            return {"forward": pairs["splash_mha_fwd"], "backward": 1.0, "backward_products": products}
        return {"forward": pairs["splash_mha_fwd"], "backward": pairs["splash_mha_dkv"], "backward_products": 5}
    computed = keys * (keys + 128) / 2 if layout.kernels.attention == "pallas" else xla_pairs(tokens, keys, window)
    return {"forward": computed, "backward": computed, "backward_products": 5}


def kernel_flops(resolved: Resolved, layout: Layout, one: Instruction) -> float | None:
    """What a splash kernel computes, which its own text does not tell; None for another one."""
    name = next((name for name in MATMULS if one.name.startswith(name)), None)
    if name is None:
        return None
    keys = resolved.config.data.sequence_length
    tokens = keys // layout.mesh.shape["context"]
    pairs = splash_pairs(tokens, keys, resolved.model.sliding_window)
    heads = resolved.model.heads // layout.mesh.shape["tensor"]
    config, mesh = resolved.config, layout.mesh.shape
    rows = config.train.batch_size // (mesh["data"] * mesh["fsdp"] * mesh["expert"] * config.train.microbatches)
    matmuls = MATMULS[name] - (name == "splash_mha_dkv" and "splash_mha_dq" in pairs)
    return 2.0 * matmuls * pairs[name] * heads * rows * resolved.model.head_dim
