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

from xlam_jax import strict_json
from xlam_jax.errors import UserError
from xlam_jax.outputs import SourceError

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
"""Those that weights may have."""
BITS = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("C64", "F64", "I64", "U64"), 64),
}
"""Bits of a value, for every dtype of the format."""
NAMES = {dtype: name for name, dtype in DTYPES.items()}
LENGTH = 8
"""Bytes of the header's length."""
LONGEST = 100_000_000
"""Bytes of the longest header that the format allows."""
METADATA = "__metadata__"
FIELDS = ("dtype", "shape", "data_offsets")
"""Of a tensor in the header."""
MOST_VALUES = 2**56
"""More than any file holds; products of larger shapes overflow in other readers of the format."""
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
            if not isinstance(size, int):
                raise ValueError("its size is unknown")
            length = int.from_bytes(self._files.cat_file(self._path, 0, LENGTH), "little")
            if not 0 < length <= min(LONGEST, size - LENGTH):
                raise ValueError(f"a header of {length} bytes")
            first = LENGTH + length
            header = self._files.cat_file(self._path, LENGTH, first)
            self.tensors = {
                key: Stored(one.dtype, one.shape, first + one.start, first + one.stop)
                for key, one in parse_header(header, size - first).items()
            }
        except ValueError as error:
            raise UserError(f"{url}: truncated or damaged, {size} bytes ({error}); download this file again") from None
        except OSError as error:
            raise UserError(f"{url}: can't be read ({error})") from None

    def read(self, key: str, part: tuple[int, tuple[int, ...]] | None = None) -> np.ndarray:
        """One tensor, as it stands in the file, or `part` of it, (elements before it, its shape); not to be written to.

        Raises `UserError` for a dtype that weights do not have, and when the file has become shorter.
        """
        stored = self.tensors[key]
        if stored.dtype not in DTYPES:
            raise UserError(f"{self.url}: {key} is {stored.dtype}, and only {', '.join(DTYPES)} are read")
        dtype = DTYPES[stored.dtype]
        first, shape = (0, stored.shape) if part is None else part
        start = stored.start + first * dtype.itemsize
        try:
            data = self._files.cat_file(self._path, start, start + prod(shape) * dtype.itemsize)
        except OSError as error:
            raise SourceError(
                f"{self.url}: {key} can't be read ({error.strerror or error}); run again to continue"
            ) from None
        if len(data) != prod(shape) * dtype.itemsize:
            raise UserError(f"{self.url}: {key} ends after {len(data)} bytes; the file changed while it was read")
        return np.frombuffer(data, dtype).reshape(shape)


def parse_header(header: bytes, size: int) -> dict[str, Stored]:
    """The tensors of a header, by name, with offsets into the `size` bytes of data after it.

    Raises `ValueError` unless every entry is well formed, has as many bytes as its dtype and shape need, and the
    tensors fill the data without a gap or an overlap: the format's own library refuses such files too.
    """
    if not header.startswith(b"{"):
        raise ValueError("its header is not a JSON object")
    entries = strict_json.loads(header)
    metadata = entries.pop(METADATA, None)
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError(f"{METADATA} is {str(metadata)[:100]}, and maps names to strings in this format")
    tensors = {key: _parse_entry(key, entry) for key, entry in entries.items()}
    end, before = 0, "the header"
    for key, stored in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)):
        if stored.start != end:
            what = "overlaps" if stored.start < end else "leaves a gap after"
            raise ValueError(
                f"{key} starts at byte {stored.start} of the data and {what} {before}, which ends at {end}"
            )
        end, before = stored.stop, key
    if end != size:
        raise ValueError(f"its tensors fill {end} bytes, and {size} bytes follow the header")
    return tensors


def _parse_entry(key: str, entry: Any) -> Stored:
    if not isinstance(entry, dict) or sorted(entry) != sorted(FIELDS):
        raise ValueError(f"{key} is {str(entry)[:100]}; exactly {', '.join(FIELDS)} are expected")
    dtype, shape, offsets = (entry[field] for field in FIELDS)
    if not isinstance(dtype, str) or dtype not in BITS:
        raise ValueError(f"{key} has dtype {str(dtype)[:100]!r}, which the format does not have")
    for field, numbers in (("shape", shape), ("data_offsets", offsets)):
        if not isinstance(numbers, list) or not all(type(number) is int and number >= 0 for number in numbers):
            raise ValueError(f"{key} has {field} {str(numbers)[:100]}; a list of whole numbers is expected")
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"{key} has data_offsets {str(offsets)[:100]}; its start and its end are expected")
    values = 1
    for length in shape:
        values *= length
        if max(length, values) > MOST_VALUES:
            raise ValueError(f"{key} has shape {str(shape)[:100]}, more values than a file holds")
    start, stop = offsets
    if values * BITS[dtype] != 8 * (stop - start):
        raise ValueError(
            f"{key} is {dtype} {shape}, {values * BITS[dtype] / 8:g} bytes, and its data_offsets {offsets} hold "
            f"{stop - start}"
        )
    return Stored(dtype, tuple(shape), start, stop)


def read_tensors(path: str) -> dict[str, np.ndarray]:
    """All tensors of a small file, such as an adapter's. Raises `UserError` as `Shard` does."""
    shard = Shard(path)
    return {key: shard.read(key) for key in shard.tensors}


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
