"""The training step: `(state, batch) -> (state, metrics)`, pure, compiled once.

The loss and its gradient are computed inside one `shard_map` over the mesh; the optimizer works on the sharded arrays.
Every quantity is a sum with its denominator, over microbatches and devices alike, so that neither the number of
microbatches nor of devices changes the result. The one exception is the load-balancing loss, which is not a sum over
tokens: it is computed per microbatch (over all devices) and weighted by the microbatch's tokens.

Axes: B rows, T tokens, D model, V vocabulary, P pairs of a row, G groups.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding

from xlam_jax.enums import PAIR_METRICS
from xlam_jax.models.config import ModelConfig
from xlam_jax.models.decoder import Decoder
from xlam_jax.models.kernels import XLA, Kernels
from xlam_jax.models.params import Params, binder, freeze, frozen_specs, join, param_specs, shapes, trainable
from xlam_jax.parallel import mesh as meshes
from xlam_jax.parallel.placement import place, put
from xlam_jax.training.objectives import load_balancing, token_log_probabilities
from xlam_jax.training.preference import Preference, Sides, by_side, count_pairs, firsts, preference_sums


class State(NamedTuple):
    """The arrays that a step changes."""

    params: Params
    """The trainable parameters."""
    opt: Any
    """The optimizer's state."""
    step: Any
    """Steps taken so far, an int32 scalar."""
    ema: Params | None = None
    """The moving average of `params`; None without one."""

    def trees(self) -> dict[str, Any]:
        """The trees that a checkpoint stores, by name; the step is the checkpoint's name."""
        trees = {"params": self.params, "opt": self.opt}
        return trees if self.ema is None else trees | {"ema": self.ema}


class Batch(NamedTuple):
    """Packed rows, [B, T] each. Segment 0 is padding; positions start at 0 in each segment."""

    tokens_BT: Any
    labels_BT: Any
    """The next token, which is predicted at each position."""
    weights_BT: Any
    """Weight of each position's loss, f32; 0 for masked positions."""
    positions_BT: Any
    segments_BT: Any
    groups_BT: Any = None
    """Group index of each position, below `Objective.groups`; the loss is reported per group."""
    reference_BT: Any = None
    """log p of the labels under the reference policy, f32, if it was computed beforehand. Only its sum over each side
    of a pair is used."""


class Objective(NamedTuple):
    """The loss: the cross-entropy of the weighted tokens, or a loss on pairs."""

    preference: Preference | None = None
    pairs: int = 0
    """Maximum pairs per row."""
    adapters_off: bool = False
    """Whether the reference policy is the model without its adapters."""
    groups: int = 0
    """Number of groups for which the loss is reported. A pair belongs to the group of its first position."""


SFT = Objective()


@dataclass(frozen=True, kw_only=True)
class StepOptions:
    """Options of a step. Evaluation and the scores of the reference policy use the first four only."""

    compute_dtype: Any
    """Dtype of the forward and backward pass; parameters and gradients are f32."""
    objective: Objective = SFT
    quantized: bool = False
    """Whether the frozen weights are stored in NF4."""
    kernels: Kernels = XLA
    remat: str = "none"
    """Activation checkpointing, as `model.remat`."""
    microbatches: int = 1
    """Gradient accumulation: the parts into which a batch is split."""
    router_aux_weight: float = 0.0
    """Weight of the load-balancing loss."""
    z_loss: float = 0.0
    """Weight of the squared log of the softmax's normalizer."""
    neftune: float = 0.0
    """Noise on the embeddings: α of Jain et al., 2310.05914."""
    ema: float = 0.0
    """Decay of the moving average of the parameters; 0: none."""
    seed: int = 0
    """Seed of dropout and noise."""


class Groups(NamedTuple):
    """Sums over a batch, per group: [G]."""

    loss_G: jax.Array
    """Sums of weight × −log p, or of the losses of pairs."""
    weight_G: jax.Array
    """The denominators of the losses."""
    count_G: jax.Array
    """Tokens that contribute to the loss, or pairs."""


class Sums(NamedTuple):
    """Sums over a batch."""

    loss: jax.Array
    """Sum of weight × −log p, or of the losses of pairs."""
    weight: jax.Array
    """The denominator of the loss: the sum of weights, or the number of pairs."""
    tokens: jax.Array
    """Tokens without padding, f32."""
    aux: jax.Array
    """Load-balancing loss × tokens."""
    trained: jax.Array
    """Tokens that contribute to the loss, f32."""
    z: jax.Array
    """Sum of the squared log of the softmax's normalizer over the trained tokens."""
    watched: dict[str, jax.Array]
    """Further metrics of pairs (`enums.PAIR_METRICS`), to be divided by `weight`."""
    groups: Groups


def abstract_state(
    model: ModelConfig, tx: optax.GradientTransformation, mesh: Mesh, *, averaged: bool = False
) -> State:
    """Returns shapes, dtypes and shardings of the state. Moments are sharded like their parameters; arrays of another
    shape (counters, factored moments, scales) are replicated. `averaged`: whether a moving average is kept."""
    params = jax.tree.map(_shaped, trainable(model, shapes(model))[0], meshes.shardings(param_specs(model, mesh), mesh))
    replicated = NamedSharding(mesh, meshes.EVERYWHERE)
    by_path = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}

    def shard_as_parameter(path: Any, leaf: Any) -> jax.ShapeDtypeStruct:
        """Matches a leaf of the optimizer's state to its parameter by path suffix."""
        matches = (by_path.get(jax.tree_util.keystr(path[cut:])) for cut in range(len(path)))
        param = next((match for match in matches if match is not None), None)
        same = param is not None and param.shape == leaf.shape
        return _shaped(leaf, param.sharding if same else replicated)  # pyright: ignore[reportOptionalMemberAccess]

    opt = jax.tree_util.tree_map_with_path(shard_as_parameter, jax.eval_shape(tx.init, params))
    return State(params, opt, jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated), params if averaged else None)


def abstract_frozen(model: ModelConfig, mesh: Mesh, *, dtype: Any, quantized: bool) -> Params:
    """Returns shapes, dtypes and shardings of the frozen parameters."""
    frozen = jax.eval_shape(partial(freeze, dtype=dtype, quantized=quantized), trainable(model, shapes(model))[1])
    return jax.tree.map(_shaped, frozen, meshes.shardings(frozen_specs(model, mesh, quantized=quantized), mesh))


def _shaped(leaf: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def init_state(abstract: State, tx: optax.GradientTransformation, params: Callable[[], Params] | Params) -> State:
    """Returns a state with a new optimizer state. `params`: arrays, or a function that computes them (see `place`)."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    placed = place(params, abstract.params)
    opt = jax.jit(tx.init, out_shardings=shardings.opt)(placed)
    ema = None if abstract.ema is None else jax.tree.map(jnp.copy, placed)
    return State(placed, opt, put(np.int32(0), shardings.step), ema)


def _score(model: Decoder, batch: Batch, key: jax.Array | None) -> tuple[jax.Array, jax.Array, Any]:
    """Returns log p of the labels, the log of the softmax's normalizer, and the router's sums."""
    hidden_BTD, router, _ = model(batch.tokens_BT, batch.positions_BT, batch.segments_BT, key=key)
    return *token_log_probabilities(hidden_BTD, model.head_VD(), batch.labels_BT, batch.weights_BT != 0), router


def _weight(objective: Objective, batch: Batch) -> jax.Array:
    """This device's share of the denominator of the loss."""
    if objective.preference is None:
        return jnp.sum(batch.weights_BT)
    return count_pairs(meshes.whole_rows(batch.segments_BT))


def _sums(
    objective: Objective, model: Decoder, reference: Decoder | None, batch: Batch, key: jax.Array | None = None
) -> Sums:
    """Returns the sums over the rows of all devices; loss, aux and z are differentiable. `key`: for dropout and
    noise."""
    log_p_BT, log_z_BT, router = _score(model, batch, key)
    tokens = meshes.total(jnp.sum(batch.segments_BT > 0).astype(jnp.float32))
    aux = jnp.zeros(())
    if router is not None:
        aux = load_balancing(meshes.total(router), model.config.layers, tokens) * tokens
    watched: dict[str, jax.Array] = {}
    if objective.preference is None:
        losses_BT = -log_p_BT * batch.weights_BT
        loss = jnp.sum(losses_BT)
        per_group = (losses_BT, batch.weights_BT, batch.weights_BT != 0, batch.groups_BT)
    else:
        losses_BP, real_BP, groups_BP, watched = _preference(objective, reference, batch, log_p_BT)
        loss = jnp.sum(losses_BP)
        per_group = (losses_BP, real_BP, real_BP, groups_BP)
    trained = meshes.total(jnp.sum(batch.weights_BT != 0).astype(jnp.float32))
    weight = meshes.total(_weight(objective, batch))
    z = meshes.total(jnp.sum(log_z_BT**2))
    groups = meshes.total(_by_group(objective.groups, *per_group))
    return Sums(meshes.total(loss), weight, tokens, aux, trained, z, meshes.total(watched), groups)


def _preference(
    objective: Objective, reference: Decoder | None, batch: Batch, log_p_BT: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array | None, dict[str, jax.Array]]:
    """Returns the losses of pairs, which pairs are real, their groups, [B, P] each, and the sums of `PAIR_METRICS`."""
    assert objective.preference is not None
    reference_BT = jnp.zeros_like(log_p_BT) if batch.reference_BT is None else batch.reference_BT
    if reference is not None:
        reference_BT = jax.lax.stop_gradient(_score(reference, batch, None)[0])
    log_p_BT, reference_BT, weights_BT, segments_BT = map(
        meshes.whole_rows, (log_p_BT, reference_BT, batch.weights_BT, batch.segments_BT)
    )
    losses_BP, real_BP, watched = preference_sums(
        objective.preference, log_p_BT, reference_BT, weights_BT, segments_BT, objective.pairs
    )
    groups_BP = None
    if batch.groups_BT is not None:
        groups_BP = firsts(meshes.whole_rows(batch.groups_BT), segments_BT, objective.pairs)
    return losses_BP, real_BP, groups_BP, watched


def _by_group(size: int, losses: jax.Array, weights: jax.Array, counted: jax.Array, groups: jax.Array | None) -> Groups:
    """Sums of positions or pairs, [B, T] or [B, P], per group."""

    def total(values: jax.Array) -> jax.Array:
        if groups is None or not size:
            return jnp.zeros((0,))
        is_member = groups[..., None] == jnp.arange(size)
        return jnp.sum(jnp.where(is_member, values.astype(jnp.float32)[..., None], 0.0), axis=(0, 1))

    return Groups(total(jax.lax.stop_gradient(losses)), total(weights), total(counted))


def _binders(
    model: ModelConfig, options: StepOptions, *, remat: str = "none", neftune: float = 0.0
) -> Callable[[Params, Params], tuple[Decoder, Decoder | None]]:
    """Returns a function from the trainable and the frozen parameters to the model, and to the reference policy if it
    shares the weights."""
    dtype, kernels = options.compute_dtype, options.kernels
    bind = binder(model, dtype=dtype, remat=remat, neftune=neftune, kernels=kernels)
    without_adapters = replace(model, lora=None)
    bind_reference = binder(without_adapters, dtype=dtype, kernels=kernels) if options.objective.adapters_off else None

    def models(params: Params, frozen: Params) -> tuple[Decoder, Decoder | None]:
        return bind(join(frozen, params)), bind_reference(frozen) if bind_reference else None

    return models


def make_train_step(
    model: ModelConfig, tx: optax.GradientTransformation, mesh: Mesh, options: StepOptions
) -> Callable[[State, Params, Batch], tuple[State, dict[str, Any]]]:
    """Builds the step `(state, frozen, batch) -> (state, metrics)`; `frozen` are the frozen parameters, {} if none.

    Metrics: loss (mean over weighted tokens, or over pairs), aux_loss, grad_norm, tokens, trained_tokens, the means of
    `PAIR_METRICS` for pairs, and `groups`, the sums of each group. The first steps of a moving average have a smaller
    decay.
    """
    specs = param_specs(model, mesh)
    frozen_spec = frozen_specs(model, mesh, quantized=options.quantized)
    sharded = jax.shard_map(
        _make_gradients(model, options),
        mesh=mesh,
        in_specs=(specs, frozen_spec, meshes.batch_spec(mesh), meshes.EVERYWHERE),
        out_specs=(specs, meshes.EVERYWHERE),
    )
    ema = options.ema

    def step(state: State, frozen: Params, batch: Batch) -> tuple[State, dict[str, Any]]:
        grads, sums = sharded(state.params, frozen, batch, jax.random.fold_in(jax.random.key(options.seed), state.step))
        updates, opt = tx.update(grads, state.opt, state.params)
        metrics = means(sums) | {"grad_norm": optax.tree.norm(grads)}
        params: Any = optax.apply_updates(state.params, updates)
        decay = jnp.minimum(ema, (1 + state.step) / (10 + state.step))
        average = jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, state.ema, params if ema else None)
        return State(params, opt, state.step + 1, average), metrics

    return step


def _make_gradients(
    model: ModelConfig, options: StepOptions
) -> Callable[[Params, Params, Batch, jax.Array], tuple[Params, Sums]]:
    """Builds the gradient of the loss over a batch, and the batch's sums, on each device inside the `shard_map`."""
    models = _binders(model, options, remat=options.remat, neftune=options.neftune)
    is_random = options.neftune > 0 or (model.lora is not None and model.lora.dropout > 0)

    def gradients(params: Params, frozen: Params, batch: Batch, key: jax.Array) -> tuple[Params, Sums]:
        # The denominators of the whole batch, before any part of it is computed.
        weight = jnp.maximum(meshes.total(_weight(options.objective, batch)), 1e-9)
        tokens = jnp.maximum(meshes.total(jnp.sum(batch.segments_BT > 0).astype(jnp.float32)), 1.0)
        trained = jnp.maximum(meshes.total(jnp.sum(batch.weights_BT != 0).astype(jnp.float32)), 1.0)

        def minimized(params: Params, part: Batch, key: jax.Array) -> tuple[jax.Array, Sums]:
            policy, reference = models(params, frozen)
            sums = _sums(options.objective, policy, reference, part, key if is_random else None)
            loss = sums.loss / weight + options.router_aux_weight * sums.aux / tokens
            return loss + options.z_loss * sums.z / trained if options.z_loss else loss, sums

        gradient = jax.grad(minimized, has_aux=True)
        if options.microbatches == 1:
            return gradient(params, batch, key)
        return _accumulate(gradient, params, batch, key, options)

    return gradients


def _accumulate(
    gradient: Callable[..., tuple[Params, Sums]], params: Params, batch: Batch, key: jax.Array, options: StepOptions
) -> tuple[Params, Sums]:
    """Adds up gradients and sums over the microbatches, one after the other."""
    parts = jax.tree.map(lambda leaf: leaf.reshape(options.microbatches, -1, *leaf.shape[1:]), batch)

    def add(total: Any, part: tuple[Batch, jax.Array]) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, gradient(params, *part)), None

    keys = jax.random.split(key, options.microbatches)
    watched = PAIR_METRICS if options.objective.preference else ()
    zero = jnp.zeros(())
    zeros_G = jnp.zeros((options.objective.groups if batch.groups_BT is not None else 0,))
    no_sums = Sums(
        loss=zero,
        weight=zero,
        tokens=zero,
        aux=zero,
        trained=zero,
        z=zero,
        watched=dict.fromkeys(watched, zero),
        groups=Groups(zeros_G, zeros_G, zeros_G),
    )
    return jax.lax.scan(add, (jax.tree.map(jnp.zeros_like, params), no_sums), (parts, keys))[0]


def make_eval_step(model: ModelConfig, mesh: Mesh, options: StepOptions) -> Callable[[Params, Params, Batch], Sums]:
    """Builds the evaluation `(params, frozen, batch) -> sums`."""
    models = _binders(model, options)

    def evaluate(params: Params, frozen: Params, batch: Batch) -> Sums:
        policy, reference = models(params, frozen)
        return _sums(options.objective, policy, reference, batch)

    specs = (param_specs(model, mesh), frozen_specs(model, mesh, quantized=options.quantized), meshes.batch_spec(mesh))
    return jax.shard_map(evaluate, mesh=mesh, in_specs=specs, out_specs=meshes.EVERYWHERE)


def make_reference_step(
    model: ModelConfig, mesh: Mesh, options: StepOptions
) -> Callable[[Params, Params, Batch], Sides]:
    """Builds the scoring of pairs `(params, frozen, batch) -> sides`: log p summed over each side, [B, P] each.
    `options.objective.pairs` is the number of pairs per row."""
    models = _binders(model, replace(options, objective=SFT))

    def score(params: Params, frozen: Params, batch: Batch) -> Sides:
        log_p_BT = _score(models(params, frozen)[0], batch, None)[0]
        return by_side(meshes.whole_rows(log_p_BT), meshes.whole_rows(batch.segments_BT), options.objective.pairs)

    specs = (param_specs(model, mesh), frozen_specs(model, mesh, quantized=options.quantized), meshes.batch_spec(mesh))
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
