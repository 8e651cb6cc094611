"""Output folders: written beside, renamed when whole, never in the place of something else."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from xlam_jax.errors import UserError


def refuse_existing(out: Path) -> None:
    """Raises `UserError` when `out` exists already, or the folder that should hold it can't."""
    if out.exists() or out.is_symlink():
        raise UserError(f"{out}: exists already and is not overwritten; give another --out, or remove it first")
    for parent in out.absolute().parents:
        if parent.exists():
            if not parent.is_dir():
                raise UserError(f"{out}: {parent} is a file, not a folder; give another --out")
            return


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Gives a path beside `out` to make a folder at, and renames it to `out` when the block ends well.

    When it does not, what was written is removed. Raises `UserError` when `out` exists or can't be written.
    """
    refuse_existing(out)
    part = out.absolute().with_name(f".{out.absolute().name}.{os.getpid()}.part")
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        yield part
        refuse_existing(out)  # it may have come into being meanwhile
        part.rename(out)
    except OSError as error:
        raise UserError(f"{out}: can't be written ({error.strerror or error}); nothing is left behind") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
