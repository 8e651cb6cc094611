"""Batches: equal for any number of hosts and after any resume; configured shares; every trajectory once per epoch."""

import json
from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xlam_jax.config import PAIRS, Data, Source
from xlam_jax.data import corpus, examples, pipeline, render_sources
from xlam_jax.data.examples import Example, Loaded
from xlam_jax.data.mixture import shares
from xlam_jax.data.tokenizer import load_tokenizer
from xlam_jax.enums import SPAN_KINDS as KINDS
from xlam_jax.errors import UserError

QUICKSTART = Path(__file__).parents[2] / "examples/quickstart"


def loaded(
    sizes: dict[str, int], weights: dict[str, float], longest: int = 20, format: str = "unified"
) -> list[Loaded]:
    """Sources of made-up trajectories or pairs, each a run of one token that names it."""
    rng = np.random.default_rng(0)
    sources, token = [], 1
    for name, size in sizes.items():
        examples = []
        for _ in range(size):
            tokens = np.full(rng.integers(3, longest), token, np.int32)
            ones, kinds = np.ones(len(tokens), np.float32), rng.integers(0, len(KINDS), len(tokens), np.int8)
            one = Example(tokens=tokens, labels=tokens, weights=ones, kinds=kinds)
            if format == PAIRS:
                one["sides"] = np.where(np.arange(len(tokens)) < rng.integers(1, len(tokens)), 1, 2).astype(np.int8)
                one["reference"] = rng.normal(size=len(tokens)).astype(np.float32)
            examples.append(one)
            token += 1
        source = Source(name=name, files=["x"], weight=weights[name], format=format)
        ids = [f"{name}{row}" for row in range(size)]
        sources.append(Loaded(source, examples, [], ids, [], None, Counter(), Counter(), Counter()))
    return sources


SOURCES = loaded({"a": 40, "b": 10}, {"a": 3, "b": 1})
DATA = Data.model_validate(
    {"sources": [{"name": "a", "files": ["x"]}], "tokenizer": "t", "sequence_length": 32, "streams": 4}
)


def loader(host: int = 0, hosts: int = 1, seed: int = 0) -> pipeline.Loader:
    return pipeline.Loader(SOURCES, DATA, batch_size=8, seed=seed, rows=block(8, host, hosts))


def block(rows: int, host: int, hosts: int) -> range:
    """The rows of one of several hosts, each with a block of them."""
    return range(host * rows // hosts, (host + 1) * rows // hosts)


def same(one: pipeline.Row, other: pipeline.Row) -> bool:
    return all(a is b if a is None or b is None else np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def joined(parts: list[pipeline.Row]) -> pipeline.Row:
    return pipeline.Row._make(
        None if column[0] is None else np.concatenate(column) for column in zip(*parts, strict=True)
    )


def segments(batch: pipeline.Row) -> list[int]:
    """The trajectories of a batch, by the token that names each."""
    return [
        int(tokens[segments == segment][0])
        for tokens, segments in zip(batch.tokens, batch.segments, strict=True)
        for segment in range(1, segments.max() + 1)
    ]


@st.composite
def mixtures(draw: st.DrawFn, formats: tuple[str, ...] = ("unified",)) -> tuple[list[Loaded], Data, int]:
    """Sources of drawn sizes and weights, a config with a drawn number of streams, and a batch size."""
    count = draw(st.integers(1, 5))
    sizes = {f"s{i}": draw(st.integers(1, 30)) for i in range(count)}
    weights = {name: draw(st.floats(0.05, 20)) for name in sizes}
    streams = draw(st.sampled_from([1, 2, 4, 8]))
    bins = draw(st.integers(1, 6))
    sources = loaded(sizes, weights, format=draw(st.sampled_from(formats)))
    of_sources = {"sources": [one.source for one in sources], "max_pairs": draw(st.integers(1, 3))}
    data = DATA.model_copy(update={"streams": streams, "packing_bins": bins, **of_sources})
    return sources, data, streams * draw(st.integers(1, 2))


SEARCH = settings(deadline=None, derandomize=True, max_examples=12)


@SEARCH
@given(mixtures(("unified", PAIRS)), st.integers(0, 6), st.data())
def test_global_batches_are_the_same_on_any_hosts_and_after_any_resume(drawn, at: int, data: st.DataObject):
    sources, config, batch_size = drawn
    counts = [hosts for hosts in (1, 2, 4, 8) if config.streams % hosts == 0]

    def loaders(hosts: int) -> list[pipeline.Loader]:
        return [
            pipeline.Loader(sources, config, batch_size=batch_size, seed=3, rows=block(batch_size, host, hosts))
            for host in range(hosts)
        ]

    before, after = loaders(data.draw(st.sampled_from(counts))), loaders(data.draw(st.sampled_from(counts)))
    (whole,) = loaders(1)
    for _ in range(at):
        assert same(next(whole), joined([next(part) for part in before]))
        assert whole.origins() == [origin for part in before for origin in part.origins()]
    states = json.loads(json.dumps({name: place for part in before for name, place in part.state().items()}))
    for part in after:
        part.restore(states)
    for _ in range(3):
        batch = next(whole)
        assert same(batch, joined([next(part) for part in after]))
        assert whole.origins() == [origin for part in after for origin in part.origins()]
        as_packed(batch, whole.origins(), sources, config)


def as_packed(batch: pipeline.Row, origins: list[pipeline.Origin], sources: list[Loaded], config: Data) -> None:
    """Fails unless the rows contain exactly the examples of `origins`, in order."""
    sides = 2 if config.pairs else 1
    remaining = iter(origins)
    columns = (batch.tokens, batch.positions, batch.segments, batch.groups)
    references = batch.tokens if batch.reference is None else batch.reference
    for tokens, positions, segments, groups, reference in zip(*columns, references, strict=True):
        count = segments.max() // sides
        assert not config.pairs or 1 <= count <= config.max_pairs
        at = 0
        for number, (source, row) in enumerate((next(remaining) for _ in range(count)), start=1):
            one = sources[source].train[row]
            place = slice(at, at := at + len(one["tokens"]))
            assert tokens[place].tolist() == one["tokens"].tolist()
            assert groups[place].tolist() == (source * len(KINDS) + one["kinds"]).tolist()
            which = one["sides"] - 1 if "sides" in one else np.zeros(len(one["tokens"]), int)
            assert segments[place].tolist() == (sides * (number - 1) + 1 + which).tolist()
            lengths = np.bincount(which)
            assert positions[place].tolist() == [*range(lengths[0]), *(range(lengths[1]) if config.pairs else ())]
            assert "reference" not in one or reference[place].tolist() == one["reference"].tolist()
        assert not segments[at:].any()
        assert not groups[at:].any()
    assert next(remaining, None) is None


@SEARCH
@given(mixtures())
def test_no_trajectory_is_seen_again_before_all_others_of_its_source(drawn):
    """Streams draw a source's trajectories from one sequence, dealt among them. What a stream has drawn, its sequence
    says: all places of it up to its own number of draws, none twice; the places of an epoch hold every trajectory."""
    sources, config, _ = drawn
    for one in sources:
        sequence = pipeline._endless(0, one, config, 3, None)
        size = len(one.train)
        for epoch in range(3):
            names = [int(sequence[place]["tokens"][0]) for place in range(epoch * size, (epoch + 1) * size)]
            assert sorted(names) == [int(example["tokens"][0]) for example in one.train]
        dealt = [sequence.slice(slice(stream, None, config.streams)) for stream in range(config.streams)]
        for stream, own in enumerate(dealt):
            for draw in range(5):
                place = stream + draw * config.streams
                assert np.array_equal(own[draw]["tokens"], sequence[place]["tokens"])


@SEARCH
@given(mixtures())
def test_realised_shares_are_the_weights(drawn):
    """Over all streams, in trajectories drawn: those seen in batches and those that wait in bins."""
    sources, config, batch_size = drawn
    whole = pipeline.Loader(sources, config, batch_size=batch_size, seed=0)
    seen: Counter[str] = Counter()
    of_token, token = {}, 1
    for one in sources:
        for _ in one.train:
            of_token[token], token = one.source.name, token + 1
    while sum(seen.values()) < 300:
        seen.update(of_token[name] for name in segments(next(whole)))
    total = sum(seen.values())
    waiting = config.streams * config.packing_bins * config.sequence_length // 3
    for one, share in zip(sources, shares(sources, config), strict=True):
        assert abs(seen[one.source.name] - float(share) * total) <= waiting + 2 * config.streams * len(sources)


def test_another_seed_gives_other_batches():
    assert not same(next(loader(seed=0)), next(loader(seed=1)))


def test_rows_are_packed_whole_and_isolated():
    for _ in range(5):
        batch = next(loader())
        for row in zip(*batch[:5], strict=True):
            tokens, labels, weights, positions, segments = row
            assert not weights[segments == 0].any()
            for segment in range(1, segments.max() + 1):
                inside = segments == segment
                assert len(set(tokens[inside])) == 1  # one trajectory, not parts of two
                assert np.array_equal(positions[inside], np.arange(inside.sum()))
                assert np.array_equal(tokens[inside], labels[inside])


def test_weights_by_epochs_sizes_and_tokens():
    sources = loaded({"a": 40, "b": 10}, {"a": 3, "b": 1})
    assert shares(sources, DATA) == [Fraction(3, 4), Fraction(1, 4)]
    passes = [
        one._replace(source=one.source.model_copy(update={"weight": None, "epochs": epochs, "size": size}))
        for one, epochs, size in zip(sources, (1.0, 2.0), (None, 80), strict=True)
    ]
    assert shares(passes, DATA) == [Fraction(1, 5), Fraction(4, 5)]
    by_tokens = shares(sources, DATA.model_copy(update={"share": "tokens"}))
    tokens = [
        share * Fraction(int(examples.trained(one.train).sum()), len(one.train))
        for share, one in zip(by_tokens, sources, strict=True)
    ]
    assert tokens[0] == 3 * tokens[1]  # trained tokens of a, three times those of b


def test_hosts_may_share_a_stream_and_need_rows_in_any_place():
    """Devices of a host need not be neighbours in the mesh, nor a stream's rows be all of one host."""
    (whole,) = (loader(),)
    parts = [pipeline.Loader(SOURCES, DATA, batch_size=8, seed=0, rows=rows) for rows in ([0, 3, 4], [1, 2, 7], [5, 6])]
    for _ in range(3):
        batch, shares = next(whole), [next(part) for part in parts]
        for share, rows in zip(shares, ([0, 3, 4], [1, 2, 7], [5, 6]), strict=True):
            assert same(share, pipeline.Row._make(None if column is None else column[rows] for column in batch))
    states = {name: place for part in parts for name, place in part.state().items()}
    assert states == whole.state()


def test_packing_wastes_little_on_the_bundled_mixture():
    sources = [
        {"name": name, "files": [str(QUICKSTART / f"{name}.jsonl")]}
        for name in ("webshop", "hotpotqa", "seal_tools", "hammer")
    ]
    data = Data.model_validate(
        {**DATA.model_dump(), "sources": sources, "sequence_length": 4096, "streams": 8, "packing_bins": 16}
    )
    one = corpus.load(data, load_tokenizer("mistral:v3"))
    batches = pipeline.Loader(one, data, batch_size=8, seed=0)
    filled = [float((next(batches).segments > 0).mean()) for _ in range(12)]
    assert np.mean(filled) >= 0.97


def test_resume_takes_as_long_at_any_place():
    """Counted, not timed: a restored stream reads what its bins hold, however far it had come."""
    sources = loaded({"a": 1000}, {"a": 1})
    reads = 0

    class Counted(list):
        def __getitem__(self, at):  # type: ignore[override]
            nonlocal reads
            reads += 1
            return super().__getitem__(at)

    sources = [sources[0]._replace(train=Counted(sources[0].train))]
    far = pipeline.Loader(sources, DATA, batch_size=4, seed=0)
    for _ in range(400):
        next(far)
    reads = 0
    again = pipeline.Loader(sources, DATA, batch_size=4, seed=0)
    again.restore(far.state())
    assert same(next(again), next(far))
    assert reads < 4 * DATA.packing_bins * DATA.sequence_length


def test_heldout_is_a_matter_of_the_id():
    ids = [f"trajectory {number}" for number in range(4000)]
    held = [one for one in ids if render_sources.is_heldout("a", one, 0.1)]
    assert 0.08 < len(held) / len(ids) < 0.12
    assert held == [one for one in ids if render_sources.is_heldout("a", one, 0.1)]
    assert set(held) <= {one for one in ids if render_sources.is_heldout("a", one, 0.2)}
    assert held != [one for one in ids if render_sources.is_heldout("b", one, 0.1)]


def quickstart(**changes: object) -> Data:
    source = {"name": "hammer", "files": [str(QUICKSTART / "hammer.jsonl")]}
    return Data.model_validate({**DATA.model_dump(), "sources": [source], "sequence_length": 1024, **changes})


def test_loading_counts_what_it_leaves_out():
    tokenizer = load_tokenizer(str(QUICKSTART / "tokenizer"))
    (whole,) = corpus.load(quickstart(heldout=0.1), tokenizer)
    assert len(whole.train) + len(whole.heldout) == 180
    (short,) = corpus.load(quickstart(heldout=0.1, sequence_length=256), tokenizer)
    assert len(short.train) + len(short.heldout) + short.dropped["too-long"] == 180
    assert short.dropped["too-long"] > 0
    with pytest.raises(UserError, match=r"hammer\.jsonl:\d+: too-long: .*; data\.sequence_length is 256"):
        corpus.load(quickstart(sequence_length=256, on_long="error"), tokenizer)
    with pytest.raises(UserError, match="nothing to train on"):
        corpus.load(quickstart(sequence_length=4), tokenizer)


def test_heldout_batches_hold_each_trajectory_once():
    tokenizer = load_tokenizer(str(QUICKSTART / "tokenizer"))
    (source,) = corpus.load(quickstart(heldout=0.2), tokenizer)
    batches = list(pipeline.heldout_batches([source], quickstart(), rows=4, limit=None))
    assert all(batch.tokens.shape == (4, 1024) for batch in batches)
    assert sum(float(batch.weights.sum()) for batch in batches) == sum(
        float(example["weights"].sum()) for example in source.heldout
    )
    assert len(list(pipeline.heldout_batches([source], quickstart(), rows=4, limit=1))) == 1


def test_heldout_batches_read_no_more_than_they_give():
    reads: list[int] = []

    class Counted(list):
        def __getitem__(self, at):  # type: ignore[override]
            reads.append(at)
            return super().__getitem__(at)

    sources = loaded({"a": 5000}, {"a": 1})
    (held,) = (one._replace(train=[], heldout=Counted(one.train)) for one in sources)
    batches = list(pipeline.heldout_batches([held], DATA, rows=2, limit=2))
    assert len(batches) == 2
    assert max(reads) < 200
    halves = [list(pipeline.heldout_batches([held], DATA, rows=2, limit=2, host_rows=block(2, at, 2))) for at in (0, 1)]
    assert all(same(whole, joined(list(parts))) for whole, *parts in zip(batches, *halves, strict=True))


@SEARCH
@given(st.integers(1, 25), st.integers(1, 25), st.integers(0, 12), st.integers(1, 3))
def test_data_that_changed_continue_at_the_same_draw_and_skip_none(
    size: int, size_now: int, batches: int, windows: int
):
    weights = {"a": 2.0, "b": 1.0}
    sources, changed = loaded({"a": size, "b": 7}, weights), loaded({"a": size_now, "b": 7}, weights)
    listed = [one.source for one in sources]
    data = DATA.model_copy(update={"streams": 2, "packing_bins": 3, "sources": listed})
    before, after = (pipeline.Loader(one, data, batch_size=2, seed=1) for one in (sources, changed))
    for _ in range(batches):
        next(before)
    state = json.loads(json.dumps(before.state()))
    begin = pipeline.draws(state, shares(sources, data), data.streams)
    assert sum(begin) == sum(place["parent"]["next_index"] for place in state.values())
    after.restore(pipeline.packed_again(state))
    seen = Counter[int]()
    for _ in range(windows * data.packing_bins):  # whole windows: all that was drawn is given out
        next(after)
        seen.update(source for source, _ in after.origins())
    end = pipeline.draws(after.state(), shares(changed, data), data.streams)
    assert [seen[source] for source in (0, 1)] == [last - first for first, last in zip(begin, end, strict=True)]
