"""The TPU's library, libtpu: loaded where a TPU is, and by `plan`, which compiles with it; nowhere else.

Without a platform named in JAX_PLATFORMS, JAX loads it wherever the package is installed. Without a TPU it then waits,
complains on stderr, and its profiler ends the process.
"""

import os
import sys
from pathlib import Path

PATH = "TPU_LIBRARY_PATH"
"""Where JAX looks first; importing the package sets it."""
DEVICES = ("accel[0-9]*", "accel/accel[0-9]*", "vfio/[0-9]*")
"""Device files of TPU chips, below /dev."""
_hidden: dict[str, str] = {}
"""Variables of the environment that `hide` has removed."""


def has_tpu(dev: Path = Path("/dev")) -> bool:
    """Whether this machine may have a TPU chip: it has a device file like those of TPUs."""
    return any(True for pattern in DEVICES for _ in dev.glob(pattern))


def hide() -> None:
    """Makes JAX choose among the other platforms, as if the package were not installed.

    Changes nothing on a machine with a TPU, or where JAX_PLATFORMS or JAX_FORCE_TPU_INIT says what to use. Has no
    effect once JAX has looked at its devices.
    """
    if os.environ.get("JAX_PLATFORMS") or "JAX_FORCE_TPU_INIT" in os.environ or has_tpu():
        return
    sys.modules["libtpu"] = None  # pyright: ignore[reportArgumentType]  an import of it raises ImportError
    if PATH in os.environ:
        _hidden[PATH] = os.environ.pop(PATH)


def show() -> None:
    """Undoes `hide`."""
    if "libtpu" in sys.modules and sys.modules["libtpu"] is None:
        del sys.modules["libtpu"]
    os.environ.update(_hidden)
    _hidden.clear()
