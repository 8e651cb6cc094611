"""Keeps JAX from loading libtpu, the TPU's library, on machines without a TPU. Only `plan` needs it there, to compile.

If JAX_PLATFORMS is not set, JAX loads libtpu wherever the package is installed. Without a TPU, libtpu then waits,
writes errors to stderr, and its profiler ends the process.
"""

import os
import sys
from pathlib import Path

PATH = "TPU_LIBRARY_PATH"
"""Environment variable in which JAX looks first; importing the package sets it."""
DEVICES = ("accel[0-9]*", "accel/accel[0-9]*", "vfio/[0-9]*")
"""Device files of TPU chips, relative to /dev."""
_hidden: dict[str, str] = {}
"""Environment variables that `hide` has removed."""


def has_tpu(dev: Path = Path("/dev")) -> bool:
    """Returns whether this machine may have a TPU chip, judged by the names of its device files."""
    return any(True for pattern in DEVICES for _ in dev.glob(pattern))


def hide() -> None:
    """Makes JAX choose among the other platforms, as if libtpu were not installed.

    Does nothing on a machine with a TPU, or if JAX_PLATFORMS or JAX_FORCE_TPU_INIT is set. Has no effect after JAX has
    initialized its devices.
    """
    if os.environ.get("JAX_PLATFORMS") or "JAX_FORCE_TPU_INIT" in os.environ or has_tpu():
        return
    sys.modules["libtpu"] = None  # pyright: ignore[reportArgumentType]  makes its import raise ImportError
    if PATH in os.environ:
        _hidden[PATH] = os.environ.pop(PATH)


def show() -> None:
    """Undoes `hide`."""
    if "libtpu" in sys.modules and sys.modules["libtpu"] is None:
        del sys.modules["libtpu"]
    os.environ.update(_hidden)
    _hidden.clear()
