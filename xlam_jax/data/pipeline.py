"""The input pipeline, from loaded trajectories to packed batches: deal → mix → pack → batch.

Batch t depends on the seed and t alone. Each source is one endless sequence, shuffled anew every epoch. It is dealt to
a fixed number of S streams: stream s takes every S-th trajectory from the s-th on, so that no two streams see the same
trajectory in an epoch. Each stream mixes and packs separately, and contributes the same number of rows to every batch.
A host reads the streams with the rows that its devices need, so that batches do not depend on the number of hosts.
"""

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from itertools import accumulate, islice
from typing import Any, Literal, NamedTuple

import grain
import numpy as np
from grain.experimental import BestFitPackIterDataset

from xlam_jax.config import Data
from xlam_jax.data.augment import augmented
from xlam_jax.data.examples import Example, LazyExamples, Loaded, make_columns, make_example
from xlam_jax.data.mixture import shares, stream_mixture
from xlam_jax.digest import random_integer
from xlam_jax.enums import SPAN_KINDS


class Row(NamedTuple):
    """A packed sequence ("row") of T positions, or a batch of B rows: all fields are [T] or [B, T].

    Integers are int32, `weights` and `reference` float32.
    """

    tokens: np.ndarray
    labels: np.ndarray
    weights: np.ndarray
    positions: np.ndarray
    segments: np.ndarray
    """Segment ids: the number of the example in the row, from 1; 0 is padding. The chosen and the rejected side of a
    row's p-th pair are segments 2p − 1 and 2p."""
    groups: np.ndarray
    """Group of each label, by which the loss is reported: source × len(SPAN_KINDS) + kind."""
    reference: np.ndarray | None = None
    """Pairs only: log p under the reference policy, see `examples.Example`."""


Origin = tuple[int, int]
"""The index of a source, and of an example in its `train` (or `heldout`)."""


class _Numbered(LazyExamples):
    """The examples of several sources with their origins, one source after the other."""

    def __init__(self, parts: Sequence[tuple[int, Sequence[Example]]]):
        self._parts = parts
        self._starts = [0, *accumulate(len(examples) for _, examples in parts)]

    def __len__(self) -> int:
        return self._starts[-1]

    def example(self, index: int) -> Example:
        part = bisect_right(self._starts, index) - 1
        source, examples = self._parts[part]
        row = index - self._starts[part]
        return _with_origin(examples[row], source, row)


def _with_origin(example: Example, source: int, row: int) -> Example:
    return example | {"origin": np.array([source, row], np.int32)}  # pyright: ignore[reportReturnType]


def _derived(seed: int, *names: object) -> int:
    return random_integer(repr((seed, *names)), size=4)


def _packed(examples: grain.IterDataset, keys: Sequence[str], data: Data, seed: int, shuffle: bool) -> Any:
    return BestFitPackIterDataset(
        examples,
        length_struct={key: data.sequence_length for key in keys},
        meta_features=[key for key in keys if key != "tokens"],  # same segment ids and positions as the tokens
        max_sequences_per_bin=data.max_pairs if data.pairs else None,
        num_packing_bins=data.packing_bins,
        seed=seed,
        shuffle_bins=shuffle,
    )


def _row(packed: dict[str, np.ndarray]) -> Row:
    segments = packed["tokens_segment_ids"].astype(np.int32)
    sources = np.concatenate([[0], packed["origin"][::2]])[segments]  # `origin` has (source, row) of each example
    groups = np.where(segments > 0, sources * len(SPAN_KINDS) + packed["kinds"], 0).astype(np.int32)
    positions = packed["tokens_positions"].astype(np.int32)
    if "sides" in packed:
        segments = np.where(segments > 0, 2 * segments - 2 + packed["sides"], 0).astype(np.int32)
        places = np.arange(len(segments), dtype=np.int32)
        starts = np.where(np.diff(segments, prepend=0) != 0, places, 0)
        positions = np.where(segments > 0, places - np.maximum.accumulate(starts), 0).astype(np.int32)
    columns = (packed["tokens"], packed["labels"], packed["weights"], positions, segments, groups)
    return Row(*columns, reference=packed.get("reference"))


def origins(packed: dict[str, np.ndarray]) -> list[Origin]:
    """Returns the origins of the examples of a packed row, in order."""
    count = int(packed["tokens_segment_ids"].max())
    return [(int(source), int(row)) for source, row in packed["origin"][: 2 * count].reshape(-1, 2)]


def stack(rows: Sequence[Row]) -> Row:
    """Stacks B rows of [T] to a batch of [B, T]."""
    columns = zip(*rows, strict=True)
    return Row(*(None if column[0] is None else np.stack(column) for column in columns))  # pyright: ignore


class Loader:
    """Yields endless batches, or the `rows` of each batch that one host needs.

    Save `state()` with a checkpoint, and `restore` it to resume. The state has the position of each stream, so a run
    may resume with another number of hosts: give every host the states of all hosts. Augmentation renders with
    `tokenizer`.
    """

    def __init__(
        self,
        loaded: list[Loaded],
        data: Data,
        *,
        batch_size: int,
        seed: int,
        tokenizer: Any = None,
        rows: Sequence[int] | None = None,
    ):
        of_stream = batch_size // data.streams
        self._host_rows = [divmod(row, of_stream) for row in (range(batch_size) if rows is None else rows)]
        self._rows = of_stream
        weights = shares(loaded, data)
        sequences = [_endless(at, source, data, seed, tokenizer) for at, source in enumerate(loaded)]
        keys = (*loaded[0].train[0], "origin")
        self._streams: dict[str, Any] = {}
        self._last: list[dict[str, np.ndarray]] = []
        for stream in sorted({stream for stream, _ in self._host_rows}):
            mixed = grain.MapDataset.select_from_datasets(
                [sequence.slice(slice(stream, None, data.streams)) for sequence in sequences],
                stream_mixture(weights, stream, data.streams),
            )
            in_order = mixed.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
            packed = _packed(in_order, keys, data, _derived(seed, "stream", stream), shuffle=True)
            self._streams[str(stream)] = iter(packed)

    def __next__(self) -> Row:
        """Returns this host's rows of the next batch, in the order of the streams."""
        return stack([_row(packed) for packed in self.packed()])

    def packed(self) -> list[dict[str, np.ndarray]]:
        """Returns the rows of the next batch as Grain packs them.

        They have every key of the examples, `tokens_segment_ids`, `tokens_positions`, and `origin`, two numbers per
        example.
        """
        drawn = {name: [next(stream) for _ in range(self._rows)] for name, stream in self._streams.items()}
        self._last = [drawn[str(stream)][at] for stream, at in self._host_rows]
        return self._last

    def origins(self) -> list[Origin]:
        """Returns the origins of all examples in this host's rows of the last batch."""
        return [origin for packed in self._last for origin in origins(packed)]

    def state(self) -> dict[str, Any]:
        """Returns the position of each stream of this host, as JSON values."""
        return {name: stream.get_state() for name, stream in self._streams.items()}

    def restore(self, state: dict[str, Any]) -> None:
        """Moves every stream of this host to a saved position; the time does not depend on the position.

        `state`: the merged `state()` of all hosts. Raises `KeyError` if a stream is missing."""
        for name, stream in self._streams.items():
            stream.set_state(state[name])


def draws(state: Mapping[str, Any], weights: Sequence[Fraction], streams: int) -> list[int]:
    """Returns how often all streams have drawn each source, up to the rows being packed at a saved position.

    `weights` are the shares of the sources. A source of n examples that was drawn d times is in epoch d // n.
    """
    counts = [
        stream_mixture(weights, int(stream), streams).counts_from_start(place["parent"]["next_index"])
        for stream, place in state.items()
    ]
    return [sum(of_source) for of_source in zip(*counts, strict=True)]


def packed_again(state: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the position at which every stream packs its current `packing_bins` rows again, from the first.

    For data that changed: it is unknown which of the newly packed rows were yielded before, and skipping the same
    number of rows would lose examples. So examples of these rows may occur twice, but none is skipped.
    """
    return {
        stream: place | {"next_row": 0, "counter": place["counter"] - place["next_row"]}
        for stream, place in state.items()
    }


def _endless(at: int, loaded: Loaded, data: Data, seed: int, tokenizer: Any) -> Any:
    """The examples of source `at`, endlessly, each once per epoch; augmentation makes new variants in every epoch."""
    source_seed = _derived(seed, loaded.source.name)
    if not data.augment.active:
        return grain.MapDataset.source(_Numbered([(at, loaded.train)])).seed(source_seed).shuffle().repeat()
    trajectories: Any = loaded.trajectories
    if trajectories is None:
        raise ValueError("augmentation needs the trajectories, which are not loaded")
    annotate = "turns" in loaded.train[0]

    def draw(row: int, rng: np.random.Generator) -> Example:
        return _with_origin(
            make_example(make_columns(augmented(trajectories[row], rng, tokenizer, data), annotate)), at, row
        )

    return grain.MapDataset.range(len(trajectories)).seed(source_seed).shuffle().repeat().random_map(draw)


def packed_rows(
    loaded: list[Loaded], data: Data, *, batch_size: int, seed: int, tokenizer: Any = None
) -> Iterator[dict[str, np.ndarray]]:
    """Yields every packed row in the order of training, endlessly; see `Loader.packed`."""
    loader = Loader(loaded, data, batch_size=batch_size, seed=seed, tokenizer=tokenizer)
    while True:
        yield from loader.packed()


def heldout_batches(
    loaded: list[Loaded], data: Data, *, rows: int, limit: int | None, host_rows: Sequence[int] | None = None
) -> Iterator[Row]:
    """Yields at most `limit` batches of `rows` rows from one pass over the held-out part, in the order of the files.

    The last batch is filled up with padding. A host gets its `host_rows`, indices into each batch (default: all rows).
    """
    batches = ordered(loaded, "heldout", data, rows=rows)
    yield from (stack([batch[row] for row in host_rows or range(rows)]) for batch, _ in islice(batches, limit))


def ordered(
    loaded: list[Loaded], part: Literal["train", "heldout"], data: Data, *, rows: int
) -> Iterator[tuple[list[Row], list[list[Origin]]]]:
    """Yields (batch of `rows` rows, origins of the examples in each row) from one pass over a part of the data.

    Rows are packed in the order of the files; the last batch is filled up with padding.
    """
    examples = _Numbered([(at, getattr(source, part)) for at, source in enumerate(loaded)])
    if not len(examples):
        return
    keys = tuple(examples[0])
    in_order = grain.MapDataset.source(examples).to_iter_dataset(
        grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    )
    packed = iter(_packed(in_order, keys, data, seed=0, shuffle=False))
    while batch := list(islice(packed, rows)):
        filled, contents = [_row(row) for row in batch], [origins(row) for row in batch]
        blank = Row(*(None if field is None else np.zeros_like(field) for field in filled[0]))  # pyright: ignore
        missing = rows - len(batch)
        yield filled + [blank] * missing, contents + [[] for _ in range(missing)]
