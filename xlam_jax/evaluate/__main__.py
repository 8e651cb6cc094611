"""`python -m xlam_jax.evaluate --suite NAME --base-url URL --model NAME --out DIR`: a benchmark against a server."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from xlam_jax import errors
from xlam_jax.cli import Parser, add_server, number, positive, run
from xlam_jax.digest import json_digest
from xlam_jax.errors import UserError, nearest

PAGE = "report.html"


class _Parser(Parser):
    """Looks into all suites and agents when they are to be listed, and not before."""

    def format_help(self) -> str:
        from xlam_jax.evaluate import agents, suites

        def listed(of: Any) -> str:
            found = [(name, of.load(name).about) for name in of.names()]
            return "\n".join(f"  {name:16}{about}" for name, about in found)

        self.epilog = (
            f"suites:\n{listed(suites)}\n\nagents:\n{listed(agents)}\n\n"
            "A suite or an agent of your own is one file: --suite FILE.py, --agent FILE.py; docs/evaluation.md has both"
        )
        return super().format_help()


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m xlam_jax.evaluate",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Asks the examples of a suite of a served model, and scores the answers. DIR gets one JSON line\n"
        "an example as it ends (examples.jsonl) and the scores (summary.json). The same command goes on where it was\n"
        "stopped. A request that fails is an error: listed, never scored, and asked again by the next run.\n"
        "Exit code: 0 all are scored, 1 some are not, 2 it could not be run.",
    )
    parser.add_argument("--suite", metavar="NAME", help="the benchmark, by name or as FILE.py")
    add_server(parser, required=False, retries=5)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where records and scores go")
    parser.add_argument("--agent", metavar="NAME", help="how the model is led (default: the suite's)")
    parser.add_argument("--data", type=Path, metavar="PATH", help="your copy of the suite's data")
    parser.add_argument("--limit", type=positive, metavar="N", help="ask the first N examples only")
    parser.add_argument("--concurrency", type=positive, default=8, metavar="K", help="examples at once (default: 8)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of what is random in a suite (default: 0)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="settings", help="a setting of the suite"
    )
    parser.add_argument("--report", action="store_true", help=f"write DIR/{PAGE}; without --suite, of what is there")
    parser.add_argument("--temperature", type=number(0), default=0.0, metavar="T", help="default: 0, greedy")
    parser.add_argument("--max-tokens", type=positive, metavar="N", help="of an answer (default: the server's room)")
    parser.add_argument("--stream", action="store_true", help="ask for answers in pieces")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    options = _parser().parse_args(arguments)
    if options.suite is None and options.report:
        _report(options.out)
        return 0
    for name in ("suite", "base_url", "model"):
        if getattr(options, name) is None:
            raise UserError(f"--{name.replace('_', '-')} is missing")
    try:
        summary = evaluate(options)
    except KeyboardInterrupt:
        print(f"stopped; the same command goes on with {options.out}", file=sys.stderr)
        return 130
    if options.report:
        _report(options.out)
    return 0 if summary["scored"] == summary["wanted"] else 1


def evaluate(options: argparse.Namespace) -> dict[str, Any]:
    """Runs what the command line asks for; returns the summary. Raises `UserError`."""
    from contextlib import closing
    from datetime import UTC, datetime

    from xlam_jax.evaluate import agents, suites
    from xlam_jax.evaluate.endpoint import Model
    from xlam_jax.evaluate.records import SUMMARY, Records
    from xlam_jax.evaluate.runner import ask
    from xlam_jax.evaluate.suite import Options
    from xlam_jax.evaluate.summary import summarize, table, told
    from xlam_jax.outputs import write_json

    kind = suites.load(options.suite)
    name = options.agent or kind.agent
    known = agents.names() if kind.agents is None else kind.agents
    if name not in known and not (kind.agents is None and name.endswith(".py")):
        raise UserError(f"--agent {name}: {kind.name} runs with {', '.join(known)}{nearest(name, known)}")
    agent = agents.load(name)
    extra = _settings(options.settings, kind)
    suite, tasks = _opened(kind, Options(data=options.data, seed=options.seed, extra=extra))
    with closing(suite):
        _check_ids(tasks)
        about = {
            "suite": kind.name,
            "model": options.model,
            "agent": name,
            "seed": options.seed,
            "data": str(options.data.resolve()) if options.data else None,
            "settings": {key: value for key, value in extra.items() if not key.endswith("key")},  # no secrets
            "temperature": options.temperature,
            "max_tokens": options.max_tokens,
            "main_score": kind.main_score,
            "examples": _digest([[task.id, task.group, task.data] for task in tasks]),
            "code": _digest([Path(one).read_text("utf-8") for one in (options.suite, name) if one.endswith(".py")]),
            "base_url": options.base_url,
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        tasks = tasks[: options.limit]
        model = Model.connect(
            options.base_url,
            options.model,
            api_key=options.api_key,
            timeout=options.timeout,
            retries=options.retries,
            temperature=options.temperature,
            max_tokens=options.max_tokens,
            stream=options.stream,
            seed=options.seed,
        )
        with Records(options.out, about) as records:
            try:
                ask(suite, agent, model, tasks, records, options.concurrency)
            finally:
                found = [records.examples[task.id] for task in tasks if task.id in records.examples]
                summary = summarize(about, found, len(tasks), kind.overall)
                summary["notes"] = suite.notes(summary)
                write_json(options.out / SUMMARY, summary)
    print(f"{kind.name}, {options.model}, {name}\n{table(summary)}")
    for line in told(summary):
        print(line)
    return summary


def _opened(kind: Any, options: Any) -> tuple[Any, list[Any]]:
    """A suite, and its tasks. Raises `UserError` where its data or settings are of no use."""
    try:
        suite = kind(options)
        tasks = list(suite.tasks())
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"--suite {kind.name}: its data are not as expected: {errors.fault(error)}") from None
    if not tasks:
        raise UserError(f"--suite {kind.name}: there is no example; check --data and --set")
    return suite, tasks


def _digest(what: list[Any]) -> str | None:
    """Tells other data, or other code, under the same path; None of nothing."""
    from dataclasses import asdict, is_dataclass

    def plain(one: Any) -> Any:
        return asdict(one) if is_dataclass(one) and not isinstance(one, type) else type(one).__name__

    return json_digest(what, length=16, sort_keys=False, default=plain) if what else None


def _settings(given: Sequence[str], kind: Any) -> dict[str, str]:
    extra = {}
    for one in given:
        key, equals, value = one.partition("=")
        if not equals:
            raise UserError(f"--set {one}: is not of the form KEY=VALUE")
        if key not in kind.settings:
            known = ", ".join(kind.settings) or "none"
            raise UserError(
                f"--set {key}: {kind.name} has no such setting{nearest(key, kind.settings)}; known: {known}"
            )
        extra[key] = value
    return extra


def _check_ids(tasks: Sequence[Any]) -> None:
    seen = set()
    for task in tasks:
        if task.id in seen:
            raise UserError(f"two examples have the id {task.id}; a rerun continues by ids, so each has its own")
        seen.add(task.id)


def _report(out: Path) -> None:
    from xlam_jax.evaluate.page import write_page

    write_page(out, out / PAGE)
    print(f"report: {out / PAGE} ({(out / PAGE).stat().st_size / 1e6:.1f} MB)")


if __name__ == "__main__":
    run(main)
