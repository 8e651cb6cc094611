"""Output folders: written beside, renamed when whole, never in the place of something else."""

import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from xlam_jax.errors import UserError


def refuse_existing(out: Path) -> None:
    """Raises `UserError` when `out` exists already, or the folder that should hold it can't."""
    if out.exists() or out.is_symlink():
        raise UserError(f"{out}: exists already and is not overwritten; give another --out, or remove it first")
    for parent in out.absolute().parents:
        if parent.exists():
            if not parent.is_dir():
                raise UserError(f"{out}: {parent} is a file, not a folder; give another --out")
            return


def refuse_address(out: str) -> None:
    """Raises `UserError` for an address such as gs://bucket/folder, where only a folder can be written."""
    if "://" in out:
        raise UserError(f"{out}: an address, and this output is written to a local folder; give one, and copy it there")


class SourceError(UserError):
    """The source could not be read; what is converted already is kept, so that the command can be run again."""


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Gives a path beside `out` to make a folder at, and renames it to `out` when the block ends well.

    When it does not, what was written is removed. Raises `UserError` when `out` exists or can't be written.
    """
    refuse_existing(out)
    part = out.absolute().with_name(f".{out.absolute().name}.{os.getpid()}.part")
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        yield part
        refuse_existing(out)  # it may have come into being meanwhile
        part.rename(out)
    except OSError as error:
        raise UserError(f"{out}: can't be written ({error.strerror or error}); nothing is left behind") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


SOURCE, DONE = ".source.json", ".done"
"""What a kept folder is made from; and of what it is made of, what is whole."""


class Work:
    """A folder that grows until it is whole. What is told to be done stays so when the process is killed."""

    def __init__(self, folder: Path):
        self.folder = folder
        journal = folder / DONE
        self.done = set(journal.read_text(encoding="utf-8").splitlines()) if journal.exists() else set()
        self._journal = journal.open("a", encoding="utf-8")

    def finish(self, part: str) -> None:
        """Notes that a part is whole."""
        self.done.add(part)
        print(part, file=self._journal, flush=True)

    @contextmanager
    def create(self, name: str) -> Iterator[Any]:
        """Gives a binary file to write; it has its name once it is whole."""
        part = self.folder / f"{name}.part"
        with part.open("wb") as file:
            yield file
        part.rename(self.folder / name)

    def close(self) -> None:
        """Ends the journal."""
        self._journal.close()


class RemoteWork(Work):
    """The same, somewhere that fsspec reaches: small files are kept here until all else is there."""

    def __init__(self, folder: Path, url: str):
        from fsspec.core import url_to_fs

        self._files, self._path = url_to_fs(url)  # first: it raises for an unknown address
        super().__init__(folder)

    @contextmanager
    def create(self, name: str) -> Iterator[Any]:
        """Gives a binary file to write; it has its name once it is whole. Closing one is not enough: a block that
        fails closes it too, cut off."""
        part = f"{self._path}/{name}.part"
        with self._files.open(part, "wb") as file:
            yield file
        self._files.mv(part, f"{self._path}/{name}")

    def begin(self, url: str, source: Mapping[str, Any]) -> None:
        """Finds out what an earlier process has left. Raises `UserError` where something else lies."""
        names = {path.rpartition("/")[2] for path in self._listed()}
        if "config.json" in names:
            raise UserError(f"{url}: exists already and is not overwritten; give another --out, or remove it first")
        record, mine = f"{self._path}/{SOURCE.lstrip('.')}", json.dumps(source, sort_keys=True)
        if SOURCE.lstrip(".") in names:
            if self._files.cat_file(record).decode() != mine:
                raise UserError(
                    f"{url}: holds an unfinished output of another source; remove it, or give another --out"
                )
            self.done = names
        elif names:
            raise UserError(f"{url}: is not empty; give another --out")
        else:
            self._files.makedirs(self._path, exist_ok=True)
            self._files.pipe_file(record, mine.encode())

    def end(self) -> None:
        """Puts the small files there, the one by which a folder is known last."""
        small = [path for path in self.folder.rglob("*") if path.is_file() and path.name not in (SOURCE, DONE)]
        for path in sorted(small, key=lambda path: path.name == "config.json"):
            self._files.put_file(str(path), f"{self._path}/{path.relative_to(self.folder)}")
        self._files.rm_file(f"{self._path}/{SOURCE.lstrip('.')}")

    def _listed(self) -> list[str]:
        return self._files.ls(self._path, detail=False) if self._files.exists(self._path) else []


@contextmanager
def output(out: str, source: Mapping[str, Any]) -> Iterator[Work]:
    """A folder of files to make, here (`resumable_folder`) or at an address that fsspec opens."""
    if "://" not in out:
        with resumable_folder(Path(out), source) as work:
            yield work
        return
    with tempfile.TemporaryDirectory(prefix="xlam-out-") as held:
        try:
            work = RemoteWork(Path(held), out.rstrip("/"))
        except (OSError, ImportError, ValueError) as error:
            raise UserError(f"{out}: can't be written ({error}); an address that fsspec opens is expected") from None
        try:
            work.begin(out, source)
            yield work
            work.end()
        except OSError as error:
            raise UserError(f"{out}: can't be written ({error}); run again to continue") from error
        finally:
            work.close()


@contextmanager
def resumable_folder(out: Path, source: Mapping[str, Any]) -> Iterator[Work]:
    """As `new_folder`, for what takes long: a process that is killed, or ended by Ctrl-C, leaves its part, and the next
    one with the same `source` (what goes in, JSON) goes on with it.

    Raises `UserError` when another process writes it, when a part of something else lies there, and as `new_folder`.
    """
    refuse_existing(out)
    part = out.absolute().with_name(f".{out.absolute().name}.part")
    source = json.loads(json.dumps(source))
    keeps = False
    try:
        part.mkdir(parents=True, exist_ok=True)
        with (part / SOURCE).open("a+", encoding="utf-8") as record:
            try:
                fcntl.flock(record, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                keeps = True
                raise UserError(f"{out}: another process is writing it now; wait for it, or stop it") from None
            record.seek(0)
            before = record.read()
            if before and json.loads(before) != source:
                keeps = True
                was = json.loads(before)
                differs = [
                    f"{key} was {was.get(key)!r} and is {source.get(key)!r}"
                    for key in sorted(was.keys() | source.keys())
                    if was.get(key) != source.get(key)
                ]
                raise UserError(
                    f"{part}: holds an unfinished output of something else ({'; '.join(differs[:3])}); "
                    "remove it, or give another --out"
                )
            if not before:
                record.write(json.dumps(source))
                record.flush()
            work = Work(part)
            try:
                yield work
            except (KeyboardInterrupt, SourceError):
                keeps = True
                raise
            finally:
                work.close()
            refuse_existing(out)  # it may have come into being meanwhile
            for name in (SOURCE, DONE):
                (part / name).unlink()
            part.rename(out)
    except OSError as error:
        raise UserError(f"{out}: can't be written ({error.strerror or error}); nothing is left behind") from error
    finally:
        if not keeps:
            shutil.rmtree(part, ignore_errors=True)
