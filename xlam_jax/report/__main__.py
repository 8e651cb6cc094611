"""`python -m xlam_jax.report RUN [RUN …] [--out FILE.html]`: one page about runs."""

import sys
from collections.abc import Sequence
from pathlib import Path

from xlam_jax import cli
from xlam_jax.errors import UserError

PAGE = "report.html"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = cli.Parser(
        prog="python -m xlam_jax.report",
        description="Writes what runs learned, how fast, from what, and what they answer, as one page that needs no "
        "network: losses, shares of the sources, throughput, samples, and how their configs differ. What is wrong with "
        "a run's files is told on stderr and on the page.",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="the output_dir of a run, finished or not")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE.html",
        help=f"the page (default: {PAGE} in the run's folder; of several runs, {PAGE} here). A page of this command is "
        "rewritten; any other file is kept",
    )
    parser.add_argument("--force", action="store_true", help="overwrite FILE.html whatever it is")
    options = parser.parse_args(arguments)
    out = options.out or (options.runs[0] / PAGE if len(options.runs) == 1 else Path(PAGE))
    return write_report(options.runs, out, force=options.force)


def write_report(paths: list[Path], out: Path, *, force: bool = False) -> int:
    """Reads the runs and writes the page; returns the exit code.

    Raises `UserError` for what is no run, and for an output that is there and is no page of ours.
    """
    from xlam_jax.data import html
    from xlam_jax.report import page, runs, samples

    read = runs.read_all(paths)
    check_output(out, html.generator_mark(page.GENERATOR), force=force)
    report = page.Report(read, [samples.read(run.path, run.warnings) for run in read])
    for warning in page.all_warnings(report):
        print(f"warning: {warning}", file=sys.stderr)
    html.write(out, page.parts(report))
    print(f"report: {out} ({out.stat().st_size / 1e6:.1f} MB)")
    return 0


def check_output(
    out: Path, mark: str, *, force: bool = False, advice: str = "name another file, or overwrite it with --force"
) -> None:
    """Raises `UserError` for a page's place that does not exist, or holds what has not the mark of its writer (which
    `force` lets pass)."""
    if not out.parent.is_dir():
        raise UserError(f"--out {out}: the folder {out.parent} does not exist; make it first")
    if out.is_dir():
        raise UserError(f"--out {out}: is a folder; name a file, such as {out / PAGE}")
    if out.exists() and not force:
        with out.open("rb") as file:
            ours = mark.encode() in file.read(4096)
        if not ours:
            raise UserError(f"--out {out}: exists and is no page of this command; {advice}")


if __name__ == "__main__":
    cli.run(main)
