"""Saves the checkpoints of a run in the background, and decides which of them are kept. Orbax writes them."""

import contextlib
import errno
import json
import math
import shutil
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np

from xlam_jax import errors
from xlam_jax.enums import STEPS_FOLDER
from xlam_jax.errors import UserError
from xlam_jax.models.families import stacked_axes
from xlam_jax.outputs import write_text
from xlam_jax.weights.checkpoint import (
    ARRAYS,
    DIGEST,
    EVALUATION,
    FILES,
    METADATA,
    METRICS,
    DamagedError,
    checksums,
    file_digests,
    is_step,
    load_metadata,
    metadata_digest,
    named_leaves,
    whole_steps,
)
from xlam_jax.weights.checkpoint.arrays import system_error
from xlam_jax.weights.checkpoint.quiet_orbax import ocp

LARGE = 2**24
"""Minimum size in bytes of parameters that are stored layer by layer; smaller ones have one chunk per device shard."""


class Checkpoints:
    """Saves the checkpoints of one run in the background. Keeps the newest `keep` of them, and the one whose metric
    `best` is the best."""

    def __init__(self, run: Path, *, keep: int, metadata: dict[str, Any], best: str | None = None):
        _silence_orbax_threads()
        self._folder = run / STEPS_FOLDER
        self._metadata = metadata
        self._files = file_digests(run)
        self._best, self._keep = best, keep
        self._orbax = ocp.training.Checkpointer(
            str(self._folder.absolute()),
            preservation_policy=self,
            step_name_format=_StepNames(),
            cleanup_tmp_directories=True,
        )
        self._saving: Any = None
        """Orbax's response to the last save. Its event loop stays open until its result is read."""
        self._metrics = {info.step: _saved_metrics(self._folder / str(info.step), info) for info in self._infos()}

    def steps(self) -> list[int]:
        """Returns the complete steps that are kept, in order."""
        return sorted(info.step for info in self._infos())

    def best(self) -> tuple[int, float] | None:
        """Returns the step with the best metric, and the metric; None if no kept step has one."""
        return self._best_of(self.steps())

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Orbax's callback: returns for each of the steps whether it is kept."""
        kept = self._kept([info.step for info in checkpoints])
        return [info.step in kept for info in checkpoints]

    def _kept(self, steps: Sequence[int]) -> set[int]:
        """Returns the steps to keep; `steps` are in order."""
        best = self._best_of(steps)
        return {*steps[-self._keep :], *([best[0]] if best else [])}

    def _best_of(self, steps: Sequence[int]) -> tuple[int, float] | None:
        name = self._best or ""
        values = {step: self._metrics[step][name] for step in steps if name in self._metrics.get(step, {})}
        if not values:
            return None
        sign = 1 if better(name, 1.0, 0.0) else -1
        step = max(values, key=lambda step: (sign * values[step], step))
        return step, values[step]

    def save(self, step: int, items: dict[str, Any], data: dict[str, Any]) -> None:
        """Starts saving trees of arrays by name, and the position in the data; returns as soon as they are copied. All
        hosts call it together.

        Raises `UserError` when an earlier save failed.
        """
        self.wait()
        items = {**items, "data": {"states": _encode(data)}}
        metadata = self._metadata | {FILES: self._files, ARRAYS: _describe(items)}
        metadata |= {DIGEST: metadata_digest(metadata)}
        context = ocp.Context()
        context.array.saving.scoped_storage_options_creator = _by_layers
        try:
            with context:
                self._saving = self._orbax.save_checkpointables_async(step, items, force=True, custom_metadata=metadata)
        except Exception as error:
            raise self._explain(error) from error

    def record(self, step: int, metrics: Mapping[str, float]) -> None:
        """Writes the metrics of a step's evaluation next to its arrays, then removes the steps that need not be kept
        any more. Waits for the save. All hosts call it together. Raises `UserError` when it can't be written."""
        self.wait()
        self._metrics[step] = {name: value for name, value in metrics.items() if math.isfinite(value)}
        try:
            if jax.process_index() == 0:
                _write_evaluation(self._folder / str(step), self._metrics[step])
            steps = self.steps()
            for other in sorted({*steps} - self._kept(steps)):
                self._orbax.delete(other)
        except Exception as error:
            raise self._explain(error) from error

    def wait(self) -> None:
        """Returns when the last save is complete. Raises `UserError` when it could not be written."""
        saving, self._saving = self._saving, None
        try:
            if saving is not None:
                saving.result()
            self._orbax.wait()
        except Exception as error:
            raise self._explain(error) from error

    def close(self) -> None:
        """Waits for the last save, and ends the background threads."""
        try:
            self.wait()
        finally:
            self._orbax.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Closes it. After an error of a run on one host a save in progress is completed first; one of several hosts
        can't complete it without the others, and must not wait before it reports why it ends."""
        if kind is None:
            self.close()
        elif jax.process_count() == 1:
            with contextlib.suppress(Exception):  # the first error is the one to report
                self.close()

    def _infos(self) -> Sequence[Any]:
        return self._orbax.checkpoints

    def _explain(self, error: Exception) -> Exception:
        """Turns an error that keeps a file from being written into a message; returns any other error unchanged."""
        number = system_error(error)
        if number not in errors.UNWRITABLE:
            return error
        problem, advice = errors.UNWRITABLE[number]
        whole = whole_steps(self._folder.parent)
        kept = f"step {whole[-1]} is whole and stays" if whole else "no earlier checkpoint exists"
        free = f" ({shutil.disk_usage(self._folder).free / 1e6:.1f} MB free)" if number == errno.ENOSPC else ""
        return UserError(
            f"{self._folder}: {problem}{free}, the checkpoint could not be written; {kept}. {advice.capitalize()} and "
            "run the same command again to continue from there."
        )


class _StepNames:
    """Orbax's names of steps, restricted to step folders of runs: it neither counts nor deletes anything else."""

    def __init__(self) -> None:
        self._standard = ocp.path.step.standard_name_format()

    def build_name(self, step: int) -> str:
        return self._standard.build_name(step)

    def find_all(self, base_path: Any) -> Iterator[Any]:
        return (step for step in self._standard.find_all(base_path) if _is_usable(Path(base_path) / step.path.name))

    def find_step(self, base_path: Any, step: int) -> Any:
        return self._standard.find_step(base_path, step)


def _is_usable(step_dir: Path) -> bool:
    """Returns whether Orbax may see a step: it fails on damaged metadata, but must be able to delete its own incomplete
    steps."""
    try:
        load_metadata(step_dir)
    except DamagedError:
        return is_step(step_dir) and not (step_dir / METADATA).exists()
    return True


def better(metric: str, value: float, than: float) -> bool:
    """Returns whether a value of a metric is better: lower for losses and divergences, higher for all others."""
    return value < than if metric.endswith(("loss", "kl")) else value > than


def is_evaluated(step_dir: Path) -> bool:
    """Returns whether the evaluation after a step is complete. Earlier versions evaluated before they saved."""
    metadata = load_metadata(step_dir)
    return METRICS in metadata or ARRAYS not in metadata or _read_evaluation(step_dir) is not None


def _write_evaluation(step_dir: Path, metrics: dict[str, float]) -> None:
    record: dict[str, Any] = {METRICS: metrics}
    write_text(step_dir / EVALUATION, json.dumps(record | {DIGEST: metadata_digest(record)}, indent=1) + "\n")


def _read_evaluation(step_dir: Path) -> dict[str, float] | None:
    """Returns the metrics of a step's evaluation; None if it is incomplete, or if the file is damaged, which is
    reported."""
    file = step_dir / EVALUATION
    try:
        record = json.loads(file.read_bytes())
        if record[DIGEST] == metadata_digest(record):
            return record[METRICS]
        problem = "its contents do not match their digest"
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        problem = f"{type(error).__name__}: {error}"[:300]
    print(f"warning: {file}: damaged, the metrics of this step are not known ({problem})", file=sys.stderr)
    return None


def _saved_metrics(step_dir: Path, info: Any) -> dict[str, float]:
    """Returns the metrics of a step's evaluation. Earlier versions stored them in the metadata, or in Orbax."""
    metadata = load_metadata(step_dir) if (step_dir / METADATA).exists() else {}
    recorded = _read_evaluation(step_dir)
    return (metadata.get(METRICS, info.metrics) or {}) if recorded is None else recorded


def _describe(items: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Returns shape, dtype and checksums of each array of each item."""
    arrays = {item: named_leaves(tree) for item, tree in items.items()}
    sums = checksums.of_items(arrays)
    return {
        item: {
            name: {"shape": list(leaf.shape), "dtype": str(leaf.dtype), "sums": sums[item][name]}
            for name, leaf in leaves.items()
        }
        for item, leaves in arrays.items()
    }


def _encode(data: dict[str, Any]) -> np.ndarray:
    """Encodes the position in the data as an array, which Orbax can store."""
    return np.frombuffer(json.dumps(data).encode(), np.uint8)


def _by_layers(key: Any, value: Any) -> Any:
    """Orbax's storage options of a parameter: large ones have a chunk per layer (and expert), which an export reads one
    after the other."""
    names = [str(getattr(part, "key", getattr(part, "name", ""))) for part in key]
    if "blocks" not in names or value.nbytes < LARGE:
        return None
    lead = stacked_axes(names[-1], value.ndim)
    return ocp.options.ArrayOptions.Saving.StorageOptions(shard_axes=tuple(range(lead)))


def _silence_orbax_threads() -> None:
    """Keeps Python from printing the errors that end Orbax's threads: `save` and `wait` raise the same errors."""
    usual = threading.excepthook

    def hook(arguments: threading.ExceptHookArgs) -> None:
        if not type(arguments.thread).__module__.startswith("orbax."):
            usual(arguments)

    threading.excepthook = hook
