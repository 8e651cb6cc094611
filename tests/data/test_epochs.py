"""Epochs as steps: the measured packing, and what a pass means for a mixture."""

from fractions import Fraction
from itertools import islice

import numpy as np
import pytest

from xlam_jax.config import Config, Source
from xlam_jax.data import pipeline
from xlam_jax.data.corpus import Loaded
from xlam_jax.data.epochs import Lengths, draws_of_epoch, examples_per_row
from xlam_jax.data.examples import Columns, Examples

LENGTH = 64


def load_lengths(name: str, lengths: list[int], **settings: float) -> Loaded:
    examples = Examples()
    for length in lengths:
        ones = np.ones(length + 1)
        examples.append(Columns(ones.astype(np.int32), ones.astype(np.float32), ones.astype(np.int8), None))
    source = Source.model_validate({"name": name, "files": ["x"], **settings})
    return Loaded(source, examples, [], [], [], None, *({} for _ in range(3)))  # pyright: ignore


def make_config(loaded: list[Loaded], rows: int = 4) -> Config:
    data = {
        "sources": [one.source.model_dump() for one in loaded], "tokenizer": "t", "sequence_length": LENGTH,
        "streams": rows,
    }  # fmt: skip
    return Config.model_validate(
        {"output_dir": "x", "model": {"config": "x"}, "data": data, "train": {"batch_size": rows, "learning_rate": 1.0}}
    )


def test_rows_that_examples_fill_exactly():
    loaded = [load_lengths("a", [16] * 100)]
    assert examples_per_row(loaded, make_config(loaded)) == 4
    assert draws_of_epoch(loaded) == 100


def test_rows_are_those_that_training_sees():
    rng = np.random.default_rng(0)
    loaded = [load_lengths(name, rng.integers(5, 60, 300).tolist(), weight=at + 1.0) for at, name in enumerate("ab")]
    config = make_config(loaded)
    per_row = examples_per_row(loaded, config)
    rows = list(islice(pipeline.packed_rows(loaded, config.data, batch_size=4, seed=config.seed), 1024))
    assert per_row == Fraction(sum(int(row["tokens_segment_ids"].max()) for row in rows), len(rows))
    steps = -(-600 // (per_row * 4))
    drawn = sum(int(row["tokens_segment_ids"].max()) for row in rows[: 4 * int(steps)])
    assert drawn == pytest.approx(600, rel=0.1)  # the batches of an epoch hold an epoch's examples


def test_an_epoch_of_a_mixture():
    weighted = [load_lengths("a", [9] * 10, weight=5), load_lengths("b", [9] * 30)]
    assert draws_of_epoch(weighted) == 40
    of_their_own = [load_lengths("a", [9] * 10, epochs=2), load_lengths("b", [9] * 30, epochs=0.5)]
    assert draws_of_epoch(of_their_own) == 35
    assert draws_of_epoch([load_lengths("a", [9] * 10, epochs=2, size=7)]) == 14


def test_lengths_stand_in_for_examples():
    loaded = load_lengths("a", [3, 5])
    lengths = Lengths(loaded.train)
    assert [len(example["tokens"]) for example in lengths[:]] == [3, 5] == lengths.lengths.tolist()
    assert lengths.trained.tolist() == [3, 5]
