"""Digests of data: every change that training would see changes them, and nothing else does."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from xlam_jax.config import Data
from xlam_jax.data import cache, corpus
from xlam_jax.data.identity import identify, source_identity
from xlam_jax.data.tokenizer import load_tokenizer, tokenizer_digest


@pytest.fixture(scope="module")
def tokenizer(quickstart: Path):
    return load_tokenizer(str(quickstart / "tokenizer"))


@pytest.fixture
def rows(quickstart: Path) -> list[dict[str, Any]]:
    lines = (quickstart / "hammer.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines[:30]]


def config(file: Path, rows: list[dict[str, Any]], **changes: object) -> Data:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    source = {"name": "mine", "files": [str(file)], **changes.pop("source", {})}  # pyright: ignore
    defaults = {"sources": [source], "tokenizer": "t", "sequence_length": 2048, "heldout": 0.2}
    return Data.model_validate({**defaults, **changes})


def of_rows(tokenizer: Any, file: Path, rows: list[dict[str, Any]], **changes: object) -> dict[str, Any]:
    return source_identity(corpus.load(config(file, rows, **changes), tokenizer)[0])


def replaced(row: dict[str, Any], old: str, new: str) -> dict[str, Any]:
    text = json.dumps(row)
    assert old in text
    return json.loads(text.replace(old, new))


def last_turn_untrained(row: dict[str, Any]) -> dict[str, Any]:
    changed = copy.deepcopy(row)
    answers = [turn for turn in changed["conversation"] if turn["role"] == "assistant"]
    answers[-1]["loss"] = False
    return changed


CHANGES: dict[str, Callable[[list[dict[str, Any]]], list[dict[str, Any]]]] = {
    "a row less": lambda rows: rows[:-1],
    "a row twice": lambda rows: [*rows, {**rows[0], "unique_trajectory_id": "again"}],
    "another order": lambda rows: rows[::-1],
    "another text": lambda rows: [
        *rows[:-1], replaced(rows[-1], rows[-1]["conversation"][0]["content"][:5], "other")
    ],
    "another id": lambda rows: [{**row, "unique_trajectory_id": f"x{at}"} for at, row in enumerate(rows)],
    "a tool less": lambda rows: [{**rows[0], "tools": rows[0]["tools"][:1]}, *rows[1:]],
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_that_training_sees(change: str, rows, tokenizer, tmp_path: Path):
    before = of_rows(tokenizer, tmp_path / "rows.jsonl", rows)
    changed = of_rows(tokenizer, tmp_path / "rows.jsonl", CHANGES[change](rows), on_invalid="drop")
    assert before != changed
    assert before["train"]["examples"] + before["heldout"]["examples"] == len(rows)


def test_other_weights_of_the_same_tokens(rows, tokenizer, tmp_path: Path):
    thanks = [{"role": "user", "content": "Thanks."}, {"role": "assistant", "content": "Any time."}]
    two_turns = {**rows[0], "conversation": [*rows[0]["conversation"], *thanks]}
    before = of_rows(tokenizer, tmp_path / "rows.jsonl", [two_turns], heldout=0.0)
    changed = of_rows(tokenizer, tmp_path / "rows.jsonl", [last_turn_untrained(two_turns)], heldout=0.0)
    assert before["train"]["examples"] == changed["train"]["examples"] == 1
    assert before["train"]["trained_tokens"] > changed["train"]["trained_tokens"]
    assert before["train"]["digest"] != changed["train"]["digest"]


def test_rows_that_training_does_not_see_do_not_matter(rows, tokenizer, tmp_path: Path):
    file = tmp_path / "rows.jsonl"
    before = of_rows(tokenizer, file, rows)
    assert of_rows(tokenizer, tmp_path / "moved.jsonl", rows) == before
    assert of_rows(tokenizer, file, [*rows, {"conversation": "invalid"}], on_invalid="drop") == before
    assert of_rows(tokenizer, file, [*rows, rows[0]], source={"limit": len(rows)}) == before
    scored = [{**row, "score": 1.0} for row in rows]
    low = {**rows[0], "unique_trajectory_id": "low", "score": 0.0}
    assert of_rows(tokenizer, file, [low, *scored], source={"filters": {"min_score": 0.5}}) == before


def test_a_cache_has_the_identity_of_its_sources(rows, tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    data = config(tmp_path / "rows.jsonl", rows)
    plain = identify(corpus.load(data, tokenizer), tokenizer, "t")
    corpus.prepare(tmp_path / "cache", data, tokenizer)
    # opening and identifying read no example
    monkeypatch.setattr(cache.CachedExamples, "__getitem__", lambda *_: pytest.fail("an example was read"))
    loaded = corpus.load(data.model_copy(update={"cache": str(tmp_path / "cache")}), tokenizer)
    assert identify(loaded, tokenizer, "t") == plain


def test_augmentation_is_identified_by_what_it_draws_from(rows, tokenizer, tmp_path: Path):
    plain = of_rows(tokenizer, tmp_path / "rows.jsonl", rows)
    augmented = [of_rows(tokenizer, tmp_path / "rows.jsonl", rows, augment={"tools": True}) for _ in range(2)]
    assert augmented[0] == augmented[1]
    assert augmented[0]["train"]["digest"] != plain["train"]["digest"]
    assert augmented[0]["heldout"] == plain["heldout"]


@pytest.fixture
def edited(quickstart: Path, tmp_path: Path) -> Callable[[str, Callable[[Any], object]], Any]:
    """Loads the bundled tokenizer with one of its files changed."""

    def load(name: str, change: Callable[[Any], object]) -> Any:
        folder = tmp_path / "tokenizer"
        folder.mkdir()
        for file in (quickstart / "tokenizer").iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        values = json.loads((folder / name).read_text(encoding="utf-8"))
        change(values)
        (folder / name).write_text(json.dumps(values), encoding="utf-8")
        return load_tokenizer(str(folder))

    return load


def swap_ids(values: dict[str, Any]) -> None:
    """Two ordinary tokens exchange their ids."""
    vocabulary = values["model"]["vocab"]
    first, second = [token for token in vocabulary if token.isalpha() and len(token) > 2][:2]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("tokenizer.json", swap_ids),
        ("tokenizer.json", lambda values: values["model"]["merges"].pop()),
        ("tokenizer.json", lambda values: values.update(normalizer={"type": "Lowercase"})),
        ("tokenizer_config.json", lambda values: values.update(eos_token=values["bos_token"])),
    ],
    ids=["ids", "merges", "normalizer", "eos"],
)
def test_another_tokenizer(file: str, change: Callable[[Any], object], edited, tokenizer):
    assert tokenizer_digest(edited(file, change)) != tokenizer_digest(tokenizer)


def test_another_chat_template(edited, tokenizer):
    other = edited("tokenizer_config.json", lambda values: None)
    assert tokenizer_digest(other) == tokenizer_digest(tokenizer)
    other.chat_template = f"{other.chat_template} "
    assert tokenizer_digest(other) != tokenizer_digest(tokenizer)


def test_a_reference_is_of_tokens_that_count_and_not_of_weights():
    from xlam_jax.data.examples import Example
    from xlam_jax.data.identity import examples_digest
    from xlam_jax.training.reference import columns

    ids, kinds = np.arange(5, dtype=np.int32), np.zeros(5, np.int8)
    weights, sides = np.array([0, 1, 1, 0, 1], np.float32), np.array([1, 1, 1, 2, 2], np.int8)
    digests = [
        examples_digest([Example(tokens=ids, labels=ids, weights=scaled, kinds=kinds, sides=sides)], columns)
        for scaled in (weights, 2 * weights, weights[::-1].copy())
    ]
    assert digests[0] == digests[1] != digests[2]
