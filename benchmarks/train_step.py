"""Compares the time of our training step with `transformers` + torch for one tiny Mixtral on the CPU.

The variants take turns in one run. Each has its own process (in a shared process, thread pools slow each other down),
with the same threads, allocator setting, seeded batches and step: loss, gradients, clipping, AdamW.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from _worker import BATCH, LENGTH

from xlam_jax.cli import run
from xlam_jax.errors import UserError


class Variant(NamedTuple):
    """An implementation of the step: its worker's `module:class`, and its precisions."""

    worker: str
    precisions: tuple[str, ...] = ("f32", "bf16")
    f32_parameters: bool = True


VARIANTS = {
    "ours": Variant("_ours:Worker"),
    "eager": Variant("_torch_mixtral:Eager"),
    "grouped": Variant("_torch_mixtral:Grouped"),
    "eager-compiled": Variant("_torch_mixtral:EagerCompiled"),
    "grouped-compiled": Variant("_torch_mixtral:GroupedCompiled"),
    "grouped-copy-compiled": Variant("_torch_mixtral:GroupedCopyCompiled", ("bf16",)),
    "grouped-pure-compiled": Variant("_torch_mixtral:GroupedPureCompiled", ("bf16",), f32_parameters=False),
}


class Process:
    """A worker's process, and the seconds of its steps."""

    def __init__(self, name: str, precision: str, stack: ExitStack) -> None:
        self.name, self.precision = name, precision
        self.seconds: list[float] = []
        self.loss = float("nan")
        command = [sys.executable, str(Path(__file__).with_name("_worker.py")), VARIANTS[name].worker, precision]
        pipe = subprocess.PIPE
        self.popen = stack.enter_context(
            subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=os.environ | environment())
        )
        self.versions: dict[str, str] = self.answer()

    def answer(self) -> dict[str, Any]:
        """Returns the worker's next line."""
        assert self.popen.stdout
        line = self.popen.stdout.readline()
        if not line:
            raise UserError(f"the worker of '{self.name}' in {self.precision} stopped; its message is above")
        return json.loads(line)

    def steps(self, count: int) -> None:
        """Lets the worker run `count` timed steps."""
        print(count, file=self.popen.stdin, flush=True)
        answer = self.answer()
        self.seconds += answer["seconds"]
        self.loss = answer["loss"]

    def result(self) -> dict[str, Any]:
        """Returns tokens per second over all the steps so far, and the latest loss."""
        speeds = [BATCH * LENGTH / seconds for seconds in self.seconds]
        return {
            "variant": self.name,
            "precision": self.precision,
            "median": median(speeds),
            "min": min(speeds),
            "max": max(speeds),
            "loss": self.loss,
            "seconds": self.seconds,
        }


def cores() -> int:
    """Returns the number of cores that this process may use, as limited by `taskset`."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def environment() -> dict[str, str]:
    """Returns the environment variables of every worker."""
    return {
        "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",  # XLA allocates new buffers in each step; no effect on torch
        "OMP_NUM_THREADS": str(cores()),
        "JAX_PLATFORMS": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "TORCHINDUCTOR_COMPILE_THREADS": "1",  # no pool of compiler processes that stays alive
    }


def machine() -> dict[str, str]:
    """Returns properties of the machine that affect the timings."""
    cpuinfo = Path("/proc/cpuinfo").read_text() if sys.platform == "linux" else ""
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in cpuinfo.splitlines())}
    flags = [flag for flag in fields.get("flags", "").split() if "bf16" in flag]
    return {
        "cpu": fields.get("model name") or platform.processor(),
        "cores": str(cores()),
        "bf16 instructions": " ".join(flags) or "none seen",
        "python": platform.python_version(),
    }


def measure(names: list[str], precision: str, rounds: int, steps: int) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Returns each variant's result in one precision, and the versions of the libraries used."""
    with ExitStack() as stack:
        processes: list[Process] = []
        for name in names:
            print(f"{precision}: starting {name}", file=sys.stderr)
            try:
                processes.append(Process(name, precision, stack))
            except UserError as error:
                if name == "ours":
                    raise
                print(f"{error}; continuing without it", file=sys.stderr)
        for _ in range(rounds):
            for process in processes:
                process.steps(steps)
        versions = {key: value for process in processes for key, value in process.versions.items()}
        return [process.result() for process in processes], versions


def report(results: list[dict[str, Any]], precision: str) -> dict[str, float]:
    """Prints the table of one precision.

    Returns the ratio of our speed to the fastest torch variant's: among those with float32 parameters, and among all.
    """
    medians = {result["variant"]: result["median"] for result in results}
    ours = medians.pop("ours", None)
    print(f"\n{precision:22} {'tokens/s':>9} {'min':>7} {'max':>7} {'loss':>7}  ours is")
    for result in results:
        ratio = f"{ours / result['median']:6.2f}×" if ours else ""
        row = f"{result['variant']:22} {result['median']:9.0f} {result['min']:7.0f} {result['max']:7.0f}"
        print(f"{row} {result['loss']:7.3f}  {ratio}")
    groups = {"f32 parameters": [name for name in medians if VARIANTS[name].f32_parameters], "any": list(medians)}
    ratios = {}
    for group, names in groups.items():
        if ours and names:
            best = max(names, key=lambda name: medians[name])
            ratios[group] = ours / medians[best]
            print(f"ours / best torch ({group}: {best}): {ratios[group]:.2f}")
    return ratios


def positive(text: str) -> int:
    """Parses a positive count. Raises `ValueError`."""
    if (number := int(text)) < 1:
        raise ValueError
    return number


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Compare the time of our training step with transformers + torch.")
    parser.add_argument("--rounds", type=positive, default=5, help="number of turns per variant (default: 5)")
    parser.add_argument("--steps", type=positive, default=4, help="timed steps per turn (default: 4)")
    parser.add_argument(
        "--precision", choices=["f32", "bf16", "both"], default="both", help="precision of the computation"
    )
    parser.add_argument(
        "--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="NAME", help=", ".join(VARIANTS)
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every timing to FILE")
    args = parser.parse_args()
    if args.variants != ["ours"] and not (find_spec("torch") and find_spec("transformers")):
        raise UserError("torch is not installed, and the other variants need it; install it: pip install '.[test]'")

    record: dict[str, Any] = {"machine": machine(), "results": [], "ratios": {}}
    precisions = ["f32", "bf16"] if args.precision == "both" else [args.precision]
    for precision in precisions:
        names = [name for name in VARIANTS if name in args.variants and precision in VARIANTS[name].precisions]
        results, versions = measure(names, precision, args.rounds, args.steps)
        record["machine"] |= versions
        record["results"] += results
        record["ratios"][precision] = report(results, precision)
    print("\n" + ", ".join(f"{key} {value}" for key, value in record["machine"].items()))
    if args.json:
        args.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    run(main)
