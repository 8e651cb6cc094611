"""Text from a model: a prefill in chunks, then one token at a time until each row has ended.

Axes: B rows, T tokens of a chunk, P slots of the prompt, S slots of the cache, V vocabulary.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from xlam_jax.models.decoder import Cache, Decoder

CHUNK = 256
"""Prompt tokens that are read at a time: bounds the memory of their attention scores."""

SHORTEST = 64
"""Prompts, and room for new tokens, are rounded up to a power of two from here on, so that few shapes compile."""


def generate(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    eos_id: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> list[list[int]]:
    """Continues each prompt by up to `max_new_tokens` tokens; a row that ends by itself ends with `eos_id`.

    Rows stop at the model's `max_positions` too. `temperature` 0 takes the likeliest token; else tokens are drawn among
    the likeliest whose probabilities add up to `top_p` (Holtzman et al., 1904.09751), the same ones for the same seed.
    """
    if not prompts or max_new_tokens < 1:
        return [[] for _ in prompts]
    lengths = np.array([len(prompt) for prompt in prompts])
    room = model.config.max_positions - lengths
    if lengths.min() < 1 or room.min() < 0:
        raise ValueError(f"prompts have {lengths.tolist()} tokens; 1 to {model.config.max_positions} are possible")
    slots = _bucket(int(lengths.max()))
    tokens_BP = np.zeros((len(prompts), slots), np.int32)
    for row, prompt in enumerate(prompts):
        tokens_BP[row, slots - len(prompt) :] = prompt
    graphdef, state = nnx.split(model)
    new_BN, count_B = _run(
        graphdef,
        state,
        tokens_BP,
        lengths.astype(np.int32),
        np.minimum(room, max_new_tokens).astype(np.int32),
        np.int32(eos_id),
        np.float32(temperature or 1.0),
        np.float32(top_p),
        seed,
        room_for_new=_bucket(max_new_tokens),
        sample=temperature > 0,
    )
    counts = np.asarray(count_B)
    return [row[:count].tolist() for row, count in zip(np.asarray(new_BN), counts, strict=True)]


def _bucket(length: int) -> int:
    return max(SHORTEST, 1 << (length - 1).bit_length())


@partial(jax.jit, static_argnums=0, static_argnames=("room_for_new", "sample"))
def _run(
    graphdef: Any,
    state: Any,
    tokens_BP: jax.Array,
    length_B: jax.Array,
    limit_B: jax.Array,
    eos_id: jax.Array,
    temperature: jax.Array,
    top_p: jax.Array,
    seed: jax.Array,
    *,
    room_for_new: int,
    sample: bool,
) -> tuple[jax.Array, jax.Array]:
    """New tokens [B, room_for_new], and how many of them each row has."""
    model: Decoder = nnx.merge(graphdef, state)
    rows, slots = tokens_BP.shape
    keys_B = jax.vmap(partial(jax.random.fold_in, jax.random.key(seed)))(jnp.arange(rows))

    def choose(logits_BV: jax.Array, step: jax.Array | int) -> jax.Array:
        if not sample:
            return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
        keys = jax.vmap(partial(jax.random.fold_in, data=step))(keys_B)
        return jax.vmap(_draw, in_axes=(0, 0, None))(keys, logits_BV / temperature, top_p)

    def read(cache: Cache, chunk: jax.Array) -> tuple[Cache, jax.Array]:
        tokens_BT = jax.lax.dynamic_slice_in_dim(tokens_BP, chunk * width, width, axis=1)
        place_T = chunk * width + jnp.arange(width)
        positions_BT = place_T - (slots - length_B)[:, None]
        segments_BT = (positions_BT >= 0).astype(jnp.int32)
        hidden_BTD, _, cache = model(tokens_BT, jnp.maximum(positions_BT, 0), segments_BT, cache)  # type: ignore
        return cache, hidden_BTD[:, -1]

    width = min(CHUNK, slots)
    cache = Cache.empty(model.config, rows, slots + room_for_new, model.dtype)
    cache, last_CBD = jax.lax.scan(read, cache, jnp.arange(slots // width))
    first_B = choose(model.logits(last_CBD[-1][:, None])[:, 0], 0)

    def go_on(carry) -> jax.Array:
        return jnp.any(carry[2])

    def decode(carry):
        cache, token_B, running_B, new_BN, count_B = carry
        # Every running row has the same number of new tokens, so this is where each writes its next one.
        at = jnp.max(count_B)
        new_BN = new_BN.at[:, at].set(jnp.where(running_B, token_B, 0))
        count_B += running_B
        running_B &= (token_B != eos_id) & (count_B < limit_B)
        positions_BT = (length_B + at)[:, None]
        segments_BT = running_B[:, None].astype(jnp.int32)
        hidden_BTD, _, cache = model(token_B[:, None], positions_BT, segments_BT, cache)
        return cache, choose(model.logits(hidden_BTD)[:, 0], at + 1), running_B, new_BN, count_B

    start = (
        cache,
        first_B,
        limit_B > 0,
        jnp.zeros((rows, room_for_new), jnp.int32),
        jnp.zeros((rows,), jnp.int32),
    )
    _, _, _, new_BN, count_B = jax.lax.while_loop(go_on, decode, start)
    return new_BN, count_B


def _draw(key: jax.Array, logits_V: jax.Array, top_p: jax.Array) -> jax.Array:
    """Draws one token among the likeliest that together reach `top_p`."""
    order_V = jnp.argsort(-logits_V)
    sorted_V = logits_V[order_V]
    probability_V = jax.nn.softmax(sorted_V)
    before_V = jnp.cumsum(probability_V) - probability_V
    kept_V = jnp.where(before_V < top_p, sorted_V, -jnp.inf).at[0].set(sorted_V[0])  # the likeliest always stays
    return order_V[jax.random.categorical(key, kept_V)].astype(jnp.int32)
