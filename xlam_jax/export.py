"""The Hugging Face folder that a run writes after its last step."""

import os
import subprocess
import sys
from pathlib import Path

from xlam_jax.config import Config, read_saved
from xlam_jax.enums import STEPS_FOLDER
from xlam_jax.errors import UserError
from xlam_jax.parallel.link import Hosts


def check_export(config: Config, saved: Path) -> None:
    """Raises `UserError` if a run that is not finished would export into a folder that exists.

    `saved`: the config.yaml in the run's folder, which need not be there yet.
    """
    folder = config.export_folder
    if folder is not None and folder.exists() and not _is_finished(saved):
        raise UserError(
            f"export: {folder} exists already, and the run is not finished; name another folder, or remove it"
        )


def _is_finished(saved: Path) -> bool:
    steps = [int(entry.name) for entry in saved.parent.glob(f"{STEPS_FOLDER}/*") if entry.name.isdigit()]
    return saved.exists() and max(steps, default=0) >= read_saved(saved).train.steps


def export_after(config: Config, run: Path, hosts: Hosts) -> int:
    """Exports the newest checkpoint of a finished run as `export` says, adapters merged. Returns an exit code.

    A process of its own does it on the CPU, as `python -m converters.orbax_to_hf` on a command line would: the devices
    of this one are still in use, and of several hosts only the first exports.
    """
    folder = config.export_folder
    if folder is None or not hosts.first:
        return 0
    if folder.exists():
        print(f"export: {folder} exists already; not written again")
        return 0
    command = [sys.executable, "-m", "converters.orbax_to_hf", "--checkpoint", str(run), "--out", str(folder)]
    done = subprocess.run(command, env=os.environ | {"JAX_PLATFORMS": "cpu"}, check=False)
    if done.returncode:
        print(f"export: failed; the run itself is finished. Export it with: {' '.join(command[1:])}", file=sys.stderr)
    return done.returncode
