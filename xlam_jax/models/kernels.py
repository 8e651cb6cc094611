"""Which kernels a model computes with, chosen for the devices that it runs on."""

from dataclasses import dataclass

from jax.sharding import Mesh

from xlam_jax.errors import UserError
from xlam_jax.models.config import ModelConfig

SPLASH, PALLAS = "splash", "pallas"
HEAD_SIZES = {SPLASH: (64, 128, 256), PALLAS: (16, 32, 64, 128, 256)}
"""Head sizes that each attention kernel has."""
PLATFORMS = {SPLASH: "tpu", PALLAS: "gpu"}
PLACES = 128
"""Both kernels compute in blocks of so many places."""


@dataclass(frozen=True)
class Kernels:
    """Kernels of a model; by default those that run everywhere."""

    attention: str = "xla"
    """xla, splash (TPU) or pallas (GPU)."""
    experts: str = "xla"
    """xla, or megablox (TPU), where no axis of the mesh splits the experts."""
    interpret: bool = False
    """Pallas kernels are run by their interpreter, on any machine: for tests."""


XLA = Kernels()


def choose(asked: str, mesh: Mesh, model: ModelConfig, tokens: int) -> tuple[Kernels, str]:
    """The kernels for `model.attention`, the mesh's devices and rows of so many tokens; and a line that says which, and
    why not another.

    Raises `UserError` when the kernel that was asked for can't compute this.
    """
    platform, context = mesh.devices.flat[0].platform, mesh.shape["context"]
    platform = "gpu" if platform in ("cuda", "rocm") else platform
    wanted = {"tpu": SPLASH, "gpu": PALLAS}.get(platform, "xla") if asked == "auto" else asked
    against = _against(wanted, platform, model, tokens, context) if wanted != "xla" else None
    if against and asked != "auto":
        raise UserError(f"model.attention is {asked}, and {against}; set it to xla, or to auto to have it chosen")
    attention = "xla" if against else wanted
    experts = "megablox" if platform == "tpu" and model.experts and mesh.shape["expert"] == 1 else "xla"
    line = f"attention: {attention}" + (f" ({wanted} is not used: {against})" if against else "")
    return Kernels(attention, experts), line + (f"; experts: {experts}" if model.experts else "")


def _against(kernel: str, platform: str, model: ModelConfig, tokens: int, context: int) -> str | None:
    """Why a kernel can't compute this, if it can't."""
    if platform != PLATFORMS[kernel]:
        return f"it runs on a {PLATFORMS[kernel].upper()}, and the devices are {platform}"
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
