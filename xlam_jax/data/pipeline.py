"""From loaded trajectories to packed batches: deal → mix → pack → batch.

Batch t depends on the seed and t alone. Each source is one endless sequence, shuffled anew every epoch; it is dealt to
a fixed number of streams, stream s taking every S-th trajectory from the s-th on, so that no two streams see the same
trajectory in an epoch. Each stream mixes and packs on its own, and gives the same number of rows to every batch. A host
reads the streams that give the rows its devices need, so that the number of hosts changes nothing.
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
from xlam_jax.enums import SPAN_KINDS as KINDS


class Row(NamedTuple):
    """A packed row or a batch of them: [T] or [B, T]."""

    tokens: np.ndarray
    labels: np.ndarray
    weights: np.ndarray
    positions: np.ndarray
    segments: np.ndarray
    """0 is padding. Of pairs 2p − 1 and 2p are the chosen and the rejected side of the row's p-th."""
    groups: np.ndarray
    """Of each label, source × len(KINDS) + kind."""
    reference: np.ndarray | None = None
    """Of pairs, log p under the reference policy: see `examples.Example`."""


Origin = tuple[int, int]
"""The index of a source, and of an example in its `train` (or `heldout`)."""


class _Numbered(LazyExamples):
    """The examples of several sources, one source after the other, with their origins."""

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
        meta_features=[key for key in keys if key != "tokens"],  # which lie like the tokens, and say nothing more
        max_sequences_per_bin=data.max_pairs if data.pairs else None,
        num_packing_bins=data.packing_bins,
        seed=seed,
        shuffle_bins=shuffle,
    )


def _row(packed: dict[str, np.ndarray]) -> Row:
    segments = packed["tokens_segment_ids"].astype(np.int32)
    sources = np.concatenate([[0], packed["origin"][::2]])[segments]  # an example has two numbers there, and 2 places
    groups = np.where(segments > 0, sources * len(KINDS) + packed["kinds"], 0).astype(np.int32)
    positions = packed["tokens_positions"].astype(np.int32)
    if "sides" in packed:
        segments = np.where(segments > 0, 2 * segments - 2 + packed["sides"], 0).astype(np.int32)
        places = np.arange(len(segments), dtype=np.int32)
        starts = np.where(np.diff(segments, prepend=0) != 0, places, 0)
        positions = np.where(segments > 0, places - np.maximum.accumulate(starts), 0).astype(np.int32)
    columns = (packed["tokens"], packed["labels"], packed["weights"], positions, segments, groups)
    return Row(*columns, reference=packed.get("reference"))


def origins(packed: dict[str, np.ndarray]) -> list[Origin]:
    """The examples of a packed row, in order."""
    count = int(packed["tokens_segment_ids"].max())
    return [(int(source), int(row)) for source, row in packed["origin"][: 2 * count].reshape(-1, 2)]


def stack(rows: Sequence[Row]) -> Row:
    """Rows as a batch."""
    columns = zip(*rows, strict=True)
    return Row(*(None if column[0] is None else np.stack(column) for column in columns))  # pyright: ignore


class Loader:
    """Endless batches, or of each batch the `rows` that one host needs.

    `state()` is what to save beside a checkpoint, `restore` what undoes a crash. The state names each stream's place,
    so a run may go on with another number of hosts: give every host all states. Augmentation renders with `tokenizer`.
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
        self._mine = [divmod(row, of_stream) for row in (range(batch_size) if rows is None else rows)]
        self._rows = of_stream
        weights = shares(loaded, data)
        sequences = [_endless(at, one, data, seed, tokenizer) for at, one in enumerate(loaded)]
        keys = (*loaded[0].train[0], "origin")
        self._streams: dict[str, Any] = {}
        self._last: list[dict[str, np.ndarray]] = []
        for stream in sorted({stream for stream, _ in self._mine}):
            mixed = grain.MapDataset.select_from_datasets(
                [sequence.slice(slice(stream, None, data.streams)) for sequence in sequences],
                stream_mixture(weights, stream, data.streams),
            )
            in_order = mixed.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
            packed = _packed(in_order, keys, data, _derived(seed, "stream", stream), shuffle=True)
            self._streams[str(stream)] = iter(packed)

    def __next__(self) -> Row:
        """The next batch's rows of this host, in the order of the streams."""
        return stack([_row(packed) for packed in self.packed()])

    def packed(self) -> list[dict[str, np.ndarray]]:
        """The same rows as Grain packs them: every key of the examples, with `tokens_segment_ids` and
        `tokens_positions`; and `origin`, two numbers an example."""
        drawn = {name: [next(stream) for _ in range(self._rows)] for name, stream in self._streams.items()}
        self._last = [drawn[str(stream)][at] for stream, at in self._mine]
        return self._last

    def origins(self) -> list[Origin]:
        """The examples of the last batch of this host."""
        return [origin for packed in self._last for origin in origins(packed)]

    def state(self) -> dict[str, Any]:
        """The place of each stream of this host, JSON."""
        return {name: stream.get_state() for name, stream in self._streams.items()}

    def restore(self, state: dict[str, Any]) -> None:
        """Goes to a saved place. Takes as long at any place."""
        for name, stream in self._streams.items():
            stream.set_state(state[name])


def draws(state: Mapping[str, Any], weights: Sequence[Fraction], streams: int) -> list[int]:
    """How often each source was drawn before the rows that are packed at a saved place, over all streams.

    `weights` are the sources' shares. A source of n examples whose draws are d so far is in epoch d // n.
    """
    counts = [
        stream_mixture(weights, int(stream), streams).counts_from_start(place["parent"]["next_index"])
        for stream, place in state.items()
    ]
    return [sum(of_source) for of_source in zip(*counts, strict=True)]


def packed_again(state: Mapping[str, Any]) -> dict[str, Any]:
    """The place at which every stream packs its current `packing_bins` rows again, from the first.

    For data that changed: which of the rows packed anew were given out before cannot be known, and skipping as many as
    were would lose examples. So examples of these rows may come twice, and none is left out.
    """
    return {
        stream: place | {"next_row": 0, "counter": place["counter"] - place["next_row"]}
        for stream, place in state.items()
    }


def _endless(at: int, one: Loaded, data: Data, seed: int, tokenizer: Any) -> Any:
    """A source's examples for ever, each once an epoch; with augmentation, another variant in every epoch."""
    seeded = _derived(seed, one.source.name)
    if not data.augment.active:
        return grain.MapDataset.source(_Numbered([(at, one.train)])).seed(seeded).shuffle().repeat()
    trajectories: Any = one.trajectories
    if trajectories is None:
        raise ValueError("augmentation draws from the trajectories, and they are not loaded")
    annotate = "turns" in one.train[0]

    def draw(row: int, rng: np.random.Generator) -> Example:
        return _with_origin(
            make_example(make_columns(augmented(trajectories[row], rng, tokenizer, data), annotate)), at, row
        )

    return grain.MapDataset.range(len(trajectories)).seed(seeded).shuffle().repeat().random_map(draw)


def packed_rows(
    loaded: list[Loaded], data: Data, *, batch_size: int, seed: int, tokenizer: Any = None
) -> Iterator[dict[str, np.ndarray]]:
    """Every packed row in the order in which training sees them, endless; see `Loader.packed`."""
    loader = Loader(loaded, data, batch_size=batch_size, seed=seed, tokenizer=tokenizer)
    while True:
        yield from loader.packed()


def heldout_batches(
    loaded: list[Loaded], data: Data, *, rows: int, limit: int | None, mine: Sequence[int] | None = None
) -> Iterator[Row]:
    """The held-out part, packed in file order, once; the last batch is filled up with padding.

    A host gets those that are `mine` of each batch's `rows`; default: all.
    """
    batches = ordered(loaded, "heldout", data, rows=rows)
    yield from (stack([batch[row] for row in mine or range(rows)]) for batch, _ in islice(batches, limit))


def ordered(
    loaded: list[Loaded], part: Literal["train", "heldout"], data: Data, *, rows: int
) -> Iterator[tuple[list[Row], list[list[Origin]]]]:
    """One part of the data, packed in file order, once: batches of `rows` rows with what each row holds.

    The last batch is filled up with padding.
    """
    examples = _Numbered([(at, getattr(one, part)) for at, one in enumerate(loaded)])
    if not len(examples):
        return
    keys = tuple(examples[0])
    in_order = grain.MapDataset.source(examples).to_iter_dataset(
        grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    )
    packed = iter(_packed(in_order, keys, data, seed=0, shuffle=False))
    while batch := list(islice(packed, rows)):
        filled, held = [_row(one) for one in batch], [origins(one) for one in batch]
        blank = Row(*(None if one is None else np.zeros_like(one) for one in filled[0]))  # pyright: ignore
        missing = rows - len(batch)
        yield filled + [blank] * missing, held + [[] for _ in range(missing)]
