"""Keeps JAX from starting its CUDA plugin on machines without a GPU. Only `plan` needs it there, to compile.

If JAX_PLATFORMS is not set, JAX starts every installed plugin. Without CUDA's libraries, this one logs an error with a
traceback.
"""

import importlib.util
import os
import sys
from pathlib import Path

from xlam_jax import tpu_library

DEVICES = ("nvidia[0-9]*", "nvidiactl", "dxg", "nvgpu")
"""Device files of NVIDIA GPUs, relative to /dev: with the usual driver, under Windows, and on Jetson."""


def has_gpu(dev: Path = Path("/dev")) -> bool:
    """Returns whether this machine may have an NVIDIA GPU, judged by the names of its device files."""
    return any(True for pattern in DEVICES for _ in dev.glob(pattern))


def is_installed() -> bool:
    """Returns whether the plugin, the compiler included, is installed."""
    return importlib.util.find_spec("jax_cuda13_plugin") is not None


def hide() -> None:
    """Makes JAX choose among the other platforms.

    Does nothing on a machine with a GPU, if JAX_PLATFORMS is set, or if another plugin is installed. Has no effect
    after JAX has initialized its devices.
    """
    if os.environ.get("JAX_PLATFORMS") or not is_installed() or has_gpu() or _plugins() != {"xla_cuda13"}:
        return
    os.environ["JAX_PLATFORMS"] = platforms = "tpu,cpu" if tpu_library.has_tpu() else "cpu"
    if "jax" in sys.modules:  # it has read the variable
        sys.modules["jax"].config.update("jax_platforms", platforms)


def _plugins() -> set[str]:
    packages = importlib.util.find_spec("jax_plugins")
    folders = packages.submodule_search_locations if packages else None
    return {path.parent.name for folder in folders or () for path in Path(folder).glob("*/__init__.py")}
