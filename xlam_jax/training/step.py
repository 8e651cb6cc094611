"""The training step: `(state, batch) -> (state, metrics)`, pure, compiled once.

The loss and its gradient are computed inside one `shard_map` over the mesh; the optimizer works on the sharded whole.
Every quantity is a sum with its denominator, over microbatches and devices alike, so that neither the number of
microbatches nor of devices changes the result. The one exception is the load-balancing loss: it is not a sum over
tokens, and is that of each microbatch (over all devices), weighted by its tokens.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding

from xlam_jax.models.config import ModelConfig
from xlam_jax.models.decoder import Decoder
from xlam_jax.models.kernels import XLA, Kernels
from xlam_jax.models.params import Params, binder, freeze, frozen_specs, join, param_specs, shapes, trainable
from xlam_jax.parallel import mesh as meshes
from xlam_jax.training.objectives import load_balancing, token_log_probabilities
from xlam_jax.training.preference import WATCHED, Preference, Sides, by_side, count_pairs, firsts, preference_sums


class State(NamedTuple):
    """All that a step changes."""

    params: Params
    """What trains."""
    opt: Any
    step: Any
    """Steps taken so far, an int32 scalar."""
    ema: Params | None = None
    """The moving average of `params`, where one is kept."""


class Batch(NamedTuple):
    """Packed rows, [B, T] each. Segment 0 is padding; positions start at 0 in each segment."""

    tokens_BT: Any
    labels_BT: Any
    """The token to predict at each place."""
    weights_BT: Any
    """Weight of each place's loss: 0 where nothing is learned, f32."""
    positions_BT: Any
    segments_BT: Any
    groups_BT: Any = None
    """What the loss is also told apart by: an index below `Objective.groups`, of each place."""
    reference_BT: Any = None
    """log p of the labels under the reference policy, f32, where it was computed beforehand; only its sum over a side
    of a pair counts."""


class Objective(NamedTuple):
    """What is minimized: the cross-entropy of the weighted tokens, or a loss on pairs."""

    preference: Preference | None = None
    pairs: int = 0
    """Pairs that a row holds at most."""
    adapters_off: bool = False
    """The reference policy is the model without its adapters."""
    groups: int = 0
    """How many groups the loss is told apart by; a pair belongs to the group of its first place."""


SFT = Objective()


class Groups(NamedTuple):
    """Sums over a batch, for each group: [G]."""

    loss_G: jax.Array
    """Of weight × −log p, or of the losses of pairs."""
    weight_G: jax.Array
    """What it is divided by."""
    count_G: jax.Array
    """Tokens that carry loss, or pairs."""


class Sums(NamedTuple):
    """Sums over a batch."""

    loss: jax.Array
    """Of weight × −log p, or of the losses of pairs."""
    weight: jax.Array
    """What it is divided by: the sum of weights, or the number of pairs."""
    tokens: jax.Array
    """Real tokens, in f32."""
    aux: jax.Array
    """Load-balancing loss × real tokens."""
    trained: jax.Array
    """Tokens that carry loss, in f32."""
    z: jax.Array
    """Over those, the squared log of the softmax's normalizer."""
    watched: dict[str, jax.Array]
    """Of pairs: what else to watch, to be divided by `weight`."""
    groups: Groups
    """The loss, told apart."""


def abstract_state(
    model: ModelConfig, tx: optax.GradientTransformation, mesh: Mesh, *, averaged: bool = False
) -> State:
    """Shapes, dtypes and shardings of the state: moments lie as their parameters do, what has another shape (counters,
    factored moments, scales) on every device."""
    placed = jax.tree.map(_placed, trainable(model, shapes(model))[0], meshes.shardings(param_specs(model, mesh), mesh))
    everywhere = NamedSharding(mesh, meshes.EVERYWHERE)
    of_path = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(placed)}

    def beside(path: Any, leaf: Any) -> jax.ShapeDtypeStruct:
        """A leaf of the optimizer's state belongs to the parameter whose path its own ends with."""
        params = (of_path.get(jax.tree_util.keystr(path[cut:])) for cut in range(len(path)))
        param = next((one for one in params if one is not None), None)
        same = param is not None and param.shape == leaf.shape
        return _placed(leaf, param.sharding if same else everywhere)  # pyright: ignore[reportOptionalMemberAccess]

    opt = jax.tree_util.tree_map_with_path(beside, jax.eval_shape(tx.init, placed))
    return State(placed, opt, jax.ShapeDtypeStruct((), jnp.int32, sharding=everywhere), placed if averaged else None)


def abstract_frozen(model: ModelConfig, mesh: Mesh, *, dtype: Any, quantized: bool) -> Params:
    """The same for the parameters that do not train."""
    kept = jax.eval_shape(partial(freeze, dtype=dtype, quantized=quantized), trainable(model, shapes(model))[1])
    return jax.tree.map(_placed, kept, meshes.shardings(frozen_specs(model, mesh, quantized=quantized), mesh))


def _placed(leaf: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def init_state(abstract: State, tx: optax.GradientTransformation, params: Callable[[], Params] | Params) -> State:
    """Fresh optimizer state beside `params`: arrays, which are placed in f32, or a function that draws them, which is
    compiled so that each is born where it lies."""
    places = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    placed = place(params, abstract.params)
    opt = jax.jit(tx.init, out_shardings=places.opt)(placed)
    ema = None if abstract.ema is None else jax.tree.map(jnp.copy, placed)
    return State(placed, opt, put(np.int32(0), places.step), ema)


def place(params: Callable[[], Params] | Params, abstract: Params) -> Params:
    """Puts parameters where, and in the dtype in which, they belong: arrays, or what stands for them in a file."""
    if callable(params):
        return jax.jit(params, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, abstract))()
    return jax.tree.map(lambda array, like: put(array.astype(like.dtype), like.sharding), params, abstract)


def put(array: Any, sharding: jax.sharding.Sharding) -> jax.Array:
    """Lays an array out over the devices of all hosts: one that each host holds whole, or can read, or that lies on all
    already."""
    if hasattr(array, "placed"):
        return array.placed(sharding)
    if sharding.is_fully_addressable or (isinstance(array, jax.Array) and not array.is_fully_addressable):
        return jax.device_put(array, sharding)
    whole = np.asarray(array)  # device_put would send all of it around to compare it
    return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])


def _scored(model: Decoder, batch: Batch, key: jax.Array | None) -> tuple[jax.Array, jax.Array, Any]:
    """log p of the labels, log of the softmax's normalizer, router sums."""
    hidden_BTD, router, _ = model(batch.tokens_BT, batch.positions_BT, batch.segments_BT, key=key)
    return *token_log_probabilities(hidden_BTD, model.head_VD(), batch.labels_BT, batch.weights_BT != 0), router


def _weight(objective: Objective, batch: Batch) -> jax.Array:
    """This device's share of what the loss is divided by."""
    if objective.preference is None:
        return jnp.sum(batch.weights_BT)
    return count_pairs(meshes.whole_rows(batch.segments_BT))


def _sums(
    objective: Objective, model: Decoder, reference: Decoder | None, batch: Batch, key: jax.Array | None = None
) -> Sums:
    """The sums over all devices' rows; differentiable in loss, aux and z. `key` draws dropout and noise."""
    log_p_BT, log_z_BT, router = _scored(model, batch, key)
    tokens = meshes.total(jnp.sum(batch.segments_BT > 0).astype(jnp.float32))
    aux = jnp.zeros(())
    if router is not None:
        aux = load_balancing(meshes.total(router), model.config.layers, tokens) * tokens
    watched: dict[str, jax.Array] = {}
    if objective.preference is None:
        losses_BT = -log_p_BT * batch.weights_BT
        loss = jnp.sum(losses_BT)
        told_apart = (losses_BT, batch.weights_BT, batch.weights_BT != 0, batch.groups_BT)
    else:
        reference_BT = jnp.zeros_like(log_p_BT) if batch.reference_BT is None else batch.reference_BT
        if reference is not None:
            reference_BT = jax.lax.stop_gradient(_scored(reference, batch, None)[0])
        log_p_BT, reference_BT, weights_BT, segments_BT = map(
            meshes.whole_rows, (log_p_BT, reference_BT, batch.weights_BT, batch.segments_BT)
        )
        losses_BP, real_BP, watched = preference_sums(
            objective.preference, log_p_BT, reference_BT, weights_BT, segments_BT, objective.pairs
        )
        loss = jnp.sum(losses_BP)
        groups_BP = None
        if batch.groups_BT is not None:
            groups_BP = firsts(meshes.whole_rows(batch.groups_BT), segments_BT, objective.pairs)
        told_apart = (losses_BP, real_BP, real_BP, groups_BP)
    trained = meshes.total(jnp.sum(batch.weights_BT != 0).astype(jnp.float32))
    weight = meshes.total(_weight(objective, batch))
    z = meshes.total(jnp.sum(log_z_BT**2))
    groups = meshes.total(_by_group(objective.groups, *told_apart))
    return Sums(meshes.total(loss), weight, tokens, aux, trained, z, meshes.total(watched), groups)


def _by_group(size: int, losses: jax.Array, weights: jax.Array, counted: jax.Array, groups: jax.Array | None) -> Groups:
    """Sums of places or pairs, [B, T] or [B, P], over each group."""

    def total(values: jax.Array) -> jax.Array:
        if groups is None or not size:
            return jnp.zeros((0,))
        mine = groups[..., None] == jnp.arange(size)
        return jnp.sum(jnp.where(mine, values.astype(jnp.float32)[..., None], 0.0), axis=(0, 1))

    return Groups(total(jax.lax.stop_gradient(losses)), total(weights), total(counted))


def _binders(
    model: ModelConfig, objective: Objective, dtype: Any, kernels: Kernels, remat: str = "none", neftune: float = 0.0
) -> Callable[[Params, Params], tuple[Decoder, Decoder | None]]:
    """Returns the function that makes the model, and the reference beside it, from what trains and what does not."""
    bind = binder(model, dtype=dtype, remat=remat, neftune=neftune, kernels=kernels)
    alone = replace(model, lora=None)
    bind_reference = binder(alone, dtype=dtype, kernels=kernels) if objective.adapters_off else None

    def models(params: Params, frozen: Params) -> tuple[Decoder, Decoder | None]:
        return bind(join(frozen, params)), bind_reference(frozen) if bind_reference else None

    return models


def make_train_step(
    model: ModelConfig,
    tx: optax.GradientTransformation,
    mesh: Mesh,
    *,
    compute_dtype: Any,
    remat: str,
    microbatches: int,
    router_aux_weight: float,
    z_loss: float = 0.0,
    neftune: float = 0.0,
    objective: Objective = SFT,
    quantized: bool = False,
    ema: float = 0.0,
    seed: int = 0,
    kernels: Kernels = XLA,
) -> Callable[[State, Params, Batch], tuple[State, dict[str, Any]]]:
    """Builds the step `(state, frozen, batch) -> (state, metrics)`; `frozen` is what does not train, maybe {}.

    Metrics: loss (mean over weighted tokens, or over pairs), aux_loss, grad_norm, tokens, trained_tokens, what is
    watched of pairs, and `groups`, the sums of each group. `ema` is the decay of the average that the state keeps, if
    it does; the first steps average over fewer.
    """
    models = _binders(model, objective, compute_dtype, kernels, remat, neftune)
    specs = param_specs(model, mesh)
    noisy = neftune > 0 or (model.lora is not None and model.lora.dropout > 0)

    def gradients(params: Params, frozen: Params, batch: Batch, key: jax.Array) -> tuple[Params, Sums]:
        # Denominators come from the whole batch before any part of it is computed.
        weight = jnp.maximum(meshes.total(_weight(objective, batch)), 1e-9)
        tokens = jnp.maximum(meshes.total(jnp.sum(batch.segments_BT > 0).astype(jnp.float32)), 1.0)
        trained = jnp.maximum(meshes.total(jnp.sum(batch.weights_BT != 0).astype(jnp.float32)), 1.0)

        def minimized(params: Params, part: Batch, key: jax.Array) -> tuple[jax.Array, Sums]:
            policy, reference = models(params, frozen)
            sums = _sums(objective, policy, reference, part, key if noisy else None)
            loss = sums.loss / weight + router_aux_weight * sums.aux / tokens
            return loss + z_loss * sums.z / trained if z_loss else loss, sums

        grad = jax.grad(minimized, has_aux=True)
        if microbatches == 1:
            return grad(params, batch, key)
        parts = jax.tree.map(lambda leaf: leaf.reshape(microbatches, -1, *leaf.shape[1:]), batch)

        def add(total: Any, part: tuple[Batch, jax.Array]) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, grad(params, *part)), None

        keys = jax.random.split(key, microbatches)
        watched = WATCHED if objective.preference else ()
        nothing = jnp.zeros(())
        apart = jnp.zeros((objective.groups if batch.groups_BT is not None else 0,))
        none = Sums(
            loss=nothing,
            weight=nothing,
            tokens=nothing,
            aux=nothing,
            trained=nothing,
            z=nothing,
            watched=dict.fromkeys(watched, nothing),
            groups=Groups(apart, apart, apart),
        )
        zero = (jax.tree.map(jnp.zeros_like, params), none)
        return jax.lax.scan(add, zero, (parts, keys))[0]

    sharded = jax.shard_map(
        gradients,
        mesh=mesh,
        in_specs=(specs, frozen_specs(model, mesh, quantized=quantized), meshes.batch_spec(mesh), meshes.EVERYWHERE),
        out_specs=(specs, meshes.EVERYWHERE),
    )

    def step(state: State, frozen: Params, batch: Batch) -> tuple[State, dict[str, Any]]:
        grads, sums = sharded(state.params, frozen, batch, jax.random.fold_in(jax.random.key(seed), state.step))
        updates, opt = tx.update(grads, state.opt, state.params)
        metrics = means(sums) | {"grad_norm": optax.tree.norm(grads)}
        params: Any = optax.apply_updates(state.params, updates)
        decay = jnp.minimum(ema, (1 + state.step) / (10 + state.step))
        average = jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, state.ema, params if ema else None)
        return State(params, opt, state.step + 1, average), metrics

    return step


def make_eval_step(
    model: ModelConfig,
    mesh: Mesh,
    *,
    compute_dtype: Any,
    objective: Objective = SFT,
    quantized: bool = False,
    kernels: Kernels = XLA,
) -> Callable[[Params, Params, Batch], Sums]:
    """Builds the evaluation of one batch by what trains and what does not: its sums."""
    models = _binders(model, objective, compute_dtype, kernels)

    def evaluate(params: Params, frozen: Params, batch: Batch) -> Sums:
        policy, reference = models(params, frozen)
        return _sums(objective, policy, reference, batch)

    return jax.shard_map(
        evaluate,
        mesh=mesh,
        in_specs=(
            param_specs(model, mesh),
            frozen_specs(model, mesh, quantized=quantized),
            meshes.batch_spec(mesh),
        ),
        out_specs=meshes.EVERYWHERE,
    )


def make_reference_step(
    model: ModelConfig,
    mesh: Mesh,
    *,
    compute_dtype: Any,
    pairs: int,
    quantized: bool = False,
    kernels: Kernels = XLA,
) -> Callable[[Params, Params, Batch], Sides]:
    """Builds the scoring of one batch of pairs by what trains and what does not: log p summed over each side."""
    models = _binders(model, SFT, compute_dtype, kernels)

    def score(params: Params, frozen: Params, batch: Batch) -> Sides:
        log_p_BT = _scored(models(params, frozen)[0], batch, None)[0]
        return by_side(meshes.whole_rows(log_p_BT), meshes.whole_rows(batch.segments_BT), pairs)

    specs = (param_specs(model, mesh), frozen_specs(model, mesh, quantized=quantized), meshes.batch_spec(mesh))
    return jax.shard_map(score, mesh=mesh, in_specs=specs, out_specs=meshes.row_spec(mesh))


def means(sums: Sums) -> dict[str, Any]:
    """Metrics from sums; `groups` stay sums."""
    return {
        "loss": sums.loss / jnp.maximum(sums.weight, 1e-9),
        "aux_loss": sums.aux / jnp.maximum(sums.tokens, 1.0),
        "tokens": sums.tokens,
        "trained_tokens": sums.trained,
        "groups": sums.groups,
    } | {name: value / jnp.maximum(sums.weight, 1e-9) for name, value in sums.watched.items()}
