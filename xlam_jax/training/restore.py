"""Restores the newest intact checkpoint of a run."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from xlam_jax.enums import STEPS_FOLDER
from xlam_jax.errors import UserError
from xlam_jax.parallel.link import Hosts
from xlam_jax.weights.checkpoint import (
    ARRAYS,
    DamagedError,
    check_shapes,
    checksums,
    load_metadata,
    named_leaves,
    open_arrays,
    warn_unverified,
    whole_steps,
)
from xlam_jax.weights.checkpoint.arrays import mismatch

Report = Callable[[str], None]


class Restored(NamedTuple):
    """A step, read and verified."""

    step: int
    items: dict[str, Any]
    data: dict[str, Any]
    """The position in the data."""
    metadata: dict[str, Any]


def restore(step_dir: Path, items: dict[str, Any]) -> Restored:
    """Reads a step and verifies it. `items`: trees whose leaves have the shapes and shardings to restore.

    Raises `DamagedError`, and `UserError` for a step of another model or optimizer.
    """
    restored = _read(step_dir, items)
    if reason := _differences(restored):
        raise DamagedError(step_dir, reason)
    return restored


def restore_newest(
    run: Path,
    newest: int,
    items: dict[str, Any],
    *,
    on_damage: Literal["fallback", "error"],
    hosts: Hosts,
    report: Report,
) -> Restored:
    """Restores the newest intact step up to `newest`, as `restore` does. All `hosts` call it together and get the same
    step.

    Damaged newer steps are reported and renamed to STEP.damaged, because the run will save these numbers again. Raises
    `UserError` at the first damaged step if `on_damage` is "error", or if no step is intact; then nothing is renamed.
    """
    visible = [set(steps) for steps in hosts.gather(whole_steps(run))]
    problems: dict[int, str] = {}
    for step in sorted((step for step in set.intersection(*visible) if step <= newest), reverse=True):
        result = _try_step(run / STEPS_FOLDER / str(step), items, hosts, report)
        if isinstance(result, Restored):
            _set_aside(run, problems, hosts, report)
            if problems:
                report(f"continuing from {run / STEPS_FOLDER / str(step)}, the newest intact checkpoint")
            return result
        problems[step] = result
        if on_damage == "error":
            raise UserError(
                f"{result}; set checkpoint.on_damage=fallback to continue from the newest intact checkpoint"
            )
    reasons = "\n  ".join(problems.values())
    raise UserError(
        f"{run / STEPS_FOLDER}: no checkpoint is intact; restore one from a copy, or start again in another "
        f"output_dir\n  {reasons}"
    )


def _try_step(step_dir: Path, items: dict[str, Any], hosts: Hosts, report: Report) -> Restored | str:
    """Reads and verifies a step on all hosts; returns it, or the same description of its damage on each host."""
    restored, problem = None, None
    try:
        restored = _read(step_dir, items, report)
    except DamagedError as error:
        problem = error.problem
    problem = next(filter(None, hosts.gather(problem)), None)
    if problem is not None or restored is None:
        return problem or ""
    reason = _differences(restored)  # all hosts have read it: they compute the checksums together
    return restored if reason is None else DamagedError(step_dir, reason).problem


def _set_aside(run: Path, problems: dict[int, str], hosts: Hosts, report: Report) -> None:
    """Renames damaged steps, on one host while the others wait."""
    for step, problem in problems.items():
        path = run / STEPS_FOLDER / str(step)
        aside = path.with_name(f"{step}.damaged")
        for number in range(2, 1000):
            if not aside.exists():
                break
            aside = path.with_name(f"{step}.damaged-{number}")
        report(f"{problem}; it is kept as {aside.name}")
        if hosts.first:
            path.rename(aside)
    if problems:
        hosts.gather(None)


def _read(step_dir: Path, items: dict[str, Any], report: Report | None = None) -> Restored:
    """Reads the shards of this host's devices; needs no other host."""
    metadata = load_metadata(step_dir)
    if ARRAYS in metadata:
        for item, tree in items.items():
            stored = {name: _Shaped(tuple(about["shape"])) for name, about in metadata[ARRAYS].get(item, {}).items()}
            check_shapes(step_dir / item, stored, named_leaves(tree))
    else:
        warn_unverified(step_dir, report)

    def read(item: str, path: Any, like: Any) -> jax.Array:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        stored = open_arrays(step_dir, item, [name], metadata)[name]
        check_shapes(step_dir / item, {name: stored}, {name: like})
        return stored.unverified(like.sharding)

    loaded = {
        item: jax.tree_util.tree_map_with_path(lambda path, like, item=item: read(item, path, like), tree)
        for item, tree in items.items()
    }
    states = open_arrays(step_dir, "data", ["states"], metadata)["states"][...]
    try:
        data = json.loads(np.asarray(states).tobytes().decode())
    except ValueError as error:
        raise DamagedError(step_dir, f"data: the position in the data can't be decoded ({error})") from None
    return Restored(int(step_dir.name), loaded, data, metadata)


class _Shaped(NamedTuple):
    shape: tuple[int, ...]


def _differences(restored: Restored) -> str | None:
    """Names the arrays that differ from the saved ones; None if there are none. All hosts call it together."""
    saved = restored.metadata.get(ARRAYS)
    if saved is None:
        return None
    sums = checksums.of_items({item: named_leaves(tree) for item, tree in restored.items.items()})
    different = [
        f"{item}/{name}"
        for item, named in sums.items()
        for name, value in named.items()
        if saved[item][name]["sums"] != value
    ]
    return mismatch(different) if different else None
