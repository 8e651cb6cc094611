"""Streams files of rows: lines, or the items of a JSON document; plain, gzip or Zstandard."""

import gzip
import io
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from xlam_jax.errors import UserError

LONGEST_ROW = 256 << 20
"""Maximum bytes of a row; a larger one is probably a missing closing bracket or line end."""
BUFFER = 1 << 20
_ZSTD_INPUT = 16 << 10  # small, because the whole decompressed chunk is in memory at once
_BLANK = b" \t\r\n"
# text up to and including the next bracket outside of strings; no match if a string is not closed
_TO_BRACKET = re.compile(rb'[^"\[\]{}]*+(?:"[^"\\]*+(?:\\.[^"\\]*+)*+"[^"\[\]{}]*+)*+[\[\]{}]', re.DOTALL)
_TO_MARK = re.compile(rb'[^"\[\]{},:]*+(?:"[^"\\]*+(?:\\.[^"\\]*+)*+"[^"\[\]{},:]*+)*+[\[\]{},:]', re.DOTALL)
_KEY = re.compile(rb'\s*"(?:[^"\\]++|\\.)*+"\s*', re.DOTALL)


class Meter:
    """The number of bytes read from files so far, before decompression; for a progress line."""

    bytes = 0


class _Metered(io.FileIO):
    def readinto(self, buffer: object, /) -> int | None:
        count = super().readinto(buffer)  # pyright: ignore[reportArgumentType]
        Meter.bytes += count or 0
        return count


class _Zstd(io.RawIOBase):
    """Decompresses Zstandard frames; unlike the library's own reader, it raises an error for a truncated file."""

    def __init__(self, packed: BinaryIO):
        import zstandard

        self._packed, self._new = packed, zstandard.ZstdDecompressor().decompressobj
        self._frame, self._started, self._rest, self._unpacked = self._new(), False, b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview, /) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        while not self._unpacked:
            piece = self._rest or self._packed.read(_ZSTD_INPUT)
            if not piece:
                if self._started:
                    raise EOFError
                return 0
            if self._frame.eof:
                self._frame = self._new()
            self._unpacked = memoryview(self._frame.decompress(piece))
            self._rest, self._started = self._frame.unused_data, not self._frame.eof
        count = min(len(buffer), len(self._unpacked))
        buffer[:count] = self._unpacked[:count]
        self._unpacked = self._unpacked[count:]
        return count


@contextmanager
def open_bytes(path: Path) -> Iterator[BinaryIO]:
    """Opens a file to read its bytes, decompressed if its name ends in .gz or .zst.

    Raises `UserError`, also inside the block, when the file cannot be read, is damaged or truncated.
    """
    errors: tuple[type[Exception], ...] = (EOFError, zlib.error)
    if path.suffix == ".zst":
        import zstandard

        errors += (zstandard.ZstdError,)
    try:
        with io.BufferedReader(_Metered(path, "rb"), BUFFER) as raw:
            if path.suffix == ".gz":
                yield io.BufferedReader(gzip.GzipFile(fileobj=raw), BUFFER)  # pyright: ignore[reportReturnType]
            elif path.suffix == ".zst":
                yield io.BufferedReader(_Zstd(raw), BUFFER)
            else:
                yield raw
    except gzip.BadGzipFile as error:
        raise UserError(f"{path}: not an intact gzip file ({error}); get it again") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); check the path") from None
    except errors as error:
        why = "it was cut off" if isinstance(error, EOFError) else error
        raise UserError(f"{path}: cannot be decompressed ({why}); get it again") from None


def read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Streams (line number from 1, line) of a file, without blank lines.

    Raises `UserError` for a file that cannot be read and for a line of more than `LONGEST_ROW` bytes.
    """
    with open_bytes(path) as lines:
        number = 0
        while line := lines.readline(LONGEST_ROW + 1):
            number += 1
            if len(line) > LONGEST_ROW:
                raise UserError(
                    f"{path}:{number}: more than {LONGEST_ROW >> 20} MiB without a line end; .jsonl files have one row "
                    "per line, name a JSON document .json"
                )
            if not line.isspace():
                yield number, line


def read_items(path: Path) -> Iterator[tuple[int, int, bytes]]:
    """Streams (number from 1, line of its beginning, text) of the items of a JSON list, or of the values of an object.

    The texts between the commas are not parsed, and need not be JSON. Raises `UserError` for a file that cannot be
    read, is neither a list nor an object, ends before it is closed or continues after it, and for an item of more than
    `LONGEST_ROW` bytes.
    """
    with open_bytes(path) as file:
        scan = _Scan(path, file)
        scan.skip_blank(start=True)
        opening = scan.take(1)
        if opening not in (b"[", b"{"):
            what = f"starts with {opening.decode('utf-8', 'replace')!r}" if opening else "is empty"
            raise UserError(f"{path}: {what}, expected a JSON list or object of rows; name files of lines .jsonl")
        number, after_comma = 0, False
        while True:
            text, mark = scan.item(b",:]}" if opening == b"{" else b",]}")
            if mark == b":" and _KEY.fullmatch(text):
                text, mark = scan.item(b",]}")
            elif opening == b"{" and text.strip(_BLANK):
                raise UserError(f"{path}: item {number + 1} of its object has no key; get it again")
            if text.strip(_BLANK) or mark == b"," or after_comma:
                number += 1
                yield number, scan.began, text
            if mark != b",":
                break
            after_comma = True
        if (opening, mark) not in ((b"[", b"]"), (b"{", b"}")):
            raise UserError(f"{path}: opens with {opening.decode()} and closes with {mark.decode()}; get it again")
        scan.skip_blank()
        if scan.take(1):
            raise UserError(
                f"{path}: continues after its first {'list' if opening == b'[' else 'object'} has closed; "
                "name files with one object per line .jsonl"
            )


def stem(path: Path) -> str:
    """Returns the file's name without suffixes such as .jsonl and .jsonl.gz."""
    return Path(path.stem).stem if path.suffix in (".gz", ".zst") else path.stem


class _Scan:
    """A window that moves over the file; the text before `_at` is consumed."""

    def __init__(self, path: Path, file: BinaryIO):
        self._path, self._file = path, file
        self._text, self._at, self._before = b"", 0, 0  # `_before`: bytes of the file before the window
        self._line = self.began = 1
        """`began`: the line on which the last item begins."""

    def _more(self) -> bool:
        """Moves the window forward. Doubles the text in it, so that a long item is searched few times."""
        piece = self._file.read(max(BUFFER, len(self._text) - self._at))
        self._before += self._at
        self._text, self._at = self._text[self._at :] + piece, 0
        return bool(piece)

    def skip_blank(self, start: bool = False) -> None:
        """Skips white space, and a byte order mark at the start."""
        while True:
            if start and self._text.startswith(b"\xef\xbb\xbf"):
                self._at = 3
            rest = self._text[self._at :].lstrip(_BLANK)
            self._line += self._text.count(b"\n", self._at, len(self._text) - len(rest))
            self._at = len(self._text) - len(rest)
            if rest or not self._more():
                return

    def take(self, count: int) -> bytes:
        """Consumes and returns the next `count` bytes of the window; fewer at the end of the file."""
        taken = self._text[self._at : self._at + count]
        self._at += len(taken)
        return taken

    def item(self, marks: bytes) -> tuple[bytes, bytes]:
        """Consumes and returns the text up to the next of `marks` outside of strings and brackets, and that mark."""
        depth, end = 0, self._at
        while True:
            match = (_TO_BRACKET if depth else _TO_MARK).match(self._text, end)
            if match is None:
                end -= self._at
                if len(self._text) - self._at > LONGEST_ROW or not self._more():
                    why = f"is longer than {LONGEST_ROW >> 20} MiB" if len(self._text) > LONGEST_ROW else "never ends"
                    raise UserError(
                        f"{self._path}: the item that begins at byte {self._before + self._at} {why}; was the file "
                        "cut off, or is a quote or bracket not closed?"
                    )
                end += self._at
                continue
            end = match.end()
            mark = self._text[end - 1 : end]
            if not depth and mark in marks:
                text = self._text[self._at : end - 1]
                self.began = self._line + text.count(b"\n", 0, len(text) - len(text.lstrip(_BLANK)))
                self._line += text.count(b"\n")
                self._at = end
                return text, mark
            if mark in b"[{":
                depth += 1
            elif mark in b"]}":
                depth -= 1
