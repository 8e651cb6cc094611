"""Grouped-query attention over packed rows, and rotary positions.

Axes: B rows, T queries, S keys, N key/value heads, G queries per key/value head, K head size.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from xlam_jax.models import flash
from xlam_jax.models.config import ModelConfig
from xlam_jax.models.kernels import XLA, Kernels
from xlam_jax.models.linear import dot
from xlam_jax.parallel import mesh

QUERY_CHUNK = 256
"""Queries whose scores are computed together: scores of keys after the chunk, or before its window, are skipped."""


def rope_frequencies(config: ModelConfig) -> np.ndarray:
    """Angular frequency of each pair of a head, shape [K/2], f32 (Su et al., 2104.09864)."""
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    frequency = np.float32(1.0) / np.power(np.float32(config.rope_theta), exponents)
    scaling = config.rope_scaling
    if scaling is None:
        return frequency
    slow = frequency / np.float32(scaling.factor)
    if scaling.kind == "linear":
        return slow
    if scaling.kind == "yarn":
        kept = _unscaled_share(config)
        return (slow * (1 - kept) + frequency * kept).astype(np.float32)
    # llama3: wavelengths over original/low are slowed, those under original/high stay, those between are blended.
    turns = scaling.original_max_positions * frequency / (2 * np.pi)
    blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blend = np.clip(blend, 0.0, 1.0)
    return ((1 - blend) * slow + blend * frequency).astype(np.float32)


def _unscaled_share(config: ModelConfig) -> np.ndarray:
    """YaRN: how much of each frequency stays unscaled, [K/2], 1 for the fast ones, 0 for the slow ones, and linear in
    between. The bounds are the frequencies that turn `beta_fast` and `beta_slow` times (Peng et al., 2309.00071)."""
    scaling = config.rope_scaling
    assert scaling is not None

    def turning(times: float) -> float:
        """The (fractional) index of the frequency that turns so often within the original positions."""
        turns = math.log(scaling.original_max_positions / (times * 2 * math.pi))
        return config.head_dim * turns / (2 * math.log(config.rope_theta))

    first, last = turning(scaling.beta_fast), turning(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, config.head_dim - 1)
    width = last - first or 0.001
    ramp = (np.arange(config.head_dim // 2, dtype=np.float32) - np.float32(first)) / np.float32(width)
    return 1 - np.clip(ramp, 0, 1)


def rope_factors(config: ModelConfig, positions_BT: jax.Array) -> tuple[jax.Array | float, float]:
    """What queries (a number, or one per position, [B, T]) and keys are multiplied by when they are rotated."""
    scaling = config.rope_scaling
    if scaling is None:
        return 1.0, 1.0
    if not scaling.query_scale:
        return scaling.attention_factor, scaling.attention_factor
    length = min(scaling.original_max_positions, np.iinfo(np.int32).max)  # positions are int32
    passed_BT = (positions_BT // length).astype(jnp.float32)
    query_BT = 1 + scaling.query_scale * jnp.log1p(passed_BT)
    return scaling.attention_factor * query_BT, scaling.attention_factor


def rotate(
    x_BTNGK: jax.Array, positions_BT: jax.Array, frequency: np.ndarray, factor: jax.Array | float = 1.0
) -> jax.Array:
    """Rotates the two halves of each head by position × frequency, and multiplies them by `factor` (a number, or one
    per position, [B, T]), in f32."""
    angle = positions_BT[:, :, None, None, None].astype(jnp.float32) * frequency
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    if isinstance(factor, jax.Array):
        factor = factor[:, :, None, None, None]
        cos, sin = cos * factor, sin * factor
    elif factor != 1.0:
        cos, sin = cos * factor, sin * factor
    first, second = jnp.split(x_BTNGK.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_BTNGK.dtype)


class Places(NamedTuple):
    """The positions of queries and keys in their segments, and the segments; segment 0 is padding."""

    q_positions_BT: jax.Array
    q_segments_BT: jax.Array
    k_positions_BS: jax.Array
    k_segments_BS: jax.Array


def attend(
    q_BTNGK: jax.Array,
    k_BSNK: jax.Array,
    v_BSNK: jax.Array,
    places: Places,
    *,
    window: int | None,
    kernels: Kernels = XLA,
) -> jax.Array:
    """Softmax attention, [B, T, N, G, K]: a query attends to keys of its own segment, at or before its position, within
    `window`.

    The backward pass recomputes the attention weights from each row's log-sum, so memory grows with T and not with
    T × S (Dao et al., 2205.14135). If T equals S, queries and keys must be the same rows, in order; keys that no query
    of a chunk attends to are then skipped, as distances in a row are distances of positions within a segment. The
    Pallas kernels require this order too. Their outputs for queries of padding differ from XLA's, and are not used.
    """
    if kernels.attention != "xla":
        options = flash.KernelOptions(kernels.attention, window, kernels.interpret, kernels.on_chip)
        return flash.attend(q_BTNGK, k_BSNK, v_BSNK, places.q_segments_BT, places.k_segments_BS, options)
    q_BNGTK = q_BTNGK.transpose(0, 2, 3, 1, 4)
    k_BNSK, v_BNSK = k_BSNK.transpose(0, 2, 1, 3), v_BSNK.transpose(0, 2, 1, 3)
    q_BNGTK, k_BNSK, v_BNSK = mesh.alike(q_BNGTK, k_BNSK, v_BNSK)
    out_BNGTK: jax.Array = _attend(window, q_BNGTK, k_BNSK, v_BNSK, places)  # pyright: ignore[reportAssignmentType]
    return out_BNGTK.transpose(0, 3, 1, 2, 4)


def attend_cached(
    q_BTNGK: jax.Array, parts: Sequence[tuple[jax.Array, jax.Array, Places]], *, window: int | None
) -> jax.Array:
    """Softmax attention of a few queries over several parts of keys [B, N, K, S] and values [B, N, S, K], as `attend`:
    [B, T, N, G, K].

    The parts stay apart: to join the large cache of earlier tokens with new ones would copy it. Tokens are the last
    axis of keys, because a CPU then multiplies few queries with them twice as fast.
    """
    q_BNGTK = q_BTNGK.transpose(0, 2, 3, 1, 4)
    scores = [
        _masked(dot("BNGTK,BNKS->BNGTS", q_BNGTK, k_BNKS), places, window, q_BNGTK.shape[-1])
        for k_BNKS, _, places in parts
    ]
    scores_BNGTS = jnp.concatenate(scores, axis=-1)
    weights_BNGTS = jnp.exp(scores_BNGTS - jnp.max(scores_BNGTS, axis=-1, keepdims=True))
    total_BNGT1 = jnp.sum(weights_BNGTS, axis=-1, keepdims=True)
    out_BNGTK, start = jnp.zeros(q_BNGTK.shape, jnp.float32), 0
    for _, v_BNSK, _ in parts:
        part_BNGTS = jax.lax.slice_in_dim(weights_BNGTS, start, start + v_BNSK.shape[2], axis=-1)
        out_BNGTK += dot("BNGTS,BNSK->BNGTK", part_BNGTS.astype(v_BNSK.dtype), v_BNSK)
        start += v_BNSK.shape[2]
    return (out_BNGTK / total_BNGT1).astype(q_BTNGK.dtype).transpose(0, 3, 1, 2, 4)


def _chunks(tokens: int, keys: int, window: int | None) -> list[tuple[slice, slice]]:
    ends = [min(start + QUERY_CHUNK, tokens) for start in range(0, tokens, QUERY_CHUNK)]
    starts = range(0, tokens, QUERY_CHUNK)
    if tokens != keys:
        return [(slice(start, end), slice(0, keys)) for start, end in zip(starts, ends, strict=True)]
    return [
        (slice(start, end), slice(max(0, start - window + 1) if window else 0, end))
        for start, end in zip(starts, ends, strict=True)
    ]


def computed_pairs(tokens: int, keys: int, window: int | None) -> int:
    """The number of query and key pairs that are computed per row, for one head."""
    return sum(
        (queries.stop - queries.start) * (part.stop - part.start) for queries, part in _chunks(tokens, keys, window)
    )


def _scores(
    q_BNGTK: jax.Array, k_BNSK: jax.Array, places: Places, queries: slice, keys: slice, window: int | None
) -> jax.Array:
    scores_BNGTS = dot("BNGTK,BNSK->BNGTS", q_BNGTK[:, :, :, queries], k_BNSK[:, :, keys])
    q_positions_BT, q_segments_BT, k_positions_BS, k_segments_BS = places
    part = Places(
        q_positions_BT[:, queries], q_segments_BT[:, queries], k_positions_BS[:, keys], k_segments_BS[:, keys]
    )
    return _masked(scores_BNGTS, part, window, q_BNGTK.shape[-1])


def _masked(products_BNGTS: jax.Array, places: Places, window: int | None, size: int) -> jax.Array:
    """The scores from the products of queries and keys of a head size: scaled, and masked where a query does not see a
    key."""
    distance_BTS = places.q_positions_BT[:, :, None] - places.k_positions_BS[:, None]
    same_BTS = places.q_segments_BT[:, :, None] == places.k_segments_BS[:, None]
    seen_BTS = same_BTS & (distance_BTS >= 0)
    if window:
        seen_BTS &= distance_BTS < window
    return products_BNGTS * size**-0.5 + jnp.where(seen_BTS, 0.0, -1e30)[:, None, None]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(window, q_BNGTK, k_BNSK, v_BNSK, places: Places) -> jax.Array:
    return _attend_forward(window, q_BNGTK, k_BNSK, v_BNSK, places)[0]


def _attend_forward(window, q_BNGTK, k_BNSK, v_BNSK, places: Places):
    outs, logs = [], []
    for queries, keys in _chunks(q_BNGTK.shape[3], k_BNSK.shape[2], window):
        scores_BNGTS = _scores(q_BNGTK, k_BNSK, places, queries, keys, window)
        peak_BNGT1 = jnp.max(scores_BNGTS, axis=-1, keepdims=True)
        weights_BNGTS = jnp.exp(scores_BNGTS - peak_BNGT1)
        total_BNGT1 = jnp.sum(weights_BNGTS, axis=-1, keepdims=True)
        out_BNGTK = dot("BNGTS,BNSK->BNGTK", weights_BNGTS.astype(v_BNSK.dtype), v_BNSK[:, :, keys])
        outs.append((out_BNGTK / total_BNGT1).astype(q_BNGTK.dtype))
        logs.append(peak_BNGT1 + jnp.log(total_BNGT1))
    # Named, so that a remat policy can keep both: the backward pass then needs no second forward pass.
    out_BNGTK = checkpoint_name(jnp.concatenate(outs, axis=3), "attention")
    log_BNGT1 = checkpoint_name(jnp.concatenate(logs, axis=3), "attention")
    return out_BNGTK, (q_BNGTK, k_BNSK, v_BNSK, places, out_BNGTK, log_BNGT1)


def _attend_backward(window, saved, dout_BNGTK: jax.Array):
    q_BNGTK, k_BNSK, v_BNSK, places, out_BNGTK, log_BNGT1 = saved
    dtype, scale = q_BNGTK.dtype, q_BNGTK.shape[-1] ** -0.5
    shift_BNGT1 = jnp.sum(dout_BNGTK.astype(jnp.float32) * out_BNGTK.astype(jnp.float32), axis=-1, keepdims=True)
    dqs = []
    dk_BNKS = jnp.zeros((*k_BNSK.shape[:2], k_BNSK.shape[3], k_BNSK.shape[2]), jnp.float32)
    dv_BNKS = jnp.zeros_like(dk_BNKS)
    for queries, keys in _chunks(q_BNGTK.shape[3], k_BNSK.shape[2], window):
        dout, q = dout_BNGTK[:, :, :, queries], q_BNGTK[:, :, :, queries]
        scores_BNGTS = _scores(q_BNGTK, k_BNSK, places, queries, keys, window)
        weights_BNGTS = jnp.exp(scores_BNGTS - log_BNGT1[:, :, :, queries])
        dweights_BNGTS = dot("BNGTK,BNSK->BNGTS", dout, v_BNSK[:, :, keys])
        dscores_BNGTS = (weights_BNGTS * (dweights_BNGTS - shift_BNGT1[:, :, :, queries]) * scale).astype(dtype)
        dqs.append(dot("BNGTS,BNSK->BNGTK", dscores_BNGTS, k_BNSK[:, :, keys]).astype(dtype))
        # Keys stay the last axis until the end, so that a CPU transposes the narrow operand, not the scores.
        dk_BNKS = dk_BNKS.at[:, :, :, keys].add(dot("BNGTK,BNGTS->BNKS", q, dscores_BNGTS))
        dv_BNKS = dv_BNKS.at[:, :, :, keys].add(dot("BNGTK,BNGTS->BNKS", dout, weights_BNGTS.astype(dtype)))
    dk_BNSK, dv_BNSK = dk_BNKS.swapaxes(2, 3), dv_BNKS.swapaxes(2, 3)
    return jnp.concatenate(dqs, axis=3), dk_BNSK.astype(k_BNSK.dtype), dv_BNSK.astype(v_BNSK.dtype), None


_attend.defvjp(_attend_forward, _attend_backward)
