"""The attention kernels, compiled alone for NVIDIA GPUs on a machine without one. Needs the extra `plan-gpu`."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from xlam_jax.models import flash_gpu
from xlam_jax.planning import gpu

OPTIMIZED = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}
"""As on a GPU, and not as the tests compile."""
NAMES = ("flash_dkv", "flash_dq", "flash_forward")


def compiled(kind: str, size: int, folder: Path) -> list[gpu.Kernel]:
    """Rows of 4096 tokens, 32 query heads, 8 key/value heads, bf16."""
    mesh = Mesh(np.array(gpu.devices(kind, 1)), ("devices",))

    def array(*shape: int, dtype: str = "bfloat16") -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec()))

    tiles = flash_gpu.tiles_for(size, gpu.TARGETS[kind].block_shared)

    def step(q: jax.Array, k: jax.Array, v: jax.Array, segments_BT: jax.Array, dout: jax.Array):
        spans = flash_gpu.find_spans(segments_BT, segments_BT, jnp.arange(segments_BT.shape[1]), 1000)
        results = flash_gpu.forward(q, k, v, spans, tiles.forward, False)
        return flash_gpu.backward((q, k, v, *results), dout, spans, tiles, False)

    q, k = array(1, 32, 4096, size), array(1, 8, 4096, size)
    options = {"xla_dump_to": str(folder), "xla_dump_hlo_as_text": True} | gpu.OPTIONS | OPTIMIZED
    jax.jit(step).lower(q, k, k, array(1, 4096, dtype="int32"), q).compile(compiler_options=options)
    return list(gpu.kernels(folder, NAMES, kind))


@pytest.mark.slow
@pytest.mark.parametrize("size", [32, 64, 128, 256])
@pytest.mark.parametrize("kind", gpu.TARGETS)
def test_no_attention_kernel_spills_registers(tmp_path: Path, kind: str, size: int):
    kernels = compiled(kind, size, tmp_path)
    assert tuple(kernel.name for kernel in kernels) == NAMES
    assert {kernel.name: kernel.spilled for kernel in kernels} == dict.fromkeys(NAMES, 0)
    assert all(kernel.shared <= gpu.TARGETS[kind].block_shared for kernel in kernels)
    assert all(kernel.blocks for kernel in kernels)
