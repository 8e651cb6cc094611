"""Steps and kernels compiled for NVIDIA GPUs on a machine without one. Needs the extra `plan-gpu`, as `make test-slow`
installs it."""

import json
from pathlib import Path

import pytest
from support import ROOT, Commands

from xlam_jax import cuda_plugin
from xlam_jax.planning import gpu
from xlam_jax.planning.hardware import CHIPS, TPU_SHAPES

PLAN = "xlam_jax.plan"
QUICKSTART = ("--config", ROOT / "configs/quickstart.yaml")


def test_every_gpu_has_a_description():
    assert set(gpu.TARGETS) == set(CHIPS) - set(TPU_SHAPES)
    for kind, target in gpu.TARGETS.items():
        chip = CHIPS[kind]
        assert chip.kind in target.name
        assert target.bandwidth == pytest.approx(chip.bandwidth, rel=0.05)
        assert target.memory == pytest.approx(chip.memory, rel=0.08)


@pytest.mark.parametrize(
    ("devices", "installed", "platforms"),
    [([], True, "cpu"), (["accel0"], True, "tpu,cpu"), (["nvidia0"], True, ""), (["dxg"], True, ""), ([], False, "")],
)
def test_the_plugin_stays_hidden_without_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, devices: list[str], installed: bool, platforms: str
):
    for name in devices:
        (tmp_path / name).touch()
    has_gpu, has_tpu = cuda_plugin.has_gpu, cuda_plugin.tpu_library.has_tpu
    monkeypatch.setattr(cuda_plugin, "has_gpu", lambda: has_gpu(tmp_path))
    monkeypatch.setattr(cuda_plugin.tpu_library, "has_tpu", lambda: has_tpu(tmp_path))
    monkeypatch.setattr(cuda_plugin, "is_installed", lambda: installed)
    monkeypatch.setattr(cuda_plugin, "_plugins", lambda: {"xla_cuda13"})
    monkeypatch.setattr("jax.config.update", lambda *_: None)
    monkeypatch.setenv("JAX_PLATFORMS", "")
    cuda_plugin.hide()
    assert cuda_plugin.os.environ["JAX_PLATFORMS"] == platforms


@pytest.mark.slow
@pytest.mark.parametrize("kind", gpu.TARGETS)
def test_a_step_is_compiled_for_each_gpu(commands: Commands, kind: str):
    small = ("train.batch_size=4", "model.compute_dtype=bfloat16")
    plan = json.loads(commands.run(PLAN, *QUICKSTART, "--topology", f"gpu:{kind}:2", "--json", *small).stdout)
    assert plan["outcome"] == "compiled"
    assert plan["kernels"] == "attention: pallas; experts: triton"
    assert plan["unknown_loops"] == 0
    assert 1 <= plan["flops"] / plan["model_flops"] < 1.4
    assert plan["arguments"] == pytest.approx(plan["estimated_arguments"], rel=0.01)
    assert any(name.startswith("all-reduce") for name in plan["exchanges"])
    kernels = {kernel["name"] for kernel in plan["compiled_kernels"]}
    assert {"mha_forward", "mha_backward", "grouped_product", "grouped_outer"} <= kernels
    assert all(kernel["registers"] and kernel["blocks"] for kernel in plan["compiled_kernels"])


@pytest.mark.slow
def test_a_step_compiled_for_gpus_as_a_person_reads_it(commands: Commands):
    said = commands.run(PLAN, *QUICKSTART, "--topology", "gpu:h100:1", "model.compute_dtype=bfloat16")
    assert "figures         compiled in" in said.stdout
    assert "kernel          grouped_product: " in said.stdout
    assert said.stderr == ""
