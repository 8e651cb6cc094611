"""From loaded trajectories to packed batches: deal → mix → pack → batch.

Batch t depends on the seed and t alone. Each source is one endless sequence, shuffled anew every epoch; it is dealt to
a fixed number of streams, stream s taking every S-th trajectory from the s-th on, so that no two streams see the same
trajectory in an epoch. Each stream mixes and packs on its own, and gives the same number of rows to every batch. A host
reads its share of the streams, so that the number of hosts changes nothing.
"""

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np
from grain.experimental import BestFitPackIterDataset

from xlam_jax.config import Data
from xlam_jax.data.augment import augmented
from xlam_jax.data.corpus import Example, Loaded, example
from xlam_jax.data.mixture import shares, stream_mixture
from xlam_jax.errors import UserError


class Row(NamedTuple):
    """A packed row or a batch of them: [T] or [B, T]."""

    tokens: np.ndarray
    labels: np.ndarray
    weights: np.ndarray
    positions: np.ndarray
    segments: np.ndarray


def _derived(seed: int, *names: object) -> int:
    return int.from_bytes(hashlib.sha256(repr((seed, *names)).encode()).digest()[:4], "big")


def _packed(examples: grain.IterDataset, keys: Sequence[str], data: Data, seed: int, shuffle: bool) -> Any:
    return BestFitPackIterDataset(
        examples,
        length_struct={key: data.sequence_length for key in keys},
        num_packing_bins=data.packing_bins,
        seed=seed,
        shuffle_bins=shuffle,
    )


def _row(packed: dict[str, np.ndarray]) -> Row:
    return Row(
        packed["tokens"],
        packed["labels"],
        packed["weights"],
        packed["tokens_positions"].astype(np.int32),
        packed["tokens_segment_ids"].astype(np.int32),
    )


def _stack(rows: Sequence[Row]) -> Row:
    return Row(*(np.stack(column) for column in zip(*rows, strict=True)))


class Loader:
    """Endless batches of one host. `state()` is what to save beside a checkpoint, `restore` what undoes a crash.

    The state names each stream's place, so a run may go on with another number of hosts: give every host all states.
    Augmentation renders with `tokenizer`. Raises `UserError` when the streams cannot be dealt to the hosts.
    """

    def __init__(
        self,
        loaded: list[Loaded],
        data: Data,
        *,
        batch_size: int,
        seed: int,
        tokenizer: Any = None,
        host: int = 0,
        hosts: int = 1,
    ):
        if data.streams % hosts:
            raise UserError(
                f"data.streams is {data.streams}, which the number of hosts, {hosts}, does not divide; "
                "every host reads the same number of streams"
            )
        self._rows = batch_size // data.streams
        weights = shares(loaded, data)
        sequences = [_endless(one, data, seed, tokenizer) for one in loaded]
        keys = tuple(loaded[0].train[0])
        share = data.streams // hosts
        self._streams: dict[str, Any] = {}
        for stream in range(host * share, (host + 1) * share):
            mixed = grain.MapDataset.select_from_datasets(
                [sequence.slice(slice(stream, None, data.streams)) for sequence in sequences],
                stream_mixture(weights, stream, data.streams),
            )
            in_order = mixed.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
            packed = _packed(in_order, keys, data, _derived(seed, "stream", stream), shuffle=True)
            self._streams[str(stream)] = iter(packed)

    def __next__(self) -> Row:
        """The next batch's rows of this host, in the order of the streams."""
        return _stack([_row(packed) for packed in self.packed()])

    def packed(self) -> list[dict[str, np.ndarray]]:
        """The same rows as Grain packs them: every key of the examples, with `<key>_segment_ids` and `_positions`."""
        return [next(stream) for stream in self._streams.values() for _ in range(self._rows)]

    def state(self) -> dict[str, Any]:
        """The place of each stream of this host, JSON."""
        return {name: stream.get_state() for name, stream in self._streams.items()}

    def restore(self, state: dict[str, Any]) -> None:
        """Goes to a saved place. Takes as long at any place."""
        for name, stream in self._streams.items():
            stream.set_state(state[name])


def _endless(one: Loaded, data: Data, seed: int, tokenizer: Any) -> Any:
    """A source's examples for ever, each once an epoch; with augmentation, another variant in every epoch."""
    seeded = _derived(seed, one.source.name)
    if not data.augment.active:
        return grain.MapDataset.source(one.train).seed(seeded).shuffle().repeat()
    trajectories, first = one.trajectories, one.train[0]
    if trajectories is None:
        raise ValueError("augmentation draws from the trajectories, and they are not loaded")
    source = int(first["sources"][0]) if "sources" in first else None

    def draw(row: int, rng: np.random.Generator) -> Example:
        return example(augmented(trajectories[row], rng, tokenizer, data), source, row)

    return grain.MapDataset.range(len(trajectories)).seed(seeded).shuffle().repeat().random_map(draw)


def packed_rows(
    loaded: list[Loaded], data: Data, *, batch_size: int, seed: int, tokenizer: Any = None
) -> Iterator[dict[str, np.ndarray]]:
    """Every packed row in the order in which training sees them, endless; see `Loader.packed`."""
    loader = Loader(loaded, data, batch_size=batch_size, seed=seed, tokenizer=tokenizer)
    while True:
        yield from loader.packed()


def heldout_batches(
    loaded: list[Loaded], data: Data, *, rows: int, limit: int | None, host: int = 0, hosts: int = 1
) -> Iterator[Row]:
    """The held-out part, packed in file order, once; the last batch is filled up with padding.

    A host gets its block of each batch's `rows`.
    """
    examples = [example for one in loaded for example in one.heldout]
    if not examples:
        return
    in_order = grain.MapDataset.source(examples).to_iter_dataset()
    mine = slice(host * rows // hosts, (host + 1) * rows // hosts)
    waiting: list[Row] = []
    batches = 0
    for packed in _packed(in_order, tuple(examples[0]), data, seed=0, shuffle=False):
        waiting.append(_row(packed))
        if len(waiting) == rows:
            yield _stack(waiting[mine])
            waiting, batches = [], batches + 1
            if batches == limit:
                return
    if waiting:
        blank = Row(*(np.zeros_like(column) for column in waiting[0]))
        yield _stack((waiting + [blank] * (rows - len(waiting)))[mine])
