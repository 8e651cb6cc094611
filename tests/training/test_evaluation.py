"""Losses by source and kind, the moving average, and the costs of a step."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_models
from support import ROOT

from xlam_jax.enums import SPAN_KINDS as KINDS
from xlam_jax.models.config import Lora, ModelConfig
from xlam_jax.models.families import FAMILIES
from xlam_jax.models.families.base import Family
from xlam_jax.models.params import initialize, shapes, trainable
from xlam_jax.parallel.mesh import make_mesh
from xlam_jax.training import cost, evaluation
from xlam_jax.training import step as steps
from xlam_jax.training.preference import Preference
from xlam_jax.training.trackers import flatten

SOURCES = ("shop", "bank", "silent")
ROWS, LENGTH = 4, 48


def model() -> ModelConfig:
    hf = json.loads((ROOT / "configs/models/tiny_mixtral.json").read_text(encoding="utf-8"))
    return ModelConfig.from_hf(hf | {"hidden_size": 32, "head_dim": 8, "intermediate_size": 48, "num_hidden_layers": 2})


def batch(pairs: bool = False) -> steps.Batch:
    """Two segments per row, from one source each; the second half of each contributes to the loss with weight 1 or
    0.5."""
    rng = np.random.default_rng(0)
    tokens_BT = rng.integers(3, 500, (ROWS, LENGTH), dtype=np.int32)
    half = LENGTH // 2
    place_T = np.arange(LENGTH) % half
    segments_BT = np.broadcast_to(1 + np.arange(LENGTH) // half, (ROWS, LENGTH)).astype(np.int32)
    kinds_BT = rng.integers(1, len(KINDS), (ROWS, LENGTH))
    kinds_BT[:, place_T < half // 2] = 0
    sources_BT = (np.arange(ROWS) // 2)[:, None] if pairs else (np.arange(ROWS)[:, None] + segments_BT) % 2
    weights_BT = np.where(kinds_BT == 0, 0, np.where(kinds_BT == 1, 0.5, 1)).astype(np.float32)
    if pairs:
        weights_BT = (weights_BT > 0).astype(np.float32)
    return steps.Batch(
        *(jnp.asarray(one) for one in (tokens_BT, np.roll(tokens_BT, -1, 1), weights_BT)),
        positions_BT=jnp.asarray(np.broadcast_to(place_T, (ROWS, LENGTH)).astype(np.int32)),
        segments_BT=jnp.asarray(segments_BT),
        groups_BT=jnp.asarray((sources_BT * len(KINDS) + kinds_BT).astype(np.int32)),
    )


def evaluate(config: ModelConfig, objective: steps.Objective, rows: steps.Batch) -> steps.Sums:
    mesh = make_mesh({}, jax.devices()[:1])
    step = steps.make_eval_step(config, mesh, steps.StepOptions(compute_dtype=jnp.float32, objective=objective))
    return jax.jit(step)(*trainable(config, initialize(config, 0)), rows)


def test_the_parts_of_the_heldout_loss_are_those_of_the_whole():
    rows, objective = batch(), steps.Objective(groups=len(SOURCES) * len(KINDS))
    parts = [jax.tree.map(lambda leaf, at=at: leaf[at : at + 2], rows) for at in (0, 2)]
    sums = [evaluate(model(), objective, part) for part in parts]
    record = evaluation.heldout_record(sums, SOURCES, kinds=True)
    assert record is not None
    assert list(record["sources"]) == ["shop", "bank"]  # the third has no tokens: skipped, not 0
    assert set(record["kinds"]) == set(KINDS) - {"prompt"}
    groups_BT, weights_BT = np.asarray(rows.groups_BT), np.asarray(rows.weights_BT)
    for at, name in enumerate(SOURCES[:2]):
        for kind, values in record["sources"][name]["kinds"].items():
            group = at * len(KINDS) + KINDS.index(kind)
            alone = rows._replace(weights_BT=jnp.asarray(np.where(groups_BT == group, weights_BT, 0)))
            expected = steps.means(evaluate(model(), steps.SFT, alone))
            np.testing.assert_allclose(values["loss"], float(expected["loss"]), rtol=1e-5)
            assert values["tokens"] == ((groups_BT == group) & (weights_BT > 0)).sum()
    whole = steps.means(evaluate(model(), steps.SFT, rows))
    np.testing.assert_allclose(record["loss"], float(whole["loss"]), rtol=1e-5)
    assert sum(one["tokens"] for one in record["sources"].values()) == record["trained_tokens"]
    paths = flatten({"heldout": record}, ".")
    assert paths["heldout.sources.bank.kinds.eos.loss"] == record["sources"]["bank"]["kinds"]["eos"]["loss"]


def test_a_pair_counts_for_its_source():
    objective = steps.Objective(Preference("simpo", 2.0), pairs=3, groups=len(SOURCES) * len(KINDS))
    rows = batch(pairs=True)
    record = evaluation.heldout_record([evaluate(model(), objective, rows)], SOURCES, kinds=False)
    assert record is not None
    assert {name: one["tokens"] for name, one in record["sources"].items()} == {"shop": 2, "bank": 2}
    half = jax.tree.map(lambda leaf: leaf[:2], rows)
    np.testing.assert_allclose(
        record["sources"]["shop"]["loss"], float(steps.means(evaluate(model(), objective, half))["loss"]), rtol=1e-5
    )


def test_the_average_follows_the_parameters():
    config, decay = model(), 0.5
    mesh = make_mesh({}, jax.devices()[:1])
    tx = optax.sgd(0.1)
    abstract = steps.abstract_state(config, tx, mesh, averaged=True)
    state = steps.init_state(abstract, tx, lambda: initialize(config, 0))
    expected = jax.tree.map(np.asarray, state.ema)
    step = jax.jit(
        steps.make_train_step(
            config,
            tx,
            mesh,
            steps.StepOptions(
                compute_dtype=jnp.float32,
                remat="none",
                microbatches=1,
                router_aux_weight=0.0,
                objective=steps.Objective(groups=len(SOURCES) * len(KINDS)),
                ema=decay,
            ),
        )
    )
    for at in range(3):
        state, _ = step(state, {}, batch())
        now = min(decay, (1 + at) / (10 + at))
        expected = jax.tree.map(lambda old, new, d=now: d * old + (1 - d) * np.asarray(new), expected, state.params)
    jax.tree.map(
        lambda ours, by_hand: np.testing.assert_allclose(ours, by_hand, rtol=1e-5, atol=1e-7), state.ema, expected
    )
    different = jax.tree.map(lambda one, other: bool((one != other).any()), state.ema, state.params)
    assert all(jax.tree.leaves(different))


@pytest.mark.parametrize("lora", [None, Lora(targets=("q", "w1", "head"), rank=4, alpha=8)])
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_model_flops_count_every_product(family: Family, lora: Lora | None):
    """2 operations per weight and token in the forward pass; the same for each gradient."""
    sizes = tiny_models.SIZES | tiny_models.OWN.get(family.name, {})
    config = replace(ModelConfig.from_hf({"architectures": [family.architecture], **sizes}), lora=lora)
    total = 0.0
    for path, leaf in jax.tree_util.tree_leaves_with_path(shapes(config)):
        name = path[-1].key
        if "norm" in name or "bias" in name or name == "embedding":
            continue
        share = config.experts_per_token / config.experts if config.experts else 1
        used = leaf.size * (share if name[:2] in ("w1", "w2", "w3") else 1)
        trains = lora is None or name.endswith(("_a", "_b"))
        total += used * (6 if trains else 4)
    scores = 3 * 4 * config.layers * config.heads * config.head_dim * 256
    np.testing.assert_allclose(cost.flops_per_token(config, 512), total + scores)


def test_devices_have_their_makers_peaks():
    assert cost.peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert cost.peak_flops("NVIDIA H200") == 989e12
    assert cost.peak_flops("TPU v5 lite") == 197e12
    assert cost.peak_flops("TPU v5p") == 459e12
    assert cost.peak_flops("TPU7x") == 1153.5e12, "a chip is two devices"
    assert cost.peak_flops("cpu") is None
