"""Outputs appear only when complete; one process has a folder at a time, and none after its end."""

import errno
import fcntl
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support import ROOT

from xlam_jax.errors import UserError
from xlam_jax.outputs import (
    LOCK,
    SourceError,
    check_file,
    locked,
    new_file,
    new_folder,
    refuse_address,
    refuse_existing,
    resumable_folder,
    write_json,
    write_text,
)

HOLDER = """
import sys, time
from pathlib import Path
from xlam_jax.outputs import locked
with locked(Path(sys.argv[1]), "output_dir", print):
    Path(sys.argv[1], "kept").touch()
    print("locked", flush=True)
    time.sleep(1000)
"""


def test_one_process_at_a_time_and_a_killed_one_leaves_no_lock(tmp_path: Path):
    folder = tmp_path / "run"
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, folder], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert holder.stdout
    assert holder.stdout.readline() == "locked\n"
    with (
        pytest.raises(UserError, match=rf"output_dir: {folder} is in use by process {holder.pid} on \S+; wait for it"),
        locked(folder, "output_dir", print),
    ):
        pass
    holder.send_signal(signal.SIGKILL)
    holder.communicate()
    assert (folder / LOCK).exists()
    with locked(folder, "output_dir", print):
        assert f"process {os.getpid()} on" in (folder / LOCK).read_text()
    assert [entry.name for entry in folder.iterdir()] == ["kept"]


def test_a_folder_that_nothing_was_written_into_is_removed(tmp_path: Path):
    with locked(tmp_path / "a/b", "output_dir", print):
        assert (tmp_path / "a/b").is_dir()
    assert not list(tmp_path.iterdir())


def test_a_folder_that_can_not_be_written(tmp_path: Path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(UserError, match=r"output_dir: .* can't be written"),
        locked(tmp_path / "file/run", "output_dir", print),
    ):
        pass


def test_a_file_system_without_locks_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    said: list[str] = []
    with locked(tmp_path / "run", "output_dir", said.append):
        assert [line.partition("; ")[2] for line in said] == ["make sure that no other process writes here"]


def test_a_file_appears_when_it_is_complete(tmp_path: Path):
    out = tmp_path / "out.txt"
    out.write_text("old")

    def fail() -> None:
        with new_file(out) as file:
            file.write("new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]
    with new_file(out) as file:
        file.write("é \ud83d\n")
        assert out.read_text() == "old"
    assert out.read_bytes() == "é \\ud83d\n".encode()
    with new_file(tmp_path / "bytes", "wb") as file:
        file.write(b"\0")
    write_json(tmp_path / "json", {"a": "é"})
    assert (tmp_path / "json").read_text(encoding="utf-8") == '{\n "a": "é"\n}\n'
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bytes", "json", "out.txt"]


def test_content_is_on_the_disk_before_the_name_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    synced: list[tuple[str, bool]] = []
    out = tmp_path / "folder"

    def fsync(descriptor: int) -> None:
        synced.append((Path(os.readlink(f"/proc/self/fd/{descriptor}")).name, out.exists()))

    monkeypatch.setattr(os, "fsync", fsync)
    with new_folder(out) as part:
        part.mkdir()
        (part / "file").write_text("content")
    assert synced == [("file", False), (f".folder.{os.getpid()}.part", False), (tmp_path.name, True)]


def test_a_disk_that_fails_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fsync(_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fsync)
    number = errno.EIO
    with pytest.raises(UserError, match=r"out: can't be written \(Input/output error\); nothing is left behind"):
        write_text(tmp_path / "out", "text")
    assert not list(tmp_path.iterdir())
    number = errno.EINVAL  # a file system without fsync
    write_text(tmp_path / "out", "text")
    assert (tmp_path / "out").read_text() == "text"


def test_what_is_in_the_way_of_a_file(tmp_path: Path):
    file, folder = tmp_path / "file", tmp_path / "folder"
    file.touch()
    folder.mkdir()
    check_file(tmp_path / "new")
    check_file(file, force=True)
    cases: tuple[tuple[Path, dict[str, Any], str], ...] = (
        (file, {"inputs": [file], "force": True}, "is an input as well"),
        (folder, {"force": True}, "exists already, and is a folder"),
        (file, {}, "exists already; give another name, or --force to overwrite it"),
        (file, {"advice": "remove it"}, "exists already; remove it"),
        (tmp_path / "none/new", {}, "the folder '.*none' does not exist; create it first"),
    )
    for out, options, message in cases:
        with pytest.raises(UserError, match=f"{out}: {message}"):
            check_file(out, **options)


def test_what_is_in_the_way_of_a_folder(tmp_path: Path):
    (tmp_path / "file").touch()
    refuse_existing(tmp_path / "new/folder")
    with pytest.raises(UserError, match="exists already and is not overwritten; give another --name"):
        refuse_existing(tmp_path / "file", "--name")
    with pytest.raises(UserError, match="file is a file, not a folder"), new_folder(tmp_path / "file/folder"):
        pass
    with pytest.raises(UserError, match="an address"):
        refuse_address("gs://bucket/folder")


def test_an_interrupted_folder_is_continued(tmp_path: Path):
    out = tmp_path / "out"

    def interrupted(error: type[BaseException]) -> None:
        with resumable_folder(out, {"from": "a"}) as work:
            with work.create("first") as file:
                file.write(b"1")
            work.finish("first")
            (work.folder / ".second.1.part").touch()
            raise error("stopped")

    with pytest.raises(SourceError):
        interrupted(SourceError)
    with (tmp_path / ".out.part" / ".done").open("a") as journal:
        journal.write('"seco')  # the state after a power failure
    with resumable_folder(out, {"from": "a"}) as work:
        assert work.done == {"first"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in out.iterdir()] == ["first"]
    shutil.rmtree(out)
    with pytest.raises(ValueError, match="stopped"):
        interrupted(ValueError)
    assert not list(tmp_path.iterdir())


def test_an_unfinished_folder_of_an_older_version_is_refused(tmp_path: Path):
    part = tmp_path / ".out.part"
    part.mkdir()
    (part / ".source.json").write_text('{"from": "a"}')
    (part / ".done").write_text("model.embed_tokens.weight\n")  # not yet valid JSON
    with (
        pytest.raises(UserError, match=rf"\.done:1: names no finished part; remove {part}, and run again"),
        resumable_folder(tmp_path / "out", {"from": "a"}),
    ):
        pass
    assert (part / ".done").exists()
