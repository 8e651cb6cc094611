"""Reading files of rows as a stream: lines, or the items of a JSON document; plain, gzip or Zstandard."""

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
"""Bytes. Past it a file is rather one that lacks a closing bracket or a line end than one with such a row."""
BUFFER = 1 << 20
_ZSTD_INPUT = 16 << 10  # small: what one piece unpacks to is held at once
_BLANK = b" \t\r\n"
# up to and with the next bracket; the strings between are skipped whole. An unfinished one never matches.
_TO_BRACKET = re.compile(rb'[^"\[\]{}]*+(?:"[^"\\]*+(?:\\.[^"\\]*+)*+"[^"\[\]{}]*+)*+[\[\]{}]', re.DOTALL)
_TO_MARK = re.compile(rb'[^"\[\]{},:]*+(?:"[^"\\]*+(?:\\.[^"\\]*+)*+"[^"\[\]{},:]*+)*+[\[\]{},:]', re.DOTALL)
_KEY = re.compile(rb'\s*"(?:[^"\\]++|\\.)*+"\s*', re.DOTALL)


class Meter:
    """How many bytes were read from files so far, before they were unpacked; for a progress line."""

    bytes = 0


class _Metered(io.FileIO):
    def readinto(self, buffer: object, /) -> int | None:
        count = super().readinto(buffer)  # pyright: ignore[reportArgumentType]
        Meter.bytes += count or 0
        return count


class _Zstd(io.RawIOBase):
    """Unpacks Zstandard frames; unlike the library's own reader, a file that was cut off is an error."""

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
    """Opens a file to read its bytes, unpacked when its name ends in .gz or .zst.

    Raises `UserError`, also inside the block, when the file can't be read, is damaged or was cut off.
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
        raise UserError(f"{path}: no intact gzip file ({error}); get it again") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); check the path") from None
    except errors as error:
        why = "it was cut off" if isinstance(error, EOFError) else error
        raise UserError(f"{path}: cannot be unpacked ({why}); get it again") from None


def read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Streams (line number from 1, line) of a file, blank lines left out.

    Raises `UserError` on a file that can't be read and on a line of more than `LONGEST_ROW` bytes.
    """
    with open_bytes(path) as lines:
        number = 0
        while line := lines.readline(LONGEST_ROW + 1):
            number += 1
            if len(line) > LONGEST_ROW:
                raise UserError(
                    f"{path}:{number}: more than {LONGEST_ROW >> 20} MiB without a line end; .jsonl files hold one row "
                    "a line, name a JSON document .json"
                )
            if not line.isspace():
                yield number, line


def read_items(path: Path) -> Iterator[tuple[int, int, bytes]]:
    """Streams (number from 1, line that it begins on, text) of the items of a JSON list, or values of a JSON object.

    The texts are not parsed: what stands between two commas may be no JSON. Raises `UserError` on a file that can't be
    read, is no list or object, ends before it closes or goes on after it, and on an item over `LONGEST_ROW` bytes.
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
                f"{path}: goes on after its first {'list' if opening == b'[' else 'object'} has closed; "
                "name files with one object a line .jsonl"
            )


def stem(path: Path) -> str:
    """The file's name without endings such as .jsonl and .jsonl.gz."""
    return Path(path.stem).stem if path.suffix in (".gz", ".zst") else path.stem


class _Scan:
    """A window that moves over the file; what lies before `_at` is used up."""

    def __init__(self, path: Path, file: BinaryIO):
        self._path, self._file = path, file
        self._text, self._at, self._before = b"", 0, 0  # `_before`: bytes of the file that the window has left behind
        self._line = self.began = 1
        """`began`: the line on which the last item begins."""

    def _more(self) -> bool:
        """Moves the window on; as large a piece as is held already, so that a long item is searched few times."""
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
        """The next bytes; fewer at the end of the file."""
        taken = self._text[self._at : self._at + count]
        self._at += len(taken)
        return taken

    def item(self, marks: bytes) -> tuple[bytes, bytes]:
        """The text up to the next of `marks` outside of strings and brackets, and that mark."""
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
