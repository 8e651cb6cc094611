"""The training step: `(state, batch) -> (state, metrics)`, pure, compiled once.

The loss and its gradient are computed inside one `shard_map` over the mesh; the optimizer works on the sharded whole.
Every quantity is a sum with its denominator, over microbatches and devices alike, so that neither the number of
microbatches nor of devices changes the result. The one exception is the load-balancing loss: it is not a sum over
tokens, and is that of each microbatch (over all devices), weighted by its tokens.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from xlam_jax.models.config import ModelConfig
from xlam_jax.models.decoder import Decoder
from xlam_jax.models.params import Params, binder, logical_axes, shapes
from xlam_jax.parallel import mesh as meshes
from xlam_jax.training.objectives import load_balancing, token_log_probabilities

EVERYWHERE = PartitionSpec()
"""Of what is the same on all devices."""


class State(NamedTuple):
    """All that a step changes."""

    params: Params
    opt: Any


class Batch(NamedTuple):
    """Packed rows, [B, T] each. Segment 0 is padding; positions start at 0 in each segment."""

    tokens_BT: Any
    labels_BT: Any
    """The token to predict at each place."""
    weights_BT: Any
    """Weight of each place's loss: 0 where nothing is learned, f32."""
    positions_BT: Any
    segments_BT: Any


class Sums(NamedTuple):
    """Sums over the tokens of a batch."""

    loss: jax.Array
    """Of weight × −log p."""
    weight: jax.Array
    tokens: jax.Array
    """Real tokens, in f32."""
    aux: jax.Array
    """Load-balancing loss × real tokens."""


def abstract_state(model: ModelConfig, tx: optax.GradientTransformation, mesh: Mesh) -> State:
    """Shapes, dtypes and shardings of the state: moments lie as their parameters do, counters on every device."""
    placed = jax.tree.map(_placed, shapes(model), param_shardings(model, mesh))
    everywhere = NamedSharding(mesh, EVERYWHERE)
    opt = optax.tree_utils.tree_map_params(
        tx,
        lambda leaf, param: _placed(leaf, param.sharding),
        jax.eval_shape(tx.init, placed),
        placed,
        transform_non_params=lambda leaf: _placed(leaf, everywhere),
    )
    return State(placed, opt)


def _placed(leaf: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def init_state(abstract: State, tx: optax.GradientTransformation, params: Callable[[], Params] | Params) -> State:
    """Fresh optimizer state beside `params`: arrays, which are placed in f32, or a function that draws them, which is
    compiled so that each is born where it lies."""
    places = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    if callable(params):
        placed = jax.jit(params, out_shardings=places.params)()
    else:
        placed = jax.tree.map(
            lambda array, like: jax.device_put(array.astype(like.dtype), like.sharding), params, abstract.params
        )
    return State(placed, jax.jit(tx.init, out_shardings=places.opt)(placed))


def param_specs(model: ModelConfig, mesh: Mesh) -> Any:
    """The partition of each parameter."""
    return jax.tree.map(
        lambda logical: meshes.spec(logical, mesh), logical_axes(model), is_leaf=lambda node: isinstance(node, tuple)
    )


def param_shardings(model: ModelConfig, mesh: Mesh) -> Any:
    """The sharding of each parameter on `mesh`."""
    return meshes.shardings(param_specs(model, mesh), mesh)


def _sums(model: Decoder, batch: Batch) -> Sums:
    """This device's sums for its rows; differentiable in loss and aux."""
    hidden_BTD, router, _ = model(batch.tokens_BT, batch.positions_BT, batch.segments_BT)
    log_p_BT = token_log_probabilities(hidden_BTD, model.head_VD(), batch.labels_BT, batch.weights_BT != 0)
    tokens = meshes.psum(jnp.sum(batch.segments_BT > 0).astype(jnp.float32), *meshes.BATCH_AXES)
    aux = jnp.zeros(())
    if router is not None:
        aux = load_balancing(meshes.psum(router, *meshes.BATCH_AXES), model.config.layers, tokens) * tokens
    loss = meshes.psum(-jnp.sum(log_p_BT * batch.weights_BT), *meshes.BATCH_AXES)
    weight = meshes.psum(jnp.sum(batch.weights_BT), *meshes.BATCH_AXES)
    return Sums(loss, weight, tokens, aux)


def make_train_step(
    model: ModelConfig,
    tx: optax.GradientTransformation,
    mesh: Mesh,
    *,
    compute_dtype: Any,
    remat: str,
    microbatches: int,
    router_aux_weight: float,
) -> Callable[[State, Batch], tuple[State, dict[str, jax.Array]]]:
    """Builds the step. Metrics: loss (mean over trained tokens), aux_loss, grad_norm, tokens, trained_tokens."""
    bind = binder(model, dtype=compute_dtype, remat=remat)
    specs = param_specs(model, mesh)

    def gradients(params: Params, batch: Batch) -> tuple[Params, Sums]:
        # Denominators come from the whole batch before any part of it is computed.
        weight = jnp.maximum(meshes.psum(jnp.sum(batch.weights_BT), *meshes.BATCH_AXES), 1e-9)
        tokens = jnp.maximum(meshes.psum(jnp.sum(batch.segments_BT > 0).astype(jnp.float32), *meshes.BATCH_AXES), 1.0)

        def objective(params: Params, part: Batch) -> tuple[jax.Array, Sums]:
            sums = _sums(bind(params), part)
            return sums.loss / weight + router_aux_weight * sums.aux / tokens, sums

        grad = jax.grad(objective, has_aux=True)
        if microbatches == 1:
            return grad(params, batch)
        parts = jax.tree.map(lambda leaf: leaf.reshape(microbatches, -1, *leaf.shape[1:]), batch)

        def add(total: Any, part: Batch) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, grad(params, part)), None

        zero = (jax.tree.map(jnp.zeros_like, params), Sums(*(jnp.zeros(()) for _ in Sums._fields)))
        return jax.lax.scan(add, zero, parts)[0]

    sharded = jax.shard_map(
        gradients,
        mesh=mesh,
        in_specs=(specs, meshes.batch_spec(mesh)),
        out_specs=(specs, EVERYWHERE),
    )

    def step(state: State, batch: Batch) -> tuple[State, dict[str, jax.Array]]:
        grads, sums = sharded(state.params, batch)
        updates, opt = tx.update(grads, state.opt, state.params)
        metrics = means(sums) | {"grad_norm": optax.tree.norm(grads)}
        params: Any = optax.apply_updates(state.params, updates)
        return State(params, opt), metrics

    return step


def make_eval_step(model: ModelConfig, mesh: Mesh, *, compute_dtype: Any) -> Callable[[Params, Batch], Sums]:
    """Builds the evaluation of one batch: its sums."""
    bind = binder(model, dtype=compute_dtype)
    return jax.shard_map(
        lambda params, batch: _sums(bind(params), batch),
        mesh=mesh,
        in_specs=(param_specs(model, mesh), meshes.batch_spec(mesh)),
        out_specs=EVERYWHERE,
    )


def means(sums: Sums) -> dict[str, jax.Array]:
    """Metrics from sums."""
    return {
        "loss": sums.loss / jnp.maximum(sums.weight, 1e-9),
        "aux_loss": sums.aux / jnp.maximum(sums.tokens, 1.0),
        "tokens": sums.tokens,
        "trained_tokens": sums.weight,
    }
