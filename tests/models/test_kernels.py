"""The choice of kernels for devices that no test has."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from xlam_jax.errors import UserError
from xlam_jax.models.config import ModelConfig
from xlam_jax.models.kernels import SHARED, Kernels, choose

MODEL = ModelConfig(
    family="mixtral",
    vocab_size=96,
    hidden_size=64,
    mlp_size=64,
    layers=1,
    heads=4,
    kv_heads=2,
    head_dim=64,
    experts=4,
    experts_per_token=2,
)
SIZES = {"data": 1, "fsdp": 1, "expert": 1, "context": 1, "tensor": 1}


def chosen(setting: str = "auto", dtype: str = "bfloat16", **device: Any) -> tuple[Kernels, str]:
    gpu = SimpleNamespace(platform="gpu", device_kind="NVIDIA GPU", **device)
    mesh: Any = SimpleNamespace(devices=np.array(gpu).reshape(1, 1, 1, 1, 1), shape=SIZES)
    return choose(mesh, MODEL, 512, attention=setting, compute_dtype=dtype)


@pytest.mark.parametrize(
    ("device", "shared"),
    [
        ({}, SHARED),
        ({"compute_capability": "9.0"}, 232448),
        ({"compute_capability": "8.9", "shared_memory_per_block_optin": 101376}, 101376),
        ({"compute_capability": "12.0", "shared_memory_per_block_optin": 101376}, 101376),
        ({"compute_capability": "9.0", "shared_memory_per_block_optin": 232448}, 232448),
    ],
)
def test_gpus_since_ampere_have_kernels_of_their_own(device: dict[str, Any], shared: int):
    kernels, line = chosen(**device)
    assert (kernels.attention, kernels.experts, kernels.on_chip) == ("pallas", "triton", shared)
    assert line == "attention: pallas; experts: triton"


def test_older_gpus_use_xla():
    kernels, line = chosen(compute_capability="7.5", shared_memory_per_block_optin=65536)
    reason = "the devices' compute capability is 7.5, and it needs 8.0"
    assert (kernels.attention, kernels.experts) == ("xla", "xla")
    assert line == f"attention: xla (pallas is not used: {reason}); experts: xla (triton is not used: {reason})"


def test_gpus_with_little_shared_memory_use_xla_attention():
    kernels, line = chosen(compute_capability="gfx942", shared_memory_per_block_optin=65536)
    assert (kernels.attention, kernels.experts) == ("xla", "triton")
    assert "the devices give a block 65536 bytes of shared memory, and it needs 101376" in line


def test_float32_uses_xla_attention():
    assert chosen(dtype="float32", compute_capability="9.0")[0].attention == "xla"
    with pytest.raises(UserError, match=r"model.attention is pallas, and model.compute_dtype is float32"):
        chosen("pallas", "float32", compute_capability="9.0")
