"""The mixture: an endless, exact sequence of sources with random access, from which the pipeline draws.

The n-th draw is a function of the weights and n alone. After n draws, the number of draws of source i differs from n·wᵢ
by less than the number of sources, for any weights and any n. (Sources are split off one after the other: of the draws
that the sources before it did not take, a source takes every draw at which its rounded-down share of them grows.)
"""

import sys
from collections.abc import Sequence
from fractions import Fraction
from math import lcm

from grain.transforms import DatasetSelectionMap

from xlam_jax.config import Data, Source
from xlam_jax.data.examples import Loaded, trained
from xlam_jax.errors import UserError


class Mixture(DatasetSelectionMap):
    """Maps draw n after the first `start` draws to (index of a source, number of its draws since `start`)."""

    def __init__(self, weights: Sequence[Fraction], start: int = 0):
        if not weights or min(weights) <= 0:
            raise ValueError(f"weights are {list(map(float, weights))}; every source needs a positive one")
        scale = lcm(*(weight.denominator for weight in weights))
        self._weights = [int(weight * scale) for weight in weights]
        self._start = start
        self._before = self.counts(start)

    def __len__(self) -> int:
        return sys.maxsize - self._start

    def __getitem__(self, index: int) -> tuple[int, int]:
        draw, next_draw = self._start + index, self._start + index + 1
        rest = sum(self._weights)
        for source, weight in enumerate(self._weights):
            left, next_left = draw * (rest - weight) // rest, next_draw * (rest - weight) // rest
            if left == next_left:
                return source, draw - left - self._before[source]
            rest, draw, next_draw = rest - weight, left, next_left
        raise AssertionError("the last source takes every remaining draw")

    def counts_from_start(self, draws: int) -> list[int]:
        """Returns how often each source is among the first `draws` draws of this mixture."""
        counts = self.counts(self._start + draws)
        return [count - before for count, before in zip(counts, self._before, strict=True)]

    def counts(self, draws: int) -> list[int]:
        """Returns how often each source is among the first `draws` draws of the mixture with `start` 0."""
        rest, counts = sum(self._weights), []
        for weight in self._weights:
            left = draws * (rest - weight) // rest
            counts.append(draws - left)
            rest, draws = rest - weight, left
        return counts


def shares(loaded: Sequence[Loaded], data: Data) -> list[Fraction]:
    """Returns each source's share of the trajectories drawn; the shares add up to 1.

    Raises `UserError` when weights are shares of tokens (`data.share`) and a source has no trained tokens.
    """
    trained_tokens = [int(trained(source.train).sum()) for source in loaded] if data.share == "tokens" else None
    sizes = [len(source.train) for source in loaded]
    return shares_of_sizes([source.source for source in loaded], sizes, trained_tokens)


def shares_of_sizes(
    sources: Sequence[Source], sizes: Sequence[int], trained_tokens: Sequence[int] | None = None
) -> list[Fraction]:
    """Returns the shares of `shares` from `sizes`, the number of trajectories of each source.

    `trained_tokens` has the number of trained tokens of each source, if weights are shares of tokens.
    """
    weights = [_weight(source, size) for source, size in zip(sources, sizes, strict=True)]
    for at, tokens in enumerate(trained_tokens or ()):
        if not tokens:
            raise UserError(f"data.share is tokens, and source {sources[at].name} has no trained tokens; drop it")
        weights[at] *= Fraction(sizes[at], tokens)
    total = sum(weights)
    return [weight / total for weight in weights]


def _weight(source: Source, size: int) -> Fraction:
    if source.epochs is not None:
        return Fraction(source.size or size) * Fraction(source.epochs)
    return Fraction(1 if source.weight is None else source.weight)


def stream_mixture(weights: Sequence[Fraction], stream: int, streams: int) -> Mixture:
    """Returns the mixture of a stream. Streams start at different draws, so that not all draw a rare source at once."""
    period = sum(weights) / min(weights)
    return Mixture(weights, start=int(period * stream / streams))
