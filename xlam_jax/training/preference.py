"""Losses on pairs: a chosen and a rejected continuation of one conversation, next to each other in a packed row.

In a row of pairs, segments 2p − 1 and 2p are the chosen and the rejected side of the row's p-th pair. Only the tokens
in which they differ have weight. Functions return sums over pairs; the step divides them by the number of pairs.

Axes: B rows, T tokens, P pairs of a row.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from xlam_jax.enums import PAIR_METRICS
from xlam_jax.enums import PairLoss as Kind
from xlam_jax.parallel import mesh

PER_TOKEN = ("ipo", "simpo", "orpo")
"""Losses that use the mean log-probability of a continuation's tokens instead of the sum."""


class Preference(NamedTuple):
    """A loss on pairs and its constants."""

    kind: Kind
    beta: float
    """Scale of a pair's rewards; ipo: 1 / (2β) is the target of their difference; orpo: weight of its term."""
    label_smoothing: float = 0.0
    """sigmoid: assumed fraction of pairs whose labels are swapped (conservative DPO)."""
    margin: float = 0.0
    """simpo: γ, the margin by which the chosen side's reward should be larger."""
    sft_weight: float = 0.0
    """Weight of −log p per token of the chosen side; orpo always adds it, with weight 1."""


class Sides(NamedTuple):
    """A sum per side of each pair, [B, P]."""

    chosen: jax.Array
    rejected: jax.Array


def by_side(values_BT: jax.Array, segments_BT: jax.Array, pairs: int) -> Sides:
    """Sums values over each side, by a product with the segments' indicator: deterministic on every backend."""
    member_BTS = segments_BT[:, :, None] == jnp.arange(1, 2 * pairs + 1)
    sums_BS = jnp.einsum(
        "BT,BTS->BS", values_BT, member_BTS.astype(values_BT.dtype), precision=jax.lax.Precision.HIGHEST
    )
    return Sides(sums_BS[:, ::2], sums_BS[:, 1::2])


def firsts(values_BT: jax.Array, segments_BT: jax.Array, pairs: int) -> jax.Array:
    """Returns the value at the first position of each pair, [B, P]; 0 for pairs that do not exist."""
    chosen_BTP = segments_BT[:, :, None] == 2 * jnp.arange(pairs) + 1
    first_BTP = chosen_BTP & (jnp.cumsum(chosen_BTP, axis=1) == 1)
    return jnp.sum(jnp.where(first_BTP, values_BT[:, :, None], 0), axis=1)


def count_pairs(segments_BT: jax.Array) -> jax.Array:
    """Returns the number of pairs in these rows, an f32 scalar."""
    return jnp.sum(jnp.max(segments_BT, axis=1) // 2).astype(jnp.float32)


def pair_losses(loss: Preference, policy: Sides, reference: Sides, tokens: Sides, real_BP: jax.Array) -> jax.Array:
    """Returns the loss of each pair, [B, P], from log-probabilities summed over each side, and each side's token count.

    sigmoid: DPO (Rafailov et al., 2305.18290); hinge: SLiC (Zhao et al., 2305.10425); ipo: Azar et al., 2310.12036, on
    means over tokens; kto_pair: the paired form of KTO (Ethayarajh et al., 2402.01306); simpo: Meng et al., 2405.14734;
    orpo: Hong et al., 2403.07691, the odds-ratio term only. `real_BP` marks the pairs that exist.
    """
    if loss.kind in PER_TOKEN:
        policy, reference = (
            Sides(*(side / jnp.maximum(count, 1.0) for side, count in zip(sides, tokens, strict=True)))
            for sides in (policy, reference)
        )
    chosen, rejected = (log_p - log_ref for log_p, log_ref in zip(policy, reference, strict=True))
    lead = loss.beta * (chosen - rejected)
    if loss.kind == "sigmoid":
        return -(1 - loss.label_smoothing) * jax.nn.log_sigmoid(lead) - loss.label_smoothing * jax.nn.log_sigmoid(-lead)
    if loss.kind == "hinge":
        return jax.nn.relu(1 - lead)
    if loss.kind == "ipo":
        return (chosen - rejected - 1 / (2 * loss.beta)) ** 2
    if loss.kind == "simpo":
        return -jax.nn.log_sigmoid(lead - loss.margin)
    if loss.kind == "kto_pair":
        # Baseline: the mean change of the policy over all pairs of the (micro)batch, without gradient.
        pairs = jnp.maximum(mesh.total(jnp.sum(real_BP)), 1)
        moved_chosen, moved_rejected = (
            jax.lax.stop_gradient(jnp.maximum(mesh.total(jnp.sum(jnp.where(real_BP, side, 0.0))) / pairs, 0.0))
            for side in (chosen, rejected)
        )
        gain = jax.nn.sigmoid(loss.beta * (chosen - moved_rejected))
        retained = jax.nn.sigmoid(loss.beta * (moved_chosen - rejected))
        return (1 - gain + 1 - retained) / 2
    assert loss.kind == "orpo", loss.kind
    odds = [log_p - jnp.log1p(-jnp.exp(jnp.minimum(log_p, -1e-6))) for log_p in policy]
    return -loss.beta * jax.nn.log_sigmoid(odds[0] - odds[1])


def preference_sums(
    loss: Preference,
    log_p_BT: jax.Array,
    reference_BT: jax.Array,
    weights_BT: jax.Array,
    segments_BT: jax.Array,
    pairs: int,
) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
    """Returns the losses of pairs [B, P], 0 for those that do not exist; which exist; and this device's sums of
    `PAIR_METRICS`.

    `log_p_BT`: log-probabilities of the labels, 0 for tokens without weight. `reference_BT`: the same under the
    reference policy, 0 without one.
    """
    counted_BT = (weights_BT != 0).astype(jnp.float32)
    policy = by_side(log_p_BT * counted_BT, segments_BT, pairs)
    reference = by_side(reference_BT * counted_BT, segments_BT, pairs)
    tokens = by_side(counted_BT, segments_BT, pairs)
    real_BP = tokens.chosen + tokens.rejected > 0
    losses_BP = pair_losses(loss, policy, reference, tokens, real_BP)
    sft_weight = loss.sft_weight + (loss.kind == "orpo")
    if sft_weight:
        losses_BP += sft_weight * -policy.chosen / jnp.maximum(tokens.chosen, 1.0)

    def real(values_BP: jax.Array) -> jax.Array:
        return jnp.where(real_BP, values_BP, 0.0)

    moved = Sides(*(log_p - log_ref for log_p, log_ref in zip(policy, reference, strict=True)))
    scale = Sides(*(jnp.where(loss.kind in PER_TOKEN, jnp.maximum(side, 1.0), 1.0) for side in tokens))
    rewards = Sides(*(loss.beta * side / by for side, by in zip(moved, scale, strict=True)))
    watched = (
        rewards.chosen,
        rewards.rejected,
        rewards.chosen - rewards.rejected,
        0.5 * (jnp.sign(rewards.chosen - rewards.rejected) + 1),  # a tie counts as half correct
        policy.chosen,
        policy.rejected,
        (moved.chosen + moved.rejected) / jnp.maximum(tokens.chosen + tokens.rejected, 1.0),
    )
    sums = {name: jnp.sum(real(value)) for name, value in zip(PAIR_METRICS, watched, strict=True)}
    return real(losses_BP), real_BP, sums
