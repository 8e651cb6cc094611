"""Schedules against their formulas; quantized moments against f32 moments; Muon's updates per matrix."""

import math
from dataclasses import replace
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_models
from hypothesis import given, settings
from hypothesis import strategies as st

from xlam_jax.config import Train
from xlam_jax.models.config import Lora
from xlam_jax.models.params import initialize, matrix_axes, trainable
from xlam_jax.training.optimizer import optimizer, schedule

BASE = Train(steps=100, batch_size=1, learning_rate=0.1, end_learning_rate=0.01, warmup_steps=10)


def expected_rate(train: Train, step: int) -> float:
    """The learning rate of step 1 … train.steps by the definition, in double precision."""
    peak, end = train.learning_rate, train.end_learning_rate
    if step <= train.warmup_steps:
        return peak * step / train.warmup_steps
    at_peak = max(train.warmup_steps, 1)  # the last step before the rate falls
    if train.schedule == "wsd":
        at_peak = max(at_peak, train.steps - train.decay_steps)
    if train.schedule == "constant" or step <= at_peak:
        return peak
    done = (step - at_peak) / (train.steps - at_peak)
    return end + (peak - end) * ((1 + math.cos(math.pi * done)) / 2 if train.schedule == "cosine" else 1 - done)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {1: 0.01, 5: 0.05, 10: 0.1, 55: 0.055, 100: 0.01}),
        ({"schedule": "linear"}, {1: 0.01, 10: 0.1, 55: 0.055, 100: 0.01}),
        ({"schedule": "constant"}, {1: 0.01, 5: 0.05, 10: 0.1, 100: 0.1}),
        ({"schedule": "wsd", "decay_steps": 20}, {5: 0.05, 10: 0.1, 80: 0.1, 90: 0.055, 100: 0.01}),
        ({"schedule": "wsd", "decay_steps": 1}, {99: 0.1, 100: 0.01}),
        ({"schedule": "wsd", "decay_steps": 90}, {10: 0.1, 55: 0.055, 100: 0.01}),
        ({"warmup_steps": 0, "steps": 101}, {1: 0.1, 51: 0.055, 101: 0.01}),
        ({"warmup_steps": 1}, {1: 0.1, 100: 0.01}),
        ({"warmup_steps": 99}, {1: 0.1 / 99, 99: 0.1, 100: 0.01}),
        ({"warmup_steps": 0, "steps": 1}, {1: 0.1}),
    ],
    ids=lambda changes: str(changes),
)
def test_schedules(changes: dict, expected: dict[int, float]):
    train = BASE.model_copy(update=changes)
    rate = schedule(train)
    for step, value in expected.items():
        assert float(jnp.asarray(rate(step - 1))) == pytest.approx(value, rel=1e-6), step
        assert expected_rate(train, step) == pytest.approx(value, rel=1e-12), step


@st.composite
def trainings(draw: st.DrawFn) -> Train:
    steps = draw(st.integers(1, 5000) | st.integers(1, 4))
    warmup = draw(st.integers(0, steps - 1) | st.sampled_from([0, steps - 1]))
    kinds: list[Literal["cosine", "linear", "constant", "wsd"]] = ["cosine", "linear", "constant", "wsd"]
    kind = draw(st.sampled_from(kinds))
    peak = draw(st.floats(1e-6, 1.0))
    return Train(
        steps=steps,
        batch_size=1,
        learning_rate=peak,
        end_learning_rate=draw(st.sampled_from([0.0, peak]) | st.floats(0.0, peak)),
        warmup_steps=warmup,
        schedule=kind,
        decay_steps=draw(st.integers(1, steps - warmup) | st.just(1)) if kind == "wsd" else 0,
    )


@settings(deadline=None, derandomize=True, max_examples=60)
@given(trainings())
def test_a_schedule_keeps_its_ends_and_equals_the_formula(train: Train):
    top, peak, end = max(train.warmup_steps, 1), np.float32(train.learning_rate), np.float32(train.end_learning_rate)
    # a fixed number of steps, so that one compilation serves all examples
    steps = np.sort(np.concatenate([[1, top, train.steps], np.linspace(1, train.steps, 61).round()])).astype(int)
    rates = np.asarray(schedule(train)(jnp.asarray(steps - 1)))
    expected = [expected_rate(train, step) for step in steps]
    np.testing.assert_allclose(rates, expected, rtol=1e-5, atol=float(1e-6 * peak))
    assert rates[0] > 0
    assert (rates[steps == top] == peak).all()
    if train.schedule != "constant" and train.steps > 1:
        assert rates[-1] == end
    assert (np.diff(rates[steps <= top]) >= 0).all()
    assert (np.diff(rates[steps >= top]) <= 1e-6 * peak).all()


def test_the_first_step_of_a_warm_up_moves_and_the_last_step_decays():
    """The optimizer applies the schedule from its first step: a step on a gradient of ones moves by its rate."""
    train = BASE.model_copy(update={"steps": 3, "warmup_steps": 2, "schedule": "wsd", "decay_steps": 1})
    tx = optax.scale_by_learning_rate(schedule(train))
    state = tx.init({})
    moves = []
    for _ in range(3):
        update, state = tx.update({"w": jnp.ones(())}, state)
        moves.append(-float(jax.tree.leaves(update)[0]))
    assert moves == pytest.approx([0.05, 0.1, 0.01], rel=1e-6)


def run(changes: dict, steps: int = 8, lora: bool = False, family: str = "mixtral"):
    """Returns the parameters after some steps on a quadratic with a fixed target, and the optimizer's state."""
    config = tiny_models.model_config(tiny_models.hf_model(family, num_local_experts=4))
    config = replace(config, lora=Lora(targets=("q", "w1"), rank=4, alpha=4)) if lora else config
    train = BASE.model_copy(update={"learning_rate": 1e-2, "warmup_steps": 0, "weight_decay": 0.1, **changes})
    tx = optimizer(train, config)
    params = trainable(config, jax.jit(lambda: initialize(config, 0))())[0]
    params = start = jax.tree_util.tree_map_with_path(  # biases start at zero, where a decay has no effect
        lambda path, leaf: jnp.ones_like(leaf) if path[-1].key.endswith("bias") else leaf, params
    )
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
    expected, actual = moved(start, whole), moved(start, small)
    assert np.linalg.norm(actual - expected) < 0.05 * np.linalg.norm(expected)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    assert size <= bytes_a_parameter * actual.size + 64


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
    """Also at parameters that are zero. Adam with Nesterov momentum, used with Muon, starts with 1.5 times the
    update."""
    _, start, params, _ = run(changes | {"weight_decay": 0.0}, lora=lora, steps=1)
    for before, after in zip(*map(jax.tree.leaves, (start, params)), strict=True):
        assert 0.1e-2 < float(jnp.sqrt(jnp.mean(jnp.square(after - before)))) < 1.6e-2


@pytest.mark.parametrize(
    ("rule", "family"),
    [
        *((rule, "mixtral") for rule in ("adamw", "lion", "adafactor", "muon")),
        ("adamw", "qwen2"),
        pytest.param("muon", "qwen2", marks=pytest.mark.slow),
    ],
)
def test_decay_is_of_the_learning_rate_and_spares_norms_and_biases(rule: str, family: str):
    """The difference between a step with and without decay is learning rate × decay × weight."""
    (_, start, with_it, _), (*_, without, _) = (
        run({"optimizer": rule, "weight_decay": decay}, steps=1, family=family) for decay in (0.5, 0.0)
    )
    for (path, before), *after in zip(
        jax.tree_util.tree_leaves_with_path(start), *map(jax.tree.leaves, (with_it, without)), strict=True
    ):
        expected = 0.0 if path[-1].key.endswith(("norm", "bias")) else 1e-2 * 0.5 * before
        np.testing.assert_allclose(after[1] - after[0], expected + jnp.zeros_like(before), atol=1e-6)


def test_muon_takes_each_weight_as_its_product_does():
    config, start, params, _ = run({"optimizer": "muon", "weight_decay": 0.0}, steps=1)
    axes = matrix_axes(config)
    assert axes["embedding"] is axes["blocks"]["router"] is axes["blocks"]["mlp_norm"] is None
    assert axes["blocks"]["o"] == ((1, 2, 3), (4,))
    assert axes["blocks"]["w1"] == ((2,), (3,))  # per layer and expert
    update = np.asarray(params["blocks"]["w1"] - start["blocks"]["w1"])
    for expert in update.reshape(-1, config.hidden_size, config.mlp_size):
        singular = np.linalg.svd(expert, compute_uv=False)
        assert (
            singular.max() < 2 * singular.min()
        )  # close to orthogonal, unlike an update of the stacked matrices as one
