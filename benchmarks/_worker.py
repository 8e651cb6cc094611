"""Settings of both sides of the training-step benchmark, and the process that runs one side.

`python _worker.py MODULE:CLASS PRECISION` builds `CLASS(PRECISION)`, which compiles and warms up, prints a JSON line
with versions, and then times steps on request: it reads a number of steps from stdin, and prints
`{"seconds": […], "loss": …}`. Between requests it blocks on a read, so that the other side has all cores.
"""

import importlib
import json
import os
import sys
from collections.abc import Iterator
from itertools import cycle
from typing import Protocol

import numpy as np

MODEL = {
    "vocab_size": 2048,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "tie_word_embeddings": False,
    "router_aux_loss_coef": 0.02,
}
BATCH, LENGTH = 4, 512
LEARNING_RATE, WEIGHT_DECAY, CLIP_NORM = 1e-4, 0.01, 1.0  # AdamW: betas 0.9 and 0.999, epsilon 1e-8


class Worker(Protocol):
    """One side of the benchmark in one precision; construction compiles it and warms it up."""

    versions: dict[str, str]  # versions of its libraries
    loss: float  # loss of the latest step

    def __init__(self, precision: str) -> None: ...

    def steps(self, count: int) -> list[float]:
        """Runs `count` training steps, each to completion. Returns the seconds of each."""
        ...


def batches() -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields inputs and their next tokens, each int64 [BATCH, LENGTH]; repeats eight seeded batches."""
    tokens = np.random.default_rng(0).integers(0, MODEL["vocab_size"], (8, BATCH, LENGTH + 1))
    return cycle([(np.ascontiguousarray(t[:, :-1]), np.ascontiguousarray(t[:, 1:])) for t in tokens])


def serve(target: str, precision: str) -> None:
    """Builds the worker of `target`, MODULE:CLASS, and answers requests until stdin closes."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # redirects output of libraries to stderr
    module, name = target.split(":")
    worker: Worker = getattr(importlib.import_module(module), name)(precision)
    print(json.dumps(worker.versions), file=answers, flush=True)
    for line in sys.stdin:
        worker.steps(1)  # refills the caches, which the other side used
        seconds = worker.steps(int(line))
        print(json.dumps({"seconds": seconds, "loss": worker.loss}), file=answers, flush=True)


if __name__ == "__main__":
    serve(sys.argv[1], sys.argv[2])
