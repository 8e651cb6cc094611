"""Which kernels a model computes with, chosen for the devices that it runs on."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jax.sharding import Mesh

from xlam_jax.errors import UserError
from xlam_jax.models.config import ModelConfig
from xlam_jax.models.tiles import SCOPED_VMEM, scoped_vmem
from xlam_jax.parallel.mesh import WIRE, Wire

SPLASH, PALLAS, MEGABLOX, TRITON = "splash", "pallas", "megablox", "triton"
HEAD_SIZES = {SPLASH: (64, 128, 256), PALLAS: (16, 32, 64, 128, 256)}
"""Head sizes that each attention kernel has."""
PLATFORMS = {SPLASH: "tpu", PALLAS: "gpu", MEGABLOX: "tpu", TRITON: "gpu"}
PLACES = 128
"""Both attention kernels compute in blocks of so many places."""
SMALLEST = 16
"""The shortest side of a matrix that a GPU's tensor cores multiply."""


@dataclass(frozen=True)
class Kernels:
    """Kernels of a model; by default those that run everywhere."""

    attention: str = "xla"
    """xla, splash (TPU) or pallas (GPU)."""
    experts: str = "xla"
    """xla; or megablox (TPU) or triton (GPU), where no axis of the mesh splits the experts."""
    interpret: bool = False
    """Pallas kernels are run by their interpreter, on any machine: for tests."""
    vmem: int = SCOPED_VMEM
    """Bytes of a TPU core's VMEM that a kernel may use."""
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
    reduce_dtype: str = "float32",
) -> tuple[Kernels, str]:
    """Chooses the kernels for the mesh's devices and rows of `tokens` tokens. Returns them and a line for the log that
    names them and gives the reason where another kernel cannot be used.

    `attention`, `experts` and `reduce_dtype` are the config's `model.attention`, `model.experts` and
    `model.reduce_dtype`; "auto" takes the devices' own kernel. Raises `UserError` if a kernel that is named there
    cannot compute this model.
    """
    platform = mesh.devices.flat[0].platform
    platform = "gpu" if platform in ("cuda", "rocm") else platform
    attention, line = _pick(
        "attention",
        attention,
        {"tpu": SPLASH, "gpu": PALLAS}.get(platform, "xla"),
        lambda kernel: _against_attention(kernel, platform, model, tokens, mesh.shape["context"]),
    )
    asked, experts = experts, "xla"
    if model.experts:
        experts, further = _pick(
            "experts",
            asked,
            {"tpu": MEGABLOX, "gpu": TRITON}.get(platform, "xla"),
            lambda kernel: _against_experts(kernel, platform, model, mesh),
        )
        line += f"; {further}"
    wire = Wire(_neighbours(mesh) if platform == "tpu" else 1, reduce_dtype)
    vmem = scoped_vmem(mesh.devices.flat[0].device_kind)
    return Kernels(attention, experts, vmem=vmem, wire=wire), line


def _pick(what: str, asked: str, own: str, against: Callable[[str], str | None]) -> tuple[str, str]:
    wanted = own if asked == "auto" else asked
    reason = against(wanted) if wanted != "xla" else None
    if reason and asked != "auto":
        raise UserError(f"model.{what} is {asked}, and {reason}; set it to xla, or to auto to have it chosen")
    return ("xla", f"{what}: xla ({wanted} is not used: {reason})") if reason else (wanted, f"{what}: {wanted}")


def _neighbours(mesh: Mesh) -> int:
    """Devices along fsdp that stand in a line from the first on, where fsdp is all chips of a slice; otherwise 1."""
    line = mesh.devices[0, :, 0, 0, 0]
    if mesh.size != len(line) * mesh.shape["data"] or not hasattr(line[0], "coords"):
        return 1
    coords = np.array([device.coords for device in line])
    moved = coords != coords[0]
    straight = [bool((moves <= moved[min(1, len(line) - 1)]).all()) for moves in moved]
    return straight.index(False) if False in straight else 1


def _against_attention(kernel: str, platform: str, model: ModelConfig, tokens: int, context: int) -> str | None:
    """Why a kernel can't compute this, if it can't."""
    if platform != PLATFORMS[kernel]:
        return _elsewhere(kernel, platform)
    if model.head_dim not in HEAD_SIZES[kernel]:
        return f"the model's head size is {model.head_dim}, and it has {', '.join(map(str, HEAD_SIZES[kernel]))}"
    if tokens % (PLACES * context):
        of_shard = f" / mesh.context {context}" if context > 1 else ""
        return f"data.sequence_length {tokens}{of_shard} is no multiple of its blocks, {PLACES}"
    if kernel == PALLAS and context > 1:
        return f"it has no queries apart from their keys, as mesh.context {context} needs"
    if kernel == PALLAS and model.sliding_window and model.sliding_window < tokens:
        return f"it has no window, and the model's, {model.sliding_window}, is shorter than a row, {tokens}"
    return None


def _against_experts(kernel: str, platform: str, model: ModelConfig, mesh: Mesh) -> str | None:
    if platform != PLATFORMS[kernel]:
        return _elsewhere(kernel, platform)
    if mesh.shape["expert"] > 1:
        return f"mesh.expert is {mesh.shape['expert']}: it computes experts that are whole on a device"
    width = model.mlp_size // mesh.shape["tensor"]
    sides = {"hidden_size": model.hidden_size, "intermediate_size / mesh.tensor": width}
    if model.lora and {"w1", "w2", "w3"} & set(model.lora.targets):
        sides["lora.rank"] = model.lora.rank
    for name, size in sides.items():
        if kernel == TRITON and size % SMALLEST:
            return f"{name} is {size}, no multiple of {SMALLEST}"
    return None


def _elsewhere(kernel: str, platform: str) -> str:
    return f"it runs on a {PLATFORMS[kernel].upper()}, and the devices are {platform}"
