"""Converts the number of epochs of a run to optimizer steps."""

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from xlam_jax.config import Augment, Config, Data, Resolved, with_steps
from xlam_jax.data import pipeline
from xlam_jax.data.examples import Example, LazyExamples, Loaded, lengths, trained

ROWS, EXAMPLES = 1024, 20_000
"""Number of rows that are packed to measure the examples per row; fewer once they have this number of examples."""


class Lengths(LazyExamples):
    """Placeholders for examples: they have the same lengths, but all tokens are 0, and nothing is read from disk."""

    def __init__(self, examples: Sequence[Example]):
        self.lengths, self.trained = lengths(examples), trained(examples)

    def __len__(self) -> int:
        return len(self.lengths)

    def example(self, index: int) -> Example:
        """Returns an example with the right number of tokens, all 0: int32 [N]."""
        example: Any = {"tokens": np.zeros(self.lengths[index], np.int32)}
        return example


def resolve_epochs(resolved: Resolved, loaded: list[Loaded], report: Callable[[str], None]) -> Resolved:
    """Returns the run with `train.steps` computed from `train.epochs`, if the config has it, and reports the number."""
    config = resolved.config
    if config.train.epochs is None:
        return resolved
    draws, per_row = draws_of_epoch(loaded), examples_per_row(loaded, config)
    rows = Fraction(config.train.epochs) * draws / per_row
    steps = max(1, math.ceil(rows / config.train.batch_size))
    report(
        f"train.epochs {config.train.epochs:g}: {steps:,} steps ({float(draws):,.0f} examples per epoch, "
        f"{float(per_row):.2f} per row, {config.train.batch_size} rows per step)"
    )
    return with_steps(resolved, steps)


def draws_of_epoch(loaded: Sequence[Loaded]) -> Fraction:
    """Returns the number of examples that an epoch draws from all sources.

    It is the number of their examples, or the sum of `size` × `epochs` where the sources have separate `epochs`, so
    that each source is passed that often.
    """
    return sum(
        (
            Fraction(len(source.train))
            if source.source.epochs is None
            else Fraction(source.source.size or len(source.train)) * Fraction(source.source.epochs)
            for source in loaded
        ),
        Fraction(0),
    )


def examples_per_row(loaded: Sequence[Loaded], config: Config) -> Fraction:
    """Returns the mean number of examples in a packed row, measured on the first rows of training.

    Rows are packed from the examples' lengths with the mixture and the seed of the run, without augmentation.
    """
    data: Data = config.data.model_copy(update={"augment": Augment()})
    lengths = [source._replace(train=Lengths(source.train)) for source in loaded]
    rows = examples = 0
    for row in pipeline.packed_rows(lengths, data, batch_size=config.train.batch_size, seed=config.seed):
        rows, examples = rows + 1, examples + int(row["tokens_segment_ids"].max())
        if rows == ROWS or examples >= EXAMPLES:
            break
    return Fraction(examples, rows)
