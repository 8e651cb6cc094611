"""Converts trajectories: `python -m converters.trajectories --format NAME --in FILE… --out FILE.jsonl`."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from xlam_jax.cli import Parser, run
from xlam_jax.data.converters import EXPORTERS, FORMATS, converter, exporter, guess
from xlam_jax.data.converters.common import Converted, Dropped, ExportRow, Lost
from xlam_jax.data.files import Meter
from xlam_jax.data.trajectory import InvalidTrajectory, Trajectory, to_dict
from xlam_jax.digest import key_digest
from xlam_jax.errors import UserError
from xlam_jax.outputs import check_file, new_file, write_json
from xlam_jax.progress import BYTES, Throughput

LISTED = 10_000
"""Maximum number of rows listed in the report per reason; further rows are counted."""
SHOWN = 3
"""Maximum number of rows printed per reason."""


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = Parser(
        prog="python -m converters.trajectories",
        description="Convert trajectories between formats, and report what was written, dropped, repaired and lost, "
        "and which problems remain.",
    )
    parser.add_argument("--format", required=True, metavar="NAME", help=f"format of the input: {', '.join(FORMATS)}")
    parser.add_argument(
        "--in",
        dest="inputs",
        required=True,
        nargs="+",
        type=Path,
        metavar="FILE",
        help="JSON lines (.jsonl) or a JSON document (.json), also compressed (.gz, .zst); Parquet; ArrayRecord",
    )
    parser.add_argument("--out", required=True, type=Path, metavar="FILE.jsonl", help="file to write")
    parser.add_argument(
        "--to",
        default="unified",
        metavar="NAME",
        help=f"format of the output: unified (default), {', '.join(EXPORTERS)}",
    )
    parser.add_argument(
        "--report", type=Path, metavar="FILE.json", help="write a report with the counts and the location of each row"
    )
    parser.add_argument("--force", action="store_true", help="overwrite the output and the report")
    options = parser.parse_args(arguments)
    size = sum(path.stat().st_size for path in options.inputs if path.is_file())
    with Throughput("converting", size, unit=BYTES) as progress:
        report = convert(
            options.format,
            options.inputs,
            options.out,
            to=options.to,
            report=options.report,
            force=options.force,
            progress=progress,
        )
    print("\n".join(summary(report)))


def convert(
    name: str,
    inputs: list[Path],
    out: Path,
    *,
    to: str = "unified",
    report: Path | None = None,
    force: bool = False,
    progress: Throughput | None = None,
) -> dict[str, Any]:
    """Converts `inputs` of format `name` to `out` in format `to`. Returns the report, and writes it to `report`.

    `out` and `report` are written atomically. `progress` counts the bytes read. Raises `UserError` for an unknown
    format, a missing input, an output that exists (unless `force`) or can't be written, and if no trajectory could be
    converted.
    """
    items = converter(name)
    export = _export_unified if to == "unified" else exporter(to)
    for path in inputs:
        if not path.is_file():
            raise UserError(f"{path}: no such file; check --in")
    outputs = [path for path in (out, report) if path is not None]
    for path in outputs:
        _check_output(path, inputs, force)
    if len({path.absolute() for path in outputs}) < len(outputs):
        raise UserError(f"{out}: set as --out and as --report; choose two different files")
    tally, start = _Tally(), Meter.bytes
    with new_file(out) as lines:
        for item in items(inputs):
            tally.add(item)
            if progress:
                rows = f"{tally.read:,} ({tally.read / progress.seconds:,.0f}/s)"
                progress.add(Meter.bytes - start - progress.done, rows=rows)
            if isinstance(item, Converted):
                for row in _export(item, export, tally):
                    lines.write(json.dumps(row, ensure_ascii=False) + "\n")
        if not tally.written:
            first = tally.first_drop
            why = f"; first: {first.where}: {first.reason}: {first.detail}" if first else ""
            hint = guess(inputs, besides=name)
            raise UserError(f"not one trajectory of format '{name}' in {', '.join(map(str, inputs))}{why}{hint}")
    result = {"format": name, "to": to, "inputs": [str(path) for path in inputs], "out": str(out), **tally.report()}
    if tally.first_drop and 2 * result["rows"]["dropped"] > result["rows"]["read"]:
        result["hint"] = guess(inputs, besides=name).removeprefix("; ")
    if report is not None:
        write_json(report, result)
    return result


def summary(report: dict[str, Any]) -> Iterator[str]:
    """Yields the lines of the report for the terminal."""
    rows, trajectories = report["rows"], report["trajectories"]
    yield (
        f"{report['out']}: {trajectories['written']} trajectories written, {trajectories['dropped']} dropped; "
        f"{rows['read']} rows read = {rows['converted']} converted + {rows['dropped']} dropped"
        + (f"; {report['lines']} lines of format {report['to']}" if report["to"] != "unified" else "")
    )
    if report.get("hint"):
        yield f"  most rows were dropped: {report['hint']}"
    for title, reasons in (
        ("dropped trajectories", report["dropped"]["trajectory"]),
        ("dropped steps", report["dropped"]["step"]),
        ("repaired", report["repaired"]),
        ("lost", report["lost"]),
        ("left as is", report["left"]),
    ):
        for reason, entry in reasons.items():
            shown = ", ".join(entry["rows"][:SHOWN])
            others = len(entry["rows"][SHOWN:]) + entry["more"]
            detail = " ".join(entry["detail"][:160].split())
            yield f"  {title}: {entry['count']} {reason}: {shown}{f' and {others} more' if others else ''} ({detail})"


def _export_unified(trajectory: Trajectory) -> Iterator[dict[str, Any]]:
    yield to_dict(trajectory)


def _export(item: Converted, export: ExportRow, tally: "_Tally") -> Iterator[dict[str, Any]]:
    """Yields the rows of a trajectory in the output's format. A trajectory without rows is counted as dropped."""
    lost: list[Lost] = []
    rows: list[dict[str, Any]] = []
    try:
        for row in export(item.trajectory):
            if isinstance(row, Lost):
                lost.append(row)
            else:
                rows.append(row)
        if not rows:
            raise InvalidTrajectory(lost[0].reason, lost[0].detail) if lost else InvalidTrajectory("no-row", "")
    except InvalidTrajectory as invalid:
        tally.add(Dropped(item.path, item.row, invalid.reason, invalid.detail, line=item.line))
        return
    tally.add_written(item, rows, lost)
    yield from rows


class _Reasons:
    """Count, locations and first detail of each reason."""

    def __init__(self):
        self._entries: dict[str, dict[str, Any]] = {}
        self._last: dict[str, str] = {}

    def add(self, where: str, reason: str, detail: str) -> None:
        entry = self._entries.setdefault(reason, {"count": 0, "rows": [], "more": 0, "detail": detail[:1000]})
        entry["count"] += 1
        if self._last.get(reason) != where:  # list each row once
            self._last[reason] = where
            if len(entry["rows"]) < LISTED:
                entry["rows"].append(where)
            else:
                entry["more"] += 1

    def report(self) -> dict[str, Any]:
        return dict(sorted(self._entries.items(), key=lambda entry: -entry[1]["count"]))


class _Tally:
    """Counts rows, trajectories and steps by outcome."""

    def __init__(self):
        from xlam_jax.data.validate import check_row

        self._check_row = check_row
        self.read = self.written = self.lines = 0
        self.first_drop: Dropped | None = None
        self._dropped: dict[Literal["trajectory", "step"], _Reasons] = {"trajectory": _Reasons(), "step": _Reasons()}
        self._repaired, self._lost, self._left = _Reasons(), _Reasons(), _Reasons()
        self._ids: set[bytes] = set()
        self._trajectories_dropped = self._rows_converted = 0
        self._row: tuple[Path, int] | None = None
        self._row_written = False

    def add(self, item: Converted | Dropped) -> None:
        if (item.path, item.row) != self._row:
            self._row, self._row_written = (item.path, item.row), False
            self.read += 1
        if isinstance(item, Dropped):
            self._dropped[item.unit].add(item.where, item.reason, item.detail)
            if item.unit == "trajectory":
                self._trajectories_dropped += 1
                self.first_drop = self.first_drop or item

    def add_written(self, item: Converted, rows: list[dict[str, Any]], lost: list[Lost]) -> None:
        self.written += 1
        self.lines += len(rows)
        self._rows_converted += not self._row_written
        self._row_written = True
        for repair in item.repairs:
            self._repaired.add(item.where, repair.reason, repair.detail)
        for loss in lost:
            self._lost.add(item.where, loss.reason, loss.detail)
        for problem in self._check_row(to_dict(item.trajectory, numbers=True)):
            self._left.add(item.where, problem.reason, problem.detail)
        digest = key_digest(item.trajectory.id)
        if digest in self._ids:
            self._left.add(item.where, "duplicate-trajectory-id", f"'{item.trajectory.id}' occurs twice")
        self._ids.add(digest)

    def report(self) -> dict[str, Any]:
        return {
            "rows": {
                "read": self.read,
                "converted": self._rows_converted,
                "dropped": self.read - self._rows_converted,
            },
            "trajectories": {"written": self.written, "dropped": self._trajectories_dropped},
            "lines": self.lines,
            "dropped": {unit: reasons.report() for unit, reasons in self._dropped.items()},
            "repaired": self._repaired.report(),
            "lost": self._lost.report(),
            "left": self._left.report(),
        }


def _check_output(path: Path, inputs: list[Path], force: bool) -> None:
    check_file(path, force=force, inputs=inputs)
    if path.suffix in (".gz", ".zst"):
        raise UserError(f"{path}: the output is not compressed; remove {path.suffix} from its name")


if __name__ == "__main__":
    run(main)
