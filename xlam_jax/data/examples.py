"""Rendered trajectories as training reads them: lazily indexed sequences of examples, and the counts of each source."""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple, NotRequired, TypedDict, overload

import numpy as np

from xlam_jax.config import PAIRS, Source
from xlam_jax.data.pair import Pair
from xlam_jax.data.render import Rendered
from xlam_jax.data.trajectory import Trajectory
from xlam_jax.enums import SPAN_KINDS


class Example(TypedDict):
    """A rendered trajectory of n + 1 tokens, ready to pack: n inputs and the n labels that follow them.

    A pair has the positions of its chosen side and then those of its rejected side.
    """

    tokens: np.ndarray
    """int32 [n]"""
    labels: np.ndarray
    """int32 [n]"""
    weights: np.ndarray
    """Loss weight of each label, float32 [n]."""
    kinds: np.ndarray
    """Kind of each label's span, an index into `enums.SPAN_KINDS`, int8 [n]."""
    turns: NotRequired[np.ndarray]
    """Turn of each label, int32 [n]; only in annotated examples."""
    sides: NotRequired[np.ndarray]
    """Of a pair: 1 for the chosen side and 2 for the rejected one, int8 [n]."""
    reference: NotRequired[np.ndarray]
    """Of a pair: log p of a side under the reference policy, float32 [n], at the side's first trained position."""
    origin: NotRequired[np.ndarray]
    """int32 [2]: the index of its source, and its own in the source's `train` or `heldout`."""


class Columns(NamedTuple):
    """A rendered sequence of N tokens."""

    ids: np.ndarray
    """int32 [N]"""
    weights: np.ndarray
    """float32 [N]"""
    kinds: np.ndarray
    """int8 [N]"""
    turns: np.ndarray | None
    """int32 [N]; only where examples are annotated."""


class Loaded(NamedTuple):
    """One source, read and rendered."""

    source: Source
    train: Sequence[Example]
    heldout: Sequence[Example]
    ids: Sequence[str]
    """Parallel to `train`: the ids of trajectories or pairs."""
    samples: list[Trajectory]
    """A fixed number of held-out trajectories, the same ones in any order of the rows; of pairs the chosen side."""
    trajectories: list[Trajectory] | list[Pair] | None
    """Parallel to `train`, where augmentation or annotation needs them."""
    dropped: Counter[str]
    """Reason → number of trajectories that were dropped."""
    repaired: Counter[str]
    """Reason → number of repairs."""
    changed: Counter[str]
    """Reason → number of trajectories that did not fit and were cut or split, or that a server would parse
    differently."""
    digests: dict[str, str] | None = None
    """Of `train` and `heldout`, where they are known without reading every example: see `identity`."""
    dataset: dict[str, Any] | None = None
    """Of a dataset on a hub: its `revision` (the commit; None where unknown) and the number of `rows` read."""


class LazyExamples(Sequence[Example], ABC):
    """A sequence whose examples are made when they are indexed. A slice is a list."""

    @abstractmethod
    def example(self, index: int) -> Example:
        """Returns the example at `index`, 0 ≤ index < len(self)."""

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        places = range(len(self))[index]
        return [self.example(place) for place in places] if isinstance(places, range) else self.example(places)


class Examples(LazyExamples):
    """Examples in one flat array per column, 9 bytes per token. The arrays of an example are read-only views."""

    def __init__(self, annotate: bool = False):
        self._flat = [(bytearray(), kind) for kind in (np.int32, np.float32, np.int8, *([np.int32] * annotate))]
        self._ends = [0]

    def append(self, sequence: Columns) -> None:
        """Adds a sequence of N tokens, which has N - 1 positions."""
        for (flat, kind), values in zip(self._flat, sequence, strict=False):
            flat += np.asarray(values, kind).tobytes()
        self._ends.append(self._ends[-1] + len(sequence.ids))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def example(self, index: int) -> Example:
        start, count = self._ends[index], self._ends[index + 1] - self._ends[index]
        views = [np.frombuffer(flat, kind, count, start * np.dtype(kind).itemsize) for flat, kind in self._flat]
        for view in views:
            view.flags.writeable = False
        ids, weights, kinds, *turns = views
        return make_example(Columns(ids, weights, kinds, turns[0] if turns else None))

    @property
    def lengths(self) -> np.ndarray:
        """Positions of each example, int64 [len]."""
        return np.diff(self._ends) - 1

    @property
    def trained(self) -> np.ndarray:
        """Trained tokens of each example, int64 [len]."""
        is_trained = np.frombuffer(self._flat[1][0], np.float32) > 0
        starts = np.array(self._ends[:-1], np.int64)
        if not len(starts):
            return starts
        # the first token of an example is not a label
        return np.add.reduceat(is_trained, starts, dtype=np.int64) - is_trained[starts]


class Pairs(LazyExamples):
    """Pairs, stored as the examples of their two sides."""

    def __init__(self, annotate: bool = False):
        self._chosen, self._rejected = Examples(annotate), Examples(annotate)

    def append(self, chosen: Columns, rejected: Columns) -> None:
        """Adds a pair."""
        self._chosen.append(chosen)
        self._rejected.append(rejected)

    def __len__(self) -> int:
        return len(self._chosen)

    def example(self, index: int) -> Example:
        return join_sides(self._chosen[index], self._rejected[index])

    @property
    def lengths(self) -> np.ndarray:
        """Positions of each pair, int64 [len]."""
        return self._chosen.lengths + self._rejected.lengths

    @property
    def trained(self) -> np.ndarray:
        """Trained tokens of each pair, int64 [len]."""
        return self._chosen.trained + self._rejected.trained


class Referenced(LazyExamples):
    """Pairs with log p of their sides under the reference policy, float32 [pairs, 2]. Raises `ValueError` otherwise."""

    def __init__(self, pairs: Sequence[Example], log_p_P2: np.ndarray):
        if log_p_P2.shape != (len(pairs), 2):
            raise ValueError(f"{len(pairs)} pairs have a reference of shape {log_p_P2.shape}")
        self._pairs, self._log_p_P2 = pairs, log_p_P2
        self.lengths, self.trained = lengths(pairs), trained(pairs)

    def __len__(self) -> int:
        return len(self._pairs)

    def example(self, index: int) -> Example:
        pair = self._pairs[index]
        sides = pair.get("sides", np.zeros(0, np.int8))
        reference = np.zeros(len(pair["tokens"]), np.float32)
        for side in (1, 2):
            reference[np.argmax((sides == side) & (pair["weights"] != 0))] = self._log_p_P2[index, side - 1]
        return pair | {"reference": reference}  # pyright: ignore[reportReturnType]


def make_columns(rendered: Rendered, annotate: bool = False) -> Columns:
    """Returns the part of a rendered sequence that training needs; with `annotate`, also the turn of each token."""
    counts = [span.end - span.start for span in rendered.spans]
    kinds = np.repeat(np.array([SPAN_KINDS.index(span.kind) for span in rendered.spans], np.int8), counts)
    turns = np.repeat(np.array([span.turn for span in rendered.spans], np.int32), counts) if annotate else None
    return Columns(np.asarray(rendered.input_ids, np.int32), np.asarray(rendered.weights, np.float32), kinds, turns)


def make_example(sequence: Columns) -> Example:
    """Returns a sequence of N tokens as N - 1 inputs and labels. The arrays are views."""
    example = Example(
        tokens=sequence.ids[:-1], labels=sequence.ids[1:], weights=sequence.weights[1:], kinds=sequence.kinds[1:]
    )
    if sequence.turns is not None:
        example["turns"] = sequence.turns[1:]
    return example


def join_sides(chosen: Example, rejected: Example) -> Example:
    """Returns the two sides of a pair as one example."""
    counts = len(chosen["tokens"]), len(rejected["tokens"])
    joined = {name: np.concatenate([chosen[name], rejected[name]]) for name in chosen}
    return Example(**joined, sides=np.repeat(np.array([1, 2], np.int8), counts))  # pyright: ignore[reportArgumentType]


def lengths(examples: Sequence[Example]) -> np.ndarray:
    """Positions of each example, int64 [len]. Sequences with `lengths` know them without reading an example."""
    stored = getattr(examples, "lengths", None)
    return np.array([len(example["tokens"]) for example in examples], np.int64) if stored is None else stored


def trained(examples: Sequence[Example]) -> np.ndarray:
    """Trained tokens of each example, int64 [len]. Sequences with `trained` know them without reading an example."""
    stored = getattr(examples, "trained", None)
    return np.array([(example["weights"] > 0).sum() for example in examples], np.int64) if stored is None else stored


def summary(loaded: Loaded) -> str:
    """Describes a source in one line: examples, tokens, and what was dropped, repaired and changed."""
    noun = "pairs" if loaded.source.format == PAIRS else "trajectories"
    line = (
        f"{loaded.source.name}: {len(loaded.train)} {noun} to train on ({lengths(loaded.train).sum():,} tokens), "
        f"{len(loaded.heldout)} held out, dropped: {counts_text(loaded.dropped)}"
    )
    if loaded.repaired:
        line += f"; repaired: {counts_text(loaded.repaired)}"
    if loaded.changed:
        line += f"; changed: {counts_text(loaded.changed)}"
    return line


def counts_text(counter: Counter[str]) -> str:
    """Describes counts by reason, "3 too-long, 1 no-loss", or "none"."""
    return ", ".join(f"{count} {reason}" for reason, count in sorted(counter.items())) or "none"
