"""Sharded parameters generate the same answers as one device: full, LoRA and QLoRA, on three meshes of 8 devices."""

import json
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xlam_jax.models.config import Lora, ModelConfig
from xlam_jax.models.decoder import UNROLLED
from xlam_jax.models.generation import Generate
from xlam_jax.models.params import Params, binder, freeze, frozen_specs, join, param_specs, shapes, trainable
from xlam_jax.parallel.mesh import make_mesh, shardings

MESHES = {
    "alone": {"data": 1, "fsdp": 1, "tensor": 1},
    "fsdp": {"data": 1, "fsdp": 8, "tensor": 1},
    "fsdp-tensor": {"data": 1, "fsdp": 4, "tensor": 2},
    "data-fsdp": {"data": 2, "fsdp": 4, "tensor": 1},
    "expert-context": {"expert": 2, "context": 2, "fsdp": 2},
}
DENSE = ModelConfig(
    family="mistral",
    vocab_size=96,
    hidden_size=512,
    mlp_size=128,
    layers=1,
    heads=8,
    kv_heads=4,
    head_dim=16,
    sliding_window=7,
)
EXPERTS = replace(DENSE, family="mixtral", experts=4, experts_per_token=2, sliding_window=None)
TREES = {
    "full": replace(DENSE, layers=UNROLLED + 1),
    "lora": replace(DENSE, lora=Lora(targets=("q", "k", "v", "o", "w1", "w2", "embedding", "head"), rank=2, alpha=4.0)),
    "qlora": replace(EXPERTS, lora=Lora(targets=("q", "o", "w1", "w2", "w3", "router"), rank=2, alpha=4.0)),
}
NEW = 16
NEVER = -1
"""No token: rows run to their limit."""
PROMPTS = [np.random.default_rng(at).integers(3, 96, 3 + 5 * at).tolist() for at in range(11)]
"""More than the rows of a batch, and no multiple of them."""


def parts(tree: str) -> tuple[Params, Params]:
    """Returns the trainable and the frozen parameters; no adapter is zero."""
    rng = np.random.default_rng(1)
    params, frozen = trainable(
        TREES[tree],
        jax.tree.map(lambda leaf: rng.normal(scale=0.1, size=leaf.shape).astype(np.float32), shapes(TREES[tree])),
    )
    return params, jax.device_get(jax.jit(partial(freeze, dtype=jnp.float32, quantized=tree == "qlora"))(frozen))


def on_a_mesh(tree: str, layout: str, both: tuple[Params, Params]) -> partial[Any]:
    """Returns the generation on a mesh, with the parameters sharded as in training."""
    model, sizes, quantized = TREES[tree], MESHES[layout], tree == "qlora"
    mesh = make_mesh(sizes, jax.devices()[: int(np.prod(list(sizes.values())))])
    specs = param_specs(model, mesh), frozen_specs(model, mesh, quantized=quantized)
    generate = Generate(model, mesh, dtype=jnp.float32, quantized=quantized)
    placed = jax.device_put(both, shardings(specs, mesh))
    return partial(generate, *placed, max_new_tokens=NEW, rows=3 if layout == "alone" else 8)


def likeliest(tree: str, both: tuple[Params, Params], texts: list[list[int]]) -> list[list[int]]:
    """Returns the most likely next token after each token of each text, by a plain forward pass."""
    tokens_BT = jnp.array([text + [0] * (max(map(len, texts)) - len(text)) for text in texts])
    positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)

    @jax.jit
    def forward(params: Params, frozen: Params) -> jax.Array:
        model = binder(TREES[tree], dtype=jnp.float32)(join(frozen, params))
        return jnp.argmax(model.logits(model(tokens_BT, positions_BT, jnp.ones_like(tokens_BT))[0]), axis=-1)

    return np.asarray(forward(*both)).tolist()


def answers(tree: str, layouts: list[str]) -> dict[str, Any]:
    """Returns the answers of each mesh: greedy, with an end token, and (lora only) sampled; and the expected ones of a
    forward pass."""
    both = parts(tree)
    results: dict[str, Any] = {}
    for layout in layouts:
        generate = on_a_mesh(tree, layout, both)
        whole = generate(PROMPTS, eos_id=NEVER)
        results.setdefault("eos", max(range(96), key=lambda token: sum(token in row for row in whole)))
        drawn = generate(PROMPTS[:9], eos_id=NEVER, temperature=1.0) if "alone" in layouts and tree == "lora" else []
        results[layout] = [whole, generate(PROMPTS, eos_id=results["eos"]), drawn]
    texts = [prompt + new for prompt, new in zip(PROMPTS, results[layouts[0]][0], strict=True)]
    results["expected"] = [
        row[len(prompt) - 1 :][:NEW] for row, prompt in zip(likeliest(tree, both, texts), PROMPTS, strict=True)
    ]
    return results


if __name__ == "__main__":
    print(json.dumps(answers(sys.argv[1], sys.argv[2:])))


@pytest.mark.parametrize(
    ("tree", "layouts"),
    [
        ("full", ["fsdp-tensor"]),
        ("lora", ["data-fsdp"]),
        ("qlora", ["fsdp-tensor", "expert-context"]),
        *(pytest.param(tree, list(MESHES), marks=pytest.mark.slow) for tree in TREES),
    ],
)
def test_sharded_answers_are_those_of_one_device(eight_devices: dict[str, str], tree: str, layouts: list[str]):
    env = eight_devices | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    command = [sys.executable, str(Path(__file__)), tree, *layouts]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout.splitlines()[-1])
    eos, expected = results["eos"], results["expected"]
    whole, ended, drawn = results[layouts[0]]
    assert whole == expected
    assert ended == [row[: row.index(eos) + 1] if eos in row else row for row in whole]
    assert len({len(row) for row in ended}) > 3  # rows end at different times
    assert all(len(row) == NEW for row in drawn)
    assert drawn != whole[:9]
    for layout in layouts[1:]:
        assert results[layout] == [whole, ended, drawn], layout
