"""`python -m converters.trajectories --format NAME --in FILE… --out FILE.jsonl`: raw files to unified trajectories."""

import argparse
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

from converters.trajectories import CONVERTERS
from converters.trajectories.common import Dropped
from xlam_jax.data.trajectory import to_dict
from xlam_jax.errors import UserError, nearest, run

EXAMPLES = 3  # dropped rows listed a reason


def main(arguments: list[str] | None = None) -> None:
    """Converts and prints what was written and what was dropped, by reason."""
    parser = argparse.ArgumentParser(prog="python -m converters.trajectories", description=main.__doc__)
    parser.add_argument("--format", required=True, metavar="NAME", help=f"one of: {', '.join(CONVERTERS)}")
    parser.add_argument("--in", dest="inputs", required=True, nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE.jsonl")
    parser.add_argument("--report", type=Path, metavar="FILE.json", help="write the counts there as well")
    parser.add_argument("--force", action="store_true", help="overwrite the output")
    options = parser.parse_args(arguments)
    report = convert(options.format, options.inputs, options.out, force=options.force)
    if options.report:
        options.report.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"{options.out}: {report['written']} trajectories")
    for unit in ("trajectory", "step"):
        for reason, entry in report["dropped"][unit].items():
            print(
                f"  dropped {entry['count']} ({unit}, {reason}), first at {entry['rows'][0]}: {entry['detail'][:120]}"
            )


def convert(name: str, inputs: list[Path], out: Path, force: bool = False) -> dict[str, Any]:
    """Converts `inputs` of format `name` to `out` and returns the counts.

    `out` appears only when it is whole. Raises `UserError` on an unknown format, a missing input, an output that exists
    (unless `force`), and when not one trajectory could be converted.
    """
    if name not in CONVERTERS:
        raise UserError(f"format '{name}' is not known; known are {', '.join(CONVERTERS)}{nearest(name, CONVERTERS)}")
    if out.exists() and not force:
        raise UserError(f"{out}: exists already; give another --out, or --force to overwrite it")
    for path in inputs:
        if not path.is_file():
            raise UserError(f"{path}: no such file; check --in")
    if not out.parent.is_dir():
        raise UserError(f"{out}: the folder '{out.parent}' does not exist; create it first")
    dropped: dict[str, list[Dropped]] = {"trajectory": [], "step": []}
    written = 0
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        with partial.open("w", encoding="utf-8", newline="\n") as lines:
            for item in CONVERTERS[name](inputs):
                if isinstance(item, Dropped):
                    dropped[item.unit].append(item)
                else:
                    lines.write(json.dumps(to_dict(item), ensure_ascii=False) + "\n")
                    written += 1
        if not written:
            first = next(iter(dropped["trajectory"]), None)
            why = f"; first: {first.path}:{first.row}: {first.reason}: {first.detail}" if first else ""
            raise UserError(f"not one trajectory of format '{name}' in {', '.join(map(str, inputs))}{why}")
        partial.replace(out)
    finally:
        partial.unlink(missing_ok=True)
    return {
        "format": name,
        "inputs": [str(path) for path in inputs],
        "written": written,
        "dropped": {unit: _by_reason(items) for unit, items in dropped.items()},
    }


def _by_reason(items: list[Dropped]) -> dict[str, Any]:
    report: dict[str, Any] = {}
    for reason, count in Counter(item.reason for item in items).most_common():
        found = [item for item in items if item.reason == reason]
        rows = [f"{item.path}:{item.row}" for item in found[:EXAMPLES]]
        report[reason] = {"count": count, "rows": rows, "detail": found[0].detail}
    return report


if __name__ == "__main__":
    run(main)
