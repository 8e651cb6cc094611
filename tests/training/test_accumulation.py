"""Microbatches do not change the update: rows with unequal numbers of trained tokens, or of pairs."""

from dataclasses import replace
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_batches
import tiny_models

from xlam_jax.config import Train
from xlam_jax.enums import UNREFERENCED
from xlam_jax.models.config import Lora, ModelConfig
from xlam_jax.models.params import Params, shapes, trainable
from xlam_jax.parallel.mesh import make_mesh
from xlam_jax.training import step as steps
from xlam_jax.training.optimizer import optimizer
from xlam_jax.training.preference import Kind, Preference

ROWS, LENGTH = 8, 72


def model(family: str, lora: bool) -> ModelConfig:
    config = tiny_models.model_config(tiny_models.hf_model(family, num_hidden_layers=1, num_local_experts=4))
    return replace(config, lora=Lora(targets=("q", "v", "w1"), rank=4, alpha=8.0)) if lora else config


def weights(config: ModelConfig) -> tuple[Params, Params]:
    """Returns the trainable and the frozen parameters; no adapter is zero."""
    rng = np.random.default_rng(0)
    return trainable(
        config, jax.tree.map(lambda leaf: rng.normal(scale=0.3, size=leaf.shape).astype(np.float32), shapes(config))
    )


def gradients(
    config: ModelConfig, batch: steps.Batch, objective: steps.Objective, microbatches: int
) -> tuple[Params, dict[str, Any]]:
    """Returns the gradients that a step passes to the optimizer, and its metrics."""
    mesh = make_mesh({}, jax.devices()[:1])
    tx = optax.trace(decay=0.0)  # an optimizer whose state is the gradient
    params, frozen = weights(config)
    step = steps.make_train_step(
        config,
        tx,
        mesh,
        steps.StepOptions(
            compute_dtype=jnp.float32,
            remat="none",
            microbatches=microbatches,
            router_aux_weight=0.0,
            objective=objective,
        ),
    )
    state = steps.init_state(steps.abstract_state(config, tx, mesh), tx, params)
    state, metrics = jax.jit(step)(state, frozen, batch)
    return jax.device_get(state.opt.trace), jax.device_get(metrics)


def largest(tree: Params) -> float:
    return max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(tree))


def same_metrics(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    for name in set(expected) - {"aux_loss", "groups"}:  # the auxiliary loss is that of each microbatch
        np.testing.assert_allclose(actual[name], expected[name], rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize(
    ("family", "method"),
    [
        ("mistral", "dpo"),
        ("mixtral", "sft"),
        pytest.param("mistral", "sft", marks=pytest.mark.slow),
        pytest.param("mixtral", "dpo", marks=pytest.mark.slow),
    ],
)
def test_the_update_is_that_of_the_whole_batch(family: str, method: str):
    config = model(family, lora=method == "dpo")
    objective, batch = steps.SFT, tiny_batches.sequences(ROWS, LENGTH, config.vocab_size)
    if method == "dpo":
        objective = steps.Objective(Preference("sigmoid", 0.5), pairs=tiny_batches.PAIRS, adapters_off=True)
        batch = tiny_batches.pairs(ROWS, LENGTH, config.vocab_size)
    params = weights(config)[0]
    tx = optimizer(Train(steps=10, batch_size=ROWS, learning_rate=1e-3, schedule="constant", warmup_steps=0), config)
    update = jax.jit(lambda gradient: tx.update(gradient, tx.init(params), params)[0])
    whole, metrics = gradients(config, batch, objective, 1)
    assert largest(whole) > 1e-2
    for microbatches in (4, 8):
        parts, of_parts = gradients(config, batch, objective, microbatches)
        same_metrics(of_parts, metrics)
        assert largest(jax.tree.map(np.subtract, parts, whole)) <= 1e-6 * largest(whole)
        assert largest(jax.tree.map(np.subtract, update(parts), update(whole))) <= 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in get_args(Kind) if kind != "kto_pair"])
def test_every_loss_on_pairs_is_a_sum(kind: Any):
    """Except for kto_pair, whose baseline is a mean over the pairs of a microbatch."""
    config = model("mistral", lora=True)
    preference = Preference(kind, 0.5, label_smoothing=0.1 * (kind == "sigmoid"), margin=0.5, sft_weight=0.3)
    objective = steps.Objective(preference, pairs=tiny_batches.PAIRS, adapters_off=kind not in UNREFERENCED)
    batch = tiny_batches.pairs(ROWS, LENGTH, config.vocab_size)
    whole, metrics = gradients(config, batch, objective, 1)
    parts, of_parts = gradients(config, batch, objective, 2)
    same_metrics(of_parts, metrics)
    assert largest(jax.tree.map(np.subtract, parts, whole)) <= 1e-6 * largest(whole)
