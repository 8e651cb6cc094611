"""What both sides of the training-step benchmark share, and the process one side runs in.

`python _worker.py MODULE:CLASS PRECISION` builds `CLASS(PRECISION)`, which compiles and warms up, answers a JSON line,
and then times steps on request: a line holding a number of steps on stdin, a line `{"seconds": […], "loss": …}` on
stdout. Between requests it is blocked on a read, so it leaves the cores to the side whose turn it is.
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
    """One side of the benchmark, in one precision: compiled and warm once built."""

    versions: dict[str, str]  # of the libraries it runs on
    loss: float  # of the latest step

    def __init__(self, precision: str) -> None: ...

    def steps(self, count: int) -> list[float]:
        """Takes `count` whole training steps, each to its end, and returns the seconds each took."""
        ...


def batches() -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields inputs and their next tokens, each [BATCH, LENGTH]: eight seeded batches, over and over."""
    tokens = np.random.default_rng(0).integers(0, MODEL["vocab_size"], (8, BATCH, LENGTH + 1))
    return cycle([(np.ascontiguousarray(t[:, :-1]), np.ascontiguousarray(t[:, 1:])) for t in tokens])


def serve(target: str, precision: str) -> None:
    """Builds the worker named by `target` and answers requests until stdin closes."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints goes to stderr, not among the answers
    module, name = target.split(":")
    worker: Worker = getattr(importlib.import_module(module), name)(precision)
    print(json.dumps(worker.versions), file=answers, flush=True)
    for line in sys.stdin:
        worker.steps(1)  # the other side had the caches
        seconds = worker.steps(int(line))
        print(json.dumps({"seconds": seconds, "loss": worker.loss}), file=answers, flush=True)


if __name__ == "__main__":
    serve(sys.argv[1], sys.argv[2])
