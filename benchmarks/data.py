"""Compares our data loader with a re-creation of ActionStudio's, on the same files, tokenizer and core.

Two figures per sequence length, for the mixture of all sources and for each source:

- trained tokens per processed token: labels that contribute to the loss, divided by all tokens of the batches, padding
  included. In one pass over the data, either side emits each assistant turn once.
- trained tokens per CPU second: the same labels, divided by the CPU time of the side's process, which is pinned to one
  core, from the first read of the files to the batch that completes the pass. Imports, loading the tokenizer and
  one-time preparation are excluded; the last is printed separately. Each round starts from the files.

Every source has its natural size in the mixture (1 epoch), as in ActionStudio's recipe; nothing is held out.
`with-thoughts` is a variant of ActionStudio's pipeline that keeps the text next to calls, which the original drops. It
trains the same tokens as ours, and also turns with `loss: false`.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from time import process_time
from typing import Any, NamedTuple

from _data_worker import SIDES, Answer, Job
from train_step import machine, positive

from xlam_jax import config as configs
from xlam_jax.cli import run
from xlam_jax.config import Data, Source
from xlam_jax.data import tokenizer as tokenizers
from xlam_jax.errors import UserError

MIXTURE = "mixture"


class Process:
    """The process of one side."""

    def __init__(self, name: str, scratch: Path, stack: ExitStack) -> None:
        self.name = name
        self._scratch = scratch
        worker = Path(__file__).with_name("_data_worker.py")
        self._popen = stack.enter_context(
            subprocess.Popen(
                [sys.executable, str(worker), name],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=os.environ | environment(scratch),
            )
        )

    def work(self, data: Data, passes: list[float], seed: int) -> Answer:
        """Sends a job to the side. Returns its answer."""
        job = Job(
            data=data.model_dump(),
            tokenizer=str(self._scratch / "tokenizer"),
            passes=passes,
            seed=seed,
            folder=tempfile.mkdtemp(dir=self._scratch),
        )
        assert self._popen.stdin is not None
        assert self._popen.stdout is not None
        print(json.dumps(job), file=self._popen.stdin, flush=True)
        line = self._popen.stdout.readline()
        if not line:
            raise UserError(f"the process of '{self.name}' stopped; its message is above")
        return json.loads(line)


class Line(NamedTuple):
    """One line of a table: figures of one side after a number of passes, over all rounds."""

    mix: str
    length: int
    side: str
    passes: float
    trained: int
    density: float
    """Trained tokens per processed token in the first round; the other rounds repeat its batches."""
    speeds: list[float]
    """Trained tokens per CPU second, one figure per round."""
    walls: list[float]
    """Trained tokens per second of wall time; on an idle machine a few percent below `speeds`."""
    beforehand: float
    """CPU seconds of one-time preparation, median."""
    notes: dict[str, int]
    """Reason → number of dropped, cut or split trajectories (rows of the other side)."""


def environment(scratch: Path) -> dict[str, str]:
    """Returns the environment variables of every side: one thread, and caches in the temporary folder."""
    return {
        "TOKENIZERS_PARALLELISM": "false",  # as in ActionStudio's train_sft.py
        "OMP_NUM_THREADS": "1",
        "JAX_PLATFORMS": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_DATASETS_CACHE": str(scratch / "datasets"),
    }


def natural_mixture(data: Data, files: Iterable[Path]) -> Data:
    """Returns the config's data with every source at one epoch per pass, and nothing held out.

    `files`: replace the config's sources. Raises `UserError` for a source that the other side cannot read.
    """
    sources = [Source(name=file.stem, files=[str(file)]) for file in files] or data.sources
    for source in sources:
        plain = source == Source(name=source.name, files=source.files, weight=source.weight, epochs=source.epochs)
        if not plain or not all(file.endswith(".jsonl") for file in source.files):
            raise UserError(
                f"source {source.name}: ActionStudio's side reads only whole .jsonl files of unified trajectories; "
                "convert the source, and pass the file with --files"
            )
        for file in source.files:
            if not Path(file).is_file():
                raise UserError(
                    f"source {source.name}: no file {file}; run this in the folder that the path is relative to"
                )
    if len({source.name for source in sources}) < len(sources):
        raise UserError("two sources have the same name; rename one of the files")
    sources = [Source(name=source.name, files=source.files, epochs=1) for source in sources]
    return data.model_copy(update={"sources": sources, "heldout": 0.0, "cache": None})


def measure(processes: list[Process], mix: str, data: Data, args: argparse.Namespace) -> list[Line]:
    """Lets all sides take turns with one mixture at one length. Returns a line per number of passes and side."""
    answers: dict[str, list[Answer]] = {process.name: [] for process in processes}
    for number in range(args.rounds):
        first_side = number % len(processes)
        for process in processes[first_side:] + processes[:first_side]:
            answers[process.name].append(process.work(data, args.passes, args.seed))
    return [
        Line(
            mix,
            data.sequence_length,
            side,
            first["passes"],
            first["trained"],
            first["trained"] / first["processed"],
            [answer["marks"][goal]["trained"] / answer["marks"][goal]["seconds"] for answer in all_rounds],
            [answer["marks"][goal]["trained"] / answer["marks"][goal]["wall"] for answer in all_rounds],
            median(answer["beforehand"] for answer in all_rounds),
            all_rounds[0]["notes"],
        )
        for goal in range(len(args.passes))
        for side, all_rounds in answers.items()
        for first in [all_rounds[0]["marks"][goal]]
    ]


def report(lines: list[Line]) -> None:
    """Prints the table of one mixture at one length after one number of passes."""
    ours = lines[0] if lines[0].side == "ours" else None
    print(f"\n{lines[0].mix}, {lines[0].length} tokens per row")
    print(
        f"{'':14} {'passes':>6} {'trained':>8} {'/processed':>10} {'ours is':>8} "
        f"{'/core·s':>8} {'min':>7} {'max':>7} {'ours is':>8} {'beforehand':>10}"
    )
    for line in lines:
        speed = median(line.speeds)
        ratios = ("", "")
        if ours and not line.side.startswith("ours"):
            ratios = (f"{ours.density / line.density:.1f}×", f"{median(ours.speeds) / speed:.1f}×")
        notes = ", ".join(f"{number} {reason}" for reason, number in sorted(line.notes.items()))
        print(
            f"{line.side:14} {line.passes:6.2f} {line.trained:8} {line.density:10.4f} {ratios[0]:>8} "
            f"{speed:8.0f} {min(line.speeds):7.0f} {max(line.speeds):7.0f} {ratios[1]:>8} {line.beforehand:8.2f} s"
            + (f"  ({notes})" if notes else "")
        )


def resume(data: Data, positions: list[int], seed: int) -> list[dict[str, Any]]:
    """Measures how long our loader takes to resume after each number of trajectories, with the data already loaded.

    Prints a table, and returns its rows.
    """
    from xlam_jax.data import corpus, pipeline

    tokenizer = tokenizers.open_tokenizer(data)
    loaded = corpus.load(data, tokenizer)

    def make() -> pipeline.Loader:
        return pipeline.Loader(loaded, data, batch_size=data.streams, seed=seed, tokenizer=tokenizer)

    def count(batch: pipeline.Row) -> int:
        return int(batch.segments.max(axis=-1).sum())

    loader, trajectories, batches, rows = make(), 0, 0, []
    print(f"\n{'resume after':>14} {'batches':>8} {'state':>8} {'next batch after':>17}")
    for position in positions:
        while trajectories < position:
            trajectories += count(next(loader))
            batches += 1
        state = json.dumps(loader.state())
        start = process_time()
        restored = make()
        restored.restore(json.loads(state))
        batch = next(restored)
        seconds = process_time() - start
        expected = next(loader)
        assert all((array == original).all() for array, original in zip(batch[:6], expected[:6], strict=True))
        print(f"{trajectories:14} {batches:8} {len(state):6} B {seconds:15.3f} s")
        rows.append({"trajectories": trajectories, "batches": batches, "state": len(state), "seconds": seconds})
        trajectories, batches = trajectories + count(batch), batches + 1
    return rows


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    result = argparse.ArgumentParser(
        description="Compare our data loader with a re-creation of ActionStudio's on one core.",
        epilog=(__doc__ or "").partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    result.add_argument(
        "--config", type=Path, default=Path("configs/quickstart.yaml"), metavar="FILE.yaml", help="config of the data"
    )
    result.add_argument(
        "--files",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE.jsonl",
        help="files of unified trajectories, one source each, instead of the config's; write overrides before this "
        "option",
    )
    result.add_argument("--rounds", type=positive, default=5, help="number of turns per side (default: 5)")
    result.add_argument(
        "--lengths", type=positive, nargs="+", default=[4096], metavar="TOKENS",
        help="row lengths of both sides (default: 4096; ActionStudio uses 4096 for LoRA, and 16384 for all parameters)",
    )  # fmt: skip
    result.add_argument(
        "--passes", type=positive, nargs="+", default=[1, 3], metavar="N",
        help="numbers of passes after which to report (default: 1 3; we tokenize once, ActionStudio in every pass)",
    )  # fmt: skip
    result.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES), metavar="SIDE", help=", ".join(SIDES))
    result.add_argument(
        "--only", nargs="+", metavar="NAME", help=f"measure only these sources, or {MIXTURE} (default: all)"
    )
    result.add_argument(
        "--resume", type=positive, nargs="+", default=[100, 3000], metavar="N",
        help="numbers of trajectories after which to measure how long our loader takes to resume (default: 100 3000)",
    )  # fmt: skip
    result.add_argument("--seed", type=int, default=0, help="random seed (default: 0)")
    result.add_argument("--json", type=Path, metavar="FILE", help="write every figure to FILE")
    result.add_argument("overrides", nargs="*", metavar="section.key=value", help="config fields to set")
    return result


def main() -> None:
    """The command line."""
    args = parser().parse_intermixed_args()
    args.passes.sort()
    missing = [name for name in ("torch", "datasets") if not find_spec(name)]
    if missing and args.sides != ["ours"]:
        raise UserError(f"{' and '.join(missing)} not installed; the other side needs it: pip install '.[test]'")

    data = natural_mixture(configs.load(args.config, args.overrides).config.data, args.files)
    mixes = {MIXTURE: data.sources} | {source.name: [source] for source in data.sources}
    if unknown := set(args.only or []) - mixes.keys():
        raise UserError(f"--only: no source is named {', '.join(sorted(unknown))}; there are {', '.join(mixes)}")
    record: dict[str, Any] = {"machine": machine(), "config": data.model_dump(), "lines": []}
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        tokenizers.save(tokenizers.open_tokenizer(data), Path(scratch) / "tokenizer", data.format)
        processes = [Process(name, Path(scratch), stack) for name in SIDES if name in args.sides]
        smallest = min(data.sources, key=lambda source: sum(Path(file).stat().st_size for file in source.files))
        for process in processes:  # warms up libraries
            process.work(data.model_copy(update={"sources": [smallest], "sequence_length": args.lengths[0]}), [0], 0)
        for length in args.lengths:
            for mix in args.only or mixes:
                job = data.model_copy(update={"sources": mixes[mix], "sequence_length": length})
                lines = measure(processes, mix, job, args)
                record["lines"] += [line._asdict() for line in lines]
                for start in range(0, len(lines), len(processes)):
                    report(lines[start : start + len(processes)])
    if "ours" in args.sides:
        longest = data.model_copy(update={"sequence_length": max(args.lengths)})
        record["resume"] = resume(longest, sorted(args.resume), args.seed)
    print("\n" + ", ".join(f"{key} {value}" for key, value in record["machine"].items()))
    if args.json:
        args.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    run(main)
