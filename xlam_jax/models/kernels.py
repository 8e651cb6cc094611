"""The kernels that a model computes with, chosen for its devices."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from jax.sharding import Mesh

from xlam_jax.errors import UserError
from xlam_jax.models import triton
from xlam_jax.models.config import ModelConfig
from xlam_jax.models.tiles import SCOPED_VMEM, scoped_vmem
from xlam_jax.parallel.mesh import WIRE, Wire

SPLASH, PALLAS, MEGABLOX, TRITON = "splash", "pallas", "megablox", "triton"
HEAD_SIZES = {SPLASH: (64, 128, 256), PALLAS: (16, 32, 64, 128, 256)}
"""Attention kernel → the head sizes that it supports."""
PLATFORMS = {SPLASH: "tpu", PALLAS: "gpu", MEGABLOX: "tpu", TRITON: "gpu"}
BLOCK = 128
"""Size of the blocks of both attention kernels, in tokens."""
SMALLEST = 16
"""Minimum side of a matrix for a GPU's tensor cores."""
CAPABILITY = 8.0
"""Minimum compute capability that Triton compiles for."""
SHARED = triton.shared_memory("")
"""Bytes of shared memory that every NVIDIA GPU since then gives a block of threads; pallas needs them."""


@dataclass(frozen=True)
class Kernels:
    """The kernels of a model; by default those that run on every device."""

    attention: str = "xla"
    """xla, splash (TPU) or pallas (GPU)."""
    experts: str = "xla"
    """xla, megablox (TPU) or triton (GPU); the last two only if no axis of the mesh splits the experts."""
    interpret: bool = False
    """Pallas kernels are run by the interpreter of Pallas, on any machine: for tests."""
    on_chip: int = SCOPED_VMEM
    """Bytes of on-chip memory that a kernel may use: VMEM of a TPU's core, shared memory of a GPU's block."""
    wire: Wire = WIRE
    """How gradients are summed over the devices."""


XLA = Kernels()


def choose(
    mesh: Mesh,
    model: ModelConfig,
    tokens: int,
    *,
    attention: str = "auto",
    experts: str = "auto",
    compute_dtype: str = "bfloat16",
    reduce_dtype: str = "float32",
) -> tuple[Kernels, str]:
    """Chooses the kernels for the mesh's devices and rows of `tokens` tokens. Returns them, and a line for the log that
    names them and the reason if the devices' own kernel cannot be used.

    `attention`, `experts`, `compute_dtype` and `reduce_dtype` are the fields of the config's section `model`; "auto"
    selects the devices' own kernel. Raises `UserError` if a kernel that the config names cannot compute this model.
    """
    device = mesh.devices.flat[0]
    platform = _platform(device)
    on_chip = _on_chip(device)
    attention, line = _pick(
        "attention",
        attention,
        {"tpu": SPLASH, "gpu": PALLAS}.get(platform, "xla"),
        lambda kernel: (
            _against_device(kernel, device)
            or _against_attention(kernel, model, tokens, mesh.shape["context"])
            or (_against_pallas(on_chip, compute_dtype) if kernel == PALLAS else None)
        ),
    )
    chosen = "xla"
    if model.experts:
        chosen, further = _pick(
            "experts",
            experts,
            {"tpu": MEGABLOX, "gpu": TRITON}.get(platform, "xla"),
            lambda kernel: _against_device(kernel, device) or _against_experts(kernel, model, mesh, compute_dtype),
        )
        line += f"; {further}"
    wire = Wire(_neighbours(mesh) if platform == "tpu" else 1, reduce_dtype)
    return Kernels(attention, chosen, on_chip=on_chip, wire=wire), line


def _pick(what: str, setting: str, own: str, against: Callable[[str], str | None]) -> tuple[str, str]:
    """The kernel for `what`, and a line for the log. `setting`: the config's; `own`: the devices' kernel; `against`:
    returns the reason why a kernel cannot be used."""
    wanted = own if setting == "auto" else setting
    reason = against(wanted) if wanted != "xla" else None
    if reason and setting != "auto":
        raise UserError(f"model.{what} is {setting}, and {reason}; set it to xla, or to auto to have it chosen")
    return ("xla", f"{what}: xla ({wanted} is not used: {reason})") if reason else (wanted, f"{what}: {wanted}")


def _neighbours(mesh: Mesh) -> int:
    """The number of devices along fsdp in a line with the first, if fsdp spans all chips of a slice; else 1."""
    line = mesh.devices[0, :, 0, 0, 0]
    if mesh.size != len(line) * mesh.shape["data"] or not hasattr(line[0], "coords"):
        return 1
    coords = np.array([device.coords for device in line])
    moved = coords != coords[0]
    straight = [bool((moves <= moved[min(1, len(line) - 1)]).all()) for moves in moved]
    return straight.index(False) if False in straight else 1


def _platform(device: Any) -> str:
    return "gpu" if device.platform in ("cuda", "rocm") else device.platform


def _on_chip(device: Any) -> int:
    """Bytes of on-chip memory that a kernel may use: of a TPU core's VMEM, or of a GPU's shared memory."""
    if _platform(device) != "gpu":
        return scoped_vmem(device.device_kind)
    of_generation = triton.shared_memory(str(getattr(device, "compute_capability", "")))
    return getattr(device, "shared_memory_per_block_optin", of_generation)


def _against_device(kernel: str, device: Any) -> str | None:
    """The reason why a kernel cannot run on a device; None if it can."""
    if _platform(device) != PLATFORMS[kernel]:
        return f"it runs on a {PLATFORMS[kernel].upper()}, and the devices are {_platform(device)}"
    capability = _capability(device)
    if capability and capability < CAPABILITY:
        return f"the devices' compute capability is {capability}, and it needs {CAPABILITY}"
    return None


def _capability(device: Any) -> float | None:
    """The compute capability of an NVIDIA GPU; None for other devices, and if the device does not report it."""
    try:
        return float(device.compute_capability)
    except (AttributeError, ValueError):
        return None


def _against_attention(kernel: str, model: ModelConfig, tokens: int, context: int) -> str | None:
    """The reason why an attention kernel cannot compute this; None if it can."""
    if model.head_dim not in HEAD_SIZES[kernel]:
        return f"the model's head size is {model.head_dim}, and it has {', '.join(map(str, HEAD_SIZES[kernel]))}"
    if tokens % (BLOCK * context):
        of_shard = f" / mesh.context {context}" if context > 1 else ""
        return f"data.sequence_length {tokens}{of_shard} is not a multiple of its blocks, {BLOCK}"
    return None


def _against_pallas(shared: int, dtype: str) -> str | None:
    """The reason why pallas cannot compute in a dtype with `shared` bytes of shared memory; None if it can."""
    if dtype == "float32":  # tensor cores have no float32
        return "model.compute_dtype is float32, and it has bfloat16"
    if shared < SHARED:
        return f"the devices give a block {shared} bytes of shared memory, and it needs {SHARED}"
    return None


def _against_experts(kernel: str, model: ModelConfig, mesh: Mesh, dtype: str) -> str | None:
    """The reason why an expert kernel cannot compute this; None if it can."""
    if kernel == TRITON and dtype == "float32":
        return "model.compute_dtype is float32, and it has bfloat16"
    if mesh.shape["expert"] > 1:
        return f"mesh.expert is {mesh.shape['expert']}: it needs all experts on each device"
    width = model.mlp_size // mesh.shape["tensor"]
    sides = {"hidden_size": model.hidden_size, "MLP width / mesh.tensor": width}
    if model.lora and any(model.weight(name).per_expert for name in model.lora.targets):
        sides["lora.rank"] = model.lora.rank
    for name, size in sides.items():
        if kernel == TRITON and size % SMALLEST:
            return f"{name} is {size}, not a multiple of {SMALLEST}"
    return None
