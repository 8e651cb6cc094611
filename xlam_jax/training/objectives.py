"""Losses of tokens and of the router. The step divides their sums by counts over the whole batch.

Axes: B rows, T tokens, D model, V this device's share of the vocabulary, E experts.
"""

import jax
import jax.numpy as jnp

from xlam_jax.models.decoder import RouterSums
from xlam_jax.models.linear import project
from xlam_jax.parallel import mesh

LOSS_CHUNK = 512
"""Maximum number of tokens whose logits exist at the same time on a device."""


def token_log_probabilities(
    hidden_BTD: jax.Array, head_VD: jax.Array, labels_BT: jax.Array, counted_BT: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns log p(label) of each counted token, and the log of its softmax's normalizer: f32, [B, T] each, 0 where
    `counted_BT` is false.

    Counted tokens are moved to the front. Logits are computed for one chunk of them at a time, and recomputed for the
    gradient, so that the logits of a whole batch are never in memory, and those of prompts are never computed. The
    vocabulary may be sharded over the tensor axis.
    """
    head_VD, hidden_BTD = mesh.alike(head_VD, hidden_BTD)
    order_S = jnp.argsort(~counted_BT.reshape(-1), stable=True)
    inverse_S = jnp.argsort(order_S)
    hidden_SD = _permute(hidden_BTD.reshape(-1, hidden_BTD.shape[-1]), *mesh.alike(order_S, inverse_S))
    labels_S, counted_S = labels_BT.reshape(-1)[order_S], counted_BT.reshape(-1)[order_S]

    def score(hidden_CD: jax.Array, labels_C: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits_CV = project("CD,VD->CV", hidden_CD, head_VD, hidden_CD.dtype, out=jnp.float32)
        peak_C = mesh.pmax(jax.lax.stop_gradient(jnp.max(logits_CV, axis=-1)), "tensor")
        total_C = mesh.psum(jnp.sum(jnp.exp(logits_CV - peak_C[:, None]), axis=-1), "tensor")
        first = mesh.index("tensor") * logits_CV.shape[-1]
        is_label_CV = (labels_C - first)[:, None] == jnp.arange(logits_CV.shape[-1])
        label_C = mesh.psum(jnp.sum(jnp.where(is_label_CV, logits_CV, 0.0), axis=-1), "tensor")
        log_z_C = peak_C + jnp.log(total_C)
        return label_C - log_z_C, log_z_C

    def skip(_: jax.Array, labels_C: jax.Array) -> tuple[jax.Array, jax.Array]:
        zeros_C = mesh.vary(jnp.zeros(labels_C.shape), mesh.varying(labels_C))
        return zeros_C, zeros_C

    @jax.checkpoint
    def chunk(hidden_CD: jax.Array, labels_C: jax.Array, counted_C: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jax.lax.cond(jnp.any(counted_C), score, skip, hidden_CD, labels_C)

    chunks = -(-labels_S.size // LOSS_CHUNK)
    while labels_S.size % chunks:
        chunks += 1
    parts = jax.tree.map(lambda leaf: leaf.reshape(chunks, -1, *leaf.shape[1:]), (hidden_SD, labels_S, counted_S))
    scored = jax.lax.map(lambda part: chunk(*part), parts)
    log_p_BT, log_z_BT = (
        jnp.where(counted_BT, each.reshape(-1)[inverse_S].reshape(labels_BT.shape), 0.0) for each in scored
    )
    return log_p_BT, log_z_BT


@jax.custom_vjp
def _permute(x_SD: jax.Array, order_S: jax.Array, inverse_S: jax.Array) -> jax.Array:
    """Permutes rows. Its gradient is a gather too: a scatter is slow, and on a GPU its order is not deterministic."""
    return x_SD[order_S]


_permute.defvjp(
    lambda x_SD, order_S, inverse_S: (x_SD[order_S], inverse_S),
    lambda inverse_S, dy_SD: (dy_SD[inverse_S], None, None),
)


def load_balancing(sums: RouterSums, layers: int, tokens: jax.Array) -> jax.Array:
    """Returns E × Σ_e (fraction of assignments to e) × (mean probability of e), over all layers and all real tokens.

    It equals top-k if the load is balanced (Fedus et al., 2101.03961, as transformers computes it for Mixtral).
    """
    count = jnp.maximum(layers * tokens, 1)
    return sums.assigned_E.shape[0] * jnp.sum((sums.assigned_E / count) * (sums.probability_E / count))
