"""Output files and folders: they appear under their names only when they are complete, and replace nothing unasked.

Each is written next to its final name, synchronized to the disk and renamed, so that a kill or a power cut leaves the
old content or the new one, never a mixture.
"""

import contextlib
import errno
import filecmp
import json
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Literal

from xlam_jax import journal
from xlam_jax.errors import UserError
from xlam_jax.journal import Journal, take_lock

PART = ".part"
"""Suffix of files and folders that are not complete."""
LOCK = ".lock"
"""A file in a folder that a process is writing. It names the process, which removes it when it ends by itself."""
SOURCE, DONE = ".source.json", ".done"
"""In an unfinished folder: what it is made from, and the journal of the parts that are complete."""

_UNSUPPORTED = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)
"""Errors of file systems that can't synchronize."""


class SourceError(UserError):
    """The source of a `resumable_folder` can't be read now; what is done is kept, and the same command continues."""


def refuse_existing(out: Path, option: str = "--out") -> None:
    """Raises `UserError` when `out` exists, or when its folder can't because a file is in the way."""
    if out.exists() or out.is_symlink():
        raise UserError(f"{out}: exists already and is not overwritten; give another {option}, or remove it first")
    parent = next((parent for parent in out.absolute().parents if parent.exists()), None)
    if parent and not parent.is_dir():
        raise UserError(f"{out}: {parent} is a file, not a folder; give another {option}")


def refuse_address(out: str) -> None:
    """Raises `UserError` for an address such as gs://bucket/folder, where only a local folder can be written."""
    if "://" in out:
        raise UserError(f"{out}: an address, and this output is written to a local folder; give one, and copy it there")


def check_file(
    out: Path,
    *,
    force: bool = False,
    inputs: Iterable[Path] = (),
    advice: str = "give another name, or --force to overwrite it",
) -> None:
    """Raises `UserError`, before any work, when `out` is one of the inputs, exists (unless `force`), or has no folder.

    `advice`: what a user can do about a file that exists.
    """
    if out.resolve() in {file.resolve() for file in inputs}:
        raise UserError(f"{out}: is an input as well; give another output")
    if out.is_dir():
        raise UserError(f"{out}: exists already, and is a folder; name a file")
    if out.exists() and not force:
        raise UserError(f"{out}: exists already; {advice}")
    if not out.parent.is_dir():
        raise UserError(f"{out}: the folder '{out.parent}' does not exist; create it first")


@contextmanager
def new_file(path: Path, mode: Literal["w", "wb"] = "w") -> Iterator[IO[Any]]:
    """Opens a file next to `path` that takes its place when the block ends well, and is removed when it does not.

    Text is UTF-8; half a surrogate pair, which JSON can hold and UTF-8 can't, is written \\ud800. Raises `UserError`
    when the file can't be written.
    """
    with new_path(path) as part:
        if mode == "wb":
            with part.open("wb") as file:
                yield file
        else:
            with part.open("w", encoding="utf-8", errors="backslashreplace", newline="\n") as text:
                yield text


def write_text(path: Path, text: str) -> None:
    """Writes a text file, or replaces one, as `new_file`."""
    with new_file(path) as file:
        file.write(text)


def write_json(path: Path, value: Any) -> None:
    """Writes a value as JSON with one space of indentation, as `new_file`."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


@contextmanager
def new_path(path: Path) -> Iterator[Path]:
    """Yields a path next to `path`, where a library can write a file or folder; otherwise as `new_file`."""
    part = path.absolute().with_name(f".{path.absolute().name}.{os.getpid()}{PART}")
    try:
        yield part
        _sync(part)
        part.replace(path)
        _sync(part.parent, deep=False)
    except OSError as error:
        raise UserError(f"{path}: can't be written ({error.strerror or error}); nothing is left behind") from error
    finally:
        if part.is_dir():
            shutil.rmtree(part, ignore_errors=True)
        else:
            part.unlink(missing_ok=True)


def _sync(path: Path, deep: bool = True) -> None:
    """Waits until a file, or a folder and (`deep`) all that is in it, is on the disk."""
    for entry in (*(path.rglob("*") if deep else ()), path):
        descriptor = os.open(entry, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
        finally:
            os.close(descriptor)


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Yields a path next to `out` to make a folder at, and renames it to `out` when the block ends well.

    When it does not, what was written is removed. Raises `UserError` when `out` exists or can't be written.
    """
    refuse_existing(out)
    with new_path(out) as part:
        part.parent.mkdir(parents=True, exist_ok=True)
        yield part
        refuse_existing(out)  # another process may have created it meanwhile


def replace_folder(path: Path, write: Callable[[Path], object]) -> bool:
    """Writes a folder of files and puts it in the place of `path`, unless that has the same files.

    Returns whether it replaced a different folder.
    """
    part, old = (path.with_name(f"{path.name}{ending}") for ending in (PART, f".old{PART}"))
    for leftover in (part, old):
        shutil.rmtree(leftover, ignore_errors=True)
    write(part)
    if _same_files(part, path):
        shutil.rmtree(part)
        return False
    replaces = path.exists()
    if replaces:
        path.rename(old)
    _sync(part)
    part.rename(path)
    shutil.rmtree(old, ignore_errors=True)
    return replaces


def _same_files(folder: Path, other: Path) -> bool:
    names = sorted(entry.name for entry in folder.iterdir())
    if not other.is_dir() or names != sorted(entry.name for entry in other.iterdir()):
        return False
    return filecmp.cmpfiles(folder, other, names, shallow=False)[0] == names


def remove_parts(folder: Path) -> None:
    """Removes the incomplete files and folders that a killed process has left in a folder."""
    for entry in folder.iterdir():
        if entry.suffix == PART and entry.is_dir():
            shutil.rmtree(entry, ignore_errors=True)
        elif entry.suffix == PART:
            entry.unlink(missing_ok=True)


@contextmanager
def locked(folder: Path, name: str, report: Callable[[str], None]) -> Iterator[None]:
    """Creates a folder if it is missing and locks it against other processes, also those of other machines that share
    it. `name`: what messages call it, such as `output_dir`.

    The lock is the operating system's (flock), so it ends with the process, however that ends. `report` gets a warning
    where the file system has no locks. Leaving removes the folder, and the parents created for it, where nothing was
    written into them. Raises `UserError` when another process has the lock, or when the folder can't be written.
    """
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = _lock(folder, name, report)
    except OSError as error:
        _remove_empty(new)
        raise UserError(
            f"{name}: {folder} can't be written ({error.strerror or error}); check who may write there, or choose "
            "another folder"
        ) from None
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            (folder / LOCK).unlink()
        file.close()
        _remove_empty(new)


def _lock(folder: Path, name: str, report: Callable[[str], None]) -> IO[str]:
    while True:
        file = (folder / LOCK).open("a+", encoding="utf-8")
        try:
            if not take_lock(file.fileno(), folder, report):
                file.seek(0)
                holder = file.read().strip() or "another process"
                raise UserError(
                    f"{name}: {folder} is in use by {holder}; wait for it, stop it, or choose another folder"
                )
            # a process that ended meanwhile may have removed the file that this one opened
            if (folder / LOCK).exists() and os.path.samestat(os.fstat(file.fileno()), (folder / LOCK).stat()):
                file.truncate(0)
                file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
                file.flush()
                return file
        except BaseException:
            file.close()
            raise
        file.close()


def _remove_empty(folders: list[Path]) -> None:
    """Removes folders that are empty, each before its parent."""
    with contextlib.suppress(OSError):
        for folder in folders:
            folder.rmdir()


class ResumableFolder:
    """A folder that grows until it is complete. Parts marked as finished stay so when the process is killed."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._journal = Journal(folder / DONE)
        try:
            problem = f"names no finished part; remove {folder}, and run again"
            self.done = set(journal.read(folder / DONE, _text, problem))
            """The names of the finished parts."""
        except BaseException:
            self._journal.close()
            raise

    def finish(self, part: str) -> None:
        """Marks a part as finished."""
        self.done.add(part)
        self._journal.append(part)

    @contextmanager
    def create(self, name: str) -> Iterator[Any]:
        """Opens a binary file; it gets its name when it is complete."""
        with new_file(self.folder / name, "wb") as file:
            yield file

    def close(self) -> None:
        """Closes the journal."""
        self._journal.close()


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError
    return value


class RemoteFolder(ResumableFolder):
    """A `ResumableFolder` at an address that fsspec opens; small files are kept here until all others are there."""

    def __init__(self, folder: Path, url: str):
        from fsspec.core import url_to_fs

        super().__init__(folder)
        self._files, self._path = url_to_fs(url)

    @contextmanager
    def create(self, name: str) -> Iterator[Any]:
        """Opens a binary file; it gets its name when it is complete. Closing it is not enough, because a block that
        fails closes it too, cut off."""
        part = f"{self._path}/{name}{PART}"
        with self._files.open(part, "wb") as file:
            yield file
        self._files.mv(part, f"{self._path}/{name}")

    def begin(self, url: str, source: Mapping[str, Any]) -> None:
        """Finds what an earlier process has left. Raises `UserError` where the address holds anything else."""
        names = {path.rpartition("/")[2] for path in self._listed()}
        if "config.json" in names:
            raise UserError(f"{url}: exists already and is not overwritten; give another --out, or remove it first")
        record, text = f"{self._path}/{SOURCE.lstrip('.')}", json.dumps(source, sort_keys=True)
        if SOURCE.lstrip(".") in names:
            if self._files.cat_file(record).decode() != text:
                raise UserError(
                    f"{url}: holds an unfinished output of another source; remove it, or give another --out"
                )
            self.done = names
        elif names:
            raise UserError(f"{url}: is not empty; give another --out")
        else:
            self._files.makedirs(self._path, exist_ok=True)
            self._files.pipe_file(record, text.encode())

    def end(self) -> None:
        """Uploads the small files, config.json last: it marks the folder as complete."""
        small = [path for path in self.folder.rglob("*") if path.is_file() and path.name not in (SOURCE, DONE)]
        for path in sorted(small, key=lambda path: path.name == "config.json"):
            self._files.put_file(str(path), f"{self._path}/{path.relative_to(self.folder)}")
        self._files.rm_file(f"{self._path}/{SOURCE.lstrip('.')}")

    def _listed(self) -> list[str]:
        return self._files.ls(self._path, detail=False) if self._files.exists(self._path) else []


@contextmanager
def output(out: str, source: Mapping[str, Any]) -> Iterator[ResumableFolder]:
    """Yields a folder to fill, local (`resumable_folder`) or at an address that fsspec opens."""
    if "://" not in out:
        with resumable_folder(Path(out), source) as work:
            yield work
        return
    with tempfile.TemporaryDirectory(prefix="xlam-out-") as local:
        try:
            work = RemoteFolder(Path(local), out.rstrip("/"))
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
def resumable_folder(out: Path, source: Mapping[str, Any]) -> Iterator[ResumableFolder]:
    """As `new_folder`, for what takes long: a process that is killed, or ended by Ctrl-C, leaves what it has done, and
    the next one with the same `source` (what goes in, as JSON) continues.

    Raises `UserError` when another process writes the folder, when an unfinished folder has another source, and as
    `new_folder`.
    """
    refuse_existing(out)
    part = out.absolute().with_name(f".{out.absolute().name}{PART}")
    keep = False
    try:
        part.mkdir(parents=True, exist_ok=True)
        with (part / SOURCE).open("a+", encoding="utf-8") as record:
            try:
                _claim(record, out, part, json.loads(json.dumps(source)))
                remove_parts(part)
                work = ResumableFolder(part)
            except UserError:
                keep = True
                raise
            try:
                yield work
            except (KeyboardInterrupt, SourceError):
                keep = True
                raise
            finally:
                work.close()
            for name in (SOURCE, DONE):
                (part / name).unlink()
            refuse_existing(out)  # another process may have created it meanwhile
            _sync(part)
            part.rename(out)
            _sync(part.parent, deep=False)
    except OSError as error:
        raise UserError(f"{out}: can't be written ({error.strerror or error}); nothing is left behind") from error
    finally:
        if not keep:
            shutil.rmtree(part, ignore_errors=True)


def _claim(record: IO[str], out: Path, part: Path, source: Any) -> None:
    """Locks an unfinished folder by its record, and writes its source there. Raises `UserError` when another process
    has it, or when it was begun from another source."""
    if not take_lock(record.fileno(), part, journal.print_warning):
        raise UserError(f"{out}: another process is writing it now; wait for it, or stop it")
    record.seek(0)
    text = record.read()
    if not text:
        record.write(json.dumps(source))
        record.flush()
        return
    before = json.loads(text)
    differences = [
        f"{key} was {before.get(key)!r} and is {source.get(key)!r}"
        for key in sorted(before.keys() | source.keys())
        if before.get(key) != source.get(key)
    ]
    if differences:
        raise UserError(
            f"{part}: holds an unfinished output of something else ({'; '.join(differences[:3])}); remove it, or give "
            "another --out"
        )
