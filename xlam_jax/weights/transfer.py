"""Moving weights between folders: dtypes, and the check of every tensor."""

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import numpy as np

from xlam_jax.errors import UserError
from xlam_jax.progress import BYTES, Throughput
from xlam_jax.weights.hf_map import Tensor
from xlam_jax.weights.shards import DTYPES, Shard, ahead

WORKERS = 2
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

    with Throughput("checking the weights", sum(sizes), unit=BYTES) as progress:
        for size, _ in zip(sizes, ahead(check, items, workers), strict=True):
            progress.add(size)


def compare(name: str, same: Callable[[Any], bool], items: Sequence[tuple[Tensor, Any]], workers: int) -> None:
    """Raises `UserError` naming the tensors for which `same` does not hold."""
    with Throughput("verifying", sum(prod(tensor.shape) for tensor, _ in items), unit="values") as progress:
        wrong = []
        for (tensor, _), holds in ahead(same, items, workers):
            progress.add(prod(tensor.shape))
            wrong += [] if holds else [tensor.key]
    if wrong:
        shown = ", ".join(wrong[:5]) + (f" and {len(wrong) - 5} more" if len(wrong) > 5 else "")
        raise UserError(
            f"{name}: {len(wrong)} tensors are not what was written ({shown}); check the disk, and run again"
        )
    print(f"verified: {len(items):,} tensors are the source's, bit for bit")
