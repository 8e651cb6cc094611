"""Attention by kernels: splash attention, which comes with JAX, on a TPU, and `flash_gpu` on a GPU.

Both work on packed rows: a query attends to keys of its own segment, at or before its position in the row. Their
outputs and log-sums have the checkpoint name "attention", as those of `attention.attend` do, so that a remat policy can
keep them.

Axes: B rows, T queries, S keys, N key/value heads, H query heads (N × G), G queries per key/value head, K head size.
"""

from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from xlam_jax.parallel import mesh, opaque

LANES = 128
"""The size of a block of either kernel, in tokens, is a multiple of it."""
FUSED_BLOCKS = 8
"""Maximum number of key blocks for the fused backward kernel, which computes all three gradients: it writes the
queries' gradient once per key block."""


class KernelOptions(NamedTuple):
    """The static options of an attention kernel."""

    kernel: str
    """splash or pallas."""
    window: int | None
    interpret: bool
    """Run by the interpreter of Pallas, on any machine: for tests."""
    shared: int
    """Bytes of shared memory that a GPU gives a block of threads: selects the tiles of pallas."""


def attend(
    q_BTNGK: jax.Array, k_BSNK: jax.Array, v_BSNK: jax.Array, q_segments_BT, k_segments_BS, options: KernelOptions
):
    """Attention as in `attention.attend`, [B, T, N, G, K]; queries must be in the order of the row. The queries of a
    context shard are the two pieces that `mesh.dealt` assigns to it; keys are whole rows."""
    rows, tokens, kv_heads, group, size = q_BTNGK.shape
    q_BHTK = q_BTNGK.transpose(0, 2, 3, 1, 4).reshape(rows, kv_heads * group, tokens, size)
    k_BNSK, v_BNSK = k_BSNK.transpose(0, 2, 1, 3), v_BSNK.transpose(0, 2, 1, 3)
    q_BHTK, k_BNSK, v_BNSK = mesh.alike(q_BHTK, k_BNSK, v_BNSK)
    segments = (q_segments_BT, k_segments_BS)
    if options.kernel == "splash":
        masks = _masks_here(tokens, k_BNSK.shape[2], kv_heads * group, options)
    else:
        masks = _triton_spans(*segments, options)
    out_BHTK: Any = _attend(options, q_BHTK, k_BNSK, v_BNSK, segments, masks)
    return out_BHTK.reshape(rows, kv_heads, group, tokens, size).transpose(0, 3, 1, 2, 4)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(options: KernelOptions, q_BHTK, k_BNSK, v_BNSK, segments, masks) -> jax.Array:
    return _forward(options, q_BHTK, k_BNSK, v_BNSK, segments, masks)[0]


def _forward(options: KernelOptions, q_BHTK, k_BNSK, v_BNSK, segments, masks):
    forward = {"splash": _splash_forward, "pallas": _triton_forward}[options.kernel]
    out_BHTK, log_BHT = opaque.call(partial(forward, options), q_BHTK, k_BNSK, v_BNSK, segments, masks)
    # Named, so that a remat policy can keep both: the backward pass then needs no second forward pass.
    out_BHTK, log_BHT = checkpoint_name(out_BHTK, "attention"), checkpoint_name(log_BHT, "attention")
    return out_BHTK, (q_BHTK, k_BNSK, v_BNSK, segments, masks, out_BHTK, log_BHT)


def _backward(options: KernelOptions, saved, dout_BHTK: jax.Array):
    backward = {"splash": _splash_backward, "pallas": _triton_backward}[options.kernel]
    return *opaque.call(partial(backward, options), saved, dout_BHTK), None, None


_attend.defvjp(_forward, _backward)


def computed_pairs(tokens: int, keys: int, size: int, options: KernelOptions) -> dict[str, float]:
    """The number of query and key pairs that the kernels compute per row of one segment, for one head of a size, and
    averaged over context shards: kernel (a part of its name) → pairs, the forward kernel first."""
    return {"splash": _splash_pairs, "pallas": _triton_pairs}[options.kernel](tokens, keys, size, options)


# ---- TPU ------------------------------------------------------------------------------------------------------------


@cache
def _splash(tokens: int, keys: int, heads: int, options: KernelOptions) -> Any:
    """The arguments of the kernel for all context shards, and its masks as NumPy arrays."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    class Mask(masks.LocalMask):
        """Classifies fully masked and fully visible blocks from their corners: O(blocks), not O(tokens²)."""

        def __getitem__(self, at: Any) -> np.ndarray:
            places, first, last = self.q_sequence[at[0]], at[1].start, at[1].stop - 1
            oldest, newest, left = places.min(), places.max(), self.window_size[0]
            if newest < first or (left is not None and oldest - left > last):
                return np.zeros((1, 1), np.bool_)
            if oldest >= last and (left is None or newest - left <= first):
                return np.ones((1, 1), np.bool_)
            return super().__getitem__(at)

        __hash__ = masks.LocalMask.__hash__

    shards = keys // tokens
    mask = Mask((keys, keys), (options.window - 1 if options.window else None, 0), 0)
    if shards > 1:
        mask.q_sequence = _positions(tokens, keys).reshape(-1)
    block_q, block_kv, compute = _block(tokens, 512), _block(keys, 1024), _block(keys, 512)
    backward: dict[str, Any] = {"use_fused_bwd_kernel": True}
    if keys // block_kv > FUSED_BLOCKS:
        backward = {"block_q_dq": block_q, "block_kv_dq": compute}
    blocks = splash.BlockSizes(
        block_q=block_q,
        block_kv=block_kv,
        block_kv_compute=compute,
        block_q_dkv=block_q,
        block_kv_dkv=block_kv,
        block_kv_dkv_compute=compute,
        **backward,
    )
    kernel = splash.make_splash_mha(
        masks.MultiHeadMask([mask] * heads),
        block_sizes=blocks,
        save_residuals=True,
        head_shards=1,
        q_seq_shards=shards,
        interpret=options.interpret,
    )
    infos = (kernel.fwd_mask_info, kernel.dq_mask_info, kernel.dkv_mask_info)
    return kernel.kwargs, jax.tree.map(np.asarray, infos)


def _splash_pairs(tokens: int, keys: int, _: int, options: KernelOptions) -> dict[str, float]:
    kwargs, infos = _splash(tokens, keys, 1, options)
    blocks = kwargs["block_sizes"]
    sides = (
        ("splash_mha_fwd", infos[0], blocks.block_q * blocks.block_kv),
        ("splash_mha_dkv", infos[2], blocks.block_q_dkv * blocks.block_kv_dkv),
        ("splash_mha_dq", infos[1], (blocks.block_q_dq or 0) * (blocks.block_kv_dq or 0)),
    )
    shards = keys // tokens
    return {name: int((info.block_mask > 0).sum()) * side / shards for name, info, side in sides if info is not None}


def _block(tokens: int, most: int) -> int:
    """The largest block up to `most` that divides a number of tokens."""
    return next(size for size in (1024, 512, 256, LANES) if size <= most and tokens % size == 0)


def _masks_here(tokens: int, keys: int, heads: int, options: KernelOptions) -> Any:
    """The masks of this context shard's queries: the kernel's three tables, each cut along its queries."""
    _, infos = opaque.outside(_splash, tokens, keys, heads, options)
    shards = keys // tokens

    def cut(table: np.ndarray) -> jax.Array:
        axis = (
            0 if table.ndim == 1 else 1
        )  # the positions of the queries, or [heads, blocks of queries, blocks of keys]
        size = table.shape[axis] // shards
        return jax.lax.dynamic_slice_in_dim(jnp.asarray(table), mesh.index("context") * size, size, axis)

    return infos if shards == 1 else jax.tree.map(cut, infos)


def _scaled(q_BHTK: jax.Array) -> jax.Array:
    return (q_BHTK.astype(jnp.float32) * q_BHTK.shape[-1] ** -0.5).astype(q_BHTK.dtype)


def _splash_forward(options: KernelOptions, q_BHTK, k_BNSK, v_BNSK, segments, masks):
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash

    kwargs, _ = _splash(q_BHTK.shape[2], k_BNSK.shape[2], q_BHTK.shape[1], options)
    kernel = splash.SplashAttentionKernel(*masks, **kwargs)
    out_BHTK, (log_BHT,) = jax.vmap(kernel)(_scaled(q_BHTK), k_BNSK, v_BNSK, splash.SegmentIds(*segments))
    return out_BHTK, log_BHT


def _splash_backward(options: KernelOptions, saved, dout_BHTK):
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash

    q_BHTK, k_BNSK, v_BNSK, segments, (_, dq_mask, dkv_mask), out_BHTK, log_BHT = saved
    kwargs, _ = _splash(q_BHTK.shape[2], k_BNSK.shape[2], q_BHTK.shape[1], options)

    def of_row(q, k, v, segments, out, log, dout):
        residuals = (q, k, v, splash.SegmentIds(*segments), None, out, log, dq_mask, dkv_mask)
        # The kernel's own gradient rule; its public form would compute the forward pass again.
        return splash._splash_attention_bwd(res=residuals, do=dout, **kwargs)[3:6]

    dq, dk, dv = jax.vmap(of_row)(_scaled(q_BHTK), k_BNSK, v_BNSK, segments, out_BHTK, log_BHT, dout_BHTK)
    return _scaled(dq), dk, dv


# ---- GPU ------------------------------------------------------------------------------------------------------------


def _triton_spans(q_segments_BT, k_segments_BS, options: KernelOptions) -> Any:
    """The keys that each query of this context shard sees."""
    from xlam_jax.models import flash_gpu

    positions_T = jnp.asarray(_positions(q_segments_BT.shape[1], k_segments_BS.shape[1]))[mesh.index("context")]
    return flash_gpu.find_spans(q_segments_BT, k_segments_BS, positions_T, options.window)


def _positions(tokens: int, keys: int) -> np.ndarray:
    """The index in the row of each query, [context shards, T]."""
    shards = keys // tokens
    return np.arange(keys, dtype=np.int32).reshape(2 * shards, -1)[mesh.dealt(shards)].reshape(shards, tokens)


def _triton_pairs(tokens: int, keys: int, size: int, options: KernelOptions) -> dict[str, float]:
    from xlam_jax.models import flash_gpu

    last_BT = _positions(tokens, keys).reshape(1, -1)
    first_BT = np.maximum(last_BT - options.window + 1, 0) if options.window else np.zeros_like(last_BT)
    pairs = flash_gpu.computed_pairs(
        flash_gpu.Spans(jnp.asarray(first_BT), jnp.asarray(last_BT)), keys, flash_gpu.tiles_for(size, options.shared)
    )
    return {name: count * tokens / keys for name, count in pairs.items()}


def _triton_forward(options: KernelOptions, q_BHTK, k_BNSK, v_BNSK, _, spans):
    from xlam_jax.models import flash_gpu

    tiles = flash_gpu.tiles_for(q_BHTK.shape[3], options.shared)
    return flash_gpu.forward(q_BHTK, k_BNSK, v_BNSK, spans, tiles.forward, options.interpret)


def _triton_backward(options: KernelOptions, saved, dout_BHTK):
    from xlam_jax.models import flash_gpu

    q_BHTK, k_BNSK, v_BNSK, _, spans, out_BHTK, log_BHT = saved
    tiles = flash_gpu.tiles_for(q_BHTK.shape[3], options.shared)
    arrays = (q_BHTK, k_BNSK, v_BNSK, out_BHTK, log_BHT)
    return flash_gpu.backward(arrays, dout_BHTK, spans, tiles, options.interpret)
