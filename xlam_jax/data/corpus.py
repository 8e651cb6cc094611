"""What a run learns from: every source read, rendered and split, kept compactly in memory or in a cache on disk.

Rendering is the slow part, so past a number of trajectories it is spread over processes; the result is the same, in the
same order, for any number of them.
"""

import heapq
import os
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from multiprocessing import get_context
from typing import Any, NamedTuple, NotRequired, TypedDict, overload

import numpy as np

from xlam_jax.config import PAIRS, Data, Source
from xlam_jax.data import sources
from xlam_jax.data.lengths import fit, fit_pair
from xlam_jax.data.pair import Pair, task
from xlam_jax.data.render import KINDS, Rendered
from xlam_jax.data.sources import Filtered, Item
from xlam_jax.data.trajectory import InvalidTrajectory, Trajectory
from xlam_jax.digest import random_integer
from xlam_jax.errors import UserError
from xlam_jax.progress import Throughput

PROCESSES = min(16, os.cpu_count() or 1)
"""Processes that render at the same time; one parses what so many render."""
ALONE = 2000
"""Trajectories that are rendered before other processes are started, which takes seconds."""
SAMPLES = 256
"""Held-out trajectories of a source that stay readable."""
_BATCH = 32

Progress = Callable[[str], None]


class Example(TypedDict):
    """A rendered trajectory, ready to pack: n tokens int32, the n tokens to predict int32, what each counts float32,
    and the kind of its span, int8, an index into `render.KINDS`. Annotated ones say of each label its turn, int32.

    A pair is the places of its chosen side and then those of its rejected one, `sides` says which is which (1 and 2,
    int8); `reference` is log p of a side under the reference policy, f32, at the side's first place that counts.
    """

    tokens: np.ndarray
    labels: np.ndarray
    weights: np.ndarray
    kinds: np.ndarray
    turns: NotRequired[np.ndarray]
    sides: NotRequired[np.ndarray]
    reference: NotRequired[np.ndarray]
    origin: NotRequired[np.ndarray]
    """int32 (2,): the index of its source, and its own in the source's `train` or `heldout`."""


class Loaded(NamedTuple):
    """One source, read and rendered."""

    source: Source
    train: Sequence[Example]
    heldout: Sequence[Example]
    ids: Sequence[str]
    """Parallel to `train`: the trajectory's or the pair's."""
    samples: list[Trajectory]
    """Up to `SAMPLES` of those held out, the same ones in any order of the rows; of pairs the chosen side."""
    trajectories: list[Trajectory] | list[Pair] | None
    """Parallel to `train`, where augmentation or annotation needs them."""
    dropped: Counter[str]
    """Reason → trajectories left out."""
    repaired: Counter[str]
    """Reason → defects mended."""
    changed: Counter[str]
    """Reason → trajectories that did not fit and were cut or split."""
    digests: dict[str, str] | None = None
    """Of `train` and `heldout`, where they are known without reading every example: see `identity`."""
    dataset: dict[str, Any] | None = None
    """Of a dataset on a hub: its `revision` (the commit; None where unknown) and the `rows` that were read."""


class Columns(NamedTuple):
    """A rendered sequence of N tokens: ids int32, weights float32, kinds int8, turns int32 where they are wanted."""

    ids: np.ndarray
    weights: np.ndarray
    kinds: np.ndarray
    turns: np.ndarray | None


def columns(rendered: Rendered, annotate: bool = False) -> Columns:
    """What training keeps of a rendered sequence."""
    lengths = [span.end - span.start for span in rendered.spans]
    kinds = np.repeat(np.array([KINDS.index(span.kind) for span in rendered.spans], np.int8), lengths)
    turns = np.repeat(np.array([span.turn for span in rendered.spans], np.int32), lengths) if annotate else None
    return Columns(np.asarray(rendered.input_ids, np.int32), np.asarray(rendered.weights, np.float32), kinds, turns)


def example(one: Columns) -> Example:
    """N tokens as N-1 places. The arrays are views."""
    whole = Example(tokens=one.ids[:-1], labels=one.ids[1:], weights=one.weights[1:], kinds=one.kinds[1:])
    if one.turns is not None:
        whole["turns"] = one.turns[1:]
    return whole


class Examples(Sequence[Example]):
    """Examples in one flat array a column: 9 bytes a token, whatever their number. The arrays given out are views."""

    def __init__(self, annotate: bool = False):
        self._flat = [(bytearray(), kind) for kind in (np.int32, np.float32, np.int8, *([np.int32] * annotate))]
        self._ends = [0]

    def append(self, one: Columns) -> None:
        """Takes over a sequence of N tokens, as N-1 places."""
        for (flat, kind), values in zip(self._flat, one, strict=False):
            flat += np.asarray(values, kind).tobytes()
        self._ends.append(self._ends[-1] + len(one.ids))

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[at] for at in range(*index.indices(len(self)))]
        at = range(len(self))[index]
        start, count = self._ends[at], self._ends[at + 1] - self._ends[at]
        views = [np.frombuffer(flat, kind, count, start * np.dtype(kind).itemsize) for flat, kind in self._flat]
        for view in views:
            view.flags.writeable = False
        ids, weights, kinds, *turns = views
        return example(Columns(ids, weights, kinds, turns[0] if turns else None))

    @property
    def lengths(self) -> np.ndarray:
        """Places of each example, int64 (len,)."""
        return np.diff(self._ends) - 1

    @property
    def trained(self) -> np.ndarray:
        """Tokens that carry loss of each example, int64 (len,)."""
        carries = np.frombuffer(self._flat[1][0], np.float32) > 0
        starts = np.array(self._ends[:-1], np.int64)
        if not len(starts):
            return starts
        # no example's first token is a label
        return np.add.reduceat(carries, starts, dtype=np.int64) - carries[starts]


def both(chosen: Example, rejected: Example) -> Example:
    """The two sides of a pair as one example."""
    counts = len(chosen["tokens"]), len(rejected["tokens"])
    joined = {name: np.concatenate([chosen[name], rejected[name]]) for name in chosen}
    return Example(**joined, sides=np.repeat(np.array([1, 2], np.int8), counts))  # pyright: ignore[reportArgumentType]


class Pairs(Sequence[Example]):
    """Pairs, kept as the examples of their two sides."""

    def __init__(self, annotate: bool = False):
        self._chosen, self._rejected = Examples(annotate), Examples(annotate)

    def append(self, chosen: Columns, rejected: Columns) -> None:
        """Takes over a pair."""
        self._chosen.append(chosen)
        self._rejected.append(rejected)

    def __len__(self) -> int:
        return len(self._chosen)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[at] for at in range(*index.indices(len(self)))]
        return both(self._chosen[index], self._rejected[index])

    @property
    def lengths(self) -> np.ndarray:
        """Places of each pair, int64 (len,)."""
        return self._chosen.lengths + self._rejected.lengths

    @property
    def trained(self) -> np.ndarray:
        """Tokens that count of each pair, int64 (len,)."""
        return self._chosen.trained + self._rejected.trained


class Referenced(Sequence[Example]):
    """Pairs with log p of their sides under the reference policy, f32 [pairs, 2]."""

    def __init__(self, pairs: Sequence[Example], log_p_P2: np.ndarray):
        if log_p_P2.shape != (len(pairs), 2):
            raise ValueError(f"{len(pairs)} pairs have a reference of shape {log_p_P2.shape}")
        self._pairs, self._log_p_P2 = pairs, log_p_P2
        self.lengths, self.trained = lengths(pairs), trained(pairs)

    def __len__(self) -> int:
        return len(self._pairs)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[at] for at in range(*index.indices(len(self)))]
        pair = self._pairs[index]
        sides = pair.get("sides", np.zeros(0, np.int8))
        reference = np.zeros(len(pair["tokens"]), np.float32)
        for side in (1, 2):
            reference[np.argmax((sides == side) & (pair["weights"] != 0))] = self._log_p_P2[index, side - 1]
        return pair | {"reference": reference}  # pyright: ignore[reportReturnType]


def lengths(examples: Sequence[Example]) -> np.ndarray:
    """Places of each example, int64 (len,); those that `load` gives know it without being read."""
    known = getattr(examples, "lengths", None)
    return np.array([len(one["tokens"]) for one in examples], np.int64) if known is None else known


def trained(examples: Sequence[Example]) -> np.ndarray:
    """Tokens that carry loss of each example, int64 (len,); known in the same way."""
    known = getattr(examples, "trained", None)
    return np.array([(one["weights"] > 0).sum() for one in examples], np.int64) if known is None else known


def is_heldout(source: str, trajectory_id: str, share: float) -> bool:
    """Whether a trajectory belongs to the held-out part: a matter of its id alone, never of its place in a file.

    For a pair the digest of its task (`pair.task`, hex) stands in place of an id, so that no task is in both parts.
    """
    return _drawn(source, trajectory_id) < share * 2**64


def _drawn(source: str, name: str) -> int:
    """A number below 2⁶⁴ that looks drawn at random."""
    return random_integer(f"{source}\0{name}")


def load(data: Data, tokenizer: Any, progress: Progress = lambda line: None, annotate: bool = False) -> list[Loaded]:
    """Reads and renders every source, or opens `data.cache`.

    With `annotate` the examples say where each token is from, and the trajectories are kept; then the sources are read
    even where there is a cache. Raises `UserError` with file and line for a trajectory that is not valid or too long,
    unless the config says that such are dropped; then they are counted.
    """
    if data.cache is not None:
        from xlam_jax.data import cache

        if not annotate:
            return cache.open(data.cache, data, tokenizer, progress)
        cache.verify(data.cache, data, tokenizer, progress)  # what is shown is what training reads
    for source in data.sources:
        sources.check(source)  # all of them before the first is rendered, which may take long
    loaded = []
    with _Renderer(tokenizer, data, annotate) as renderer:
        for source in data.sources:
            one = _load_source(source, data, renderer, progress, annotate)
            progress(summary(one))
            if not len(one.train):
                raise UserError(
                    f"data.sources: {source.name} has nothing to train on (dropped: {_counts(one.dropped)}; "
                    f"held out: {len(one.heldout)}); remove the source or check its files and filters"
                )
            loaded.append(one)
    return loaded


def summary(one: Loaded) -> str:
    """A source in a line: what is there, what was left out, mended and changed."""
    what = "pairs" if one.source.format == PAIRS else "trajectories"
    line = (
        f"{one.source.name}: {len(one.train)} {what} to train on ({lengths(one.train).sum():,} tokens), "
        f"{len(one.heldout)} held out, dropped: {_counts(one.dropped)}"
    )
    if one.repaired:
        line += f"; repaired: {_counts(one.repaired)}"
    if one.changed:
        line += f"; changed: {_counts(one.changed)}"
    return line


def _counts(counter: Counter[str]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in sorted(counter.items())) or "none"


def _load_source(source: Source, data: Data, renderer: "_Renderer", progress: Progress, annotate: bool) -> Loaded:
    train, heldout = _Part(source, annotate), _Part(source, annotate)
    samples: list[tuple[int, str, Trajectory]] = []  # a heap, the last to be taken on top
    trajectories: list[Any] | None = [] if annotate or data.augment.active else None
    dropped, repaired, changed = Counter[str](), Counter[str](), Counter[str]()
    dataset: dict[str, Any] = {}
    reading = Throughput(source.name, unit="rows", out=progress)
    for item, fitted in renderer.render(sources.read(source, dataset)):
        repaired.update(repair.reason for repair in item.repairs)
        match item.trajectory:
            case Filtered(reason):
                dropped[reason] += 1
            case InvalidTrajectory(reason=reason, detail=detail):
                _leave_out(item.where, reason, detail, data)
                dropped[reason] += 1
            case whole if not fitted.rendered:
                for reason in fitted.reasons:
                    _leave_out(item.where, reason, fitted.detail, data)
                    dropped[reason] += 1
            case whole:
                changed.update(fitted.reasons)
                name = task(whole.chosen).hex() if isinstance(whole, Pair) else whole.id
                if is_heldout(source.name, name, data.heldout):
                    heldout.add(whole.id, fitted.rendered)
                    side = whole.chosen if isinstance(whole, Pair) else whole
                    heapq.heappush(samples, (-_drawn(source.name, f"sample {whole.id}"), item.where, side))
                    if len(samples) > SAMPLES:
                        heapq.heappop(samples)
                else:
                    added = train.add(whole.id, fitted.rendered)
                    if trajectories is not None:
                        trajectories += fitted.parts if data.augment.active else [whole] * added
        reading.add()
    chosen = [side for _, _, side in sorted(samples, reverse=True)]
    return Loaded(
        source,
        train.examples,
        heldout.examples,
        train.ids,
        chosen,
        trajectories,
        dropped,
        repaired,
        changed,
        dataset=dataset or None,
    )


class _Part:
    """The train or the held-out part of a source, as it grows."""

    def __init__(self, source: Source, annotate: bool):
        self.examples = Pairs(annotate) if source.format == PAIRS else Examples(annotate)
        self.ids: list[str] = []

    def add(self, name: str, rendered: Sequence[Columns]) -> int:
        """Adds what was rendered, and returns how many examples that made: one a sequence, or a pair of two."""
        if isinstance(self.examples, Pairs):
            self.examples.append(*rendered)
            self.ids.append(name)
            return 1
        for one in rendered:
            self.examples.append(one)
            self.ids.append(name)
        return len(rendered)


def _leave_out(where: str, reason: str, detail: str, data: Data) -> None:
    """Raises `UserError` unless the config says that such trajectories are left out."""
    if reason == "no-loss":  # nothing is wrong with it, there is only nothing to learn from it
        return
    if reason == "too-long" and data.on_long == "error":
        instead = "say with data.on_long what becomes of such trajectories: drop, cut or split"
        if data.pairs:  # they stay whole
            instead = "leave such pairs out with data.on_long=drop"
        raise UserError(
            f"{where}: {reason}: {detail}; data.sequence_length is {data.sequence_length}: raise it, or {instead}"
        )
    if reason != "too-long" and data.on_invalid == "error":
        raise UserError(
            f"{where}: {reason}: {detail}; correct the line, or leave such lines out with data.on_invalid=drop"
        )


class Ready(NamedTuple):
    """What a trajectory or a pair gives: `lengths.Fitted` with what training keeps of each sequence."""

    rendered: list[Columns]
    reasons: list[str]
    parts: list[Trajectory]
    detail: str


_NOTHING = Ready([], [], [], "")


class _Renderer:
    """Renders trajectories in order: the first in this process, those after them in several."""

    def __init__(self, tokenizer: Any, data: Data, annotate: bool):
        self._work = _Work(tokenizer, data, annotate)
        self._rendered = 0
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> "_Renderer":
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool:
            self._pool.shutdown(cancel_futures=True)

    def render(self, items: Iterator[Item]) -> Iterator[tuple[Item, Ready]]:
        """Gives each item with what its trajectory gives to train on; nothing for an item that has none."""
        while PROCESSES == 1 or self._rendered < ALONE:
            item = next(items, None)
            if item is None:
                return
            trajectory = _of(item)
            self._rendered += trajectory is not None
            yield item, self._work(trajectory)
        if self._pool is None:
            # spawned, not forked: JAX may be running threads here
            self._pool = ProcessPoolExecutor(PROCESSES, get_context("spawn"), _start, (self._work,))
        waiting: deque[tuple[list[Item], Future[list[Ready]]]] = deque()
        try:
            while True:
                batch = list(islice(items, _BATCH))
                if batch:
                    waiting.append((batch, self._pool.submit(_run, [_of(item) for item in batch])))
                if not waiting:
                    return
                if not batch or len(waiting) > 4 * PROCESSES:
                    done, future = waiting.popleft()
                    yield from zip(done, future.result(), strict=True)
        except BrokenProcessPool:
            raise UserError(
                "a process that rendered trajectories ended before its time; is there enough memory for "
                f"{PROCESSES} of them? A script that calls this needs `if __name__ == '__main__':`"
            ) from None


class _Work(NamedTuple):
    """What a process needs to render."""

    tokenizer: Any
    data: Data
    annotate: bool

    def __call__(self, whole: Trajectory | Pair | None) -> Ready:
        """Renders, and leaves out what is slow to send and nobody asks for: spans and trajectories."""
        if whole is None:
            return _NOTHING
        one = (fit_pair if isinstance(whole, Pair) else fit)(whole, self.tokenizer, self.data)  # pyright: ignore
        rendered = [columns(each, self.annotate) for each in one.rendered]
        return Ready(rendered, one.reasons, one.parts if self.data.augment.active else [], one.detail)


_worker: _Work


def _start(work: _Work) -> None:
    global _worker
    _worker = work


def _run(trajectories: list[Trajectory | Pair | None]) -> list[Ready]:
    return [_worker(trajectory) for trajectory in trajectories]


def _of(item: Item) -> Trajectory | Pair | None:
    return item.trajectory if isinstance(item.trajectory, Trajectory | Pair) else None
