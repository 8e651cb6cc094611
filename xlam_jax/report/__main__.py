"""Writes a page about runs: `python -m xlam_jax.report RUN [RUN …] [--out FILE.html]`."""

import sys
from collections.abc import Sequence
from pathlib import Path

from xlam_jax import cli

PAGE = "report.html"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code."""
    parser = cli.Parser(
        prog="python -m xlam_jax.report",
        description="Write a self-contained page about training runs: losses, shares of the sources, throughput, "
        "answers to held-out requests, and differences of the configs. Problems with a run's files are reported on "
        "stderr and on the page.",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="output_dir of a run, finished or not")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE.html",
        help=f"the page (default: {PAGE} in the run's folder; for several runs, {PAGE} in the current folder). A page "
        "that this command wrote is overwritten; any other file is kept",
    )
    parser.add_argument(
        "--force", action="store_true", help="overwrite FILE.html even if this command did not write it"
    )
    options = parser.parse_args(arguments)
    out = options.out or (options.runs[0] / PAGE if len(options.runs) == 1 else Path(PAGE))
    return write_report(options.runs, out, force=options.force)


def write_report(paths: list[Path], out: Path, *, force: bool = False) -> int:
    """Reads the runs and writes the page; returns the exit code.

    Raises `UserError` for a path that is not a run, and for an output file that this command did not write.
    """
    from xlam_jax.pages import document
    from xlam_jax.report import page, runs, samples
    from xlam_jax.report.figures import Report

    loaded = runs.read_all(paths)
    document.check_output(out, page.GENERATOR, force=force)
    report = Report(loaded, [samples.read(run.path, run.warnings) for run in loaded])
    for warning in page.all_warnings(report):
        print(f"warning: {warning}", file=sys.stderr)
    page.write(report, out)
    print(f"report: {out} ({out.stat().st_size / 1e6:.1f} MB)")
    return 0


if __name__ == "__main__":
    cli.run(main)
