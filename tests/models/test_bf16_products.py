"""XLA on a CPU with bf16 instructions: its library must compute every product of bf16 numbers.

XLA itself has no bf16 product on CPUs. A product outside the library's fusions compiles, but then ends the run
("Unsupported element type for DotThunk::Execute: BF16 x BF16 = F32"). Which products are outside does not depend on the
CPU, so these tests detect them on every machine.
"""

import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_batches
from support import ROOT

from xlam_jax.config import Train
from xlam_jax.models import linear
from xlam_jax.models.attention import Places, attend
from xlam_jax.models.config import Lora, ModelConfig
from xlam_jax.parallel.mesh import batch_spec, make_mesh
from xlam_jax.planning.hlo import Module
from xlam_jax.training import step as steps
from xlam_jax.training.optimizer import optimizer
from xlam_jax.training.preference import Preference

ROWS = 4
TARGETS = ("q", "k", "v", "o", "w1", "w2", "w3", "embedding", "head")
EQUATIONS = [
    "BTD,DNK->BTNK",
    "BTD,BTNK->DNK",
    "BTNK,DNK->BTD",
    "BTD,VD->BTV",
    "BTD,BTV->VD",
    "BNGTK,BNSK->BNGTS",
    "BNGTK,BNGTS->BNKS",
    "ECI,ECO->EIO",
    "ECO,EIO->ECI",
    "TD,DF->FT",
]


@pytest.fixture(autouse=True)
def bf16_instructions(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Compiles products as on a CPU with bf16 instructions."""
    monkeypatch.setattr(linear, "_bf16_instructions", lambda: True)
    jax.clear_caches()
    yield
    jax.clear_caches()


def count_products(text: str) -> tuple[int, list[str]]:
    """Returns the number of products of bf16 numbers in a compiled module, and of those outside the library's
    fusions."""
    module = Module(text)
    in_library = {
        computation
        for instructions in module.computations.values()
        for instruction in instructions.values()
        if instruction.opcode == "fusion" and "__ynn_fusion" in instruction.attributes
        for computation in instruction.called("calls")
    }
    count, outside = 0, []
    for name, instructions in module.computations.items():
        for instruction in instructions.values():
            if instruction.opcode != "dot":
                continue
            operands = [instructions[operand].results[0] for operand in instruction.operands]
            if any(operand.dtype == "bf16" for operand in operands):
                count += 1
                if name not in in_library:
                    shapes = " × ".join(str(operand.sizes) for operand in operands)
                    outside.append(f"{shapes}: {instruction.attributes}")
    return count, outside


def check(compiled: Any) -> None:
    count, outside = count_products(compiled.as_text())
    assert count, "no product of bf16 numbers: nothing is tested"
    assert not outside, "\n".join(outside)


@pytest.mark.parametrize("equation", EQUATIONS)
def test_a_product_is_that_of_einsum(equation: str):
    sizes = dict(zip("BCDEFGIKNOSTV", (2, 64, 32, 3, 32, 2, 32, 16, 4, 48, 32, 32, 64), strict=True))
    keys = jax.random.split(jax.random.key(0), 2)
    x, y = (
        jax.random.normal(key, [sizes[axis] for axis in axes], jnp.bfloat16)
        for key, axes in zip(keys, equation.split("->")[0].split(","), strict=True)
    )
    # only transposes around the product, which XLA would merge into it
    product = jax.jit(lambda x, y: linear.dot(equation, x.T.T, y.T.T).T).lower(x, y).compile()
    check(product)
    expected = np.einsum(equation, np.asarray(x, np.float64), np.asarray(y, np.float64))
    np.testing.assert_allclose(np.asarray(product(x, y)).T, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("captured", [False, True])
def test_gradients_of_attention_run(captured: bool):
    shape = (2, 256, 2, 64)  # one chunk of queries: no sum between the product and the transpose
    q, k, v = (jax.random.normal(key, shape, jnp.bfloat16) for key in jax.random.split(jax.random.key(0), 3))
    positions, segments = jnp.arange(256) * jnp.ones((2, 1), jnp.int32), jnp.ones((2, 256), jnp.int32)
    where = Places(positions, segments, positions, segments)

    def gradients(dtype: Any, *inputs: jax.Array) -> Any:
        def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            q, k, v = (one.astype(dtype) for one in (q[:, :, :, None], k, v))
            out = attend(q, k, v, where, window=None)
            return jnp.sum(out.astype(jnp.float32) ** 2)

        return jax.grad(loss, argnums=(0, 1, 2))(*inputs)

    if captured:
        step = jax.jit(lambda: gradients(jnp.bfloat16, q, k, v)).lower().compile()
        computed = step()
    else:
        step = jax.jit(lambda *inputs: gradients(jnp.bfloat16, *inputs)).lower(q, k, v).compile()
        computed = step(q, k, v)
    check(step)
    exact = gradients(jnp.float32, *(one.astype(jnp.float32) for one in (q, k, v)))
    for gradient, like in zip(computed, exact, strict=True):
        error = np.abs(np.asarray(gradient, np.float32) - like).max()
        assert error <= 2e-2 * np.abs(np.asarray(like)).max()


def compiled_step(
    family: str = "mistral",
    *,
    trainable: str = "full",
    remat: str = "minimal",
    microbatches: int = 1,
    length: int = 256,
    pairs: bool = False,
    tied: bool = False,
    mesh: dict[str, int] | None = None,
) -> Any:
    """The training step of a small model in bf16, compiled."""
    model = ModelConfig(
        family=family,
        vocab_size=512,
        hidden_size=64,
        mlp_size=96,
        layers=2,
        heads=4,
        kv_heads=2,
        head_dim=16,
        tie_embeddings=tied,
        experts=4 if family == "mixtral" else 0,
        experts_per_token=2 if family == "mixtral" else 0,
    )
    if trainable != "full":
        targets = TARGETS + (("router",) if model.experts else ())
        model = replace(model, lora=Lora(targets=targets, rank=8, alpha=16.0))
    devices = make_mesh(mesh or {}, jax.devices()[: int(np.prod(list((mesh or {}).values())))])
    tx = optimizer(Train(steps=10, batch_size=ROWS, learning_rate=1e-3), model)
    quantized = trainable == "qlora"
    objective = steps.SFT
    if pairs:
        preference = Preference("sigmoid", 0.1)
        objective = steps.Objective(preference, pairs=tiny_batches.PAIRS, adapters_off=model.lora is not None)
    step = steps.make_train_step(
        model,
        tx,
        devices,
        steps.StepOptions(
            compute_dtype=jnp.bfloat16,
            remat=remat,
            microbatches=microbatches,
            router_aux_weight=0.01,
            objective=objective,
            quantized=quantized,
        ),
    )
    draw: Callable[..., Any] = tiny_batches.pairs if pairs else tiny_batches.sequences
    sharding = jax.sharding.NamedSharding(devices, batch_spec(devices))
    batch = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        jax.eval_shape(lambda: draw(ROWS, length, model.vocab_size)),
    )
    state = steps.abstract_state(model, tx, devices)
    frozen = steps.abstract_frozen(model, devices, dtype=jnp.bfloat16, quantized=quantized)
    return jax.jit(step, donate_argnums=0).lower(state, frozen, batch).compile()


def test_a_step_has_no_other_product():
    check(compiled_step("mixtral", trainable="lora"))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mistral", "mixtral"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"length": 512},
        {"trainable": "lora"},
        {"trainable": "qlora"},
        {"pairs": True, "trainable": "lora"},
        {"pairs": True},
        {"tied": True},
        {"microbatches": 2},
        {"remat": "none"},
        {"remat": "dots"},
        {"remat": "full"},
        {"remat": "offload"},
    ],
    ids=lambda options: ",".join(f"{name}={value}" for name, value in options.items()) or "default",
)
def test_no_step_has_another_product(family: str, options: dict[str, Any]):
    check(compiled_step(family, **options))


@pytest.mark.slow
@pytest.mark.parametrize("axis", ["data", "fsdp", "tensor", "context", "expert"])
def test_no_mesh_has_another_product(axis: str, eight_devices: dict[str, str]):
    result = subprocess.run(
        [sys.executable, Path(__file__), axis], cwd=ROOT, env=eight_devices, capture_output=True, text=True, timeout=900
    )
    assert result.returncode == 0, result.stderr


if __name__ == "__main__":
    linear._bf16_instructions = lambda: True
    for rows in (256, 512):
        check(compiled_step("mixtral", mesh={sys.argv[1]: 2}, length=rows))
