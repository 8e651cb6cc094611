"""What a run folder tells: its records as columns over steps, its config, and what is wrong with its files."""

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
from xlam_jax.journals import SHOWN, json_lines, summarize
from xlam_jax.train import CONFIG
from xlam_jax.training.metrics import METRICS
from xlam_jax.training.setup import RUN

KINDS_OF_RECORDS = ("train", "heldout", "requests")
MOST = sys.float_info.max
"""The largest number that a column holds; integers of a JSON file may be larger."""
Keys = tuple[str, ...]
"""Keys that lead to a number in a record, such as ("sources", "webshop", "loss")."""


class Table(NamedTuple):
    """The records of one kind, each step once and in order."""

    steps: np.ndarray
    """[n] int64."""
    columns: dict[Keys, np.ndarray]
    """[n] f64 each; NaN where a record has no such number."""
    breaks: np.ndarray
    """[n] bool: steps are missing before this one."""

    def get(self, *path: str) -> np.ndarray:
        """A column, or NaN throughout."""
        return self.columns.get(path, np.full(len(self.steps), np.nan))

    def names(self, *path: str) -> list[str]:
        """The keys below a path, in the order in which they first appeared."""
        depth = len(path)
        return list(dict.fromkeys(key[depth] for key in self.columns if key[:depth] == path and len(key) > depth))


class Run(NamedTuple):
    """A run folder, read."""

    name: str
    path: Path
    about: dict[str, Any]
    """run.json; empty where there is none."""
    config: Config | None
    """None where config.yaml does not fit the schema."""
    config_text: str
    train: Table
    heldout: Table
    requests: Table
    written: datetime
    """When metrics.jsonl was last written."""
    warnings: list[str]

    @property
    def objective(self) -> str:
        """What is minimized: runs that minimize different things have no comparable losses."""
        if self.config:
            return self.config.objective.kind
        return "a loss on pairs" if ("margin",) in self.train.columns else "sft"

    @property
    def planned(self) -> int | None:
        """Steps that the config asks for."""
        return self.config.train.steps if self.config else None

    def number(self, key: str) -> float | None:
        """A number of run.json, or None."""
        return number(self.about.get(key))

    def sources(self) -> list[str]:
        """The names of the mixture's sources."""
        told = self.about.get("sources")
        names = [*(told if isinstance(told, dict) else ()), *self.train.names("sources")]
        return list(dict.fromkeys([*names, *self.heldout.names("sources")]))


def number(value: Any) -> float | None:
    """The value where it is a finite number, else None."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and -MOST <= value <= MOST else None


def is_step(value: Any) -> bool:
    """Whether a value is the number of a step: an integer of 64 bits."""
    return type(value) is int and -(2**63) <= value < 2**63


class _Node:
    """The columns of one dict of the records, and of the dicts in it."""

    __slots__ = ("below", "columns")

    def __init__(self) -> None:
        self.columns: dict[str, array[float]] = {}
        self.below: dict[str, _Node] = {}

    def leaves(self, path: Keys = ()) -> Iterator[tuple[Keys, "array[float]"]]:
        """All columns with their paths."""
        yield from (((*path, name), column) for name, column in self.columns.items())
        for name, node in self.below.items():
            yield from node.leaves((*path, name))


class _Columns:
    """Records of one kind, taken in as they come."""

    def __init__(self) -> None:
        self.steps = array("q")
        self._root = _Node()

    def add(self, step: int, record: dict[str, Any]) -> list[str]:
        """Takes a record in; returns the names of its values that are no finite numbers."""
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
        """The table, the ranges of steps that are missing (first, last), and the steps that stood there twice.

        Of records of one step the last one counts: it is what a continued run wrote.
        """
        steps = np.frombuffer(self.steps, np.int64) if self.steps else np.zeros(0, np.int64)
        order = np.argsort(steps, kind="stable")
        ordered = steps[order]
        last = np.append(ordered[1:] != ordered[:-1], True) if len(ordered) else np.zeros(0, bool)
        kept = order[last]
        twice = np.unique(ordered[~last])
        steps = steps[kept]
        before = np.append(0, steps[:-1]) if len(steps) else steps
        gaps = (steps - before > 1) if consecutive else np.zeros(len(steps), bool)
        missing = [(int(a) + 1, int(b) - 1) for a, b in zip(before[gaps], steps[gaps], strict=True)]
        columns = {}
        for path, column in self._root.leaves():
            column.extend([math.nan] * (len(self.steps) - len(column)))
            columns[path] = np.frombuffer(column, np.float64)[kept]
        return Table(steps, columns, gaps), missing, twice


def ranges(spans: list[tuple[int, int]]) -> str:
    """`step 3, steps 7 to 9`."""
    shown = [f"step {a:,}" if a == b else f"steps {a:,} to {b:,}" for a, b in spans[:SHOWN]]
    return ", ".join(shown) + (f" and {len(spans) - SHOWN:,} more places" if len(spans) > SHOWN else "")


def _spans(steps: np.ndarray) -> list[tuple[int, int]]:
    """Numbers in order as ranges of consecutive ones."""
    parts = np.split(steps, np.flatnonzero(np.diff(steps) > 1) + 1) if len(steps) else []
    return [(int(part[0]), int(part[-1])) for part in parts]


def read(path: Path, name: str) -> Run:
    """Reads a run folder. Raises `UserError` when it is no run, or has no metrics yet; lesser problems are warnings."""
    if not path.is_dir():
        what = "is a file; the folder of the run is expected" if path.exists() else "no such folder"
        raise UserError(f"{path}: {what}")
    if not (path / CONFIG).exists():
        raise UserError(
            f"{path}: is no run: it has no {CONFIG}; the output_dir of a python -m xlam_jax.train is expected"
        )
    metrics = path / METRICS
    warnings: list[str] = []
    tables: dict[str, Table] = {}
    if metrics.exists():
        tables = _tables(metrics, warnings)
    if not any(len(table.steps) for table in tables.values()):
        raise UserError(
            f"{metrics}: {'no record yet' if metrics.exists() else 'not there yet'}; a run writes it from its first "
            "step on, so try again once it has taken one"
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
    for at, record in json_lines(path, problems):
        if not isinstance(record, dict) or not is_step(record.get("step")) or "kind" not in record:
            problems.append(f"line {at} is no record with step and kind")
            continue
        step, kind, absent = record.pop("step"), record.pop("kind"), record.pop("not_finite", None)
        if not isinstance(kind, str) or kind not in kinds:
            problems.append(f"line {at} has the unknown kind {kind!r}")
            continue
        bad = kinds[kind].add(step, record)
        if isinstance(absent, dict):
            not_finite.append(
                f"step {step:,}, {kind}: " + ", ".join(f"{name} is {what}" for name, what in absent.items())
            )
        elif bad:
            problems.append(f"line {at}, {', '.join(bad)}: no finite number")
    warnings += summarize(path, problems) + summarize(path, not_finite, "not drawn")
    tables = {}
    for kind, columns in kinds.items():
        tables[kind], missing, twice = columns.table(consecutive=kind == "train")
        if len(twice):
            warnings.append(f"{path}: {ranges(_spans(twice))}: {kind} stands there more than once; the last is shown")
        if missing:
            warnings.append(f"{path}: {ranges(missing)}: no {kind} record; the curves have a gap there")
    return tables


def _about(path: Path, warnings: list[str]) -> dict[str, Any]:
    try:
        return documents.read_object(path)
    except UserError as error:
        problem = str(error)
    warnings.append(f"{problem}; sizes, devices, target shares and utilisation are unknown")
    return {}


def _config(path: Path, warnings: list[str]) -> tuple[Config | None, str]:
    text = path.read_bytes().decode(errors="backslashreplace")
    try:
        return from_saved(documents.parse_yaml(text, path), str(path)), text
    except UserError as error:
        problem = " ".join(str(error).removeprefix(f"{path}: ").split())
    warnings.append(f"{path}: does not fit this version's schema ({problem}): shown as it is, and not compared")
    return None, text


def read_all(paths: list[Path]) -> list[Run]:
    """Reads runs and gives each a name of its own: the folder's, with as many of its parents as tell it apart."""
    resolved = [path.resolve() for path in paths]
    for at, path in enumerate(resolved):
        if path in resolved[:at]:
            raise UserError(f"{paths[at]}: is named twice; each run once")
    depth = 1
    while len({path.parts[-depth:] for path in resolved}) < len(resolved):
        depth += 1
    return [read(path, "/".join(one.parts[-depth:])) for path, one in zip(paths, resolved, strict=True)]
