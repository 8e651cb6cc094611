"""Helpers of the weight converters: dtypes, and checks of every tensor."""

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import numpy as np

from xlam_jax.errors import UserError
from xlam_jax.progress import BYTES, Throughput
from xlam_jax.weights.hf_map import Tensor
from xlam_jax.weights.shards import DTYPES, Shard, map_ordered

WORKERS = 2
BLOCK = 2**18
"""Number of values that are checked at once: few enough to stay in the processor's cache."""
INFINITE = {2: {"bfloat16": 0x7F80, "float16": 0x7C00}, 4: {"float32": 0x7F800000}, 8: {"float64": 0x7FF0000000000000}}
"""Item size in bytes and name of a dtype → bits of infinity. Larger bits, apart from the sign, are NaN."""


def parse_dtype(name: str | None) -> np.dtype | None:
    """Returns the dtype of that name, None for None."""
    import ml_dtypes

    return None if name is None else np.dtype(getattr(ml_dtypes, name, name))


def check_finite(where: str, key: str, value: np.ndarray) -> None:
    """Raises `UserError` if a tensor of any shape contains NaN or infinity. `where`, `key`: its file and name."""
    bits = 8 * value.dtype.itemsize
    infinite = INFINITE[value.dtype.itemsize][value.dtype.name]
    words = value.reshape(-1).view(f"uint{bits}")
    without_sign = words.dtype.type(2 ** (bits - 1) - 1)
    blocks = (words[start : start + BLOCK] & without_sign for start in range(0, words.size, BLOCK))
    count = sum(int((block >= infinite).sum()) for block in blocks if block.max() >= infinite)
    if count:
        raise UserError(
            f"{where}: {key} contains {count:,} of {value.size:,} values that are infinite or NaN; "
            "the training diverged or the file is damaged: use an earlier step, or download it again"
        )


def check_values(shards: Sequence[Shard], workers: int = WORKERS) -> None:
    """Raises `UserError` for the first tensor with NaN or infinity. Skips tensors of unsupported dtypes."""
    items = [(shard, key) for shard in shards for key, entry in shard.tensors.items() if entry.dtype in DTYPES]
    sizes = [shard.tensors[key].stop - shard.tensors[key].start for shard, key in items]

    def check(item: tuple[Shard, str]) -> None:
        shard, key = item
        check_finite(shard.url, key, shard.read(key))

    with Throughput("checking the weights", sum(sizes), unit=BYTES) as progress:
        for size, _ in zip(sizes, map_ordered(check, items, workers), strict=True):
            progress.add(size)


def check_tensors(
    name: str, is_equal: Callable[[Any], bool], items: Sequence[tuple[Tensor, Any]], workers: int
) -> None:
    """Raises `UserError` with the tensors for which `is_equal(item)` is False. `name`: the folder, for messages."""
    with Throughput("verifying", sum(prod(tensor.shape) for tensor, _ in items), unit="values") as progress:
        different = []
        for (tensor, _), equal in map_ordered(is_equal, items, workers):
            progress.add(prod(tensor.shape))
            different += [] if equal else [tensor.key]
    if different:
        shown = ", ".join(different[:5]) + (f" and {len(different) - 5} more" if len(different) > 5 else "")
        raise UserError(
            f"{name}: {len(different)} tensors differ from what was written ({shown}); check the disk, and run again"
        )
    print(f"verified: {len(items):,} tensors equal the source's, bit for bit")
