"""Losses on pairs against their formulas, computed for one pair at a time in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xlam_jax.enums import PAIR_METRICS
from xlam_jax.training.preference import Preference, Sides, by_side, count_pairs, pair_losses, preference_sums

ROWS, LENGTH, PAIRS = 3, 60, 4


def packed(seed: int = 0):
    """Returns log-probabilities of policy and reference, weights and segments of rows with two or three pairs."""
    rng = np.random.default_rng(seed)
    segments_BT = np.zeros((ROWS, LENGTH), np.int32)
    weights_BT = np.zeros((ROWS, LENGTH), np.float32)
    for row in range(ROWS):
        at = 0
        for segment in range(1, 2 * (2 + row % 2) + 1):
            length = int(rng.integers(4, 10))
            segments_BT[row, at : at + length] = segment
            weights_BT[row, at + 2 : at + length] = 1
            at += length
    log_p_BT, reference_BT = (-rng.exponential(size=(ROWS, LENGTH)) * (weights_BT != 0) for _ in range(2))
    return log_p_BT, reference_BT, weights_BT, segments_BT


def log_sigmoid(x: float) -> float:
    return -np.log1p(np.exp(-x))


def by_hand(preference: Preference) -> list[float]:
    """Computes the loss of every pair."""
    log_p_BT, reference_BT, weights_BT, segments_BT = packed()
    pairs = []
    for row in range(ROWS):
        for pair in range(segments_BT[row].max() // 2):
            sides = [segments_BT[row] == 2 * pair + side for side in (1, 2)]
            sums = [
                (log_p_BT[row, side].sum(), reference_BT[row, side].sum(), weights_BT[row, side].sum())
                for side in sides
            ]
            pairs.append(sums)
    moved = [np.mean([pair[side][0] - pair[side][1] for pair in pairs]) for side in (0, 1)]
    moved = [max(0.0, value) for value in moved]
    losses = []
    for (p_c, r_c, n_c), (p_r, r_r, n_r) in pairs:
        if preference.kind == "sigmoid":
            lead = preference.beta * ((p_c - p_r) - (r_c - r_r))
            loss = -(1 - preference.label_smoothing) * log_sigmoid(lead) - preference.label_smoothing * log_sigmoid(
                -lead
            )
        elif preference.kind == "hinge":
            loss = max(0.0, 1 - preference.beta * ((p_c - p_r) - (r_c - r_r)))
        elif preference.kind == "ipo":
            loss = ((p_c - r_c) / n_c - (p_r - r_r) / n_r - 1 / (2 * preference.beta)) ** 2
        elif preference.kind == "kto_pair":
            chosen = 1 / (1 + np.exp(-preference.beta * (p_c - r_c - moved[1])))
            rejected = 1 / (1 + np.exp(-preference.beta * (moved[0] - (p_r - r_r))))
            loss = (1 - chosen + 1 - rejected) / 2
        elif preference.kind == "simpo":
            loss = -log_sigmoid(preference.beta * (p_c / n_c - p_r / n_r) - preference.margin)
        else:
            odds = [np.log(np.exp(p / n) / (1 - np.exp(p / n))) for p, n in ((p_c, n_c), (p_r, n_r))]
            loss = -preference.beta * log_sigmoid(odds[0] - odds[1]) - p_c / n_c
        losses.append(loss + preference.sft_weight * -p_c / n_c)
    return losses


CASES = [
    Preference("sigmoid", 0.1),
    Preference("sigmoid", 0.5, label_smoothing=0.2, sft_weight=0.3),
    Preference("hinge", 0.3),
    Preference("ipo", 0.2),
    Preference("kto_pair", 0.4),
    Preference("simpo", 2.0, margin=0.7),
    Preference("orpo", 0.2),
]


@pytest.mark.parametrize("preference", CASES, ids=lambda preference: f"{preference.kind}-{preference.beta}")
def test_losses_are_those_of_the_papers(preference: Preference):
    log_p_BT, reference_BT, weights_BT, segments_BT = packed()
    if preference.kind in ("simpo", "orpo"):
        reference_BT = np.zeros_like(reference_BT)
    losses_BP, _, watched = preference_sums(
        preference,
        jnp.asarray(log_p_BT),
        jnp.asarray(reference_BT),
        jnp.asarray(weights_BT),
        jnp.asarray(segments_BT),
        PAIRS,
    )
    losses = by_hand(preference)
    assert float(count_pairs(jnp.asarray(segments_BT))) == len(losses) == 7
    np.testing.assert_allclose(float(jnp.sum(losses_BP)), sum(losses), rtol=1e-5)
    assert tuple(watched) == PAIR_METRICS
    assert 0 <= float(watched["accuracy"]) <= 7


@pytest.mark.parametrize("preference", CASES, ids=lambda preference: f"{preference.kind}-{preference.beta}")
def test_gradients_are_those_of_differences(preference: Preference):
    """Against central differences of the loss in each log-probability, in float64."""
    log_p_BT, reference_BT, weights_BT, segments_BT = packed(1)
    if preference.kind == "kto_pair":  # its baseline has no gradient, and is zero for both sides here
        reference_BT = log_p_BT + 0.1 * (weights_BT != 0)

    def loss(log_p_BT):
        weights, segments = jnp.asarray(weights_BT), jnp.asarray(segments_BT)
        return jnp.sum(preference_sums(preference, log_p_BT, reference_BT, weights, segments, PAIRS)[0])

    with jax.enable_x64(True):
        gradient = np.asarray(jax.grad(loss)(jnp.asarray(log_p_BT)))
        for row, at in ((0, 4), (1, 9), (2, 20), (0, 0)):
            step = np.zeros_like(log_p_BT)
            step[row, at] = 1e-5
            numeric = (float(loss(jnp.asarray(log_p_BT + step))) - float(loss(jnp.asarray(log_p_BT - step)))) / 2e-5
            np.testing.assert_allclose(gradient[row, at], numeric, rtol=1e-5, atol=1e-8)
        assert not gradient[weights_BT == 0].any()


def test_sides_are_summed_apart():
    segments_BT = jnp.array([[1, 1, 2, 3, 4, 4, 0]])
    sums = by_side(jnp.arange(1.0, 8.0)[None], segments_BT, 3)
    assert sums.chosen.tolist() == [[3, 4, 0]]
    assert sums.rejected.tolist() == [[3, 11, 0]]


def test_certain_tokens_do_not_break_the_odds():
    one = Sides(jnp.zeros((1, 1)), jnp.full((1, 1), -0.5))
    tokens = Sides(jnp.ones((1, 1)), jnp.ones((1, 1)))
    nothing = Sides(jnp.zeros((1, 1)), jnp.zeros((1, 1)))
    gradient = jax.grad(
        lambda log_p: pair_losses(
            Preference("orpo", 1.0), Sides(log_p, one.rejected), nothing, tokens, jnp.array(True)
        ).sum()
    )(one.chosen)
    assert np.isfinite(np.asarray(gradient)).all()
