"""Runs of every kind that are killed repeatedly at random moments end like uninterrupted ones."""

import os
import random
import signal
import sys
import time
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
from small_pairs import write_config, write_pairs
from support import assert_same_run
from test_adapters import LORA, QLORA
from test_train import TRAIN

from xlam_jax import cli, train

KILLS = 15
"""Of each kind of run: sixty in all."""
STEPS = 60
START_UP = ("held out, dropped", " parameters", "compiled the step")
"""Lines of every start."""
KINDS = {"full": (), "lora": LORA, "qlora": QLORA, "dpo": ()}
IMPORTED = (
    "core_only.sitecustomize", "transformers", "grain", "grain.experimental", "jax", "optax", "orbax.checkpoint.v1",
    "xlam_jax.train", "xlam_jax.data.corpus", "xlam_jax.training.trainer", "converters.hf_to_orbax",
)  # fmt: skip
"""What takes most of the time of a start, imported once: each start is a fork of the process that has imported it."""


class Lines:
    """A stderr that sends its text through a connection."""

    def __init__(self, connection: Connection):
        self._connection = connection

    def write(self, text: str) -> int:
        self._connection.send(text)
        return len(text)

    def flush(self) -> None:
        """Does nothing: there is no buffer."""

    def isatty(self) -> bool:
        return False


def run_training(arguments: list[str], connection: Connection) -> None:
    """Runs the training command in a separate process."""
    os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"  # otherwise it would restart itself, without the imports
    sys.argv = [TRAIN, *arguments]
    sys.stderr = Lines(connection)  # pyright: ignore[reportAttributeAccessIssue]
    cli.run(train.main)


def train_forked(arguments: list[str], kill: tuple[str, int, float] | None = None) -> str:
    """Runs a training command to its end, or kills it: (text, count, delay) means `delay` seconds after its stderr has
    had the text for the `count`-th time. Returns its stderr until then."""
    context = get_context("forkserver")
    context.set_forkserver_preload(list(IMPORTED))
    parent_end, child_end = context.Pipe(duplex=False)
    process = context.Process(target=run_training, args=(arguments, child_end))
    process.start()
    child_end.close()
    said = ""
    while kill is None or said.count(kill[0]) < kill[1]:
        try:
            said += parent_end.recv()
        except EOFError:  # it has ended by itself
            break
    if kill:
        time.sleep(kill[2])
        process.kill()
    process.join()
    assert process.exitcode == (-signal.SIGKILL if kill else 0), said
    return said


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_random_kills_change_no_bit(kind: str, tiny_config: Path, tmp_path: Path):
    draw = random.Random(kind)
    config = tiny_config
    if kind == "dpo":
        config = write_config(tmp_path, write_pairs(tmp_path / "pairs.jsonl"))
    common = (
        "--config", str(config), f"train.steps={STEPS}", "checkpoint.every=2", "eval.every=15", "eval.requests=2",
        "eval.requests_every=15", "eval.max_new_tokens=4", *KINDS[kind],
    )  # fmt: skip
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train_forked([*common, f"output_dir={whole}"])
    resumed = 0
    for _ in range(KILLS):
        at, count = f"/{STEPS}  loss", draw.randint(2, 4)  # in most cases, a step was saved
        if draw.random() < 0.25:
            at, count = draw.choice(START_UP), 1
        said = train_forked([*common, f"output_dir={killed}"], kill=(at, count, draw.random() * 0.05))
        resumed += "continuing" in said
    train_forked([*common, f"output_dir={killed}"])
    assert resumed > KILLS / 2
    assert_same_run(whole, killed)
    for file in (whole / "reference").glob("*"):
        assert file.read_bytes() == (killed / "reference" / file.name).read_bytes()
