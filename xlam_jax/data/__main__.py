"""Checks data, shows how training sees them, and prepares them: `python -m xlam_jax.data COMMAND --help`."""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from xlam_jax.cli import Parser, add_server, number, positive, run
from xlam_jax.errors import UserError, nearest
from xlam_jax.outputs import check_file, write_json

OVERRIDES = "section.key=value"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser, commands = _parsers()
    if words and words[0] in commands:  # a command's parser alone accepts options and overrides in any order
        options = commands[words[0]].parse_intermixed_args(words[1:])
    else:
        options = parser.parse_args(words)
    return options.command(options)


def _parsers() -> tuple[Parser, dict[str, Parser]]:
    """Returns (parser of the whole command line, parsers of the commands by name)."""
    parser = Parser(prog="python -m xlam_jax.data", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in (_add_validate, _add_stats, _add_preview, _add_prepare, _add_pairs, _add_rate):
        add(commands)
    return parser, commands.choices


def _add_validate(commands: Any) -> None:
    parser = commands.add_parser(
        "validate",
        help="find everything that is wrong with files of trajectories",
        description="Checks each row, and each call against its tool's JSON Schema. One line per finding on stdout, a "
        "summary on stderr. Exit code: 0 no finding, 1 findings, 2 the check could not be made.",
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--config", type=Path, metavar="FILE.yaml", help="also find trajectories longer than its rows")
    parser.add_argument(
        "--json", action="store_true", help="one JSON object per finding: file, line, id, reason, detail"
    )
    parser.add_argument("--max-errors", type=positive, metavar="N", help="stop after N findings")
    parser.set_defaults(command=_validate)


def _add_stats(commands: Any) -> None:
    parser = commands.add_parser(
        "stats",
        help="show what a config's data contain, how well they pack, and each source's share",
        description="Prints a table, and writes it as a page with plots.",
    )
    _add_config(parser)
    parser.add_argument("--out", type=Path, metavar="FILE.html", help="the page (default: stats.html here)")
    parser.add_argument("--rows", type=positive, metavar="N", help="packed rows to look at (default: about one epoch)")
    parser.add_argument("--force", action="store_true", help="overwrite the page")
    parser.set_defaults(command=_stats)


def _add_preview(commands: Any) -> None:
    parser = commands.add_parser(
        "preview",
        help="show the tokens that training sees, and which of them are trained",
        description="Shows the first packed rows of a run, token by token.",
    )
    _add_config(parser)
    parser.add_argument("-n", dest="rows", type=positive, default=1, metavar="N", help="packed rows (default: 1)")
    parser.add_argument("--source", metavar="NAME", help="only the trajectories of this source")
    parser.add_argument("--html", type=Path, metavar="FILE.html", help="write a page instead")
    parser.add_argument("--force", action="store_true", help="overwrite the page")
    parser.add_argument("--color", choices=("auto", "always", "never"), default="auto", help="default: on a terminal")
    parser.set_defaults(command=_preview)


def _add_prepare(commands: Any) -> None:
    parser = commands.add_parser(
        "prepare",
        help="render a config's data once, into a cache that training reads",
        description="Writes a folder for data.cache. Training refuses it after a change of data, tokenizer, settings "
        "or the version of the renderer.",
    )
    _add_config(parser)
    parser.add_argument("--out", required=True, type=Path, metavar="DIR")
    parser.set_defaults(command=_prepare)


def _add_pairs(commands: Any) -> None:
    parser = commands.add_parser(
        "pairs",
        help="make preference pairs from scored trajectories",
        description="Pairs trajectories of one task that agree up to an assistant turn and differ there; the one with "
        "the higher score is chosen.",
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE.jsonl")
    parser.add_argument(
        "--min-gap", type=number(0), default=0.0, metavar="G", help="minimum difference of scores (default: any)"
    )
    parser.add_argument(
        "--per-task", type=positive, default=10, metavar="K", help="maximum pairs per task (default: %(default)s)"
    )
    parser.add_argument("--report", type=Path, metavar="FILE.json", help="write the counts there as well")
    parser.add_argument("--force", action="store_true", help="overwrite the outputs")
    parser.set_defaults(command=_pairs)


def _add_rate(commands: Any) -> None:
    parser = commands.add_parser(
        "rate",
        help="score trajectories from 0 to 5 with a model, with reasons",
        description="Asks a model behind an OpenAI-compatible server how good each trajectory is, and writes them with "
        "the rating as score. FILE.jsonl.ratings.jsonl has the reasons and the previous scores; a run that was stopped "
        "resumes from it. Exit code: 0 all are rated, 1 some are not, 2 none could be.",
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    add_server(parser, retries=5)
    parser.add_argument("--out", required=True, type=Path, metavar="FILE.jsonl")
    parser.add_argument("--concurrency", type=positive, default=16, metavar="K", help="default: %(default)s")
    parser.add_argument("--limit", type=positive, metavar="N", help="only the first N rows")
    parser.add_argument(
        "--keep", type=number(0), default=4.0, metavar="R", help="minimum good rating (default: %(default)s)"
    )
    parser.add_argument(
        "--good",
        type=number(),
        metavar="S",
        help="minimum good previous score, to compare with (default: each source's highest)",
    )
    parser.add_argument("--report", type=Path, metavar="FILE.json", help="write the counts there as well")
    parser.add_argument("--force", action="store_true", help="start again and overwrite the outputs")
    parser.set_defaults(command=_rate)


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, type=Path, metavar="FILE.yaml")
    parser.add_argument("overrides", nargs="*", metavar=OVERRIDES, help="fields of the config to set")


def _log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _check_readable(files: Sequence[Path]) -> None:
    """Raises `UserError`, before any work, for files that do not exist or have an unknown suffix."""
    from xlam_jax.data.rows import PACKED, SUFFIXES, suffix

    for file in files:
        if file.is_dir():
            raise UserError(f"{file}: is a folder; name its files")
        if not file.exists():
            siblings = [entry.name for entry in file.parent.iterdir()] if file.parent.is_dir() else []
            raise UserError(f"{file}: no such file{nearest(file.name, siblings)}")
        if suffix(file) not in SUFFIXES:
            raise UserError(
                f"{file}: its suffix must be one of {', '.join(SUFFIXES)}, "
                f"the first three also with {' or '.join(PACKED)}"
            )


def _validate(options: argparse.Namespace) -> int:
    from xlam_jax.data import validate

    _check_readable(options.files)
    limit = validate.length_limit(options.config) if options.config else None
    summary, findings = validate.run(
        options.files, sys.stdout, limit=limit, as_json=options.json, most=options.max_errors
    )
    sys.stdout.flush()
    _log(summary)
    return 1 if findings else 0


def _stats(options: argparse.Namespace) -> int:
    from xlam_jax.data import stats

    out = options.out or Path("stats.html")
    check_file(out, force=options.force)
    result = stats.collect(options.config, options.overrides, rows=options.rows, progress=_log)
    print(stats.table(result))
    stats.write_page(result, out)
    _log(f"page with plots: {out}")
    return 0


def _preview(options: argparse.Namespace) -> int:
    from xlam_jax.data import preview

    if options.html:
        check_file(options.html, force=options.force)
    shown = preview.rows(options.config, options.overrides, count=options.rows, source=options.source, progress=_log)
    if options.html:
        preview.write_page(shown, options.html)
        _log(f"{options.html}: {options.rows} packed rows")
    else:
        color = options.color == "always" or (options.color == "auto" and sys.stdout.isatty())
        for text in preview.terminal(shown, color=color):
            print(text)
    return 0


def _prepare(options: argparse.Namespace) -> int:
    from xlam_jax import config as configs
    from xlam_jax.data import corpus
    from xlam_jax.data.tokenizer import open_tokenizer

    began = time.monotonic()
    data = configs.load(options.config, options.overrides).config.data
    corpus.prepare(options.out, data, open_tokenizer(data), _log)
    seconds = time.monotonic() - began
    _log(f"{options.out}: written in {seconds:.0f} s; to train from it set data.cache: {options.out} in the config")
    return 0


def _pairs(options: argparse.Namespace) -> int:
    from xlam_jax.data import pairs

    _check_readable(options.files)
    result = pairs.write(
        options.files,
        options.out,
        min_gap=options.min_gap,
        per_task=options.per_task,
        report_path=options.report,
        force=options.force,
    )
    print(pairs.summary(options.out, result))
    return 0


def _rate(options: argparse.Namespace) -> int:
    from xlam_jax.evaluate import rate
    from xlam_jax.evaluate.endpoint import Model

    _check_readable(options.files)
    if options.report:
        check_file(options.report, force=options.force)
    model = Model.connect(
        options.base_url,
        options.model,
        api_key=options.api_key,
        timeout=options.timeout,
        retries=options.retries,
    )
    try:
        result = rate.rate(
            options.files,
            options.out,
            model,
            concurrency=options.concurrency,
            limit=options.limit,
            good=options.good,
            keep=options.keep,
            force=options.force,
            progress=_log,
        )
    except KeyboardInterrupt:
        print(f"stopped; the same command resumes {options.out}", file=sys.stderr)
        return 130
    if options.report:
        write_json(options.report, result)
    print(rate.summary(options.out, result))
    return 0 if result["rated"] == result["trajectories"] else 1


if __name__ == "__main__":
    run(main)
