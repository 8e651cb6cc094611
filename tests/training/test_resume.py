"""Checks of a resumed run: data and tokenizer, position in the data, CPU threads, an unreadable run.json."""

import json
import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from xlam_jax.config import Data
from xlam_jax.data.mixture import shares_of_sizes
from xlam_jax.errors import UserError
from xlam_jax.parallel import mesh
from xlam_jax.training.resume import check_data, check_threads


def part(examples: int, digest: str = "aaaa") -> dict[str, Any]:
    return {"examples": examples, "trained_tokens": 100 * examples, "digest": digest}


def identity(**sizes: int) -> dict[str, Any]:
    return {
        "data": {name: {"train": part(size), "heldout": part(2)} for name, size in sizes.items()},
        "tokenizer": {"name": "folder", "tokens": 2048, "digest": "tttt"},
    }


def config(**changes: object) -> Data:
    sources = [{"name": "a", "files": ["x"], "weight": 3}, {"name": "b", "files": ["x"]}]
    values = {"sources": sources, "tokenizer": "t", "sequence_length": 32, "streams": 2, "packing_bins": 4}
    return Data.model_validate({**values, **changes})


def place(*indices: int) -> dict[str, Any]:
    """Returns the saved positions of streams after this many draws, with 3 of the packed rows consumed."""
    return {
        str(stream): {"parent": {"next_index": index}, "next_row": 3, "counter": 11}
        for stream, index in enumerate(indices)
    }


def check(saved: dict[str, Any], now: dict[str, Any], said: list[str], **changes: object) -> tuple[Any, Any]:
    return check_data(Path("RUN"), 6, saved, now, config(**changes), place(40, 40), said.append)


def test_the_same_data_continue_in_silence():
    said: list[str] = []
    moved = identity(a=60, b=20)
    moved["tokenizer"]["name"] = "another folder"
    assert check(identity(a=60, b=20), moved, said) == (None, place(40, 40))
    assert not said


def test_other_data_are_refused_with_both_counts():
    now = identity(a=46, b=20)
    now["data"]["a"]["train"]["digest"] = "bbbb"
    with pytest.raises(UserError) as error:
        check(identity(a=60, b=20), now, [])
    message = str(error.value)
    assert "data.sources, a: 60 examples to train on (6,000 trained tokens, digest aaaa)" in message
    assert "at step 6; 46 examples to train on (4,600 trained tokens, digest bbbb)" in message
    assert "data.sources, b" not in message
    for advice in ("restore them", "choose another output_dir", "data.on_change=warn"):
        assert advice in message


def test_another_text_of_as_many_rows_is_refused():
    now = identity(a=60, b=20)
    now["data"]["b"]["heldout"]["digest"] = "bbbb"
    with pytest.raises(UserError, match=r"data\.sources, b: .*digest bbbb"):
        check(identity(a=60, b=20), now, [])


def test_another_tokenizer_is_refused():
    now = identity(a=60, b=20)
    now["tokenizer"]["digest"] = "uuuu"
    with pytest.raises(UserError, match=r"folder with 2,048 tokens, digest tttt at step 6; .* digest uuuu now"):
        check(identity(a=60, b=20), now, [])
    said: list[str] = []
    record, state = check(identity(a=60, b=20), now, said, on_change="warn")
    assert record["tokenizer"]["now"]["digest"] == "uuuu"
    assert record["sources"] == {}
    assert state == place(40, 40)
    assert len(said) == 1


def test_a_warning_says_what_changed_and_where_the_data_continue():
    said: list[str] = []
    now = identity(a=46, b=20)
    record, state = check(identity(a=60, b=20), now, said, on_change="warn")
    assert said[0].startswith("warning: RUN: the data are not those")
    # 80 draws, three of four of a: 60 of them, a whole epoch of 60, or one of 46 and 14 of the next
    assert record["sources"]["a"]["continues"] == {
        "before": {"drawn": 60, "epoch": 2, "example": 1, "examples": 60},
        "now": {"drawn": 60, "epoch": 2, "example": 15, "examples": 46},
    }
    assert (
        "a: continues with example 15 of 46 in epoch 2 (60 drawn before); without the change: example 1 of 60"
        in said[1]
    )
    assert "b: " not in said[1]
    assert record["step"] == 6
    assert record["sources"]["a"]["now"]["train"]["examples"] == 46
    assert state == {stream: {"parent": {"next_index": 40}, "next_row": 0, "counter": 8} for stream in "01"}
    json.dumps(record)


def test_a_source_whose_share_depends_on_the_others_is_reported_too():
    epochs = [{"name": name, "files": ["x"], "epochs": 1} for name in "ab"]
    said: list[str] = []
    record, _ = check(identity(a=60, b=20), identity(a=20, b=20), said, on_change="warn", sources=epochs)
    positions = record["sources"]["b"]["continues"]
    assert (positions["before"]["drawn"], positions["now"]["drawn"]) == (20, 40)


def test_a_checkpoint_without_digests_opens_with_one_warning():
    said: list[str] = []
    assert check({}, identity(a=60, b=20), said) == (None, place(40, 40))
    assert len(said) == 1
    assert said[0].startswith("warning: RUN: step 6 was saved by a version that stored no digests")


def test_shares_of_sizes():
    assert shares_of_sizes(config().sources, [5, 5]) == [Fraction(3, 4), Fraction(1, 4)]


# ---- CPU threads ----------------------------------------------------------------------------------------------------


def test_threads_are_counted_as_xla_counts_them(monkeypatch: pytest.MonkeyPatch):
    for name in ("PJRT_NPROC", "NPROC"):
        monkeypatch.delenv(name, raising=False)
    assert mesh.cpu_threads() == len(os.sched_getaffinity(0))
    monkeypatch.setenv("NPROC", "5")
    assert mesh.cpu_threads() == 5
    monkeypatch.setenv("PJRT_NPROC", "7")
    assert mesh.cpu_threads() == 7


@pytest.mark.parametrize(
    ("variables", "devices", "threads"),
    [({}, 1, "3"), ({"PJRT_NPROC": "9"}, 1, "9"), ({"NPROC": "9"}, 1, None), ({}, 8, None)],
    ids=["the run's", "the user's", "the user's NPROC", "too few for the devices"],
)
def test_a_resumed_run_takes_as_many_threads_as_before(
    variables: dict[str, str], devices: int, threads: str | None, monkeypatch: pytest.MonkeyPatch
):
    for name in ("PJRT_NPROC", "NPROC"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    mesh.keep_cpu_threads(3, devices)
    assert os.environ.get("PJRT_NPROC") == threads
    monkeypatch.delenv("PJRT_NPROC", raising=False)


def test_another_number_of_threads_is_reported():
    said: list[str] = []
    for saved, now in (([2], [2]), (None, [2]), ([2], None)):
        check_threads(6, saved, now, said.append)
    assert not said
    check_threads(6, [2], [4], said.append)
    assert len(said) == 1
    assert "XLA has 4 CPU threads, and had 2 when step 6 was saved" in said[0]
    assert "continue with PJRT_NPROC=2" in said[0]


SUM = """
import os, sys
if sys.argv[1] == "one":
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
from xlam_jax.parallel import mesh
mesh.keep_cpu_threads(int(sys.argv[2]), 1)
import jax, numpy
total = jax.jit(lambda: jax.random.normal(jax.random.key(2), (3_000_001,)).sum())()
print(numpy.asarray(total).tobytes().hex(), mesh.cpu_threads())
"""


@pytest.mark.slow
def test_the_number_of_threads_decides_the_bits_of_a_sum(environment: dict[str, str]):
    """One CPU with two threads gives the bits of two CPUs; with one thread, they differ."""
    bits = {
        (cpus, threads): subprocess.run(
            [sys.executable, "-c", SUM, cpus, threads], env=environment, capture_output=True, text=True, check=True
        ).stdout.split()
        for cpus, threads in (("one", "2"), ("all", "2"), ("one", "1"), ("all", "1"))
    }
    assert bits["one", "2"] == bits["all", "2"]
    assert bits["one", "1"] == bits["all", "1"]
    assert bits["one", "1"][0] != bits["one", "2"][0]
