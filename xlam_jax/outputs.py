"""Files and folders that appear only when they are whole, and folders that one process at a time writes."""

import contextlib
import errno
import fcntl
import filecmp
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from xlam_jax.errors import UserError

PART = ".part"
"""The ending of a file or folder that is not whole."""
LOCK = ".lock"
"""A file of a folder that some process writes. It has the process's name, and is gone when that ends by itself."""
_UNSUPPORTED = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)


def write_text(path: Path, text: str) -> None:
    """Writes a text file beside and renames it, in place of one that is there."""
    part = path.with_name(f"{path.name}{PART}")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def replace_folder(path: Path, write: Callable[[Path], object]) -> bool:
    """Writes a folder of files beside and renames it, unless one is there that has the same files.

    Returns whether another one was there, which it replaced.
    """
    part, old = (path.with_name(f"{path.name}{ending}") for ending in (PART, f".old{PART}"))
    for leftover in (part, old):
        shutil.rmtree(leftover, ignore_errors=True)
    write(part)
    if _same_files(part, path):
        shutil.rmtree(part)
        return False
    replaces = path.exists()
    if replaces:
        path.rename(old)
    part.rename(path)
    shutil.rmtree(old, ignore_errors=True)
    return replaces


def _same_files(folder: Path, other: Path) -> bool:
    names = sorted(entry.name for entry in folder.iterdir())
    if not other.is_dir() or names != sorted(entry.name for entry in other.iterdir()):
        return False
    return filecmp.cmpfiles(folder, other, names, shallow=False)[0] == names


def remove_parts(folder: Path) -> None:
    """Removes what a killed process has left of files and folders that it was writing into a folder."""
    for entry in folder.iterdir():
        if entry.suffix == PART and entry.is_dir():
            shutil.rmtree(entry, ignore_errors=True)
        elif entry.suffix == PART:
            entry.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(folder: Path, name: str, report: Callable[[str], None]) -> Iterator[None]:
    """Makes a folder where it is missing, and keeps other processes from it, those of other machines that share it
    included. `name`: what messages call it, such as `output_dir`.

    The lock is the operating system's (flock): it ends with the process, however that ends. A file system without
    locks is reported. Leaving removes the folder, and the parents made for it, where nothing was written into them.
    Raises `UserError` when another process has it, or when nothing can be written there.
    """
    new = [one for one in (folder, *folder.parents) if not one.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = _lock(folder, name, report)
    except OSError as error:
        _remove_empty(new)
        raise UserError(
            f"{name}: {folder} can't be written ({error.strerror or error}); check who may write there, or choose "
            "another folder"
        ) from None
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            (folder / LOCK).unlink()
        file.close()
        _remove_empty(new)


def _lock(folder: Path, name: str, report: Callable[[str], None]) -> IO[str]:
    while True:
        file = (folder / LOCK).open("a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            file.close()
            raise UserError(
                f"{name}: {folder} is in use by {holder}; wait for it, stop it, or choose another folder"
            ) from None
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                file.close()
                raise
            report(
                f"warning: {folder}: this file system has no locks ({error.strerror}); make sure that no other process "
                "writes here"
            )
        # a process that ended meanwhile may have removed the file that this one opened
        if (folder / LOCK).exists() and os.path.samestat(os.fstat(file.fileno()), (folder / LOCK).stat()):
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            file.flush()
            return file
        file.close()


def _remove_empty(folders: list[Path]) -> None:
    """Removes folders that are empty, each before its parent."""
    with contextlib.suppress(OSError):
        for one in folders:
            one.rmdir()
