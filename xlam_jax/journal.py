"""Journals: append-only files with one JSON value per line that grow while a command runs, such as metrics.jsonl.

A journal has one writer at a time. A process that is killed loses no line that was written: at most the last line is
torn (cut off), and the next writer removes it.
"""

import contextlib
import errno
import fcntl
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self, TypeVar

from xlam_jax.errors import UserError

SHOWN = 5
"""Problems of a file that a warning lists; the rest are counted."""
_UNSUPPORTED = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)
_BLOCK = 1 << 16
Value = TypeVar("Value")


def print_warning(text: str) -> None:
    """Prints a line on stderr."""
    print(text, file=sys.stderr, flush=True)


class Journal:
    """A journal that is open for appending; a context manager.

    The lock is the operating system's (flock), so it ends with the process, however that ends.
    """

    def __init__(
        self, path: Path, advice: str = "wait for it, or stop it", report: Callable[[str], None] = print_warning
    ):
        """Opens or creates the file, locks it, and removes a torn last line.

        `advice`: what a user can do while another process has the journal. `report` gets a warning where the file
        system has no locks (default: stderr). Raises `UserError` when another process has the journal, `OSError`
        when it can't be opened.
        """
        self.path = path
        self._file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            if not take_lock(self._file, path, report):
                raise UserError(f"{path}: another process is writing to it; {advice}")
            self.torn = self._remove_torn_line()
            """Whether a torn last line was removed."""
        except BaseException:
            os.close(self._file)
            raise

    def append(self, value: Any, *, allow_nan: bool = True, default: Callable[[Any], Any] | None = None) -> None:
        """Appends a line, or nothing of it where an `OSError` is raised. The options are those of `json.dumps`."""
        text = json.dumps(value, ensure_ascii=False, allow_nan=allow_nan, default=default)
        # JSON can hold half a surrogate pair and UTF-8 can't; Python's escape for it is also JSON's
        line = f"{text}\n".encode(errors="backslashreplace")
        start = os.fstat(self._file).st_size
        try:
            while line:
                line = line[os.write(self._file, line) :]
        except BaseException as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, start)
            if isinstance(error, OSError) and error.filename is None:
                raise OSError(error.errno, error.strerror, str(self.path)) from None
            raise

    def close(self) -> None:
        """Closes the file, which ends the lock."""
        os.close(self._file)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _remove_torn_line(self) -> bool:
        size = end = os.fstat(self._file).st_size
        while end > 0 and os.pread(self._file, 1, end - 1) != b"\n":
            start = max(0, end - _BLOCK)
            end = start + os.pread(self._file, end - start, start).rfind(b"\n") + 1
        if end < size:
            os.ftruncate(self._file, end)
        return end < size


def read(path: Path, parse: Callable[[Any], Value], problem: str) -> Iterator[Value]:
    """Yields `parse(value)` of each line; a torn last line is skipped.

    `parse` raises `ValueError`, `KeyError`, `TypeError` or `AttributeError` for a value that does not belong here.
    Then, and for a line that is not JSON, a `UserError` names the line: "path:line: {problem}".
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return
            try:
                value = parse(json.loads(line))
            except (ValueError, KeyError, TypeError, AttributeError):
                raise UserError(f"{path}:{number}: {problem}") from None
            yield value


def json_lines(path: Path, problems: list[str]) -> Iterator[tuple[int, Any]]:
    """Yields (line number, value). A line that is not JSON is added to `problems` and skipped; a torn last line is
    skipped without."""
    from pydantic_core import from_json  # three times as fast as json on these records

    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                value = from_json(line)
            except ValueError:
                try:
                    value = json.loads(line)  # it also accepts half a surrogate pair
                except ValueError:
                    if line.endswith(b"\n"):
                        problems.append(f"line {number} is not valid JSON")
                    continue
            yield number, value


def summarize(path: Path, problems: list[str], done: str = "skipped") -> list[str]:
    """Returns one warning about all problems of a file, or none. `done`: what was done with such lines."""
    if not problems:
        return []
    rest = f", and {len(problems) - SHOWN:,} more like this" if len(problems) > SHOWN else ""
    return [f"{path}: {'; '.join(problems[:SHOWN])}{rest}: {done}"]


def take_lock(file: int, path: Path, report: Callable[[str], None]) -> bool:
    """Locks an open file; returns False when another process has locked it. `report` gets a warning where the file
    system has no locks, and the caller continues without one."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        report(
            f"warning: {path}: this file system has no locks ({error.strerror}); make sure that no other process "
            "writes here"
        )
    return True
