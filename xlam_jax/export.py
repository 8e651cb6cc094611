"""Exports the model to a Hugging Face folder after a run's last step."""

import os
import subprocess
import sys
from pathlib import Path

from xlam_jax.config import Config, read_saved
from xlam_jax.enums import STEPS_FOLDER
from xlam_jax.errors import UserError
from xlam_jax.parallel.link import Hosts


def check_export(config: Config, saved: Path) -> None:
    """Raises `UserError` if an unfinished run would export into an existing folder.

    `saved`: path of the run's config.yaml, which may not exist yet.
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
    """Exports the newest checkpoint of a finished run as configured in `export`, adapters merged. Returns an exit code.

    Runs `python -m converters.orbax_to_hf` as a subprocess on the CPU, because this process still uses its devices. Of
    several hosts, only the first exports.
    """
    folder = config.export_folder
    if folder is None or not hosts.first:
        return 0
    if folder.exists():
        print(f"export: {folder} exists already; not written again")
        return 0
    command = [sys.executable, "-m", "converters.orbax_to_hf", "--checkpoint", str(run), "--out", str(folder)]
    process = subprocess.run(command, env=os.environ | {"JAX_PLATFORMS": "cpu"}, check=False)
    if process.returncode:
        print(f"export: failed; the run itself is finished. Export it with: {' '.join(command[1:])}", file=sys.stderr)
    return process.returncode
