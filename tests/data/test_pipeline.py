"""Batches: the same for any number of hosts, after any resume; every trajectory once an epoch; shares as configured."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from xlam_jax.config import Data
from xlam_jax.data import pipeline
from xlam_jax.data.tokenizer import load_tokenizer
from xlam_jax.errors import UserError

QUICKSTART = Path(__file__).parents[2] / "examples/quickstart"


def loaded(sizes: dict[str, int], weights: dict[str, float]) -> list[pipeline.Loaded]:
    """Sources of made-up trajectories, each a run of one token that names it."""
    rng = np.random.default_rng(0)
    sources, token = [], 1
    for name, size in sizes.items():
        examples = []
        for _ in range(size):
            tokens = np.full(rng.integers(3, 20), token, np.int32)
            examples.append(pipeline.Example(tokens=tokens, labels=tokens, weights=np.ones(len(tokens), np.float32)))
            token += 1
        sources.append(pipeline.Loaded(name, weights[name], examples, [], Counter()))
    return sources


SOURCES = loaded({"a": 40, "b": 10}, {"a": 3, "b": 1})
DATA = Data.model_validate(
    {"sources": [{"name": "a", "files": ["x"]}], "tokenizer": "t", "sequence_length": 32, "streams": 4}
)


def loader(host: int = 0, hosts: int = 1, seed: int = 0) -> pipeline.Loader:
    return pipeline.Loader(SOURCES, DATA, batch_size=8, seed=seed, host=host, hosts=hosts)


def same(one: pipeline.Row, other: pipeline.Row) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("hosts", [2, 4])
def test_any_number_of_hosts_sees_the_same_global_batches(hosts: int):
    whole, parts = loader(), [loader(host, hosts) for host in range(hosts)]
    for _ in range(12):
        rows = [next(part) for part in parts]
        assert same(next(whole), pipeline.Row(*(np.concatenate(column) for column in zip(*rows, strict=True))))


@pytest.mark.parametrize("at", [0, 1, 5, 17])
def test_resume_at_any_step(at: int):
    first = loader()
    for _ in range(at):
        next(first)
    second = loader()
    second.restore(first.state())
    for _ in range(10):
        assert same(next(first), next(second))


def test_another_seed_gives_other_batches():
    assert not same(next(loader(seed=0)), next(loader(seed=1)))


def test_rows_are_packed_whole_and_isolated():
    for _ in range(5):
        batch = next(loader())
        for row in zip(*batch, strict=True):
            tokens, labels, weights, positions, segments = row
            assert not weights[segments == 0].any()
            for segment in range(1, segments.max() + 1):
                mine = segments == segment
                assert len(set(tokens[mine])) == 1  # one trajectory, not parts of two
                assert np.array_equal(positions[mine], np.arange(mine.sum()))
                assert np.array_equal(tokens[mine], labels[mine])


def test_every_trajectory_is_seen_once_an_epoch_and_shares_are_exact():
    seen: Counter[int] = Counter()
    batches = loader()
    while sum(seen.values()) < 4000:
        for row in zip(*next(batches), strict=True):
            tokens, segments = row[0], row[4]
            seen.update(int(tokens[segments == segment][0]) for segment in range(1, segments.max() + 1))
    total = sum(seen.values())
    of_a = sum(count for token, count in seen.items() if token <= 40)
    # Trajectories that wait in a bin are not seen yet: a bound on them is all that the shares may be off by.
    waiting = 4 * DATA.packing_bins * 10
    assert abs(of_a - 0.75 * total) <= waiting
    for tokens in (range(1, 41), range(41, 51)):
        counts = [seen[token] for token in tokens]
        assert max(counts) - min(counts) <= 2 + waiting // len(counts)


def test_heldout_is_a_matter_of_the_id():
    ids = [f"trajectory {number}" for number in range(4000)]
    held = [one for one in ids if pipeline.is_heldout("a", one, 0.1)]
    assert 0.08 < len(held) / len(ids) < 0.12
    assert held == [one for one in ids if pipeline.is_heldout("a", one, 0.1)]
    assert set(held) <= {one for one in ids if pipeline.is_heldout("a", one, 0.2)}
    assert held != [one for one in ids if pipeline.is_heldout("b", one, 0.1)]


def quickstart(**changes: object) -> Data:
    source = {"name": "hammer", "files": [str(QUICKSTART / "hammer.jsonl")]}
    return Data.model_validate({**DATA.model_dump(), "sources": [source], "sequence_length": 1024, **changes})


def test_loading_counts_what_it_leaves_out():
    tokenizer = load_tokenizer(str(QUICKSTART / "tokenizer"))
    (whole,) = pipeline.load(quickstart(heldout=0.1), tokenizer)
    assert len(whole.train) + len(whole.heldout) == 180
    (short,) = pipeline.load(quickstart(heldout=0.1, sequence_length=256), tokenizer)
    assert len(short.train) + len(short.heldout) + short.dropped["too-long"] == 180
    assert short.dropped["too-long"] > 0
    with pytest.raises(UserError, match=r"hammer\.jsonl:\d+: too-long: \d+ tokens, data\.sequence_length is 256"):
        pipeline.load(quickstart(sequence_length=256, on_long="error"), tokenizer)
    with pytest.raises(UserError, match="no trajectory to train on"):
        pipeline.load(quickstart(sequence_length=4), tokenizer)


def test_heldout_batches_hold_each_trajectory_once():
    tokenizer = load_tokenizer(str(QUICKSTART / "tokenizer"))
    (source,) = pipeline.load(quickstart(heldout=0.2), tokenizer)
    batches = list(pipeline.heldout_batches([source], quickstart(), rows=4, limit=None))
    assert all(batch.tokens.shape == (4, 1024) for batch in batches)
    assert sum(float(batch.weights.sum()) for batch in batches) == sum(
        float(example["weights"].sum()) for example in source.heldout
    )
    assert len(list(pipeline.heldout_batches([source], quickstart(), rows=4, limit=1))) == 1
