"""Journals survive kills, have one writer, and name the lines that can't be read."""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support import ROOT

from xlam_jax.errors import UserError
from xlam_jax.journal import SHOWN, Journal, json_lines, read, summarize

WRITER = """
import sys, time
from pathlib import Path
from xlam_jax.journal import Journal
journal = Journal(Path(sys.argv[1]))
journal.append({"at": 1})
print("written", flush=True)
time.sleep(1000)
"""


def lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_killed_writer_loses_nothing_and_leaves_no_lock(tmp_path: Path):
    path = tmp_path / "journal.jsonl"
    writer = subprocess.Popen([sys.executable, "-c", WRITER, path], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert writer.stdout
    assert writer.stdout.readline() == "written\n"
    with pytest.raises(UserError, match=r"journal\.jsonl: another process is writing to it; wait for it, or stop it"):
        Journal(path)
    writer.send_signal(signal.SIGKILL)
    writer.communicate()
    with Journal(path) as journal:
        journal.append({"at": 2})
        assert not journal.torn
    assert lines(path) == [{"at": 1}, {"at": 2}]


@pytest.mark.parametrize("size", [1, 65535, 65536, 65537, 200_000])
@pytest.mark.parametrize("before", [b"", b'"whole"\n'])
def test_a_torn_last_line_is_removed(tmp_path: Path, before: bytes, size: int):
    path = tmp_path / "journal.jsonl"
    path.write_bytes(before + b"x" * size)
    with Journal(path) as journal:
        assert journal.torn
        journal.append("next")
    assert path.read_bytes() == before + b'"next"\n'


def test_half_a_surrogate_pair_is_kept(tmp_path: Path):
    path = tmp_path / "journal.jsonl"
    with Journal(path) as journal:
        journal.append({"text": "é \ud83d"})
    assert "é" in path.read_text(encoding="utf-8")
    assert list(read(path, dict, "")) == [value for _, value in json_lines(path, [])] == [{"text": "é \ud83d"}]


def test_a_line_that_can_not_be_written_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "journal.jsonl"
    write = os.write

    def half(file: int, data: bytes) -> int:
        if len(data) < 5:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(file, data[: len(data) // 2])

    with Journal(path) as journal:
        journal.append("first")
        monkeypatch.setattr(os, "write", half)
        with pytest.raises(OSError, match="No space left") as raised:
            journal.append("a line that does not fit")
        assert raised.value.filename == str(path)
        monkeypatch.undo()
        journal.append("last")
    assert lines(path) == ["first", "last"]


def test_values_that_are_not_numbers(tmp_path: Path):
    with Journal(tmp_path / "journal.jsonl") as journal:
        journal.append({"loss": float("nan")})
        with pytest.raises(ValueError, match="JSON compliant"):
            journal.append({"loss": float("nan")}, allow_nan=False)


def test_a_line_that_does_not_belong_is_named(tmp_path: Path):
    path = tmp_path / "journal.jsonl"
    for wrong in ("[]", "not JSON", '{"other": 1}', "null"):
        path.write_text('{"id": 1}\n' + wrong + "\n", encoding="utf-8")
        with pytest.raises(UserError, match=r"journal\.jsonl:2: is not a record; remove it"):
            list(read(path, lambda value: value["id"], "is not a record; remove it"))
    path.write_text('{"id": 1}\n{"id": 2', encoding="utf-8")
    assert list(read(path, lambda value: value["id"], "")) == [1]


def test_problems_are_collected_and_summarized(tmp_path: Path):
    path = tmp_path / "journal.jsonl"
    path.write_text("1\n" + "wrong\n" * (SHOWN + 2) + "2\nto", encoding="utf-8")
    problems: list[str] = []
    assert list(json_lines(path, problems)) == [(1, 1), (SHOWN + 4, 2)]
    assert len(problems) == SHOWN + 2
    (warning,) = summarize(path, problems)
    assert warning.startswith(f"{path}: line 2 is not valid JSON; line 3 is not valid JSON")
    assert warning.endswith("line 6 is not valid JSON, and 2 more like this: skipped")
    assert summarize(path, []) == []


def test_a_file_system_without_locks_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    said: list[str] = []
    with Journal(tmp_path / "journal.jsonl", report=said.append) as journal:
        journal.append(1)
    assert [line.partition("; ")[2] for line in said] == ["make sure that no other process writes here"]
