"""The mixture: exact shares after any prefix, every row once per epoch, streams that never meet."""

from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xlam_jax.data.mixture import Mixture, stream_mixture

WEIGHTS = st.lists(st.floats(1e-3, 1e3), min_size=2, max_size=20)
EXACT = settings(deadline=None, derandomize=True, max_examples=60)


def fractions(weights: list[float]) -> list[Fraction]:
    return [Fraction(weight) for weight in weights]


@EXACT
@given(WEIGHTS, st.integers(1, 600))
def test_shares_are_within_one_block_after_any_prefix(weights: list[float], draws: int):
    """A block has as many draws as there are sources."""
    mixture = Mixture(fractions(weights))
    total = sum(fractions(weights))
    drawn: Counter[int] = Counter()
    for draw in range(draws):
        source, before = mixture[draw]
        assert before == drawn[source]  # each source yields its trajectories in order, without gaps
        drawn[source] += 1
        for i, weight in enumerate(fractions(weights)):
            assert abs(drawn[i] - (draw + 1) * weight / total) < len(weights)


@EXACT
@given(WEIGHTS, st.integers(0, 10**15))
def test_shares_never_drift(weights: list[float], draws: int):
    """The same after more draws than any run makes: no error accumulates."""
    exact = fractions(weights)
    counts = Mixture(exact).counts(draws)
    assert sum(counts) == draws
    for count, weight in zip(counts, exact, strict=True):
        assert abs(count - draws * weight / sum(exact)) < len(weights)
    source, before = Mixture(exact)[draws]
    assert before == counts[source]


@EXACT
@given(WEIGHTS, st.integers(1, 16), st.data())
def test_a_stream_starts_anywhere_and_is_exact_from_there(weights: list[float], streams: int, data: st.DataObject):
    stream = data.draw(st.integers(0, streams - 1))
    mixture = stream_mixture(fractions(weights), stream, streams)
    total, drawn = sum(fractions(weights)), Counter[int]()
    for draw in range(200):
        source, before = mixture[draw]
        assert before == drawn[source]
        drawn[source] += 1
    for i, weight in enumerate(fractions(weights)):
        assert abs(drawn[i] - 200 * weight / total) < 2 * len(weights)


def test_a_rare_source_is_not_drawn_by_all_streams_at_once():
    weights = [Fraction(99), Fraction(1)]
    firsts = [
        next(draw for draw in range(200) if stream_mixture(weights, stream, 10)[draw][0] == 1) for stream in range(10)
    ]
    assert len(set(firsts)) == 10


def test_weights_are_positive():
    with pytest.raises(ValueError, match="positive"):
        Mixture([Fraction(1), Fraction(0)])
    with pytest.raises(ValueError, match="positive"):
        Mixture([])
