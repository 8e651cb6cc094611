"""Moving weights between folders: progress, and the check of every tensor."""

import time
from collections.abc import Callable, Sequence
from math import prod
from types import TracebackType
from typing import Any, Self

import numpy as np

from xlam_jax.errors import UserError
from xlam_jax.weights.hf_map import Tensor
from xlam_jax.weights.shards import DTYPES, Shard, ahead

WORKERS = 2
EVERY = 10.0
"""Seconds between lines in a log."""
CACHED = 2**18
"""Values that are looked at together: few enough to stay near the processor."""
INFINITE = {2: {"bfloat16": 0x7F80, "float16": 0x7C00}, 4: {"float32": 0x7F800000}, 8: {"float64": 0x7FF0000000000000}}
"""Bits of infinity, by the bytes and the name of a dtype; what is larger, the sign aside, is no number."""


def dtype_of(name: str | None) -> np.dtype | None:
    """The dtype of that name."""
    import ml_dtypes

    return None if name is None else np.dtype(getattr(ml_dtypes, name, name))


def check_finite(where: str, key: str, value: np.ndarray) -> None:
    """Raises `UserError` for a tensor with values that are no numbers, or infinite."""
    bits = 8 * value.dtype.itemsize
    infinite = INFINITE[value.dtype.itemsize][value.dtype.name]
    words = value.reshape(-1).view(f"uint{bits}")
    without_sign = words.dtype.type(2 ** (bits - 1) - 1)
    parts = (words[at : at + CACHED] & without_sign for at in range(0, words.size, CACHED))
    wrong = sum(int((part >= infinite).sum()) for part in parts if part.max() >= infinite)
    if wrong:
        raise UserError(
            f"{where}: {key} holds {wrong:,} of {value.size:,} values that are infinite or no numbers; "
            "the training diverged or the file is damaged: use an earlier step, or download it again"
        )


def check_values(shards: Sequence[Shard], workers: int = WORKERS) -> None:
    """Raises `UserError` for the first tensor with values that are no numbers; dtypes that weights are not kept in are
    left out."""
    items = [(shard, key) for shard in shards for key, one in shard.tensors.items() if one.dtype in DTYPES]
    sizes = [shard.tensors[key].stop - shard.tensors[key].start for shard, key in items]

    def check(item: tuple[Shard, str]) -> None:
        shard, key = item
        check_finite(shard.url, key, shard.read(key))

    with Told("looking at the weights", sum(sizes)) as told:
        for size, _ in zip(sizes, ahead(check, items, workers), strict=True):
            told.add(size)


def compare(name: str, same: Callable[[Any], bool], items: Sequence[tuple[Tensor, Any]], workers: int) -> None:
    """Raises `UserError` naming the tensors for which `same` does not hold."""
    with Told("verifying", sum(prod(tensor.shape) for tensor, _ in items)) as told:
        wrong = []
        for (tensor, _), holds in ahead(same, items, workers):
            told.add(prod(tensor.shape))
            wrong += [] if holds else [tensor.key]
    if wrong:
        shown = ", ".join(wrong[:5]) + (f" and {len(wrong) - 5} more" if len(wrong) > 5 else "")
        raise UserError(
            f"{name}: {len(wrong)} tensors are not what was written ({shown}); check the disk, and run again"
        )
    print(f"verified: {len(items):,} tensors are the source's, bit for bit")


class Told:
    """Says how far a conversion is: a panel on a terminal, a line every ten seconds in a log."""

    def __init__(self, what: str, total: int):
        """`total`: bytes."""
        from xlam_jax.training.progress import Progress

        self._what, self._total, self._moved, self._skipped = what, total, 0, 0
        self._progress = Progress()
        self._began = self._said = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self._progress.close()

    def skip(self, size: int) -> None:
        """Bytes that an earlier process has done."""
        self._skipped += size
        if size:
            self._progress.line(f"{self._what}: {size / 1e9:.2f} GB are there already")

    def add(self, size: int) -> None:
        """Bytes that are done."""
        from xlam_jax.training.progress import Status, duration

        self._moved += size
        now = time.monotonic()
        rate = self._moved / max(now - self._began, 1e-9)
        left = (self._total - self._skipped - self._moved) / max(rate, 1e-9)
        done = self._skipped + self._moved
        speed = f"{rate / 1e6:,.0f} MB/s"
        line = f"{self._what}: {done / 1e9:.2f} of {self._total / 1e9:.2f} GB  {speed}  left {duration(left)}"
        fields = (("", self._what), ("", speed))
        status: Any = Status(
            step=done // 10**6, steps=max(1, self._total // 10**6), left=left, fields=fields, line=line
        )
        keep = now - self._said >= EVERY
        self._said = now if keep else self._said
        self._progress.step(status, keep=keep)
