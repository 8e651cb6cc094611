"""Reads the header of a GGUF file: its metadata, and where its tensors are.

GGUF (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md) is the format of llama.cpp. It begins with "GGUF", the
version, and the numbers of tensors and of metadata entries. Then follow the metadata entries (name, type, value), the
tensors' entries (name, axes, type, offset), and the tensors. This reader checks every length against the size of the
file before it uses it. The package `gguf` knows the tensor types.
"""

import mmap
import struct
from functools import lru_cache
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from xlam_jax.errors import UserError

SUFFIX = ".gguf"
MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT = 32
"""Tensors start at multiples of this number of bytes, unless `general.alignment` is another."""
MOST_AXES = 4
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Code of a metadata type → its format in `struct`."""
FLOAT32, TEXT, ARRAY = 6, 8, 9
"""Codes of metadata types."""


class TensorPlace(NamedTuple):
    """Where a tensor is stored."""

    type: str
    """Name of its type, such as Q4_1."""
    shape: tuple[int, ...]
    """Its shape, the last axis contiguous."""
    start: int
    """Offset of its first byte in the file."""
    stop: int


class GGUFFile:
    """The header of a GGUF file."""

    def __init__(self, path: Path):
        """Reads the header. Raises `UserError` if the file cannot be read, is damaged or truncated, or is a part of a
        model that was split into several files, and if the package `gguf` is not installed."""
        _require_package(path)
        self.path = path
        try:
            self.size = path.stat().st_size
            with path.open("rb") as file:
                if not self.size:
                    raise ValueError("it is empty")
                with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                    self.metadata, self.tensors = _Cursor(data).read_header()
        except (ValueError, struct.error) as error:
            raise UserError(
                f"{path}: truncated or damaged, or not a GGUF file ({error}); download this file again"
            ) from None
        except OSError as error:
            raise UserError(f"{path}: can't be read ({error.strerror or error})") from None
        parts = self.metadata.get("split.count", 1)
        if parts not in (0, 1):
            raise UserError(
                f"{path}: is one of {parts} parts of a model (split.count); join them with llama-gguf-split --merge"
            )


def open_gguf(path: Path) -> GGUFFile:
    """Returns the header of a GGUF file, which is read again if the file has changed. Raises as `GGUFFile`."""
    try:
        status = path.stat()
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror or error})") from None
    return _open(path, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=2)
def _open(path: Path, size: int, modified: int) -> GGUFFile:
    """`size` in bytes and `modified` in nanoseconds identify the version of the file."""
    return GGUFFile(path)


def find_gguf(name: str | Path) -> Path | None:
    """Returns the GGUF file that a name means: itself, or the only one of a folder without safetensors; else None.

    Raises `UserError` for a file that does not exist or is not local, and for a folder with several that has no
    config.json either.
    """
    if "://" in str(name):
        if str(name).endswith(SUFFIX):
            raise UserError(f"{name}: GGUF files are read from local disks; download the file first")
        return None
    path = Path(name)
    if path.suffix == SUFFIX and not path.is_dir():
        if not path.is_file():
            raise UserError(f"{path}: no such file; a GGUF file is expected")
        return path
    if not path.is_dir() or any(path.glob("*.safetensors")):
        return None
    files = sorted(path.glob(f"*{SUFFIX}"))
    if len(files) > 1 and not (path / "config.json").is_file():
        names = ", ".join(file.name for file in files[:4]) + (", …" if len(files) > 4 else "")
        raise UserError(f"{path}: contains {len(files)} GGUF files ({names}); name one of them, such as {files[0]}")
    return files[0] if len(files) == 1 else None


def _require_package(path: Path) -> None:
    if find_spec("gguf") is None:
        raise UserError(f"{path}: reading GGUF files needs the package gguf; install it: pip install 'xlam_jax[gguf]'")


class _Cursor:
    """Reads values one after the other; raises `ValueError` instead of reading past the end."""

    def __init__(self, data: mmap.mmap):
        self._data, self._at, self._size = data, 0, len(data)

    def read_header(self) -> tuple[dict[str, Any], dict[str, TensorPlace]]:
        """Returns the metadata and the places of the tensors, by name. Raises `ValueError`."""
        if self.take(len(MAGIC)) != MAGIC:
            raise ValueError("it does not begin with GGUF")
        version = self.number("I")
        if version not in VERSIONS:
            raise ValueError(f"version {version}; {' and '.join(map(str, VERSIONS))} in little-endian order are read")
        tensors, entries = self.number("Q"), self.number("Q")
        metadata: dict[str, Any] = {}
        for _ in range(self.check_count(entries, "metadata entries")):
            name = self.text()
            if name in metadata:
                raise ValueError(f"{name} is there twice")
            metadata[name] = self.value(self.number("I"))
        places: dict[str, tuple[Any, ...]] = {}
        for _ in range(self.check_count(tensors, "tensors")):
            name = self.text()
            if name in places:
                raise ValueError(f"{name} is there twice")
            axes = self.number("I")
            if not 0 < axes <= MOST_AXES:
                raise ValueError(f"{name} has {axes} axes")
            shape = tuple(self.number("Q") for _ in range(axes))[::-1]  # the file begins with the contiguous axis
            places[name] = shape, self.number("I"), self.number("Q")
        alignment = metadata.get("general.alignment", ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise ValueError(f"general.alignment is {alignment!r}")
        first = -(-self._at // alignment) * alignment
        return metadata, {name: self.place(name, first, *place) for name, place in places.items()}

    def place(self, name: str, first: int, shape: tuple[int, ...], code: int, offset: int) -> TensorPlace:
        """Returns the place of a tensor. `first`: offset of the first one; `code`: of its type."""
        import gguf

        tensor_type = gguf.GGMLQuantizationType(code)
        block, size = gguf.GGML_QUANT_SIZES[tensor_type]
        if shape[-1] % block:
            raise ValueError(f"{name} is {tensor_type.name} {shape}; the last axis must be a multiple of {block}")
        start = first + offset
        stop = start + prod(shape) // block * size
        if stop > self._size:
            raise ValueError(f"{name} ends at byte {stop:,} and the file at {self._size:,}")
        return TensorPlace(tensor_type.name, shape, start, stop)

    def value(self, code: int) -> Any:
        """Reads a metadata value of the type with this code."""
        if code == TEXT:
            return self.text()
        if code == ARRAY:
            element, count = self.number("I"), self.number("Q")
            if element in NUMBERS:
                return list(struct.unpack(f"<{count}{NUMBERS[element]}", self.take(count * _size_of(element))))
            return [self.value(element) for _ in range(self.check_count(count, "elements of an array"))]
        if code not in NUMBERS:
            raise ValueError(f"a metadata value has type {code}")
        number = self.number(NUMBERS[code])
        return _shortest(number) if code == FLOAT32 else number

    def text(self) -> str:
        """Reads a string."""
        return self.take(self.number("Q")).decode("utf-8")

    def number(self, kind: str) -> Any:
        """Reads a number of a format of `struct`."""
        return struct.unpack("<" + kind, self.take(struct.calcsize("<" + kind)))[0]

    def take(self, count: int) -> bytes:
        """Reads bytes."""
        self.check_count(count, "bytes")
        self._at += count
        return self._data[self._at - count : self._at]

    def check_count(self, count: int, of: str) -> int:
        """Returns a number of things, each of at least one byte, if they can be in the rest of the file."""
        if count > self._size - self._at:
            raise ValueError(f"{count:,} {of} at byte {self._at:,} of {self._size:,}")
        return count


def _size_of(code: int) -> int:
    return struct.calcsize("<" + NUMBERS[code])


def _shortest(number: float) -> float:
    """Returns the shortest decimal that is the same number in float32: 1e-05, not 9.999999747378752e-06."""
    import numpy as np

    return float(str(np.float32(number)))
