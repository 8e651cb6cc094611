"""LoRA-DPO needs as much memory as LoRA-SFT: its reference is the same weights, and its activations are not kept."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
import tiny_batches
from support import ROOT

from xlam_jax.config import Train
from xlam_jax.models.config import Lora, ModelConfig
from xlam_jax.models.params import freeze, initialize, trainable
from xlam_jax.parallel.mesh import make_mesh
from xlam_jax.parallel.placement import place
from xlam_jax.training import step as steps
from xlam_jax.training.optimizer import optimizer
from xlam_jax.training.preference import Preference

ROWS, LENGTH = 4, 1024
MODEL = ModelConfig(
    family="mistral",
    vocab_size=8192,
    hidden_size=512,
    mlp_size=1536,
    layers=8,
    heads=8,
    kv_heads=4,
    head_dim=64,
    lora=Lora(targets=("q", "k", "v", "o", "w1", "w2", "w3"), rank=16, alpha=32.0),
)
OBJECTIVES = {
    "sft": steps.SFT,
    "dpo": steps.Objective(Preference("sigmoid", 0.1), pairs=tiny_batches.PAIRS, adapters_off=True),
}


@contextmanager
def optimized() -> Iterator[None]:
    """Compiled as in a run."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


def compiled(objective: steps.Objective, remat: str, quantized: bool):
    """Returns the step, its compiled form, and the abstract state and frozen parameters."""
    mesh = make_mesh({}, jax.devices()[:1])
    tx = optimizer(Train(steps=10, batch_size=ROWS, learning_rate=1e-3, warmup_steps=0), MODEL)
    state = steps.abstract_state(MODEL, tx, mesh)
    frozen = steps.abstract_frozen(MODEL, mesh, dtype=jnp.bfloat16, quantized=quantized)
    step = steps.make_train_step(
        MODEL,
        tx,
        mesh,
        steps.StepOptions(
            compute_dtype=jnp.bfloat16,
            remat=remat,
            microbatches=1,
            router_aux_weight=0.0,
            objective=objective,
            quantized=quantized,
        ),
    )
    batch = jax.eval_shape(lambda: tiny_batches.pairs(ROWS, LENGTH, MODEL.vocab_size))
    return jax.jit(step, donate_argnums=0).lower(state, frozen, batch).compile(), tx, state, frozen


@pytest.mark.parametrize(
    ("remat", "quantized", "as_in_a_run"),
    [
        ("minimal", False, False),
        pytest.param("minimal", False, True, marks=pytest.mark.slow),
        pytest.param("full", False, True, marks=pytest.mark.slow),
        pytest.param("minimal", True, True, marks=pytest.mark.slow),
    ],
)
def test_the_compiler_plans_as_much_for_pairs(remat: str, quantized: bool, as_in_a_run: bool):
    def planned(name: str) -> int:
        plan = compiled(OBJECTIVES[name], remat, quantized)[0].memory_analysis()
        assert plan
        return (
            plan.temp_size_in_bytes + plan.argument_size_in_bytes + plan.output_size_in_bytes - plan.alias_size_in_bytes
        )

    if as_in_a_run:
        with optimized():
            sft, dpo = planned("sft"), planned("dpo")
    else:
        sft, dpo = planned("sft"), planned("dpo")
    print(remat, quantized, as_in_a_run, dpo / sft, sft)
    assert dpo <= 1.15 * sft


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads a process's memory from /proc")
def test_a_process_takes_as_much_for_pairs(environment: dict[str, str]):
    peaks = {}
    for name in OBJECTIVES:
        result = subprocess.run(
            [sys.executable, Path(__file__), name],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert result.returncode == 0, result.stderr
        peaks[name] = float(result.stdout.split()[-1])
    print(peaks)
    assert peaks["dpo"] <= 1.15 * peaks["sft"]


def run(objective: steps.Objective) -> int:
    """Takes two steps; returns the peak resident memory of the process during them, in KiB."""
    step, tx, abstract, like = compiled(objective, "minimal", quantized=False)

    def drawn():
        return trainable(MODEL, initialize(MODEL, 0))

    state = steps.init_state(abstract, tx, lambda: drawn()[0])
    frozen = place(lambda: freeze(drawn()[1], jnp.bfloat16, quantized=False), like)
    batch = tiny_batches.pairs(ROWS, LENGTH, MODEL.vocab_size)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak, which the compiler caused
    state, metrics = step(state, frozen, batch)
    state, metrics = step(state, frozen, batch)
    assert float(metrics["loss"]) > 0
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))


if __name__ == "__main__":
    print(run(OBJECTIVES[sys.argv[1]]))
