"""An evaluation's folder: what was asked (run.json), how each example ended (examples.jsonl), its scores
(summary.json)."""

import fcntl
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from xlam_jax import documents
from xlam_jax.errors import UserError
from xlam_jax.outputs import write_text

RUN, EXAMPLES, SUMMARY = "run.json", "examples.jsonl", "summary.json"
FREE = ("base_url", "started", "limit")
"""What may differ when a run goes on."""


class Records:
    """The records of one evaluation, open for one process; a context manager.

    A line is written at once and whole, so a process that is killed has lost no example that was written. A last line
    that was cut off (the machine went down) is dropped, and its example asked again.
    """

    def __init__(self, folder: Path, about: Mapping[str, Any]):
        """Makes the folder, or goes on in it. `about` says what is asked; it becomes run.json.

        Raises `UserError` where the folder is another evaluation's, holds what is none, or is in use.
        """
        self.folder = folder
        self.torn = False
        """A last line was dropped."""
        _check(folder, about)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / EXAMPLES
        self._file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._file)
            raise UserError(f"{folder}: another process writes it; wait for it, or name another --out") from None
        if not (folder / RUN).exists():
            write_text(folder / RUN, json.dumps(about, indent=1, ensure_ascii=False) + "\n")
        self._drop_torn()
        self.examples = read(folder)
        """The last record of each example, by its id."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._file)

    def add(self, record: dict[str, Any]) -> None:
        """Writes a record."""
        self.examples[record["id"]] = record
        text = json.dumps(record, ensure_ascii=False, default=str)
        try:
            line = f"{text}\n".encode()
        except UnicodeEncodeError:  # half a surrogate pair, which JSON can hold and UTF-8 can't
            line = f"{json.dumps(record, default=str)}\n".encode()
        while line:
            line = line[os.write(self._file, line) :]

    def _drop_torn(self) -> None:
        size = os.fstat(self._file).st_size
        at = size
        while at > 0 and os.pread(self._file, 1, at - 1) != b"\n":
            step = min(at, 1 << 16)
            newline = os.pread(self._file, step, at - step).rfind(b"\n")
            at = at - step + newline + 1
        if at < size:
            self.torn = True
            os.ftruncate(self._file, at)


def read(folder: Path) -> dict[str, dict[str, Any]]:
    """The last record of each example, by its id, in the order in which they ended. Raises `UserError`."""
    path = folder / EXAMPLES
    found: dict[str, dict[str, Any]] = {}
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                break  # being written, or cut off
            try:
                record = json.loads(line)
                id = record["id"]
                assert isinstance(id, str)
                assert "error" in record or all(isinstance(one, int | float) for one in record["scores"].values())
            except (ValueError, KeyError, TypeError, AttributeError, AssertionError):
                raise UserError(
                    f"{path}:{number}: is no record of an example; take the line out, and its example is asked again"
                ) from None
            found.pop(id, None)
            found[id] = record
    return found


def about(folder: Path) -> dict[str, Any]:
    """What run.json says. Raises `UserError`."""
    path = folder / RUN
    if not path.exists():
        raise UserError(f"{folder}: contains no {RUN}, so it is not the folder of an evaluation; check the path")
    return documents.read_object(path, "the record of an evaluation is expected; name another --out")


def _check(folder: Path, wanted: Mapping[str, Any]) -> None:
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out {folder}: is a file; name a folder")
    if not (folder / RUN).exists():
        if folder.is_dir() and any(folder.iterdir()) and not _ours(list(folder.iterdir())):
            raise UserError(f"--out {folder}: holds files, and no {RUN}; name a new folder, or an evaluation's own")
        return
    was = about(folder)
    keys = [key for key in {**was, **wanted} if key not in FREE and was.get(key) != wanted.get(key)]
    if keys:
        told = "; ".join(f"{key}: {_told(was.get(key))} there, {_told(wanted.get(key))} now" for key in keys)
        raise UserError(
            f"--out {folder}: belongs to another evaluation ({told}); name another folder, or ask what was asked there"
        )


def _ours(entries: Sequence[Path]) -> bool:
    """Whether a first start that was killed before run.json was there left this."""
    return {one.name for one in entries} <= {EXAMPLES, f"{RUN}.part"}


def _told(value: Any) -> str:
    return "none" if value is None else json.dumps(value, ensure_ascii=False)
