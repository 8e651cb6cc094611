"""Steps and kernels compiled for NVIDIA GPUs on a machine without one. Needs the extra `plan-gpu`, as `make test-slow`
installs it."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from support import COMPILER, ROOT, Commands

from xlam_jax import cuda_plugin
from xlam_jax.models import triton
from xlam_jax.planning import gpu
from xlam_jax.planning.hardware import CHIPS, TPU_SHAPES

PLAN = "xlam_jax.plan"
BF16 = "model.compute_dtype=bfloat16"
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
    small = ("train.batch_size=4", BF16)
    plan = json.loads(
        commands.run(PLAN, *QUICKSTART, "--topology", f"gpu:{kind}:2", "--json", *small, **COMPILER).stdout
    )
    assert plan["outcome"] == "compiled"
    assert plan["kernels"] == "attention: pallas; experts: triton"
    assert plan["unknown_loops"] == 0
    assert 1 <= plan["flops"] / plan["model_flops"] < 1.4
    assert plan["arguments"] == pytest.approx(plan["estimated_arguments"], rel=0.01)
    assert any(name.startswith("all-reduce") for name in plan["exchanges"])
    kernels = {kernel["name"] for kernel in plan["compiled_kernels"]}
    assert {"flash_forward", "flash_dkv", "flash_dq", "grouped_product", "grouped_outer"} <= kernels
    assert all(kernel["registers"] and kernel["blocks"] for kernel in plan["compiled_kernels"])


@pytest.mark.slow
def test_a_step_compiled_for_gpus_as_a_person_reads_it(commands: Commands):
    said = commands.run(PLAN, *QUICKSTART, "--topology", "gpu:h100:1", BF16, **COMPILER)
    assert "figures         compiled in" in said.stdout
    assert "kernel          grouped_product: " in said.stdout
    assert said.stderr == ""


def compiled_kernels(kind: str, folder: Path, function: Callable[..., Any], *shapes: Any) -> tuple[gpu.Kernel, ...]:
    """Compiles a function of arrays for one GPU. Returns its kernels."""
    everywhere = NamedSharding(Mesh(np.array(gpu.devices(kind, 1)), ("one",)), PartitionSpec())
    placed = [jax.ShapeDtypeStruct(one.shape, one.dtype, sharding=everywhere) for one in shapes]
    options = {"xla_dump_to": str(folder), "xla_dump_hlo_as_text": True, **gpu.OPTIONS}
    jax.jit(function).lower(*placed).compile(compiler_options=options)
    return gpu.kernels(folder, ["grouped_product", "grouped_outer"], kind)


@pytest.mark.slow
@pytest.mark.usefixtures("offline_compiler")
@pytest.mark.parametrize("kind", ["a100", "l40s", "h100", "b200"])
@pytest.mark.parametrize("rows", [128, 64])
@pytest.mark.parametrize("rank", [None, 16])
def test_the_experts_kernels_spill_nothing(kind: str, rows: int, rank: int | None, tmp_path: Path):
    """The products of Mixtral 8x7B's experts, forward and backward, and those of adapters on them."""
    tiles, width, hidden = 9216 // rows, rank or 4096, 14336
    array = partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    integers = partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    [device] = gpu.devices(kind, 1)
    shared = triton.shared_memory(device.compute_capability)
    assert shared == gpu.TARGETS[kind].block_shared
    product = partial(triton.product, shared=shared, interpret=False)
    of_tiles = integers((tiles,))
    narrow, wide = array((9216, width)), array((9216, hidden))
    kernels = [
        *compiled_kernels(
            kind,
            tmp_path / "in",
            partial(product, out=jnp.bfloat16, transposed=False),
            narrow,
            array((8, width, hidden)),
            of_tiles,
        ),
        *compiled_kernels(
            kind,
            tmp_path / "out",
            partial(product, out=jnp.float32, transposed=True),
            wide,
            array((8, width, hidden)),
            of_tiles,
        ),
        *compiled_kernels(
            kind,
            tmp_path / "outer",
            partial(triton.outer, shared=shared, interpret=False),
            narrow,
            wide,
            integers((8,)),
        ),
    ]
    assert [kernel.name for kernel in kernels] == ["grouped_product", "grouped_product", "grouped_outer"]
    most = 16 if kind == "l40s" else 0  # 128 registers for each of 256 threads: one kernel stores two values once
    assert [kernel for kernel in kernels if kernel.spilled > most or kernel.blocks < 1] == []
    if kind in ("h100", "b200") and rows == 128 and rank is None:  # a full tile: four stages of 128 × 64 and 64 × 256
        assert all(kernel.threads == 256 and kernel.shared >= 196608 for kernel in kernels)
