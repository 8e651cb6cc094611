"""What is minimized. Every function returns sums; the step divides them by counts over the whole batch.

Axes: B rows, T tokens, D model, V this device's share of the vocabulary, E experts.
"""

import jax
import jax.numpy as jnp

from xlam_jax.models.decoder import RouterSums
from xlam_jax.models.linear import project
from xlam_jax.parallel import mesh

LOSS_CHUNK = 2048
"""Tokens whose logits exist at one time on a device."""


def token_log_probabilities(hidden_BTD: jax.Array, head_VD: jax.Array, labels_BT: jax.Array) -> jax.Array:
    """log p(label) of each token in f32, [B, T].

    Logits are made a chunk of tokens at a time and made again for the gradient, so that those of a whole batch are
    never held. The vocabulary may be split over the tensor axis.
    """
    rows, tokens, width = hidden_BTD.shape
    chunks = max(1, -(-rows * tokens // LOSS_CHUNK))
    while tokens % chunks:  # whole columns of the batch: a chunk is [B, T / chunks]
        chunks += 1
    head_VD, hidden_BTD = mesh.alike(head_VD, hidden_BTD)

    @jax.checkpoint
    def chunk(hidden_BCD: jax.Array, labels_BC: jax.Array) -> jax.Array:
        logits_BCV = project("BTD,VD->BTV", hidden_BCD, head_VD, hidden_BCD.dtype, out=jnp.float32)
        peak_BC = mesh.pmax(jax.lax.stop_gradient(jnp.max(logits_BCV, axis=-1)), "tensor")
        total_BC = mesh.psum(jnp.sum(jnp.exp(logits_BCV - peak_BC[..., None]), axis=-1), "tensor")
        first = mesh.index("tensor") * logits_BCV.shape[-1]
        mine_BCV = (labels_BC - first)[..., None] == jnp.arange(logits_BCV.shape[-1])
        label_BC = mesh.psum(jnp.sum(jnp.where(mine_BCV, logits_BCV, 0.0), axis=-1), "tensor")
        return label_BC - peak_BC - jnp.log(total_BC)

    if chunks == 1:
        return chunk(hidden_BTD, labels_BT)
    hidden_NBCD = jnp.moveaxis(hidden_BTD.reshape(rows, chunks, tokens // chunks, width), 1, 0)
    labels_NBC = jnp.moveaxis(labels_BT.reshape(rows, chunks, tokens // chunks), 1, 0)
    out_NBC = jax.lax.map(lambda part: chunk(*part), (hidden_NBCD, labels_NBC))
    return jnp.moveaxis(out_NBC, 0, 1).reshape(rows, tokens)


def load_balancing(sums: RouterSums, layers: int, tokens: jax.Array) -> jax.Array:
    """E × Σ_e (share of assignments to e) × (mean probability of e), over all layers and real tokens.

    1 × top-k when balanced (Fedus et al., 2101.03961, as transformers computes it for Mixtral).
    """
    count = jnp.maximum(layers * tokens, 1)
    return sums.assigned_E.shape[0] * jnp.sum((sums.assigned_E / count) * (sums.probability_E / count))
