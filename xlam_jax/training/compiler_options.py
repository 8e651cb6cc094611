"""Options of XLA's compiler for the training step, by the devices' platform."""

from collections.abc import Mapping
from typing import Any

from xlam_jax.errors import UserError

Value = bool | int | float | str

DEFAULTS: Mapping[str, Mapping[str, Value]] = {
    "gpu": {
        # Start exchanges as early and wait for them as late as possible, also across the iterations of a loop: of the
        # layers. XLA does neither by itself.
        "xla_gpu_enable_latency_hiding_scheduler": True,
        "xla_gpu_enable_pipelined_all_gather": True,
        "xla_gpu_enable_pipelined_reduce_scatter": True,
        "xla_gpu_enable_pipelined_all_reduce": True,
        # Sums by atomic additions depend on the order of threads: the same step would give other bits.
        "xla_gpu_exclude_nondeterministic_ops": True,
    }
}
"""Platform → options that differ from XLA's own."""


PREFIX = "xla_"
PLATFORMS = ("cpu", "gpu", "tpu")


def options(platform: str, chosen: Mapping[str, Value]) -> dict[str, Any]:
    """Returns the options for a platform, cpu, gpu (cuda, rocm) or tpu: those of `model.compiler_options` over the
    defaults, without those of another platform."""
    platform = "gpu" if platform in ("cuda", "rocm") else platform
    others = tuple(f"{PREFIX}{other}_" for other in PLATFORMS if other != platform)
    own = {name: value for name, value in chosen.items() if not name.startswith(others)}
    return {**DEFAULTS.get(platform, {}), **own}


def lines(options: Mapping[str, Value], chosen: Mapping[str, Value]) -> list[str]:
    """Returns lines for the log: the options, and those of the config that are not used on this platform."""
    ignored = [name for name in chosen if name not in options]
    said = " ".join(f"{name}={str(value).lower()}" for name, value in options.items())
    return [f"compiler options: {said}"] * bool(options) + [
        f"warning: model.compiler_options.{name} is not used: it is not an option of this platform" for name in ignored
    ]


def refusal(error: Exception, chosen: Mapping[str, Value]) -> UserError | None:
    """Returns the error to raise if XLA refused an option of the config; None for any other error."""
    text = str(error).splitlines()[0].removeprefix("INVALID_ARGUMENT: ")
    if not text.startswith(("No such compile option", "While setting option")):
        return None
    name = next((name for name in chosen if name in text), None)
    return UserError(f"model.compiler_options.{name}: XLA refuses it: {text}") if name else None
