"""The loss against the plain softmax, values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xlam_jax.models.decoder import RouterSums
from xlam_jax.training import objectives


@pytest.mark.parametrize(("rows", "tokens", "share"), [(2, 16, 0.5), (3, 700, 0.1), (1, 1024, 1.0), (2, 8, 0.0)])
def test_log_probabilities_equal_the_softmax(rows: int, tokens: int, share: float):
    rng = np.random.default_rng(0)
    hidden_BTD = jnp.asarray(rng.normal(size=(rows, tokens, 8)), jnp.float32)
    head_VD = jnp.asarray(rng.normal(size=(33, 8)), jnp.float32)
    labels_BT = jnp.asarray(rng.integers(0, 33, (rows, tokens)))
    counted_BT = jnp.asarray(rng.random((rows, tokens)) < share)
    upstream_BT = jnp.asarray(rng.normal(size=(rows, tokens)), jnp.float32)

    def plain(hidden_BTD: jax.Array, head_VD: jax.Array) -> jax.Array:
        log_p_BTV = jax.nn.log_softmax(hidden_BTD @ head_VD.T)
        log_p_BT = jnp.take_along_axis(log_p_BTV, labels_BT[..., None], axis=-1)[..., 0]
        return jnp.where(counted_BT, log_p_BT, 0.0)

    def ours(hidden_BTD: jax.Array, head_VD: jax.Array) -> jax.Array:
        return objectives.token_log_probabilities(hidden_BTD, head_VD, labels_BT, counted_BT)[0]

    np.testing.assert_allclose(ours(hidden_BTD, head_VD), plain(hidden_BTD, head_VD), rtol=1e-5, atol=1e-5)
    expected, got = (
        jax.grad(lambda *args, one=one: jnp.sum(one(*args) * upstream_BT), argnums=(0, 1))(hidden_BTD, head_VD)
        for one in (plain, ours)
    )
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_balanced_experts_cost_their_number_per_token():
    tokens, layers, experts, per_token = 100, 3, 8, 2
    assigned = jnp.full(experts, layers * tokens * per_token / experts)
    probability = jnp.full(experts, layers * tokens / experts)
    loss = objectives.load_balancing(RouterSums(assigned, probability), layers, jnp.asarray(float(tokens)))
    assert float(loss) == pytest.approx(per_token)
