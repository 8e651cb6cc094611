"""Reads and renders every source of a config, and splits each into a part to train on and a held-out part.

Rendering is the slow part. Past a number of trajectories it is spread over processes; the result is the same, in the
same order, for any number of them.
"""

import heapq
import os
import re
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from functools import partial
from itertools import islice
from multiprocessing import get_context
from typing import Any, NamedTuple

from xlam_jax.config import PAIRS, Data, Source
from xlam_jax.data import sources
from xlam_jax.data.control import added_tokens, spelled_mark
from xlam_jax.data.examples import Columns, Examples, Loaded, Pairs, counts_text, make_columns, summary
from xlam_jax.data.lengths import Fitted, fit, fit_pair
from xlam_jax.data.pair import Pair, task
from xlam_jax.data.readback import Unreadable, unreadable_turn
from xlam_jax.data.render import codec_and_format
from xlam_jax.data.sources import Filtered, Item
from xlam_jax.data.trajectory import InvalidTrajectory, Trajectory, without_reasoning
from xlam_jax.digest import random_integer
from xlam_jax.errors import UserError
from xlam_jax.progress import Throughput

PROCESSES = min(16, os.cpu_count() or 1)
"""Processes that render at the same time; one parses what so many render."""
ALONE = 2000
"""Trajectories that are rendered before other processes are started, which takes seconds."""
SAMPLES = 256
"""Held-out trajectories per source that stay readable."""
_BATCH = 32
"""Trajectories per message to a process."""

Progress = Callable[[str], None]
"""Called with each line of progress."""


def ignore_progress(line: str) -> None:
    """Reports nothing."""


def is_heldout(source: str, trajectory_id: str, share: float) -> bool:
    """Whether a trajectory belongs to the held-out part.

    Depends on `share`, the name of its source and its id, never on its place in a file. For a
    pair, the digest of its task (`pair.task`, hex) replaces the id, so that no task is in both parts.
    """
    return _hash(source, trajectory_id) < share * 2**64


def _hash(source: str, name: str) -> int:
    """A pseudo-random number below 2⁶⁴."""
    return random_integer(f"{source}\0{name}")


def render_sources(
    data: Data, tokenizer: Any, progress: Progress = ignore_progress, annotate: bool = False
) -> list[Loaded]:
    """Reads and renders every source; `data.cache` is ignored.

    With `annotate` the examples have the turn of each token, and the trajectories are kept. Raises `UserError` with
    file and line for a trajectory that is invalid or too long, unless the config says that such are dropped; then they
    are counted.
    """
    for source in data.sources:
        sources.check(source)  # all of them before the first is rendered, which may take long
    loaded = []
    with _Renderer(tokenizer, data, annotate) as renderer:
        for source in data.sources:
            rendered = _render_source(source, data, renderer, progress, annotate)
            progress(summary(rendered))
            if not len(rendered.train):
                raise UserError(
                    f"data.sources: {source.name} has nothing to train on (dropped: {counts_text(rendered.dropped)}; "
                    f"held out: {len(rendered.heldout)}); remove the source or check its files and filters"
                )
            loaded.append(rendered)
    return loaded


class _Part:
    """The train or the held-out part of a source, as it grows."""

    def __init__(self, source: Source, annotate: bool):
        self.examples = Pairs(annotate) if source.format == PAIRS else Examples(annotate)
        self.ids: list[str] = []

    def add(self, name: str, rendered: Sequence[Columns]) -> int:
        """Adds the sequences of a trajectory, or the two sides of a pair. Returns the number of new examples."""
        if isinstance(self.examples, Pairs):
            self.examples.append(*rendered)
            self.ids.append(name)
            return 1
        for sequence in rendered:
            self.examples.append(sequence)
            self.ids.append(name)
        return len(rendered)


class _SourceParts:
    """The parts and counts of a source that is being read."""

    def __init__(self, source: Source, data: Data, annotate: bool):
        self._source, self._data = source, data
        self.train, self.heldout = _Part(source, annotate), _Part(source, annotate)
        self.trajectories: list[Any] | None = [] if annotate or data.augment.active else None
        self.dropped, self.repaired, self.changed = Counter[str](), Counter[str](), Counter[str]()
        self.spelled, self.first_spelled = 0, ""
        """Number of trajectories that spell a mark of the format, and the first of them."""
        self._samples: list[tuple[int, str, Trajectory]] = []  # a heap, the last to be taken on top

    def add(self, item: Item, fitted: "Ready") -> None:
        """Adds an item to the part that it belongs to, or counts it as dropped."""
        self.repaired.update(repair.reason for repair in item.repairs)
        match item.trajectory:
            case Filtered(reason):
                self.dropped[reason] += 1
            case InvalidTrajectory(reason=reason, detail=detail):
                self._drop(item.where, [reason], detail)
            case _ if not fitted.rendered:
                self._drop(item.where, fitted.reasons, fitted.detail)
            case Trajectory() | Pair() as whole:
                self.changed.update(fitted.reasons)
                if fitted.unreadable:
                    _check_readable(item.where, fitted.unreadable, self._data)
                    self.changed[fitted.unreadable.reason] += 1
                if fitted.spelled:
                    self.spelled += 1
                    self.first_spelled = self.first_spelled or f"{item.where}: {fitted.spelled}"
                self._add_example(item.where, _as_rendered(whole, fitted), fitted)

    def _add_example(self, where: str, whole: Trajectory | Pair, fitted: "Ready") -> None:
        name = task(whole.chosen).hex() if isinstance(whole, Pair) else whole.id
        if is_heldout(self._source.name, name, self._data.heldout):
            self.heldout.add(whole.id, fitted.rendered)
            side = whole.chosen if isinstance(whole, Pair) else whole
            heapq.heappush(self._samples, (-_hash(self._source.name, f"sample {whole.id}"), where, side))
            if len(self._samples) > SAMPLES:
                heapq.heappop(self._samples)
        else:
            added = self.train.add(whole.id, fitted.rendered)
            if self.trajectories is not None:
                self.trajectories += fitted.parts if self._data.augment.active else [whole] * added

    def _drop(self, where: str, reasons: Sequence[str], detail: str) -> None:
        for reason in reasons:
            _check_droppable(where, reason, detail, self._data)
            self.dropped[reason] += 1

    def samples(self) -> list[Trajectory]:
        return [side for _, _, side in sorted(self._samples, reverse=True)]


def _render_source(source: Source, data: Data, renderer: "_Renderer", progress: Progress, annotate: bool) -> Loaded:
    parts = _SourceParts(source, data, annotate)
    dataset: dict[str, Any] = {}
    reading = Throughput(source.name, unit="rows", out=progress)
    for item, fitted in renderer.render(sources.read(source, dataset)):
        parts.add(item, fitted)
        reading.add()
    if parts.spelled and renderer.guards:
        progress(
            f"{source.name}: in {parts.spelled} trajectories, text spells a mark of the format (first: "
            f"{parts.first_spelled}); a zero-width space is written in it, in JSON an escape, so that it stays text at "
            "any server"
        )
    elif parts.spelled:
        progress(
            f"{source.name}: warning: in {parts.spelled} trajectories, text spells a mark of the format (first: "
            f"{parts.first_spelled}); training keeps special tokens as text, but a server that tokenizes rendered "
            "prompts reads them as tokens, and other marks are the same for the model in any text"
        )
    return Loaded(
        source=source,
        train=parts.train.examples,
        heldout=parts.heldout.examples,
        ids=parts.train.ids,
        samples=parts.samples(),
        trajectories=parts.trajectories,
        dropped=parts.dropped,
        repaired=parts.repaired,
        changed=parts.changed,
        dataset=dataset or None,
    )


def _as_rendered(whole: Trajectory | Pair, fitted: "Ready") -> Trajectory | Pair:
    """Returns the trajectory or pair without reasoning if it was dropped before rendering."""
    if "reasoning-dropped" not in fitted.reasons:
        return whole
    if isinstance(whole, Trajectory):
        return without_reasoning(whole)
    return replace(whole, chosen=without_reasoning(whole.chosen), rejected=without_reasoning(whole.rejected))


def _check_droppable(where: str, reason: str, detail: str, data: Data) -> None:
    """Raises `UserError` unless the config says that such trajectories are dropped."""
    if reason == "no-loss":  # it is valid, and has nothing to train on
        return
    if reason == "too-long" and data.on_long == "error":
        instead = "choose with data.on_long what becomes of such trajectories: drop, cut or split"
        if data.pairs:  # they stay whole
            instead = "drop such pairs with data.on_long=drop"
        raise UserError(
            f"{where}: {reason}: {detail}; data.sequence_length is {data.sequence_length}: raise it, or {instead}"
        )
    if reason != "too-long" and data.on_invalid == "error":
        raise UserError(f"{where}: {reason}: {detail}; correct the line, or drop such lines with data.on_invalid=drop")


def _check_readable(where: str, turn: Unreadable, data: Data) -> None:
    """Raises `UserError` for a call that a server would parse differently, unless the config allows it."""
    if turn.reason == "unreadable-call" and data.unreadable_calls == "error":
        raise UserError(
            f"{where}: {turn.reason}: {turn.detail}; a server would not return the call that is trained: use "
            "data.format=xlam, another chat template, or train it nevertheless with data.unreadable_calls=allow"
        )


class Ready(NamedTuple):
    """The result for a trajectory or a pair: `lengths.Fitted` with the columns that training keeps of each sequence."""

    rendered: list[Columns]
    reasons: list[str]
    parts: list[Trajectory]
    detail: str
    unreadable: Unreadable | None = None
    """The first turn that a server would parse differently."""
    spelled: str = ""
    """The first mark of the format that a text spells."""


_NOTHING = Ready([], [], [], "")


class _Renderer:
    """Renders trajectories in order: the first in this process, those after them in several."""

    def __init__(self, tokenizer: Any, data: Data, annotate: bool):
        self._work = _Work(tokenizer, data, annotate)
        self._rendered = 0
        self._pool: ProcessPoolExecutor | None = None
        self.guards = bool(codec_and_format(tokenizer, data.format)[1].marks)
        """Whether the format keeps marks out of content."""

    def __enter__(self) -> "_Renderer":
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool:
            self._pool.shutdown(cancel_futures=True)

    def render(self, items: Iterator[Item]) -> Iterator[tuple[Item, Ready]]:
        """Yields each item with its rendered sequences; nothing for an item without a trajectory."""
        while PROCESSES == 1 or self._rendered < ALONE:
            item = next(items, None)
            if item is None:
                return
            trajectory = _trajectory(item)
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
                    waiting.append((batch, self._pool.submit(_run, [_trajectory(item) for item in batch])))
                if not waiting:
                    return
                if not batch or len(waiting) > 4 * PROCESSES:
                    done, future = waiting.popleft()
                    yield from zip(done, future.result(), strict=True)
        except BrokenProcessPool:
            raise UserError(
                "a process that rendered trajectories ended early; is there enough memory for "
                f"{PROCESSES} of them? A script that calls this needs `if __name__ == '__main__':`"
            ) from None


class _Work(NamedTuple):
    """The settings that a process needs to render."""

    tokenizer: Any
    data: Data
    annotate: bool

    def __call__(self, whole: Trajectory | Pair | None) -> Ready:
        """Renders, and omits spans and trajectories, which are slow to send, unless they are needed."""
        if whole is None:
            return _NOTHING
        codec, format_ = codec_and_format(self.tokenizer, self.data.format)
        fitted = (fit_pair if isinstance(whole, Pair) else fit)(whole, self.tokenizer, self.data)  # pyright: ignore
        rendered = [make_columns(sequence, self.annotate) for sequence in fitted.rendered]
        parts = fitted.parts if self.data.augment.active else []
        marks = format_.marks.pattern if format_.marks else added_tokens(codec)
        spelled = _spelled(whole, marks) if rendered else ""
        return Ready(rendered, fitted.reasons, parts, fitted.detail, self._unreadable(whole, fitted), spelled)

    def _unreadable(self, whole: Trajectory | Pair, fitted: Fitted) -> Unreadable | None:
        """Returns the first turn that a server would parse differently."""
        wire = codec_and_format(self.tokenizer, self.data.format)[1].wire
        decode = partial(self.tokenizer.decode, skip_special_tokens=False)
        # turns in the spans of a part are those of the whole trajectory
        of = fitted.parts if isinstance(whole, Pair) else [whole] * len(fitted.rendered)
        turns = (unreadable_turn(*pair, wire, decode) for pair in zip(fitted.rendered, of, strict=True))
        return next((turn for turn in turns if turn), None)


def _spelled(whole: Trajectory | Pair, marks: re.Pattern[str]) -> str:
    """Describes the first mark that a trajectory or a pair spells."""
    sides = (whole.chosen, whole.rejected) if isinstance(whole, Pair) else (whole,)
    return next((spelled for side in sides if (spelled := spelled_mark(side, marks))), "")


_worker: _Work


def _start(work: _Work) -> None:
    global _worker
    _worker = work


def _run(trajectories: list[Trajectory | Pair | None]) -> list[Ready]:
    return [_worker(trajectory) for trajectory in trajectories]


def _trajectory(item: Item) -> Trajectory | Pair | None:
    return item.trajectory if isinstance(item.trajectory, Trajectory | Pair) else None
