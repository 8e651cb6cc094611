"""Reads run folders: the records as columns over steps, the config, and warnings about problems with the files."""

import math
import sys
from array import array
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from xlam_jax import documents
from xlam_jax.config import Config, from_saved
from xlam_jax.errors import UserError
from xlam_jax.journal import SHOWN, json_lines, summarize
from xlam_jax.training.run_folder import CONFIG, METRICS, RUN

KINDS_OF_RECORDS = ("train", "heldout", "requests")
MOST = sys.float_info.max
"""Maximum absolute value in a column; integers in JSON may be larger."""
Keys = tuple[str, ...]
"""Path of a number in a record, such as ("sources", "webshop", "loss")."""


class Table(NamedTuple):
    """The records of one kind, sorted by step, without duplicates."""

    steps: np.ndarray
    """[n] int64."""
    columns: dict[Keys, np.ndarray]
    """Path → column, [n] float64; NaN if a record lacks the number."""
    breaks: np.ndarray
    """[n] bool: whether steps are missing before this one."""

    def get(self, *path: str) -> np.ndarray:
        """Returns a column, [n] float64; all NaN if there is none."""
        return self.columns.get(path, np.full(len(self.steps), np.nan))

    def names(self, *path: str) -> list[str]:
        """Returns the keys below a path, in order of first appearance."""
        depth = len(path)
        return list(dict.fromkeys(key[depth] for key in self.columns if key[:depth] == path and len(key) > depth))


class Run(NamedTuple):
    """The contents of a run folder."""

    name: str
    path: Path
    about: dict[str, Any]
    """run.json; empty if there is none."""
    config: Config | None
    """None if config.yaml does not fit the schema."""
    config_text: str
    """config.yaml as text."""
    train: Table
    heldout: Table
    requests: Table
    written: datetime
    """Time of the last write to metrics.jsonl."""
    warnings: list[str]

    @property
    def objective(self) -> str:
        """Name of the minimized loss. Losses of runs with different objectives cannot be compared."""
        if self.config:
            return self.config.objective.kind
        return "a loss on pairs" if ("margin",) in self.train.columns else "sft"

    @property
    def planned(self) -> int | None:
        """Number of steps in the config."""
        return self.config.train.steps if self.config else None

    def number(self, key: str) -> float | None:
        """Returns a number of run.json, or None."""
        return number(self.about.get(key))

    def sources(self) -> list[str]:
        """Returns the names of the mixture's sources."""
        recorded = self.about.get("sources")
        names = [*(recorded if isinstance(recorded, dict) else ()), *self.train.names("sources")]
        return list(dict.fromkeys([*names, *self.heldout.names("sources")]))


def number(value: Any) -> float | None:
    """Returns a finite number as a float, and None for any other value."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and -MOST <= value <= MOST else None


def is_step(value: Any) -> bool:
    """Returns whether a value is a valid step number, a 64-bit integer."""
    return type(value) is int and -(2**63) <= value < 2**63


class _Node:
    """The columns of an object in the records, and of the objects nested in it."""

    __slots__ = ("below", "columns")

    def __init__(self) -> None:
        self.columns: dict[str, array[float]] = {}
        self.below: dict[str, _Node] = {}

    def leaves(self, path: Keys = ()) -> Iterator[tuple[Keys, "array[float]"]]:
        """Yields all columns with their paths."""
        yield from (((*path, name), column) for name, column in self.columns.items())
        for name, node in self.below.items():
            yield from node.leaves((*path, name))


class _Columns:
    """Collects the records of one kind as columns."""

    def __init__(self) -> None:
        self.steps = array("q")
        self._root = _Node()

    def add(self, step: int, record: dict[str, Any]) -> list[str]:
        """Adds a record. Returns the names of its values that are not finite numbers."""
        bad: list[str] = []
        self._add(record, self._root, len(self.steps), bad)
        self.steps.append(step)
        return bad

    def _add(self, record: dict[str, Any], node: _Node, row: int, bad: list[str]) -> None:
        columns = node.columns
        for name, value in record.items():
            kind = type(value)
            if kind is dict:
                if name not in node.below:
                    node.below[name] = _Node()
                self._add(value, node.below[name], row, bad)
            elif (kind is float or kind is int) and -MOST <= value <= MOST:  # neither infinite nor NaN
                column = columns.get(name)
                if column is None:
                    column = columns[name] = array("d")
                if len(column) < row:
                    column.extend([math.nan] * (row - len(column)))
                column.append(value)
            else:
                bad.append(name)

    def table(self, consecutive: bool) -> tuple[Table, list[tuple[int, int]], np.ndarray]:
        """Returns the table, the ranges (first, last) of missing steps, and the duplicate steps.

        Of several records of a step the last is kept, which a resumed run wrote. `consecutive`: whether every step
        should have a record.
        """
        steps = np.frombuffer(self.steps, np.int64) if self.steps else np.zeros(0, np.int64)
        order = np.argsort(steps, kind="stable")
        ordered = steps[order]
        last = np.append(ordered[1:] != ordered[:-1], True) if len(ordered) else np.zeros(0, bool)
        kept = order[last]
        duplicates = np.unique(ordered[~last])
        steps = steps[kept]
        previous = np.append(0, steps[:-1]) if len(steps) else steps
        gaps = (steps - previous > 1) if consecutive else np.zeros(len(steps), bool)
        missing = [(int(a) + 1, int(b) - 1) for a, b in zip(previous[gaps], steps[gaps], strict=True)]
        columns = {}
        for path, column in self._root.leaves():
            column.extend([math.nan] * (len(self.steps) - len(column)))
            columns[path] = np.frombuffer(column, np.float64)[kept]
        return Table(steps, columns, gaps), missing, duplicates


def describe_ranges(spans: list[tuple[int, int]]) -> str:
    """Formats ranges (first, last) of steps as `step 3, steps 7 to 9`."""
    shown = [f"step {a:,}" if a == b else f"steps {a:,} to {b:,}" for a, b in spans[:SHOWN]]
    return ", ".join(shown) + (f" and {len(spans) - SHOWN:,} more ranges" if len(spans) > SHOWN else "")


def _spans(steps: np.ndarray) -> list[tuple[int, int]]:
    """Groups sorted numbers into ranges (first, last) of consecutive ones."""
    parts = np.split(steps, np.flatnonzero(np.diff(steps) > 1) + 1) if len(steps) else []
    return [(int(part[0]), int(part[-1])) for part in parts]


def read(path: Path, name: str) -> Run:
    """Reads a run folder. Raises `UserError` if it is not a run, or has no metrics yet; other problems are warnings."""
    if not path.is_dir():
        problem = "is a file; the folder of the run is expected" if path.exists() else "no such folder"
        raise UserError(f"{path}: {problem}")
    if not (path / CONFIG).exists():
        raise UserError(
            f"{path}: not a run folder: it has no {CONFIG}; use the output_dir of a python -m xlam_jax.train"
        )
    metrics = path / METRICS
    warnings: list[str] = []
    tables: dict[str, Table] = {}
    if metrics.exists():
        tables = _tables(metrics, warnings)
    if not any(len(table.steps) for table in tables.values()):
        raise UserError(
            f"{metrics}: {'no record yet' if metrics.exists() else 'does not exist yet'}; a run writes it after its "
            "first step, so try again then"
        )
    config, text = _config(path / CONFIG, warnings)
    return Run(
        name=name,
        path=path,
        about=_about(path / RUN, warnings),
        config=config,
        config_text=text,
        written=datetime.fromtimestamp(metrics.stat().st_mtime, UTC),
        warnings=warnings,
        **tables,
    )


def _tables(path: Path, warnings: list[str]) -> dict[str, Table]:
    kinds = {kind: _Columns() for kind in KINDS_OF_RECORDS}
    problems: list[str] = []
    not_finite: list[str] = []
    for line, record in json_lines(path, problems):
        if not isinstance(record, dict) or not is_step(record.get("step")) or "kind" not in record:
            problems.append(f"line {line} is not a record with step and kind")
            continue
        step, kind, absent = record.pop("step"), record.pop("kind"), record.pop("not_finite", None)
        if not isinstance(kind, str) or kind not in kinds:
            problems.append(f"line {line} has the unknown kind {kind!r}")
            continue
        bad = kinds[kind].add(step, record)
        if isinstance(absent, dict):
            not_finite.append(
                f"step {step:,}, {kind}: " + ", ".join(f"{name} is {value}" for name, value in absent.items())
            )
        elif bad:
            problems.append(f"line {line}, {', '.join(bad)}: not a finite number")
    warnings += summarize(path, problems) + summarize(path, not_finite, "not drawn")
    tables = {}
    for kind, columns in kinds.items():
        tables[kind], missing, duplicates = columns.table(consecutive=kind == "train")
        if len(duplicates):
            steps = describe_ranges(_spans(duplicates))
            warnings.append(f"{path}: {steps}: more than one {kind} record; the last is shown")
        if missing:
            warnings.append(f"{path}: {describe_ranges(missing)}: no {kind} record; the curves have a gap there")
    return tables


def _about(path: Path, warnings: list[str]) -> dict[str, Any]:
    try:
        return documents.read_object(path)
    except UserError as error:
        problem = str(error)
    warnings.append(f"{problem}; sizes, devices, target shares and utilization are unknown")
    return {}


def _config(path: Path, warnings: list[str]) -> tuple[Config | None, str]:
    text = path.read_bytes().decode(errors="backslashreplace")
    try:
        return from_saved(documents.parse_yaml(text, path), str(path)), text
    except UserError as error:
        problem = " ".join(str(error).removeprefix(f"{path}: ").split())
    warnings.append(f"{path}: does not fit this version's schema ({problem}): shown as text, and not compared")
    return None, text


def read_all(paths: list[Path]) -> list[Run]:
    """Reads runs. Each gets a unique name: its folder's, with as many parents as needed. Raises `UserError`."""
    resolved = [path.resolve() for path in paths]
    for index, path in enumerate(resolved):
        if path in resolved[:index]:
            raise UserError(f"{paths[index]}: is named twice; name each run once")
    depth = 1
    while len({path.parts[-depth:] for path in resolved}) < len(resolved):
        depth += 1
    return [read(path, "/".join(full.parts[-depth:])) for path, full in zip(paths, resolved, strict=True)]
