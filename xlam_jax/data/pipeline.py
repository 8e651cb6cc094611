"""From files to packed batches: read → check → split → render → mix → pack → batch.

Batch t depends on the seed and t alone. The mixture is one endless sequence; it is dealt to a fixed number of streams,
stream s taking every S-th trajectory from the s-th on; each stream packs on its own, and gives the same rows to every
batch. A host reads its share of the streams, so that the number of hosts changes nothing.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import grain
import numpy as np
from grain.experimental import BestFitPackIterDataset

from xlam_jax.config import Data, Source
from xlam_jax.data.render import render
from xlam_jax.data.trajectory import InvalidTrajectory, Trajectory, read_jsonl
from xlam_jax.errors import UserError


class Example(TypedDict):
    """A rendered trajectory, ready to pack: n tokens, the n tokens to predict, and what each counts."""

    tokens: np.ndarray
    labels: np.ndarray
    weights: np.ndarray


class Row(NamedTuple):
    """A packed row or a batch of them: [T] or [B, T]."""

    tokens: np.ndarray
    labels: np.ndarray
    weights: np.ndarray
    positions: np.ndarray
    segments: np.ndarray


class Loaded(NamedTuple):
    """One source, read and rendered."""

    name: str
    weight: float
    train: list[Example]
    heldout: list[Example]
    dropped: Counter[str]
    """Reason → trajectories left out."""


def load(data: Data, tokenizer: Any, progress: Callable[[str], None] = lambda line: None) -> list[Loaded]:
    """Reads and renders every source.

    Raises `UserError` with file and line for a trajectory that is not valid or too long, unless the config says that
    such are dropped; then they are counted.
    """
    loaded = []
    for source in data.sources:
        one = _load_source(source, data, tokenizer)
        dropped = ", ".join(f"{count} {reason}" for reason, count in sorted(one.dropped.items()))
        tokens = sum(len(example["tokens"]) for example in one.train)
        progress(
            f"{one.name}: {len(one.train)} trajectories to train on ({tokens:,} tokens), {len(one.heldout)} held out, "
            f"dropped: {dropped or 'none'}"
        )
        if not one.train:
            raise UserError(
                f"data.sources: {one.name} has no trajectory to train on (dropped: {dropped or 'none'}; "
                f"held out: {len(one.heldout)}); remove the source or check its files"
            )
        loaded.append(one)
    return loaded


def _load_source(source: Source, data: Data, tokenizer: Any) -> Loaded:
    train, heldout, dropped = [], [], Counter()
    for file in source.files:
        for line, trajectory in read_jsonl(Path(file)):
            if isinstance(trajectory, InvalidTrajectory):
                if data.on_invalid == "error":
                    raise UserError(
                        f"{file}:{line}: {trajectory.reason}: {trajectory.detail}; correct the line, or leave such "
                        "lines out with data.on_invalid=drop"
                    )
                dropped[trajectory.reason] += 1
                continue
            example = _example(trajectory, tokenizer)
            if len(example["tokens"]) > data.sequence_length:
                if data.on_long == "error":
                    raise UserError(
                        f"{file}:{line}: too-long: {len(example['tokens'])} tokens, data.sequence_length is "
                        f"{data.sequence_length}; raise it, or leave such lines out with data.on_long=drop"
                    )
                dropped["too-long"] += 1
            elif is_heldout(source.name, trajectory.id, data.heldout):
                heldout.append(example)
            else:
                train.append(example)
    return Loaded(source.name, source.weight, train, heldout, dropped)


def _example(trajectory: Trajectory, tokenizer: Any) -> Example:
    rendered = render(trajectory, tokenizer)
    ids = np.asarray(rendered.input_ids, np.int32)
    return Example(tokens=ids[:-1], labels=ids[1:], weights=np.asarray(rendered.loss_mask, np.float32)[1:])


def is_heldout(source: str, trajectory_id: str, share: float) -> bool:
    """Whether a trajectory belongs to the held-out part: a matter of its id alone, never of its place in a file."""
    digest = hashlib.sha256(f"{source}\0{trajectory_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def _derived(seed: int, *names: object) -> int:
    return int.from_bytes(hashlib.sha256(repr((seed, *names)).encode()).digest()[:4], "big")


def _packed(examples: grain.IterDataset, data: Data, seed: int, shuffle: bool) -> grain.IterDataset:
    length = data.sequence_length
    return BestFitPackIterDataset(
        examples,
        length_struct={"tokens": length, "labels": length, "weights": length},
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
    """Endless batches of one host. `state()` is what to save beside a checkpoint, `restore` what undoes a crash."""

    def __init__(self, loaded: list[Loaded], data: Data, *, batch_size: int, seed: int, host: int = 0, hosts: int = 1):
        self._rows = batch_size // data.streams
        mixed = grain.MapDataset.mix(
            [grain.MapDataset.source(one.train).seed(_derived(seed, one.name)).shuffle().repeat() for one in loaded],
            weights=[one.weight for one in loaded],
        )
        share = data.streams // hosts
        self._streams = {
            str(stream): iter(
                _packed(
                    mixed.slice(slice(stream, None, data.streams)).to_iter_dataset(
                        grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
                    ),
                    data,
                    _derived(seed, "stream", stream),
                    shuffle=True,
                )
            )
            for stream in range(host * share, (host + 1) * share)
        }

    def __next__(self) -> Row:
        """The next batch's rows of this host, in the order of the streams."""
        return _stack([_row(next(stream)) for stream in self._streams.values() for _ in range(self._rows)])

    def state(self) -> dict[str, Any]:
        """The place of each stream, JSON."""
        return {name: stream.get_state() for name, stream in self._streams.items()}

    def restore(self, state: dict[str, Any]) -> None:
        """Goes to a saved place."""
        for name, stream in self._streams.items():
            stream.set_state(state[name])


def heldout_batches(loaded: list[Loaded], data: Data, *, rows: int, limit: int | None) -> Iterator[Row]:
    """The held-out part, packed in file order, once; the last batch is filled up with padding."""
    examples = [example for one in loaded for example in one.heldout]
    if not examples:
        return
    packed = _packed(grain.MapDataset.source(examples).to_iter_dataset(), data, seed=0, shuffle=False)
    waiting: list[Row] = []
    batches = 0
    for row in packed:
        waiting.append(_row(row))
        if len(waiting) == rows:
            yield _stack(waiting)
            waiting, batches = [], batches + 1
            if batches == limit:
                return
    if waiting:
        blank = Row(*(np.zeros_like(column) for column in waiting[0]))
        yield _stack(waiting + [blank] * (rows - len(waiting)))
