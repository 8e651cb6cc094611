"""The reference policy's folder is read back as written, and refused by name if it has other inputs or is damaged."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from xlam_jax.config import PAIRS, Source
from xlam_jax.data.examples import Example, Loaded
from xlam_jax.errors import UserError
from xlam_jax.training import reference


def pair(seed: int) -> Example:
    tokens = np.random.default_rng(seed).integers(3, 99, 12, np.int32)
    sides = np.repeat(np.array([1, 2], np.int8), 6)
    weights = np.tile(np.array([0, 0, 1, 1, 1, 1], np.float32), 2)
    return Example(tokens=tokens, labels=tokens, weights=weights, kinds=np.zeros(12, np.int8), sides=sides)


def source(pairs: int) -> Loaded:
    examples = [pair(seed) for seed in range(pairs)]
    named = Source(name="things", files=["x"], format=PAIRS)
    return Loaded(named, examples[2:], examples[:2], ["id"] * (pairs - 2), [], None, Counter(), Counter(), Counter())


LOADED = [source(7)]
SCORES = [{"train": np.arange(10, dtype=np.float32).reshape(5, 2), "heldout": np.ones((2, 2), np.float32)}]


def attach(folder: Path, loaded: list[Loaded] = LOADED, weights: str = "ffff") -> tuple[list[Loaded], bool, list[str]]:
    """Attaches the reference of these weights; computes `SCORES` if there is no folder."""
    said: list[str] = []
    origin = reference.identity(loaded, weights=weights, model={}, dtype="float32")
    with_reference, is_read = reference.attach(folder, loaded, origin, lambda: SCORES, said.append)
    return with_reference, is_read, said


def test_it_is_read_back_as_it_was_written(tmp_path: Path):
    first, is_read, _ = attach(tmp_path / "kept")
    assert not is_read
    again, is_read, said = attach(tmp_path / "kept")
    assert is_read
    assert not said
    for row in range(5):
        assert np.array_equal(first[0].train[row]["reference"], again[0].train[row]["reference"])  # pyright: ignore
        assert sorted(again[0].train[row]["reference"])[-2:] == sorted(SCORES[0]["train"][row])[-2:]  # pyright: ignore


def flip(position: int) -> Callable[[bytes], bytes]:
    def change(content: bytes) -> bytes:
        at = position % len(content)
        return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]

    return change


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "first byte": flip(0),
    "header": flip(30),
    "number": flip(-9),
    "last byte": flip(-1),
    "half": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "zeros": lambda content: bytes(len(content)),
    "longer": lambda content: content + b"\0",
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("file", ["0.train.npy", "0.heldout.npy"])
def test_a_damaged_file_is_refused_by_name(tmp_path: Path, file: str, damage: str):
    attach(tmp_path / "kept")
    path = tmp_path / "kept" / file
    path.write_bytes(DAMAGE[damage](path.read_bytes()))
    with pytest.raises(UserError, match=rf"kept: can't be read \({file} is damaged: .*; name another folder in"):
        attach(tmp_path / "kept")


def test_what_it_was_made_of_must_be_readable(tmp_path: Path):
    attach(tmp_path / "kept")
    path = tmp_path / "kept" / "reference.json"
    whole = path.read_bytes()
    for damaged in (b"", whole[: len(whole) // 2], b"[]", b"{}", whole.replace(b'"sources"', b'"sourcez"')):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="can't be read"):
            attach(tmp_path / "kept")


def test_other_pairs_and_weights_are_refused(tmp_path: Path):
    attach(tmp_path / "kept")
    with pytest.raises(UserError, match=r"weights: ffff there, 0000 now"):
        attach(tmp_path / "kept", weights="0000")
    with pytest.raises(UserError, match=r"things, train: 5 pairs of digest .* there, 4 of"):
        attach(tmp_path / "kept", [source(6)])


def test_a_folder_without_digests_opens_with_one_warning(tmp_path: Path):
    attach(tmp_path / "kept")
    path = tmp_path / "kept" / "reference.json"
    origin: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    origin.pop("files")
    path.write_text(json.dumps(origin), encoding="utf-8")
    _, is_read, said = attach(tmp_path / "kept")
    assert is_read
    assert len(said) == 1
    assert "written by a version that stored no digests" in said[0]
    np.save(tmp_path / "kept" / "0.train.npy", np.zeros((4, 2), np.float32))
    with pytest.raises(UserError, match=r"0\.train\.npy has float32 \(4, 2\), and float32 \(5, 2\) is expected"):
        attach(tmp_path / "kept")
