"""One side of the data benchmark, in a process of its own on one core.

`python _data_worker.py SIDE` answers jobs: a `Job` as a JSON line on stdin, an `Answer` as a JSON line on stdout. Every
job starts from files and a fresh tokenizer; only imported libraries stay.
"""

import gc
import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from time import perf_counter, process_time
from typing import Any, NamedTuple, Protocol, TypedDict

import numpy as np

from xlam_jax.cli import run
from xlam_jax.config import Data

PEER_BATCH = 8
"""Rows a batch in ActionStudio's published scripts for 4096 tokens."""


class Job(TypedDict):
    """What to do: read the sources of `data`, and go on until each number of `passes` over them is emitted."""

    data: dict[str, Any]
    """A `config.Data`; its `sequence_length` is the length of both sides."""
    tokenizer: str
    """Its folder."""
    passes: list[float]
    seed: int
    folder: str
    """An empty folder, for what is made beforehand; removed afterwards."""


class Mark(NamedTuple):
    """How far it got, and what that took from the first read on: CPU seconds, and how long it was under way."""

    passes: float
    trained: int
    processed: int
    seconds: float
    wall: float


class Answer(TypedDict):
    """What a job gave."""

    beforehand: float
    """CPU seconds of what is made once, before training."""
    notes: dict[str, int]
    """Reason → trajectories (on their side rows) left out, cut or split."""
    marks: list[dict[str, Any]]
    """A `Mark` for each number of passes asked for."""


class Side(Protocol):
    """Reads sources and gives batches."""

    notes: Counter[str]

    def __init__(self, data: Data, tokenizer: Path, seed: int, folder: Path) -> None: ...

    def prepare(self) -> None:
        """Makes what is made once, before training."""

    def start(self) -> None:
        """Reads what has to be read before the first batch."""

    def batch(self) -> Any:
        """The next batch."""

    def count(self, batch: Any) -> tuple[int, int]:
        """Labels of the batch that carry loss, and all of its tokens, padding and all."""
        ...

    def passes(self) -> float:
        """Passes over the data that the batches so far make up."""
        ...


class Ours:
    """xlam_jax's loader as the trainer uses it: files to batches."""

    def __init__(self, data: Data, tokenizer: Path, seed: int, folder: Path) -> None:
        from xlam_jax.data import corpus, examples, pipeline, render_sources
        from xlam_jax.data.tokenizer import load_tokenizer

        render_sources.PROCESSES = 1
        self._corpus, self._examples, self._pipeline = corpus, examples, pipeline
        self._data, self._seed, self._folder = data, seed, folder
        self._tokenizer = load_tokenizer(data.tokenizer)
        self._emitted = 0
        self._pass: int | None = None
        self.notes: Counter[str] = Counter()

    def prepare(self) -> None:
        pass

    def start(self) -> None:
        self._loaded = self._corpus.load(self._data, self._tokenizer)
        self._loader = self._pipeline.Loader(
            self._loaded, self._data, batch_size=self._data.streams, seed=self._seed, tokenizer=self._tokenizer
        )

    def batch(self) -> Any:
        return next(self._loader)

    def count(self, batch: Any) -> tuple[int, int]:
        trained = int(np.count_nonzero(batch.weights))
        self._emitted += trained
        return trained, batch.weights.size

    def passes(self) -> float:
        if self._pass is None:
            self._pass = sum(int(self._examples.trained(one.train).sum()) for one in self._loaded)
            for one in self._loaded:
                self.notes.update(one.dropped + one.changed)
        return self._emitted / self._pass


class OursPrepared(Ours):
    """The same with a cache, which `python -m xlam_jax.data prepare` makes beforehand."""

    def prepare(self) -> None:

        self._corpus.prepare(self._folder / "cache", self._data, self._tokenizer)
        self._data = self._data.model_copy(update={"cache": str(self._folder / "cache")})


class ActionStudio:
    """ActionStudio's pipeline; see `_actionstudio.py`."""

    keep_thoughts = False

    def __init__(self, data: Data, tokenizer: Path, seed: int, folder: Path) -> None:
        import _actionstudio

        self._peer = _actionstudio
        self._data, self._seed, self._folder = data, seed, folder
        self._tokenizer = _actionstudio.load_tokenizer(tokenizer)
        self._emitted = 0
        self.notes: Counter[str] = Counter()

    def prepare(self) -> None:
        files = {source.name: [Path(file) for file in source.files] for source in self._data.sources}
        prefix = "[TOOL_CALLS]" if "[TOOL_CALLS]" in self._tokenizer.get_vocab() else ""
        self._sources = self._peer.prepare(files, self._folder, keep_thoughts=self.keep_thoughts, prefix=prefix)

    def start(self) -> None:
        self._rows = self._peer.PaddedRows(self._sources, self._tokenizer, self._data.sequence_length, self._seed)
        self._batches: Iterator[Any] = self._peer.batches(self._rows, PEER_BATCH)

    def batch(self) -> Any:
        return next(self._batches)

    def count(self, batch: Any) -> tuple[int, int]:
        self._emitted += len(batch.labels)
        self.notes = +Counter({"too-long": self._rows.skipped})
        return int((batch.labels != self._peer.IGNORED).sum()), batch.labels.numel()

    def passes(self) -> float:
        return (self._emitted + self._rows.skipped) / sum(self._sources.rows.values())


class ActionStudioWithThoughts(ActionStudio):
    """The same, if it kept the text beside calls: it trains the tokens that we train."""

    keep_thoughts = True


SIDES: dict[str, Callable[[Data, Path, int, Path], Side]] = {
    "ours": Ours,
    "ours-prepared": OursPrepared,
    "ActionStudio": ActionStudio,
    "with-thoughts": ActionStudioWithThoughts,
}


class Clock:
    """Adds up the time spent inside it."""

    def __init__(self) -> None:
        self.seconds = self.wall = 0.0
        """CPU time of this process, all threads; and what passed meanwhile."""

    def __enter__(self) -> "Clock":
        self._began = process_time(), perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds += process_time() - self._began[0]
        self.wall += perf_counter() - self._began[1]


def work(name: str, job: Job) -> Answer:
    """Does one job. Counting is left out of the time."""
    folder = Path(job["folder"])
    side = SIDES[name](Data.model_validate(job["data"]), Path(job["tokenizer"]), job["seed"], folder)
    gc.collect()
    with Clock() as before:
        side.prepare()
    clock, marks = Clock(), []
    trained = processed = 0
    with clock:
        side.start()
    for goal in job["passes"]:
        while not processed or side.passes() < goal:
            with clock:
                batch = side.batch()
            counted = side.count(batch)
            trained, processed = trained + counted[0], processed + counted[1]
        marks.append(Mark(side.passes(), trained, processed, clock.seconds, clock.wall))
    shutil.rmtree(folder)
    return {"beforehand": before.seconds, "notes": side.notes, "marks": [mark._asdict() for mark in marks]}


def serve(name: str) -> None:
    """Does jobs until stdin closes."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints goes to stderr, not among the answers
    for line in sys.stdin:
        print(json.dumps(work(name, json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    run(lambda: serve(sys.argv[1]))
