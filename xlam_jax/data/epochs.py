"""How many optimizer steps the epochs of a run are."""

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from xlam_jax.config import Augment, Config, Data, Resolved, with_steps
from xlam_jax.data import pipeline
from xlam_jax.data.examples import Example, LazyExamples, Loaded, lengths, trained

ROWS, EXAMPLES = 1024, 20_000
"""Rows that are packed to measure how many examples a row holds; fewer once they hold so many examples."""


class Lengths(LazyExamples):
    """Examples of which only the lengths matter: their tokens are zeros, and nothing is read."""

    def __init__(self, examples: Sequence[Example]):
        self.lengths, self.trained = lengths(examples), trained(examples)

    def __len__(self) -> int:
        return len(self.lengths)

    def example(self, index: int) -> Example:
        """An example with its number of tokens only."""
        example: Any = {"tokens": np.zeros(self.lengths[index], np.int32)}
        return example


def resolve_epochs(resolved: Resolved, loaded: list[Loaded], report: Callable[[str], None]) -> Resolved:
    """Returns the run with `train.steps` set, where the config gives `train.epochs`, and reports how many those are."""
    config = resolved.config
    if config.train.epochs is None:
        return resolved
    draws, per_row = draws_of_epoch(loaded), examples_per_row(loaded, config)
    rows = Fraction(config.train.epochs) * draws / per_row
    steps = max(1, math.ceil(rows / config.train.batch_size))
    report(
        f"train.epochs {config.train.epochs:g}: {steps:,} steps ({float(draws):,.0f} examples an epoch, "
        f"{float(per_row):.2f} per row, {config.train.batch_size} rows per step)"
    )
    return with_steps(resolved, steps)


def draws_of_epoch(loaded: Sequence[Loaded]) -> Fraction:
    """Returns how many examples an epoch draws from all sources together: as many as they contain, or the sum of
    `size` × `epochs` where the sources have epochs of their own, so that each passes that often."""
    return sum(
        (
            Fraction(len(one.train))
            if one.source.epochs is None
            else Fraction(one.source.size or len(one.train)) * Fraction(one.source.epochs)
            for one in loaded
        ),
        Fraction(0),
    )


def examples_per_row(loaded: Sequence[Loaded], config: Config) -> Fraction:
    """Returns the mean number of examples in a packed row, measured on the first rows that training would see.

    Rows are packed from the examples' lengths with the run's own mixture and seed; augmentation is not applied.
    """
    data: Data = config.data.model_copy(update={"augment": Augment()})
    lengths = [one._replace(train=Lengths(one.train)) for one in loaded]
    rows = examples = 0
    for row in pipeline.packed_rows(lengths, data, batch_size=config.train.batch_size, seed=config.seed):
        rows, examples = rows + 1, examples + int(row["tokens_segment_ids"].max())
        if rows == ROWS or examples >= EXAMPLES:
            break
    return Fraction(examples, rows)
