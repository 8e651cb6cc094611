"""Reads safetensors files tensor by tensor, and makes their headers, so that only a few tensors are in memory.

Files are local, or remote ones that fsspec opens. The format (https://huggingface.co/docs/safetensors): 8 bytes
(little-endian) with the length of a JSON header, the header (name → dtype, shape, start and end offset), and the bytes
of all tensors.
"""

import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from math import prod
from typing import Any, NamedTuple, Protocol, TypeVar

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
"""Supported dtypes of weights, by their name in the format."""
BITS = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("C64", "F64", "I64", "U64"), 64),
}
"""dtype of the format → bits of a value."""
NAMES = {dtype: name for name, dtype in DTYPES.items()}
LENGTH = 8
"""Size of the header's length field in bytes."""
LONGEST = 100_000_000
"""Maximum size of a header in bytes, by the format."""
METADATA = "__metadata__"
FIELDS = ("dtype", "shape", "data_offsets")
"""Fields of a tensor's entry in the header."""
MOST_VALUES = 2**56
"""Maximum number of values of a tensor, beyond any real file: products of larger shapes overflow in other readers."""
Item = TypeVar("Item")
Result = TypeVar("Result")


class TensorEntry(NamedTuple):
    """A tensor's entry in a file's header."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    """Offset in bytes; `Shard.tensors` counts it from the beginning of the file."""
    stop: int


class TensorFile(Protocol):
    """A file with tensors under Hugging Face names."""

    url: str
    size: int
    """In bytes."""
    stamp: str
    """Identifies the version of the file."""
    tensors: dict[str, TensorEntry]

    def read(self, key: str, part: tuple[int, tuple[int, ...]] | None = None) -> np.ndarray:
        """Reads a tensor, or `part` of it: (number of elements before the part, shape of the part)."""
        ...


class Shard:
    """A safetensors file that is read. Thread-safe."""

    def __init__(self, url: str):
        """Reads the header. Raises `UserError` if the file cannot be read, is damaged or truncated."""
        from fsspec.core import url_to_fs

        self.url = url
        self._files, self._path = url_to_fs(url)
        size = 0
        try:
            info = self._files.info(self._path)
            self.size = size = info["size"]
            versions = (info.get(key) for key in ("mtime", "etag", "ETag", "updated", "created"))
            self.stamp = (
                f"{size} bytes, {next((str(version) for version in versions if version), 'of an unknown time')}"
            )
            """Identifies the version of the file; differs if it was replaced by a file of the same size."""
            if not isinstance(size, int):
                raise ValueError("its size is unknown")
            length = int.from_bytes(self._files.cat_file(self._path, 0, LENGTH), "little")
            if not 0 < length <= min(LONGEST, size - LENGTH):
                raise ValueError(f"a header of {length} bytes")
            first = LENGTH + length
            header = self._files.cat_file(self._path, LENGTH, first)
            self.tensors = {
                key: TensorEntry(entry.dtype, entry.shape, first + entry.start, first + entry.stop)
                for key, entry in parse_header(header, size - first).items()
            }
        except ValueError as error:
            raise UserError(f"{url}: truncated or damaged, {size} bytes ({error}); download this file again") from None
        except OSError as error:
            raise UserError(f"{url}: can't be read ({error})") from None

    def read(self, key: str, part: tuple[int, tuple[int, ...]] | None = None) -> np.ndarray:
        """Reads a tensor, or `part` of it: (number of elements before the part, shape of the part).

        Returns a read-only array with the tensor's dtype and shape. Raises `UserError` for an unsupported dtype, or if
        the file has become shorter; `SourceError` if it cannot be read.
        """
        entry = self.tensors[key]
        if entry.dtype not in DTYPES:
            raise UserError(f"{self.url}: {key} is {entry.dtype}, and only {', '.join(DTYPES)} are supported")
        dtype = DTYPES[entry.dtype]
        first, shape = (0, entry.shape) if part is None else part
        start = entry.start + first * dtype.itemsize
        try:
            data = self._files.cat_file(self._path, start, start + prod(shape) * dtype.itemsize)
        except OSError as error:
            raise SourceError(
                f"{self.url}: {key} can't be read ({error.strerror or error}); run again to continue"
            ) from None
        if len(data) != prod(shape) * dtype.itemsize:
            raise UserError(f"{self.url}: {key} ends after {len(data)} bytes; the file changed while it was read")
        return np.frombuffer(data, dtype).reshape(shape)


def parse_header(header: bytes, size: int) -> dict[str, TensorEntry]:
    """Parses a header. Returns its tensors by name, with offsets into the `size` bytes of data after the header.

    Raises `ValueError`, as the format's own library does, unless every entry is well formed, its number of bytes
    matches its dtype and shape, and the tensors fill the data without gaps or overlaps.
    """
    if not header.startswith(b"{"):
        raise ValueError("its header is not a JSON object")
    entries = strict_json.loads(header)
    metadata = entries.pop(METADATA, None)
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError(f"{METADATA} is {str(metadata)[:100]}; an object of strings is expected")
    tensors = {key: _parse_entry(key, entry) for key, entry in entries.items()}
    end, previous = 0, "the header"
    for key, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)):
        if tensor.start != end:
            problem = "overlaps" if tensor.start < end else "leaves a gap after"
            raise ValueError(
                f"{key} starts at byte {tensor.start} of the data and {problem} {previous}, which ends at {end}"
            )
        end, previous = tensor.stop, key
    if end != size:
        raise ValueError(f"its tensors have {end} bytes, and {size} bytes follow the header")
    return tensors


def _parse_entry(key: str, entry: Any) -> TensorEntry:
    if not isinstance(entry, dict) or sorted(entry) != sorted(FIELDS):
        raise ValueError(f"{key} is {str(entry)[:100]}; exactly {', '.join(FIELDS)} are expected")
    dtype, shape, offsets = (entry[field] for field in FIELDS)
    if not isinstance(dtype, str) or dtype not in BITS:
        raise ValueError(f"{key} has dtype {str(dtype)[:100]!r}, which is not a dtype of the format")
    for field, numbers in (("shape", shape), ("data_offsets", offsets)):
        if not isinstance(numbers, list) or not all(type(number) is int and number >= 0 for number in numbers):
            raise ValueError(f"{key} has {field} {str(numbers)[:100]}; a list of whole numbers is expected")
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"{key} has data_offsets {str(offsets)[:100]}; its start and its end are expected")
    values = 1
    for length in shape:
        values *= length
        if max(length, values) > MOST_VALUES:
            raise ValueError(f"{key} has shape {str(shape)[:100]}, more values than a file can contain")
    start, stop = offsets
    if values * BITS[dtype] != 8 * (stop - start):
        raise ValueError(
            f"{key} is {dtype} {shape}, {values * BITS[dtype] / 8:g} bytes, and its data_offsets {offsets} span "
            f"{stop - start}"
        )
    return TensorEntry(dtype, tuple(shape), start, stop)


def read_tensors(path: str) -> dict[str, np.ndarray]:
    """Reads all tensors of a small file, such as an adapter's. Raises `UserError` as `Shard`."""
    shard = Shard(path)
    return {key: shard.read(key) for key in shard.tensors}


class TensorSpec(NamedTuple):
    """Name, dtype and shape of a tensor to be written."""

    key: str
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Size of its values in bytes."""
        return prod(self.shape) * self.dtype.itemsize


def make_header(specs: Iterable[TensorSpec]) -> bytes:
    """Returns the length field and header of a file that contains these tensors in this order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for spec in specs:
        header[spec.key] = {
            "dtype": NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [offset, offset + spec.bytes],
        }
        offset += spec.bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format aligns tensors to 8 bytes
    return len(text).to_bytes(LENGTH, "little") + text


def map_ordered(
    function: Callable[[Item], Result], items: Iterable[Item], workers: int
) -> Iterator[tuple[Item, Result]]:
    """Applies a function to items in threads. Yields (item, result) in order; at most `workers` results are pending."""
    with ThreadPoolExecutor(workers) as pool:
        waiting: deque[tuple[Item, Future[Result]]] = deque()
        try:
            for item in items:
                if len(waiting) == workers:
                    done, future = waiting.popleft()
                    yield done, future.result()
                    del future  # frees its result
                waiting.append((item, pool.submit(function, item)))
            while waiting:
                done, future = waiting.popleft()
                yield done, future.result()
                del future
        finally:
            for _, future in waiting:
                future.cancel()
