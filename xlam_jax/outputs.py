"""Files and folders that appear only when they are whole."""

import filecmp
import shutil
from collections.abc import Callable
from pathlib import Path

PART = ".part"
"""The ending of a file or folder that is not whole."""


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
