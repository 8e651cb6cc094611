"""Kinds of damage to the files of a checkpoint, and the outcome of reading it."""

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from xlam_jax.enums import STEPS_FOLDER
from xlam_jax.errors import UserError
from xlam_jax.parallel.link import Hosts
from xlam_jax.training.restore import restore_newest
from xlam_jax.weights import checkpoint
from xlam_jax.weights import run as weights

KINDS = ("delete", "cut in half", "empty", "zeros", "flip", "flip elsewhere", "flip a third")


def flip(path: Path, at: int, bit: int = 0) -> None:
    """Flips one bit of a file."""
    content = bytearray(path.read_bytes())
    content[at] ^= 1 << bit
    path.write_bytes(content)


def damage(path: Path, kind: str, seed: str) -> None:
    """Damages a file; the same seed selects the same place."""
    draw = random.Random(f"{kind} {seed}")
    size = path.stat().st_size
    if kind == "delete":
        path.unlink()
    elif kind == "cut in half":
        path.write_bytes(path.read_bytes()[: size // 2])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "zeros":
        content, start = bytearray(path.read_bytes()), draw.randrange(size)
        length = min(512, size - start)
        content[start : start + length] = bytes(length)
        path.write_bytes(content)
    else:
        flip(path, draw.randrange(size), draw.randrange(8))


def bits(tree: Any) -> list[bytes]:
    """Returns the bytes of a tree's arrays."""
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def resumed(run: Path, items: dict[str, Any]) -> tuple[int, Any]:
    """Returns the step from which a run continues, and everything that it reads there. Raises `UserError`."""
    newest = max(checkpoint.whole_steps(run), default=0)
    restored = restore_newest(run, newest, items, on_damage="fallback", hosts=Hosts(), report=lambda line: None)
    rest = {key: value for key, value in restored.metadata.items() if key != checkpoint.DIGEST}
    return restored.step, (bits(restored.items), restored.data, rest)


def read_for_export(folder: Path) -> Any:
    """Returns everything that an export reads. Raises `UserError`."""
    step = checkpoint.resolve(folder)
    tokenizer = checkpoint.tokenizer_dir(step)
    files = {path.name: path.read_bytes() for path in sorted(tokenizer.iterdir())} if tokenizer else {}
    return step.name, checkpoint.load_hf_config(step), files, bits(weights.load_whole(step))


def outcome(read: Callable[[], Any], expected: dict[Any, Any]) -> str:
    """Returns the outcome of reading: `expected` maps results to names. Exceptions other than `UserError` are
    raised."""
    try:
        result = read()
    except UserError:
        return "refused"
    for name, value in expected.items():
        if result == value:
            return name
    return "OTHER VALUES"


def files_of(folder: Path, step: str) -> list[Path]:
    """Returns the files of a run or a converted model that are read again, relative to its folder."""
    own = [path for path in (folder / STEPS_FOLDER / step).rglob("*") if path.is_file()]
    beside = [folder / checkpoint.HF_CONFIG, *(folder / checkpoint.TOKENIZER).iterdir()]
    return sorted(path.relative_to(folder) for path in own + beside if path.stat().st_size)


def copy(folder: Path, to: Path) -> Path:
    """Copies these files."""
    shutil.rmtree(to, ignore_errors=True)
    shutil.copytree(folder, to, ignore=shutil.ignore_patterns("tensorboard", "*.png", "hf"))
    return to
