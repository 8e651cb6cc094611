"""For any damaged file, its reader raises one of our errors: no foreign exception, no hang, bounded memory."""

import resource
import time
from pathlib import Path
from random import Random

import pytest
from fuzz.readers import READERS
from support import ROOT

from xlam_jax.data.trajectory import InvalidTrajectory
from xlam_jax.errors import UserError

FEW = 60
MANY = {"config": 4_000, "saved_config": 6_000, "overrides": 10_000, "hf_config": 30_000, "safetensors": 15_000,
        "tokenizer": 2_000, "run": 3_000, "rows": 30_000}  # fmt: skip
"""Mutated inputs of each reader in the slow group: 100,000 together."""
SECONDS = 10.0
"""CPU time of one input."""
GROWTH = 1 << 20
"""KiB that the process may grow by while one reader's inputs are read."""


@pytest.fixture(autouse=True)
def in_the_root(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)


def fuzz(name: str, folder: Path, inputs: range) -> int:
    """Reads mutated inputs; returns how many were refused."""
    read = READERS[name](folder)
    refused = 0
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in inputs:
        begin = time.thread_time()
        try:
            read(Random(f"{name} {number}"))
        except (UserError, InvalidTrajectory):
            refused += 1
        except BaseException as error:
            error.add_note(f"input {number} of {name}")
            raise
        took = time.thread_time() - begin
        assert took < SECONDS, f"input {number} of {name} took {took:.1f} s"
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory
    assert grown < GROWTH, f"{name}: the process grew by {grown >> 10} MiB"
    return refused


@pytest.mark.parametrize("name", READERS)
def test_damaged_input_raises_our_error(name: str, tmp_path: Path):
    refused = fuzz(name, tmp_path, range(FEW))
    assert name == "rows" or refused > FEW // 10  # enough mutations are detected


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_damaged_input_raises_our_error_100_000_times(name: str, tmp_path: Path):
    assert sum(MANY.values()) == 100_000
    assert fuzz(name, tmp_path, range(FEW, FEW + MANY[name])) < MANY[name]
