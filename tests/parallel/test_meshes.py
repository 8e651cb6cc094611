"""A step gives the same loss and parameter gradients on every mesh as on a single device."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from xlam_jax.models.config import AddedTokens, Lora, ModelConfig
from xlam_jax.models.hf_rope import RopeScaling
from xlam_jax.models.kernels import XLA, Kernels
from xlam_jax.models.params import shapes, trainable
from xlam_jax.parallel import mesh as meshes
from xlam_jax.parallel.placement import place
from xlam_jax.training import step as steps

ROWS = 8
LENGTHS = {"TPU kernels": 256, "GPU kernels": 256}
MESHES = {
    "alone": {},
    "expert": {"expert": 8},
    "expert-fsdp": {"expert": 2, "fsdp": 4},
    "expert-tensor": {"data": 2, "expert": 2, "tensor": 2},
    "fsdp-tensor": {"fsdp": 2, "tensor": 2},
    "context": {"context": 8},
    "context-fsdp": {"context": 4, "fsdp": 2},
    "context-expert-tensor": {"context": 2, "expert": 2, "tensor": 2},
    "context-data-fsdp": {"context": 2, "data": 2, "fsdp": 2},
    "context-fsdp-in-turns": {"context": 2, "fsdp": 4},
}
METRICS = ("loss", "aux_loss", "grad_norm", "trained_tokens")
KERNELS = {
    "TPU kernels": Kernels("splash", "megablox", interpret=True, wire=meshes.Wire(inner=2)),
    "GPU kernels": Kernels("pallas", "triton", interpret=True),
}
MODEL = ModelConfig(
    family="mixtral",
    vocab_size=96,
    hidden_size=32,
    mlp_size=48,
    layers=2,
    heads=8,
    kv_heads=2,
    head_dim=8,
    experts=8,
    experts_per_token=2,
)

YARN = RopeScaling(kind="yarn", factor=4.0, original_max_positions=4, attention_factor=1.2, query_scale=0.5)
SIZES: dict[str, dict[str, int]] = {name: {"experts": 0, "experts_per_token": 0} for name in ("qwen2", "qwen3")}
SIZES["qwen3_moe"] = {"experts": 128, "experts_per_token": 8, "mlp_size": 8}
"""Case of another family → sizes that differ from `MODEL`'s."""


def batch(length: int) -> steps.Batch:
    """Packed rows whose sequences end anywhere, also inside a context shard; some rows are mostly padding."""
    rng = np.random.default_rng(0)
    segments = np.zeros((ROWS, length), np.int32)
    positions = np.zeros((ROWS, length), np.int32)
    for row in range(ROWS):
        ends = np.sort(rng.choice(np.arange(3, length), 3, replace=False)) if row else [5, 9]
        start = 0
        for segment, end in enumerate(ends, start=1):
            segments[row, start:end] = segment
            positions[row, start:end] = np.arange(end - start)
            start = end
    tokens, labels = (rng.integers(3, MODEL.vocab_size, (ROWS, length)).astype(np.int32) for _ in range(2))
    weights = np.where(segments > 0, rng.choice([0.0, 0.5, 1.0], (ROWS, length)), 0).astype(np.float32)
    groups = np.where(segments > 0, rng.integers(0, 3, (ROWS, length)), 0).astype(np.int32)
    return steps.Batch(tokens, labels, weights, positions, segments, groups)


def gradient(case: str, layout: str) -> dict[str, list]:
    """Returns the metrics of a step, and the gradient of each parameter."""
    model = replace(MODEL, family=case, **SIZES[case]) if case in SIZES else MODEL
    if case == "window":
        model = replace(model, sliding_window=7)
    if case == "GPU kernels":
        model = replace(model, sliding_window=100)
    if case in ("yarn", "TPU kernels"):  # queries are scaled by their position, which shards of a row must know
        model = replace(model, rope_scaling=YARN)
    if case == "lora":
        model = replace(model, lora=Lora(targets=("q", "o", "w1", "w2", "router"), rank=4, alpha=8.0))
    if case == "added tokens":  # on both shards of a vocabulary that tensor splits
        lora = Lora(targets=("q", "embedding", "head"), rank=4, alpha=8.0, train_tokens=True)
        model = replace(model, lora=lora, added=AddedTokens(45, 6))
    rng = np.random.default_rng(1)
    whole = jax.tree.map(lambda leaf: rng.normal(scale=0.2, size=leaf.shape).astype(np.float32), shapes(model))
    if case == "one expert":  # all tokens prefer the third and then the sixth
        whole["blocks"]["router"] *= 1e-3
        whole["blocks"]["mlp_norm"][:] = 0.0
        whole["blocks"]["mlp_norm"][:, 0] = 1.0
        whole["embedding"][:, 0] = 4.0
        whole["blocks"]["router"][:, 0, 2], whole["blocks"]["router"][:, 0, 5] = 0.5, 0.3
    params, frozen = trainable(model, whole)
    sizes = MESHES[layout]
    mesh = meshes.make_mesh(sizes, jax.devices()[: int(np.prod(list(sizes.values()))) if sizes else 1])
    tx = optax.chain(optax.trace(0.0), optax.scale(0.0))  # keeps the gradient, leaves the parameters unchanged
    step = jax.jit(
        steps.make_train_step(
            model,
            tx,
            mesh,
            steps.StepOptions(
                compute_dtype=jnp.float32,
                remat="minimal",
                microbatches=1,
                router_aux_weight=0.05,
                z_loss=1e-3,
                objective=steps.Objective(groups=3),
                kernels=KERNELS.get(case, XLA) if layout != "alone" else XLA,
            ),
        )
    )
    state = steps.init_state(steps.abstract_state(model, tx, mesh), tx, params)
    frozen = place(frozen, steps.abstract_frozen(model, mesh, dtype=jnp.float32, quantized=False))
    placed = steps.Batch(
        *(None if one is None else meshes.put_rows(mesh, one, ROWS) for one in batch(LENGTHS.get(case, 64)))
    )
    state, metrics = step(state, frozen, placed)
    results = {name: np.asarray(metrics[name]).tolist() for name in METRICS if name in metrics}
    results |= {f"groups.{name}": np.asarray(one).tolist() for name, one in metrics["groups"]._asdict().items()}
    leaves = jax.tree_util.tree_leaves_with_path(state.opt[0].trace)
    return results | {jax.tree_util.keystr(path): np.asarray(leaf).ravel().tolist() for path, leaf in leaves}


if __name__ == "__main__":
    print(json.dumps([gradient(sys.argv[1], layout) for layout in MESHES if layout in sys.argv[2:]]))


@pytest.mark.parametrize(
    ("case", "layouts"),
    [
        ("plain", ["alone", "expert-fsdp", "context-expert-tensor"]),
        ("one expert", ["alone", "expert-tensor"]),
        ("TPU kernels", ["alone", "context-fsdp-in-turns"]),
        ("GPU kernels", ["alone", "context-fsdp-in-turns"]),
        ("added tokens", ["alone", "fsdp-tensor"]),
        *(
            pytest.param(case, ["alone", "fsdp-tensor", "context-expert-tensor"], marks=pytest.mark.slow)
            for case in ("qwen2", "qwen3", "qwen3_moe")
        ),
        *(
            pytest.param(case, list(MESHES), marks=pytest.mark.slow)
            for case in ("plain", "one expert", "window", "lora", "yarn")
        ),
    ],
)
def test_every_mesh_has_the_same_loss_and_gradients(eight_devices: dict[str, str], case: str, layouts: list[str]):
    env = eight_devices | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    command = [sys.executable, str(Path(__file__)), case, *layouts]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    alone, *others = json.loads(done.stdout.splitlines()[-1])
    assert len(others) == len(layouts) - 1
    if case == "one expert":
        assert alone["aux_loss"] > 5  # 2 when balanced, 8 when two experts have everything
    for layout, results in zip(layouts[1:], others, strict=True):
        assert results.keys() == alone.keys()
        for name, value in results.items():
            expected = np.asarray(alone[name])
            scale = np.abs(expected).max()
            np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-5 * scale, err_msg=f"{layout}: {name}")
