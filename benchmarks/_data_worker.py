"""One side of the data benchmark, in a separate process on one core.

`python _data_worker.py SIDE` reads each `Job` as a JSON line from stdin, and prints its `Answer` as a JSON line. Every
job starts from the files and a new tokenizer; only imported libraries are reused.
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
"""Rows per batch in ActionStudio's published scripts for 4096 tokens."""


class Job(TypedDict):
    """A measurement: read the sources of `data`, and emit batches until the last of `passes` is complete."""

    data: dict[str, Any]
    """Fields of a `config.Data`; `sequence_length` is the row length of both sides."""
    tokenizer: str
    """Folder of the tokenizer."""
    passes: list[float]
    """Increasing numbers of passes over the data, each of which gives a `Mark`."""
    seed: int
    folder: str
    """Empty folder for prepared data; removed afterwards."""


class Mark(NamedTuple):
    """Progress after a number of passes, since the first read of the files."""

    passes: float
    trained: int
    """Labels that contribute to the loss."""
    processed: int
    """All tokens of the batches, padding included."""
    seconds: float
    """CPU time."""
    wall: float
    """Wall time in seconds."""


class Answer(TypedDict):
    """The result of a job."""

    beforehand: float
    """CPU seconds of one-time preparation."""
    notes: dict[str, int]
    """Reason → number of dropped, cut or split trajectories (rows of the other side)."""
    marks: list[dict[str, Any]]
    """A `Mark` for each number of passes."""


class Side(Protocol):
    """A data loader: reads sources and emits batches."""

    notes: Counter[str]

    def __init__(self, data: Data, tokenizer: Path, seed: int, folder: Path) -> None: ...

    def prepare(self) -> None:
        """Prepares the data once, before training."""

    def start(self) -> None:
        """Reads the data that the first batch needs."""

    def batch(self) -> Any:
        """Returns the next batch."""

    def count(self, batch: Any) -> tuple[int, int]:
        """Returns the number of labels that contribute to the loss, and of all tokens, padding included."""
        ...

    def passes(self) -> float:
        """Returns the number of passes over the data that the batches so far amount to."""
        ...


class Ours:
    """The loader of xlam_jax as the trainer uses it, from files to batches."""

    def __init__(self, data: Data, tokenizer: Path, seed: int, folder: Path) -> None:
        from xlam_jax.data import corpus, examples, pipeline, render_sources
        from xlam_jax.data.tokenizer import open_tokenizer

        render_sources.PROCESSES = 1
        self._corpus, self._examples, self._pipeline = corpus, examples, pipeline
        self._data, self._seed, self._folder = data, seed, folder
        self._tokenizer = open_tokenizer(data)
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
            self._pass = sum(int(self._examples.trained(source.train).sum()) for source in self._loaded)
            for source in self._loaded:
                self.notes.update(source.dropped + source.changed)
        return self._emitted / self._pass


class OursPrepared(Ours):
    """The same loader with a cache, as `python -m xlam_jax.data prepare` writes it."""

    def prepare(self) -> None:

        self._corpus.prepare(self._folder / "cache", self._data, self._tokenizer)
        self._data = self._data.model_copy(update={"cache": str(self._folder / "cache")})


class ActionStudio:
    """The re-creation of ActionStudio's pipeline in `_actionstudio.py`."""

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
    """The same pipeline, which also keeps the text next to calls, so that it trains the same tokens as ours."""

    keep_thoughts = True


SIDES: dict[str, Callable[[Data, Path, int, Path], Side]] = {
    "ours": Ours,
    "ours-prepared": OursPrepared,
    "ActionStudio": ActionStudio,
    "with-thoughts": ActionStudioWithThoughts,
}


class Clock:
    """Context manager that accumulates the time spent in it."""

    def __init__(self) -> None:
        self.seconds = self.wall = 0.0
        """CPU time of all threads of this process, and wall time, in seconds."""

    def __enter__(self) -> "Clock":
        self._start = process_time(), perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds += process_time() - self._start[0]
        self.wall += perf_counter() - self._start[1]


def work(name: str, job: Job) -> Answer:
    """Runs a job on one side. The time of counting is excluded."""
    folder = Path(job["folder"])
    side = SIDES[name](Data.model_validate(job["data"]), Path(job["tokenizer"]), job["seed"], folder)
    gc.collect()
    with Clock() as preparation:
        side.prepare()
    clock, marks = Clock(), []
    trained = processed = 0
    with clock:
        side.start()
    for goal in job["passes"]:
        while not processed or side.passes() < goal:
            with clock:
                batch = side.batch()
            new_trained, new_processed = side.count(batch)
            trained, processed = trained + new_trained, processed + new_processed
        marks.append(Mark(side.passes(), trained, processed, clock.seconds, clock.wall))
    shutil.rmtree(folder)
    return {"beforehand": preparation.seconds, "notes": side.notes, "marks": [mark._asdict() for mark in marks]}


def serve(name: str) -> None:
    """Runs jobs until stdin closes."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # redirects output of libraries to stderr
    for line in sys.stdin:
        print(json.dumps(work(name, json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    run(lambda: serve(sys.argv[1]))
