"""The optimizer, from the config: AdamW under a warmed-up cosine, with the gradient clipped by its global norm."""

import jax
import optax

from xlam_jax.config import Train
from xlam_jax.models.params import Params


def schedule(train: Train) -> optax.Schedule:
    """Learning rate of a step: linear from zero, then a cosine to the end value (Loshchilov & Hutter, 1608.03983)."""
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0 if train.warmup_steps else train.learning_rate,
        peak_value=train.learning_rate,
        warmup_steps=train.warmup_steps,
        decay_steps=train.steps,
        end_value=train.end_learning_rate,
    )


def optimizer(train: Train) -> optax.GradientTransformation:
    """AdamW (Loshchilov & Hutter, 1711.05101); the norms' scales are not decayed."""
    return optax.chain(
        optax.clip_by_global_norm(train.clip_norm),
        optax.adamw(
            schedule(train),
            b1=train.beta1,
            b2=train.beta2,
            eps=train.epsilon,
            weight_decay=train.weight_decay,
            mask=_decayed,
        ),
    )


def _decayed(params: Params) -> Params:
    return jax.tree_util.tree_map_with_path(
        lambda path, _: not jax.tree_util.keystr(path, simple=True, separator=".").endswith("norm"), params
    )
