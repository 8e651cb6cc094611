"""Files of users are executed in their current version, and errors are reported with their line."""

import sys
from pathlib import Path

import pytest

from xlam_jax import user_code
from xlam_jax.errors import UserError


def test_a_file_is_run_as_it_is_now(tmp_path: Path):
    path = tmp_path / "mine.py"
    for value in (1, 2):  # same size, same second: cached bytecode of the first could be used for the second
        path.write_text(
            "from __future__ import annotations\nfrom dataclasses import dataclass\n"
            f"@dataclass\nclass Mine:\n    it: int = {value}\n"
        )
        assert user_code.load(path, "a class").Mine().it == value
    assert list(tmp_path.iterdir()) == [path]
    assert "mine" not in sys.modules


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"x = 1\nx = y\n", "mine.py:2: NameError: name 'y' is not defined"),
        (b"import json\n\njson.loads('')\n", "mine.py:3: JSONDecodeError: Expecting value"),
        (b"open('/nowhere/at/all')\n", "mine.py:1: FileNotFoundError: "),
        (b"x = (\n", r"mine.py: SyntaxError: '\(' was never closed \(mine.py, line 1\)"),
        (b"x = '\xff'\n", "mine.py: SyntaxError: "),
    ],
)
def test_faults_are_told_with_their_line(tmp_path: Path, text: bytes, message: str):
    (tmp_path / "mine.py").write_bytes(text)
    with pytest.raises(UserError, match=message):
        user_code.load(tmp_path / "mine.py", "anything")


def test_what_is_no_file(tmp_path: Path):
    for path in (tmp_path, tmp_path / "none.py"):
        with pytest.raises(UserError, match=r"can't be read \(.*\); a suite is expected here"):
            user_code.load(path, "a suite")
