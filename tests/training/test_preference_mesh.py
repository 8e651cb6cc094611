"""Training on pairs gives the same losses and metrics on each mesh, over some steps on 8 devices."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_batches

from xlam_jax.enums import PAIR_METRICS, UNREFERENCED
from xlam_jax.models.config import Lora, ModelConfig
from xlam_jax.models.params import shapes, trainable
from xlam_jax.parallel.mesh import make_mesh, put_rows
from xlam_jax.parallel.placement import place
from xlam_jax.training import step as steps
from xlam_jax.training.preference import Kind, Preference

ROWS, LENGTH, STEPS = 8, 72, 4
MESHES = {
    "alone": {},
    "fsdp": {"fsdp": 8},
    "fsdp-tensor": {"fsdp": 4, "tensor": 2},
    "data-fsdp": {"data": 2, "fsdp": 4},
    "data-fsdp-tensor": {"data": 2, "fsdp": 2, "tensor": 2},
    "expert": {"expert": 2, "fsdp": 4},
    "context": {"context": 4, "fsdp": 2},
    "context-expert-fsdp": {"context": 2, "expert": 2, "fsdp": 2},
}
MODEL = ModelConfig(
    family="mixtral",
    vocab_size=96,
    hidden_size=32,
    mlp_size=48,
    layers=1,
    heads=4,
    kv_heads=2,
    head_dim=8,
    experts=4,
    experts_per_token=2,
    lora=Lora(targets=("q", "v", "w1"), rank=4, alpha=8.0),
)


SHOWN = ("loss", "grad_norm", *PAIR_METRICS)


def trained(kind: Any, layout: str) -> list[list[float]]:
    """Returns the loss and the metrics of each step."""
    sizes = MESHES[layout]
    mesh = make_mesh(sizes, jax.devices()[: int(np.prod(list(sizes.values()), initial=1))])
    model, tx = replace(MODEL, family="mistral", experts=0) if kind in UNREFERENCED else MODEL, optax.adam(3e-2)
    rng = np.random.default_rng(0)
    params, frozen = trainable(
        model, jax.tree.map(lambda leaf: rng.normal(scale=0.2, size=leaf.shape).astype(np.float32), shapes(model))
    )
    params = (
        jax.tree_util.tree_map_with_path(  # adapters near their initial values: at exactly zero, rounding would decide
            lambda path, leaf: 0.05 * leaf if path[-1].key.endswith("_b") else leaf, params
        )
    )
    preference = Preference(kind, 0.3, label_smoothing=0.1 * (kind == "sigmoid"), margin=0.4, sft_weight=0.2)
    step = jax.jit(
        steps.make_train_step(
            model,
            tx,
            mesh,
            steps.StepOptions(
                compute_dtype=jnp.float32,
                remat="minimal",
                microbatches=1,
                router_aux_weight=0.01,
                objective=steps.Objective(preference, pairs=tiny_batches.PAIRS, adapters_off=kind not in UNREFERENCED),
            ),
        )
    )
    state = steps.init_state(steps.abstract_state(model, tx, mesh), tx, params)
    frozen = place(frozen, steps.abstract_frozen(model, mesh, dtype=jnp.float32, quantized=False))
    values = []
    whole = tiny_batches.pairs(ROWS, LENGTH, model.vocab_size)
    batch = steps.Batch(*(None if one is None else put_rows(mesh, np.asarray(one), ROWS) for one in whole))
    for _ in range(STEPS):
        state, metrics = step(state, frozen, batch)
        values.append([float(metrics[name]) for name in SHOWN])
    return values


if __name__ == "__main__":
    print(json.dumps([trained(sys.argv[1], layout) for layout in sys.argv[2:]]))


@pytest.mark.parametrize(
    ("kind", "layouts"),
    [
        # the loss that depends on all pairs of a batch, on all axes
        pytest.param("kto_pair", ["alone", "data-fsdp-tensor", "context-expert-fsdp"], marks=pytest.mark.slow),
        *(
            pytest.param(
                kind,
                [layout for layout in MESHES if kind not in UNREFERENCED or "expert" not in layout],
                marks=pytest.mark.slow,
            )
            for kind in get_args(Kind)
        ),
    ],
)
def test_every_mesh_trains_alike(eight_devices: dict[str, str], kind: str, layouts: list[str]):
    env = eight_devices | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    command = [sys.executable, str(Path(__file__)), kind, *layouts]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    alone, *others = np.array(json.loads(done.stdout.splitlines()[-1]))
    assert alone[-1, SHOWN.index("loss")] < alone[0, SHOWN.index("loss")]
    if kind == "kto_pair":  # its baseline is above its lower bound
        assert alone[-1, SHOWN.index("rewards_chosen")] > 0.01
    assert len(others) == len(layouts) - 1
    for layout, values in zip(layouts[1:], others, strict=True):
        np.testing.assert_allclose(values, alone, rtol=1e-5, atol=1e-5, err_msg=layout)
