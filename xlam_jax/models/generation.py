"""Generation of text: a prefill of a few rows at a time, then one token at a time until every row has ended.

It runs inside one `shard_map`, on parameters sharded as in training. Rows are split over the batch axes, heads and
vocabulary over `tensor`: a device caches keys and values of its own rows and heads. Every device executes the same
number of steps, those of the longest answer, because each step gathers weights from all devices.

Axes: B rows (in the `shard_map`, those of one device), R rows that are read together, P slots of the prompt, N new
tokens, E end tokens, D model width, V vocabulary.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from xlam_jax.enums import MESH_AXES
from xlam_jax.models.config import ModelConfig
from xlam_jax.models.decoder import Cache, Decoder
from xlam_jax.models.params import Params, binder, frozen_specs, join, param_specs, trainable
from xlam_jax.parallel import mesh as meshes

TOGETHER = 4096
"""Maximum slots of prompts that are read together, unless a single prompt has more: bounds the memory of
activations."""

SHORTEST = 64
"""Lengths of prompts and answers are rounded up to a multiple of this, and of a quarter of the next lower power of two,
so that few shapes compile."""


class _Rows(NamedTuple):
    """The prompts of a batch; an unused row has length and limit 0."""

    tokens_BP: Any
    """Padded on the left."""
    length_B: Any
    limit_B: Any
    """Maximum number of new tokens."""
    prompt_B: Any
    """The index of the prompt among all prompts."""


class _Options(NamedTuple):
    """Options that are the same for all rows."""

    stops_E: Any
    """The tokens that end a row."""
    temperature: Any
    top_p: Any
    seed: Any


class Generate:
    """Continues prompts on a mesh; compiles once per size of batch, prompts and answers."""

    def __init__(self, model: ModelConfig, mesh: Mesh, *, dtype: Any, quantized: bool = False):
        """The model computes in `dtype`. `quantized`: the frozen parameters are stored in four bits."""
        self._model, self._mesh = model, mesh
        self._by_row = meshes.row_spec(mesh)
        bind = binder(model, dtype=dtype)
        split = [axis for axis in MESH_AXES if mesh.shape[axis] > 1 and axis != "context"]
        specs = (
            param_specs(model, mesh),
            frozen_specs(model, mesh, quantized=quantized),
            self._by_row,
            meshes.EVERYWHERE,
        )

        # Every device, and so every host, receives all answers.
        @partial(jax.jit, static_argnames=("room", "sample"), out_shardings=NamedSharding(mesh, meshes.EVERYWHERE))
        def run(params: Params, frozen: Params, rows: _Rows, options: _Options, *, room: int, sample: bool):
            def of_a_device(params: Params, frozen: Params, rows: _Rows, options: _Options):
                return _continue(bind(join(frozen, params)), split, rows, options, room=room, sample=sample)

            sharded = jax.shard_map(of_a_device, mesh=mesh, in_specs=specs, out_specs=self._by_row)
            return sharded(params, frozen, rows, options)

        self._run = run

    def __call__(
        self,
        params: Params,
        frozen: Params,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        eos_id: int | Sequence[int],
        rows: int | None = None,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> list[list[int]]:
        """Continues each prompt by up to `max_new_tokens` tokens; an answer that ends earlier ends with (one of)
        `eos_id`.

        `params` and `frozen` are the trainable and the frozen parameters, sharded as in training; `frozen` may be {}.
        Up to `rows` prompts, rounded up to a multiple of the devices that split a batch, are answered at a time
        (default: all); each needs a cache for the longest prompt and answer. In a run with several hosts, all of them
        call it with the same prompts, and get the same answers.

        Answers also stop at the model's `max_positions`. `temperature` 0 selects the likeliest token; otherwise tokens
        are drawn from the likeliest whose probabilities add up to `top_p` (Holtzman et al., 1904.09751), the same for
        the same seed and index in `prompts`. Raises `ValueError` for a prompt that is empty or too long for the model.
        """
        if not prompts or max_new_tokens < 1:
            return [[] for _ in prompts]
        lengths = [len(prompt) for prompt in prompts]
        if min(lengths) < 1 or max(lengths) > self._model.max_positions:
            raise ValueError(f"prompts have {lengths} tokens; 1 to {self._model.max_positions} are possible")
        slots, room = _bucket(max(lengths)), _bucket(max_new_tokens)
        shards = math.prod(self._mesh.shape[axis] for axis in meshes.BATCH_AXES)
        height = -(-min(rows or len(prompts), len(prompts)) // shards) * shards
        answers: list[list[int]] = []
        for start in range(0, len(prompts), height):
            batch = prompts[start : start + height]
            padded = _Rows(
                np.zeros((height, slots), np.int32), *(np.zeros(height, np.int32) for _ in _Rows._fields[1:])
            )
            for row, prompt in enumerate(batch):
                padded.tokens_BP[row, slots - len(prompt) :] = prompt
                padded.length_B[row] = len(prompt)
                padded.limit_B[row] = min(max_new_tokens, self._model.max_positions - len(prompt))
                padded.prompt_B[row] = start + row
            options = _Options(
                stops_E=np.array(eos_id, np.int32).reshape(-1),
                temperature=np.array(temperature or 1.0, np.float32),
                top_p=np.array(top_p, np.float32),
                seed=np.array(seed, np.int32),
            )
            placed = self._place(padded, self._by_row), self._place(options, meshes.EVERYWHERE)
            new_BN, count_B = self._run(params, frozen, *placed, room=room, sample=temperature > 0)
            each = zip(np.asarray(new_BN), np.asarray(count_B), batch, strict=False)  # there may be unused rows
            answers += [row[:count].tolist() for row, count, _ in each]
        return answers

    def _place(self, arrays: Any, spec: PartitionSpec) -> Any:
        sharding = NamedSharding(self._mesh, spec)
        return jax.tree.map(lambda one: jax.make_array_from_callback(one.shape, sharding, one.__getitem__), arrays)


def generate(model: Decoder, prompts: Sequence[Sequence[int]], **options: Any) -> list[list[int]]:
    """Continues prompts with a model that is on one device; `options` are those of `Generate.__call__`."""
    params, frozen = trainable(model.config, nnx.to_pure_dict(nnx.split(model)[1]))
    return _on_one_device(model.config, model.dtype)(params, frozen, prompts, **options)


@cache
def _on_one_device(model: ModelConfig, dtype: Any) -> Generate:
    return Generate(model, meshes.make_mesh(dict.fromkeys(MESH_AXES, 1), jax.devices()[:1]), dtype=dtype)


def _bucket(length: int) -> int:
    step = max(SHORTEST, (1 << (length.bit_length() - 1)) // 4)
    return -(-length // step) * step


def _continue(
    model: Decoder, split: Sequence[str], rows: _Rows, options: _Options, *, room: int, sample: bool
) -> tuple[jax.Array, jax.Array]:
    """Returns the new tokens [B, room] of this device's rows, and the number of them in each row [B]. `split`: the axes
    of the mesh with more than one device, without context, along which everything is the same."""
    height, slots = rows.tokens_BP.shape
    by_row = [axis for axis in split if axis in meshes.BATCH_AXES]
    choose = _chooser(rows, options) if sample else _likeliest
    positions_BP = jnp.arange(slots) - (slots - rows.length_B)[:, None]
    segments_BP, positions_BP = (positions_BP >= 0).astype(jnp.int32), jnp.maximum(positions_BP, 0)
    groups = -(-height // max(1, TOGETHER // slots))
    together = -(-height // groups)

    def read(group: jax.Array, carry: tuple[Cache, jax.Array]) -> tuple[Cache, jax.Array]:
        cache, last_BD = carry
        row = jnp.minimum(group * together, height - together)  # the last group may repeat rows of the one before
        of_rows = (rows.tokens_BP, positions_BP, segments_BP)
        tokens_RP, positions_RP, segments_RP = (jax.lax.dynamic_slice_in_dim(one, row, together) for one in of_rows)
        hidden_RPD, _, new = model(tokens_RP, positions_RP, segments_RP, keep=True)
        assert new is not None
        last_BD = jax.lax.dynamic_update_slice_in_dim(last_BD, hidden_RPD[:, -1], row, axis=0)
        return cache.with_tokens(new, positions_RP, segments_RP, row=row, slot=0), last_BD

    last_BD = _vary(jnp.zeros((height, model.config.hidden_size), model.dtype), by_row)
    empty = _empty_cache(model, height, slots + room, by_row, split)
    filled, last_BD = jax.lax.fori_loop(0, groups, read, (empty, last_BD))

    def any_of_all(running_B: jax.Array) -> jax.Array:
        return meshes.psum(jnp.sum(running_B.astype(jnp.int32)), *meshes.BATCH_AXES) > 0

    def decode(carry):
        cache, at, last_BD, running_B, new_BN, count_B, _ = carry
        logits_BV = _whole(model.logits(last_BD[:, None])[:, 0], model.config.vocab_size)
        token_B = choose(logits_BV, at)
        new_BN = new_BN.at[:, at].set(jnp.where(running_B, token_B, 0))
        count_B += running_B
        running_B &= (token_B[:, None] != options.stops_E).all(axis=1) & (count_B < rows.limit_B)
        places = (rows.length_B + at)[:, None], running_B[:, None].astype(jnp.int32)
        hidden_BTD, _, new = model(token_B[:, None], *places, cache)
        assert new is not None
        cache = cache.with_tokens(new, *places, row=0, slot=slots + at)
        return cache, at + 1, hidden_BTD[:, 0], running_B, new_BN, count_B, any_of_all(running_B)

    running_B = rows.limit_B > 0
    new_BN = _vary(jnp.zeros((height, room), jnp.int32), by_row)
    start = (filled, jnp.int32(0), last_BD, running_B, new_BN, jnp.zeros_like(rows.limit_B), any_of_all(running_B))
    *_, new_BN, count_B, _ = jax.lax.while_loop(lambda carry: carry[-1], decode, start)
    return new_BN, count_B


def _empty_cache(model: Decoder, rows: int, slots: int, by_row: Sequence[str], split: Sequence[str]) -> Cache:
    """An empty cache for this device's rows and heads."""
    devices = jax.sharding.get_abstract_mesh().shape["tensor"]
    config = replace(model.config, kv_heads=model.config.kv_heads // devices)
    empty = Cache.empty(config, rows, slots, model.dtype)
    return empty._replace(
        k_LBNKS=_vary(empty.k_LBNKS, split),
        v_LBNSK=_vary(empty.v_LBNSK, split),
        positions_BS=_vary(empty.positions_BS, by_row),
        segments_BS=_vary(empty.segments_BS, by_row),
    )


def _vary(array: jax.Array, axes: Sequence[str]) -> jax.Array:
    """Marks an array as different on each device along `axes`, as a loop's carry must be before the loop."""
    return meshes.vary(array, tuple(axes))


def _whole(logits_BV: jax.Array, vocabulary: int) -> jax.Array:
    """Gathers the logits of the whole vocabulary on each device."""
    at = meshes.index("tensor") * logits_BV.shape[1]
    alone_BV = jax.lax.dynamic_update_slice(jnp.zeros((len(logits_BV), vocabulary)), logits_BV, (0, at))
    return meshes.psum(alone_BV, "tensor")


def _likeliest(logits_BV: jax.Array, _: jax.Array) -> jax.Array:
    return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)


def _chooser(rows: _Rows, options: _Options) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """Returns a function that draws each row's next token, from the seed, the index of its prompt and the step."""
    keys_B = jax.vmap(partial(jax.random.fold_in, jax.random.key(options.seed)))(rows.prompt_B)

    def choose(logits_BV: jax.Array, at: jax.Array) -> jax.Array:
        keys = jax.vmap(partial(jax.random.fold_in, data=at))(keys_B)
        return jax.vmap(_draw, in_axes=(0, 0, None))(keys, logits_BV / options.temperature, options.top_p)

    return choose


def _draw(key: jax.Array, logits_V: jax.Array, top_p: jax.Array) -> jax.Array:
    """Draws one token from the likeliest that together reach `top_p`."""
    order_V = jnp.argsort(-logits_V)
    sorted_V = logits_V[order_V]
    probability_V = jax.nn.softmax(sorted_V)
    before_V = jnp.cumsum(probability_V) - probability_V
    kept_V = jnp.where(before_V < top_p, sorted_V, -jnp.inf).at[0].set(sorted_V[0])  # the likeliest always stays
    return order_V[jax.random.categorical(key, kept_V)].astype(jnp.int32)
