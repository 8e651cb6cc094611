"""Grouped-query attention over packed rows, and rotary positions.

Axes: B rows, T queries, S keys, N key/value heads, G queries a key/value head, K head size.
"""

import jax
import jax.numpy as jnp
import numpy as np

from xlam_jax.models.config import ModelConfig
from xlam_jax.models.linear import dot

QUERY_CHUNK = 256
"""Queries that are scored at a time: keys after a chunk, and before its window, are never computed."""


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
    # llama3: wavelengths over original/low are slowed, those under original/high kept, between them blended.
    turns = scaling.original_max_positions * frequency / (2 * np.pi)
    blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blend = np.clip(blend, 0.0, 1.0)
    return ((1 - blend) * slow + blend * frequency).astype(np.float32)


def rotate(x_BTNGK: jax.Array, positions_BT: jax.Array, frequency: np.ndarray) -> jax.Array:
    """Rotates the two halves of each head by position × frequency, in f32."""
    angle = positions_BT[:, :, None, None, None].astype(jnp.float32) * frequency
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first, second = jnp.split(x_BTNGK.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_BTNGK.dtype)


def attend(
    q_BTNGK: jax.Array,
    k_BSNK: jax.Array,
    v_BSNK: jax.Array,
    *,
    q_positions_BT: jax.Array,
    k_positions_BS: jax.Array,
    q_segments_BT: jax.Array,
    k_segments_BS: jax.Array,
    window: int | None,
) -> jax.Array:
    """Softmax attention: a query sees keys of its own segment, at or before its position, within `window`.

    Segment 0 is padding. When T equals S, queries and keys are the same row, in order, and keys that no query of a
    chunk can see are skipped: positions grow by one within a segment, so a distance in the row is one in positions.
    """
    tokens, keys = q_BTNGK.shape[1], k_BSNK.shape[1]
    if tokens != keys:
        chunks = [(0, tokens, 0, keys)]
    else:
        starts = range(0, tokens, QUERY_CHUNK)
        chunks = [
            (at, min(at + QUERY_CHUNK, tokens), max(0, at - window + 1) if window else 0, min(at + QUERY_CHUNK, tokens))
            for at in starts
        ]
    outs = []
    for q0, q1, k0, k1 in chunks:
        distance_BTS = q_positions_BT[:, q0:q1, None] - k_positions_BS[:, None, k0:k1]
        seen_BTS = (q_segments_BT[:, q0:q1, None] == k_segments_BS[:, None, k0:k1]) & (distance_BTS >= 0)
        if window:
            seen_BTS &= distance_BTS < window
        bias_BTS = jnp.where(seen_BTS, 0.0, -1e30)
        outs.append(_softmax_attention(q_BTNGK[:, q0:q1], k_BSNK[:, k0:k1], v_BSNK[:, k0:k1], bias_BTS))
    return outs[0] if len(outs) == 1 else jnp.concatenate(outs, axis=1)


def _softmax_attention(q_BTNGK: jax.Array, k_BSNK: jax.Array, v_BSNK: jax.Array, bias_BTS: jax.Array) -> jax.Array:
    scores = dot("BTNGK,BSNK->BNGTS", q_BTNGK, k_BSNK) * q_BTNGK.shape[-1] ** -0.5
    weights_BNGTS = jax.nn.softmax(scores + bias_BTS[:, None, None], axis=-1).astype(q_BTNGK.dtype)
    return dot("BNGTS,BSNK->BTNGK", weights_BNGTS, v_BSNK).astype(q_BTNGK.dtype)
