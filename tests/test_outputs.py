"""The lock of a folder: one process at a time, and none after its end."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support import ROOT

from xlam_jax.errors import UserError
from xlam_jax.outputs import LOCK, locked

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
