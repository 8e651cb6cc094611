"""safetensors files by ranges: a tensor is read alone, and a file is written tensor by tensor, so that memory holds no
more than a few of them. Local or wherever fsspec reaches.

The format: 8 bytes (little-endian) with the length of a JSON header, the header (name → dtype, shape, first and last
offset), and the tensors' bytes one after the other (https://huggingface.co/docs/safetensors).
"""

import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from math import prod
from typing import Any, NamedTuple, TypeVar

import ml_dtypes
import numpy as np

from xlam_jax.errors import UserError

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
"""Those that weights may have."""
NAMES = {dtype: name for name, dtype in DTYPES.items()}
LENGTH = 8
"""Bytes of the header's length."""
LONGEST = 100_000_000
"""Bytes of the longest header that the format allows."""
Item = TypeVar("Item")
Result = TypeVar("Result")


class Stored(NamedTuple):
    """A tensor in a file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    """In the file."""
    stop: int


class Shard:
    """A file that is read. Its tensors may be read by several threads."""

    def __init__(self, url: str):
        """Reads the header. Raises `UserError` when the file is damaged or cut off."""
        from fsspec.core import url_to_fs

        self.url = url
        self._files, self._path = url_to_fs(url)
        size = 0
        try:
            info = self._files.info(self._path)
            self.size = size = info["size"]
            told = (info.get(key) for key in ("mtime", "etag", "ETag", "updated", "created"))
            self.stamp = f"{size} bytes, {next((str(one) for one in told if one), 'of an unknown time')}"
            """Another one where the file was replaced by one of the same size."""
            length = int.from_bytes(self._files.cat_file(self._path, 0, LENGTH), "little")
            if not 0 < length <= min(LONGEST, size - LENGTH):
                raise ValueError(f"a header of {length} bytes")
            header = json.loads(self._files.cat_file(self._path, LENGTH, LENGTH + length))
            header.pop("__metadata__", None)
            first = LENGTH + length
            self.tensors = {
                key: Stored(
                    one["dtype"], tuple(one["shape"]), first + one["data_offsets"][0], first + one["data_offsets"][1]
                )
                for key, one in header.items()
            }
            end = max((one.stop for one in self.tensors.values()), default=first)
            if end != size:
                raise ValueError(f"its header tells of {end} bytes")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{url}: truncated or damaged, {size} bytes ({error}); download this file again") from None
        except OSError as error:
            raise UserError(f"{url}: can't be read ({error})") from None

    def read(self, key: str, part: tuple[int, tuple[int, ...]] | None = None) -> np.ndarray:
        """One tensor, as it stands in the file, or `part` of it, (elements before it, its shape); not to be written to.

        Raises `UserError` when the file has become shorter.
        """
        stored = self.tensors[key]
        dtype = DTYPES[stored.dtype]
        first, shape = (0, stored.shape) if part is None else part
        start = stored.start + first * dtype.itemsize
        data = self._files.cat_file(self._path, start, start + prod(shape) * dtype.itemsize)
        if len(data) != prod(shape) * dtype.itemsize:
            raise UserError(f"{self.url}: {key} ends after {len(data)} bytes; the file changed while it was read")
        return np.frombuffer(data, dtype).reshape(shape)


class Place(NamedTuple):
    """A tensor that a file is to hold."""

    key: str
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Of its values."""
        return prod(self.shape) * self.dtype.itemsize


def header_of(places: Iterable[Place]) -> bytes:
    """The first bytes of a file that holds these tensors in this order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for place in places:
        header[place.key] = {
            "dtype": NAMES[place.dtype],
            "shape": list(place.shape),
            "data_offsets": [at, at + place.bytes],
        }
        at += place.bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8, as the format asks
    return len(text).to_bytes(LENGTH, "little") + text


def ahead(function: Callable[[Item], Result], items: Iterable[Item], workers: int) -> Iterator[tuple[Item, Result]]:
    """Results in the order of the items, computed by threads; no more than `workers` of them wait."""
    with ThreadPoolExecutor(workers) as pool:
        waiting: deque[tuple[Item, Future[Result]]] = deque()
        try:
            for item in items:
                if len(waiting) == workers:
                    done, future = waiting.popleft()
                    yield done, future.result()
                    del future  # and its result with it
                waiting.append((item, pool.submit(function, item)))
            while waiting:
                done, future = waiting.popleft()
                yield done, future.result()
                del future
        finally:
            for _, future in waiting:
                future.cancel()
