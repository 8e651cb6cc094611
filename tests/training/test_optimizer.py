"""Schedules by their formulas; moments in few bits against those in f32; Muon's updates as the matrices they are."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_models

from xlam_jax.config import Train
from xlam_jax.models.config import Lora
from xlam_jax.models.params import initialize, matrix_axes, trainable
from xlam_jax.training.optimizer import optimizer, schedule

BASE = Train(steps=100, batch_size=1, learning_rate=0.1, end_learning_rate=0.01, warmup_steps=10)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {0: 0.0, 5: 0.05, 10: 0.1, 55: 0.055, 100: 0.01}),
        ({"schedule": "linear"}, {5: 0.05, 10: 0.1, 55: 0.055, 100: 0.01}),
        ({"schedule": "constant"}, {5: 0.05, 10: 0.1, 99: 0.1}),
        ({"schedule": "wsd", "decay_steps": 20}, {5: 0.05, 10: 0.1, 80: 0.1, 90: 0.055, 100: 0.01}),
        ({"warmup_steps": 0}, {0: 0.1, 50: 0.055, 100: 0.01}),
    ],
    ids=lambda changes: str(changes),
)
def test_schedules(changes: dict, expected: dict[int, float]):
    rate = schedule(BASE.model_copy(update=changes))
    for step, value in expected.items():
        assert float(rate(step)) == pytest.approx(value, abs=1e-6), step


def run(changes: dict, steps: int = 8, lora: bool = False):
    """Parameters after some steps on a quadratic with a fixed target, and the optimizer's state."""
    config = tiny_models.model_config(tiny_models.hf_model("mixtral", num_local_experts=4))
    config = replace(config, lora=Lora(targets=("q", "w1"), rank=4, alpha=4)) if lora else config
    train = BASE.model_copy(update={"learning_rate": 1e-2, "warmup_steps": 0, "weight_decay": 0.1, **changes})
    tx = optimizer(train, config)
    params = start = trainable(config, jax.jit(lambda: initialize(config, 0))())[0]
    keys = jax.random.split(jax.random.key(1), len(jax.tree.leaves(params)))
    target = jax.tree.unflatten(
        jax.tree.structure(params),
        [jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, jax.tree.leaves(params), strict=True)],
    )

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.tree.map(jnp.subtract, params, target), state, params)
        return optax.apply_updates(params, updates), state

    state = jax.jit(tx.init)(params)
    for _ in range(steps):
        params, state = step(params, state)
    return config, start, params, state


def moved(start, params) -> np.ndarray:
    return np.concatenate([np.ravel(b - a) for a, b in zip(*map(jax.tree.leaves, (start, params)), strict=True)])


@pytest.mark.parametrize(("moments", "bytes_a_parameter"), [("bfloat16", 4), ("8bit", 3)])
def test_small_moments_do_what_large_ones_do(moments: str, bytes_a_parameter: float):
    *_, whole, _ = run({})
    _, start, small, state = run({"moments": moments})
    theirs, ours = moved(start, whole), moved(start, small)
    assert np.linalg.norm(ours - theirs) < 0.05 * np.linalg.norm(theirs)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    assert size <= bytes_a_parameter * ours.size + 64


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": "lion", "moments": "bfloat16"},
        {"optimizer": "adafactor"},
        {"optimizer": "muon"},
        {"optimizer": "adamw", "moments": "8bit"},
    ],
    ids=lambda changes: changes["optimizer"],
)
@pytest.mark.parametrize("lora", [False, True])
def test_every_rule_steps_as_far_as_the_learning_rate_says(changes: dict, lora: bool):
    """Also where a parameter is zero. Adam with Nesterov's momentum, beside Muon, begins with half as much again."""
    _, start, params, _ = run(changes | {"weight_decay": 0.0}, lora=lora, steps=1)
    for before, after in zip(*map(jax.tree.leaves, (start, params)), strict=True):
        assert 0.1e-2 < float(jnp.sqrt(jnp.mean(jnp.square(after - before)))) < 1.6e-2


@pytest.mark.parametrize("rule", ["adamw", "lion", "adafactor", "muon"])
def test_decay_is_of_the_learning_rate_and_spares_norms(rule: str):
    """Between a step with decay and one without lies learning rate × decay × weight."""
    (_, start, with_it, _), (*_, without, _) = (
        run({"optimizer": rule, "weight_decay": decay}, steps=1) for decay in (0.5, 0.0)
    )
    for (path, before), *after in zip(
        jax.tree_util.tree_leaves_with_path(start), *map(jax.tree.leaves, (with_it, without)), strict=True
    ):
        expected = 0.0 if path[-1].key.endswith("norm") else 1e-2 * 0.5 * before
        np.testing.assert_allclose(after[1] - after[0], expected + jnp.zeros_like(before), atol=1e-6)


def test_muon_takes_each_weight_as_its_product_does():
    config, start, params, _ = run({"optimizer": "muon", "weight_decay": 0.0}, steps=1)
    axes = matrix_axes(config)
    assert axes["embedding"] is axes["blocks"]["router"] is axes["blocks"]["mlp_norm"] is None
    assert axes["blocks"]["o"] == ((1, 2, 3), (4,))
    assert axes["blocks"]["w1"] == ((2,), (3,))  # of each layer's each expert
    update = np.asarray(params["blocks"]["w1"] - start["blocks"]["w1"])
    for expert in update.reshape(-1, config.hidden_size, config.mlp_size):
        singular = np.linalg.svd(expert, compute_uv=False)
        assert singular.max() < 2 * singular.min()  # close to orthogonal, which a step on the stack as one would not be
