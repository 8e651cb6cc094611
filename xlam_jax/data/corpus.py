"""What a run learns from: every source read, rendered and split, kept compactly in memory or in a cache on disk.

Rendering is the slow part, so past a number of trajectories it is spread over processes; the result is the same, in the
same order, for any number of them.
"""

import hashlib
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from itertools import islice
from multiprocessing import get_context
from typing import Any, Literal, NamedTuple, NotRequired, TypedDict, overload

import numpy as np

from xlam_jax.config import Data, Source
from xlam_jax.data import sources
from xlam_jax.data.lengths import Fitted, fit
from xlam_jax.data.render import KINDS, Rendered
from xlam_jax.data.sources import Filtered, Item
from xlam_jax.data.trajectory import InvalidTrajectory, Trajectory
from xlam_jax.errors import UserError

PROCESSES = min(16, os.cpu_count() or 1)
"""Processes that render at the same time; one parses what so many render."""
ALONE = 2000
"""Trajectories that are rendered before other processes are started, which takes seconds."""
_BATCH = 32
_QUIET = 10.0  # seconds between two lines about a source that takes long

Progress = Callable[[str], None]


class Example(TypedDict):
    """A rendered trajectory, ready to pack: n tokens int32, the n tokens to predict int32, what each counts float32.

    Annotated ones say of each label where it is from, int32: the span's kind (an index into `render.KINDS`) and turn,
    the source, and the row: the trajectory's index in its source's `train` (or `heldout`).
    """

    tokens: np.ndarray
    labels: np.ndarray
    weights: np.ndarray
    kinds: NotRequired[np.ndarray]
    turns: NotRequired[np.ndarray]
    sources: NotRequired[np.ndarray]
    rows: NotRequired[np.ndarray]


class Loaded(NamedTuple):
    """One source, read and rendered."""

    source: Source
    train: Sequence[Example]
    heldout: Sequence[Example]
    trajectories: list[Trajectory] | None
    """Parallel to `train`, where augmentation or annotation needs them."""
    dropped: Counter[str]
    """Reason → trajectories left out."""
    repaired: Counter[str]
    """Reason → defects mended."""
    changed: Counter[str]
    """Reason → trajectories that did not fit and were cut or split."""


class Examples(Sequence[Example]):
    """Examples in one flat array a column: 8 bytes a token, whatever their number. The arrays given out are views."""

    def __init__(self, source: int = 0, annotate: bool = False):
        self._source = source
        self._flat = {name: bytearray() for name in ("ids", "weights", *(("kinds", "turns") if annotate else ()))}
        self._ends = [0]

    def append(self, rendered: Rendered) -> None:
        """Takes over a rendered trajectory of N tokens, as N-1 tokens and labels."""
        self._flat["ids"] += np.asarray(rendered.input_ids, np.int32).tobytes()
        self._flat["weights"] += np.asarray(rendered.weights, np.float32).tobytes()
        if "kinds" in self._flat:
            for name, values in _of_spans(rendered).items():
                self._flat[name] += values.tobytes()
        self._ends.append(self._ends[-1] + len(rendered.input_ids))

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

        def column(name: str, kind: type) -> np.ndarray:
            view = np.frombuffer(self._flat[name], kind, count, 4 * start)
            view.flags.writeable = False
            return view

        ids = column("ids", np.int32)
        example = Example(tokens=ids[:-1], labels=ids[1:], weights=column("weights", np.float32)[1:])
        if "kinds" in self._flat:
            example["kinds"], example["turns"] = (column(name, np.int32)[1:] for name in ("kinds", "turns"))
            example["sources"] = np.full(count - 1, self._source, np.int32)
            example["rows"] = np.full(count - 1, at, np.int32)
        return example

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each example, int64 (len,)."""
        return np.diff(self._ends) - 1

    @property
    def trained(self) -> np.ndarray:
        """Tokens that carry loss of each example, int64 (len,)."""
        carries = np.frombuffer(self._flat["weights"], np.float32) > 0
        starts = np.array(self._ends[:-1], np.int64)
        if not len(starts):
            return starts
        # no example's first token is a label
        return np.add.reduceat(carries, starts, dtype=np.int64) - carries[starts]


def example(rendered: Rendered, source: int | None = None, row: int = 0) -> Example:
    """Returns a rendered trajectory as an example, annotated where its `source` is given."""
    ids = np.asarray(rendered.input_ids, np.int32)
    one = Example(tokens=ids[:-1], labels=ids[1:], weights=np.asarray(rendered.weights, np.float32)[1:])
    if source is not None:
        for name, values in _of_spans(rendered).items():
            one[name] = values[1:]
        one["sources"], one["rows"] = (np.full(len(ids) - 1, value, np.int32) for value in (source, row))
    return one


def _of_spans(rendered: Rendered) -> dict[Literal["kinds", "turns"], np.ndarray]:
    """Kind and turn of each token, int32 (N,)."""
    lengths = [span.end - span.start for span in rendered.spans]
    kinds, turns = [KINDS.index(span.kind) for span in rendered.spans], [span.turn for span in rendered.spans]
    return {
        "kinds": np.repeat(np.array(kinds, np.int32), lengths),
        "turns": np.repeat(np.array(turns, np.int32), lengths),
    }


def lengths(examples: Sequence[Example]) -> np.ndarray:
    """Tokens of each example, int64 (len,); those that `load` gives know it without being read."""
    known = getattr(examples, "lengths", None)
    return np.array([len(one["tokens"]) for one in examples], np.int64) if known is None else known


def trained(examples: Sequence[Example]) -> np.ndarray:
    """Tokens that carry loss of each example, int64 (len,); known in the same way."""
    known = getattr(examples, "trained", None)
    return np.array([(one["weights"] > 0).sum() for one in examples], np.int64) if known is None else known


def is_heldout(source: str, trajectory_id: str, share: float) -> bool:
    """Whether a trajectory belongs to the held-out part: a matter of its id alone, never of its place in a file."""
    digest = hashlib.sha256(f"{source}\0{trajectory_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


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
        for at, source in enumerate(data.sources):
            one = _load_source(at, source, data, renderer, progress, annotate)
            progress(summary(one))
            if not len(one.train):
                raise UserError(
                    f"data.sources: {source.name} has no trajectory to train on (dropped: {_counts(one.dropped)}; "
                    f"held out: {len(one.heldout)}); remove the source or check its files and filters"
                )
            loaded.append(one)
    return loaded


def summary(one: Loaded) -> str:
    """A source in a line: what is there, what was left out, mended and changed."""
    line = (
        f"{one.source.name}: {len(one.train)} trajectories to train on ({lengths(one.train).sum():,} tokens), "
        f"{len(one.heldout)} held out, dropped: {_counts(one.dropped)}"
    )
    if one.repaired:
        line += f"; repaired: {_counts(one.repaired)}"
    if one.changed:
        line += f"; changed: {_counts(one.changed)}"
    return line


def _counts(counter: Counter[str]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in sorted(counter.items())) or "none"


def _load_source(
    at: int, source: Source, data: Data, renderer: "_Renderer", progress: Progress, annotate: bool
) -> Loaded:
    train, heldout = Examples(at, annotate), Examples(at, annotate)
    trajectories: list[Trajectory] | None = [] if annotate or data.augment.active else None
    dropped, repaired, changed = Counter[str](), Counter[str](), Counter[str]()
    began = told = time.monotonic()
    for number, (item, fitted) in enumerate(renderer.render(sources.read(source)), start=1):
        repaired.update(repair.reason for repair in item.repairs)
        match item.trajectory:
            case Filtered(reason):
                dropped[reason] += 1
            case InvalidTrajectory(reason=reason, detail=detail):
                _leave_out(item.where, reason, detail, data)
                dropped[reason] += 1
            case Trajectory() as trajectory if not fitted.rendered:
                for reason in fitted.reasons:
                    _leave_out(item.where, reason, fitted.detail, data)
                    dropped[reason] += 1
            case Trajectory() as trajectory:
                changed.update(fitted.reasons)
                held = is_heldout(source.name, trajectory.id, data.heldout)
                for rendered in fitted.rendered:
                    (heldout if held else train).append(rendered)
                if trajectories is not None and not held:
                    whole = [trajectory] * len(fitted.rendered)
                    trajectories += fitted.parts if data.augment.active else whole
        if (now := time.monotonic()) - told > _QUIET:
            progress(f"{source.name}: {number:,} trajectories read, {number / (now - began):,.0f} a second")
            told = now
    return Loaded(source, train, heldout, trajectories, dropped, repaired, changed)


def _leave_out(where: str, reason: str, detail: str, data: Data) -> None:
    """Raises `UserError` unless the config says that such trajectories are left out."""
    if reason == "no-loss":  # nothing is wrong with it, there is only nothing to learn from it
        return
    if reason == "too-long" and data.on_long == "error":
        raise UserError(
            f"{where}: {reason}: {detail}; data.sequence_length is {data.sequence_length}: raise it, or say with "
            "data.on_long what becomes of such trajectories: drop, cut or split"
        )
    if reason != "too-long" and data.on_invalid == "error":
        raise UserError(
            f"{where}: {reason}: {detail}; correct the line, or leave such lines out with data.on_invalid=drop"
        )


_NOTHING = Fitted([], [], [])


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

    def render(self, items: Iterator[Item]) -> Iterator[tuple[Item, Fitted]]:
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
        waiting: deque[tuple[list[Item], Future[list[Fitted]]]] = deque()
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

    def __call__(self, trajectory: Trajectory | None) -> Fitted:
        """Renders, and leaves out what is slow to send and nobody asks for: spans and trajectories."""
        if trajectory is None:
            return _NOTHING
        fitted = fit(trajectory, self.tokenizer, self.data)
        if not self.annotate:
            fitted = fitted._replace(rendered=[replace(one, spans=()) for one in fitted.rendered])
        return fitted if self.data.augment.active else fitted._replace(parts=[])


_worker: _Work


def _start(work: _Work) -> None:
    global _worker
    _worker = work


def _run(trajectories: list[Trajectory | None]) -> list[Fitted]:
    return [_worker(trajectory) for trajectory in trajectories]


def _of(item: Item) -> Trajectory | None:
    return item.trajectory if isinstance(item.trajectory, Trajectory) else None
