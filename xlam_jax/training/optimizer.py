"""The optimizer and its learning-rate schedule: the gradient is clipped by its global norm and passed to optax."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from xlam_jax.config import Train
from xlam_jax.models.config import ModelConfig
from xlam_jax.models.families import is_vector
from xlam_jax.models.params import Params, matrix_axes

MOMENTS = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "8bit": jnp.float8_e4m3fn}
BLOCK = 128
"""Number of 8-bit moments that share a scale, along the last axis. An axis whose size is not a multiple of it has
a single scale."""


def schedule(train: Train) -> optax.Schedule:
    """Learning rate of each step, as a function of the number of steps before it (optax's convention).

    Step s of 1 … `train.steps` has the rate `learning_rate` · s / `warmup_steps` during warm-up, so that no step is
    without effect and step `warmup_steps` (without warm-up: step 1) has the rate `learning_rate`. From there a cosine
    (Loshchilov & Hutter, 1608.03983) or a line reaches `end_learning_rate` at the last step. wsd (warmup, stable,
    decay: Hu et al., 2404.06395) stays constant, and falls linearly over the last `decay_steps` steps. A run of a
    single step has the rate `learning_rate`.
    """
    peak, end, steps, warmup = train.learning_rate, train.end_learning_rate, train.steps, train.warmup_steps
    decay = steps - max(warmup, 1)
    if train.schedule == "wsd":
        decay = min(decay, train.decay_steps)
    level = steps if train.schedule == "constant" else steps - decay

    def rate(count: Any) -> jax.Array:
        step = jnp.asarray(count, jnp.float32) + 1
        left = jnp.clip((steps - step) / max(decay, 1), 0.0, 1.0)  # exactly 0 at the last step
        share = 0.5 * (1 - jnp.cos(jnp.pi * left)) if train.schedule == "cosine" else left
        falling = share * peak + (1 - share) * end
        return jnp.where(step < warmup, peak * (step / max(warmup, 1)), jnp.where(step <= level, peak, falling))

    return rate


def optimizer(train: Train, model: ModelConfig) -> optax.GradientTransformation:
    """AdamW (Loshchilov & Hutter, 1711.05101), Adafactor (Shazeer & Stern, 1804.04235), Lion (Chen et al., 2302.06675)
    or Muon (Jordan et al., 2024; Adam with Nesterov momentum for parameters that are not matrices of a block). All
    apply the learning rate and weight decay as AdamW does. The scales of norms are not decayed."""
    return optax.chain(
        optax.clip_by_global_norm(train.clip_norm),
        _direction(train, model),
        optax.add_decayed_weights(train.weight_decay, _decayed),
        optax.scale_by_learning_rate(schedule(train)),
    )


def _direction(train: Train, model: ModelConfig) -> optax.GradientTransformation:
    """Returns the update at a learning rate of 1 without decay, of about the magnitude of AdamW's.

    optax.adafactor and optax.contrib.muon do not apply rate and decay as AdamW does. The first scales updates by the
    parameter's own norm, which is 0 for the adapter factor that starts at zero, and its decay ignores the learning
    rate; the second decays norms.
    """
    dtype = MOMENTS[train.moments]
    if train.optimizer == "adamw":
        adam = optax.scale_by_adam(train.beta1, train.beta2, train.epsilon)
        return adam if train.moments == "float32" else _quantize_moments(adam, dtype)
    if train.optimizer == "lion":
        return optax.scale_by_lion(train.beta1, train.beta2, mu_dtype=dtype)
    if train.optimizer == "adafactor":
        return optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0))
    muon = optax.contrib.muon(
        1.0,
        beta=train.beta1,
        mu_dtype=dtype,
        adam_b1=train.beta1,
        adam_b2=train.beta2,
        # so that learning rates tuned for AdamW fit (Liu et al., 2502.16982)
        consistent_rms=0.2,
        muon_weight_dimension_numbers=jax.tree.map(
            lambda axes: axes and optax.contrib.MuonDimensionNumbers(*axes), matrix_axes(model), is_leaf=_is_axes
        ),
    )
    return optax.chain(muon, optax.scale(-1.0))


def _is_axes(node: Any) -> bool:
    return node is None or type(node) is tuple


def _decayed(params: Params) -> Params:
    """Whether the optimizer decays each parameter: all but the scales of norms and biases."""
    return jax.tree_util.tree_map_with_path(lambda path, _: not is_vector(path[-1].key), params)


class Quantized(NamedTuple):
    """Moments stored in eight bits: values relative to the largest of their block."""

    values: Any
    scales: Any


def _quantize_moments(adam: optax.GradientTransformation, dtype: Any) -> optax.GradientTransformation:
    """Adam with both moments stored in bf16 or in eight bits, and computed in f32 (Dettmers et al., 2110.02861, with an
    8-bit float instead of their table). The square root of the second moment is stored, which halves its range."""

    def blocks(leaf: jax.Array) -> tuple[int, ...]:
        size = leaf.shape[-1]
        block = BLOCK if size % BLOCK == 0 else size
        return (*leaf.shape[:-1], size // block, block)

    def pack(moment: Any) -> Any:
        if dtype == jnp.bfloat16:
            return jax.tree.map(lambda leaf: leaf.astype(dtype), moment)
        largest = float(jnp.finfo(dtype).max)

        def scale(leaf: jax.Array) -> jax.Array:
            return jnp.maximum(jnp.max(jnp.abs(leaf.reshape(blocks(leaf))), axis=-1), 1e-30) / largest

        def values(leaf: jax.Array) -> jax.Array:
            return (leaf.reshape(blocks(leaf)) / scale(leaf)[..., None]).astype(dtype).reshape(leaf.shape)

        return Quantized(jax.tree.map(values, moment), jax.tree.map(scale, moment))

    def unpack(moment: Any) -> Any:
        if dtype == jnp.bfloat16:
            return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), moment)
        return jax.tree.map(
            lambda leaf, scales: (leaf.astype(jnp.float32).reshape(blocks(leaf)) * scales[..., None]).reshape(
                leaf.shape
            ),
            moment.values,
            moment.scales,
        )

    def packed(state: Any) -> Any:
        return state._replace(mu=pack(state.mu), nu=pack(jax.tree.map(jnp.sqrt, state.nu)))

    def init(params: Any) -> Any:
        state = adam.init(params)
        # behind a barrier: the compiler would constant-fold the packing of zeros, element by element
        return packed(jax.lax.optimization_barrier(state))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        whole = state._replace(mu=unpack(state.mu), nu=jax.tree.map(jnp.square, unpack(state.nu)))
        updates, whole = adam.update(updates, whole, params)
        return updates, packed(whole)

    return optax.GradientTransformation(init, update)
