"""`python -m xlam_jax.evaluate --suite NAME --base-url URL --model NAME --out DIR`: evaluates a served model."""

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
    """Imports the suites and agents only for `--help`, which lists them."""

    def format_help(self) -> str:
        from xlam_jax.evaluate import agents, suites

        def list_all(registry: Any) -> str:
            entries = [(name, registry.load(name).about) for name in registry.names()]
            return "\n".join(f"  {name:16}{about}" for name, about in entries)

        self.epilog = (
            f"suites:\n{list_all(suites)}\n\nagents:\n{list_all(agents)}\n\n"
            "To use your own suite or agent, pass its file: --suite FILE.py, --agent FILE.py; see docs/evaluation.md"
        )
        return super().format_help()


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m xlam_jax.evaluate",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Runs the examples of a suite against a served model, and scores the answers. Writes to DIR one\n"
        "JSON line per example as it ends (examples.jsonl), and the scores (summary.json). The same command\n"
        "continues a stopped evaluation. A request that fails is an error: it is listed but not scored, and the\n"
        "next run repeats it. Exit code: 0 if all examples are scored, 1 if some are not, 2 if none can be run.",
    )
    parser.add_argument("--suite", metavar="NAME", help="the benchmark: a name, or FILE.py")
    add_server(parser, required=False, retries=5)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for records and scores")
    parser.add_argument("--agent", metavar="NAME", help="prompting strategy (default: the suite's)")
    parser.add_argument("--data", type=Path, metavar="PATH", help="your copy of the suite's data")
    parser.add_argument("--limit", type=positive, metavar="N", help="run only the first N examples")
    parser.add_argument("--concurrency", type=positive, default=8, metavar="K", help="parallel examples (default: 8)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="random seed of the suite (default: 0)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="settings", help="a setting of the suite"
    )
    parser.add_argument(
        "--report", action="store_true", help=f"write DIR/{PAGE}; without --suite, from existing records"
    )
    parser.add_argument("--temperature", type=number(0), default=0.0, metavar="T", help="default: 0 (greedy)")
    parser.add_argument("--max-tokens", type=positive, metavar="N", help="limit per answer (default: the server's)")
    parser.add_argument("--stream", action="store_true", help="request streamed answers")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code."""
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
        print(f"stopped; the same command continues {options.out}", file=sys.stderr)
        return 130
    if options.report:
        _report(options.out)
    return 0 if summary["scored"] == summary["wanted"] else 1


def evaluate(options: argparse.Namespace) -> dict[str, Any]:
    """Runs the evaluation that the command line describes; returns its summary. Raises `UserError`."""
    from contextlib import closing

    from xlam_jax.evaluate import agents, suites
    from xlam_jax.evaluate.endpoint import Model
    from xlam_jax.evaluate.records import SUMMARY, Records
    from xlam_jax.evaluate.runner import run_tasks
    from xlam_jax.evaluate.suite import Options
    from xlam_jax.evaluate.summary import list_notes, summarize, table
    from xlam_jax.outputs import write_json

    kind = suites.load(options.suite)
    name = options.agent or kind.agent
    allowed = agents.names() if kind.agents is None else kind.agents
    if name not in allowed and not (kind.agents is None and name.endswith(".py")):
        raise UserError(f"--agent {name}: {kind.name} runs with {', '.join(allowed)}{nearest(name, allowed)}")
    agent = agents.load(name)
    extra = _settings(options.settings, kind)
    suite, tasks = _open_suite(kind, Options(data=options.data, seed=options.seed, extra=extra))
    with closing(suite):
        _check_ids(tasks)
        about = _run_settings(options, kind, name, extra, tasks)
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
                run_tasks(suite, agent, model, tasks, records, options.concurrency)
            finally:
                examples = [records.examples[task.id] for task in tasks if task.id in records.examples]
                summary = summarize(about, examples, len(tasks), kind.overall)
                summary["notes"] = suite.notes(summary)
                write_json(options.out / SUMMARY, summary)
    print(f"{kind.name}, {options.model}, {name}\n{table(summary)}")
    for line in list_notes(summary):
        print(line)
    return summary


def _run_settings(
    options: argparse.Namespace, kind: Any, agent: str, extra: dict[str, str], tasks: Sequence[Any]
) -> dict[str, Any]:
    """Returns the content of run.json: the settings, and fingerprints of examples and user code."""
    from datetime import UTC, datetime

    return {
        "suite": kind.name,
        "model": options.model,
        "agent": agent,
        "seed": options.seed,
        "data": str(options.data.resolve()) if options.data else None,
        "settings": {key: value for key, value in extra.items() if not key.endswith("key")},  # no secrets
        "temperature": options.temperature,
        "max_tokens": options.max_tokens,
        "main_score": kind.main_score,
        "examples": _digest([[task.id, task.group, task.data] for task in tasks]),
        "code": _digest([Path(path).read_text("utf-8") for path in (options.suite, agent) if path.endswith(".py")]),
        "base_url": options.base_url,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _open_suite(kind: Any, options: Any) -> tuple[Any, list[Any]]:
    """Creates a suite and its tasks. Raises `UserError` if its data or settings are invalid."""
    try:
        suite = kind(options)
        tasks = list(suite.tasks())
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"--suite {kind.name}: its data are not as expected: {errors.fault(error)}") from None
    if not tasks:
        raise UserError(f"--suite {kind.name}: has no examples; check --data and --set")
    return suite, tasks


def _digest(items: list[Any]) -> str | None:
    """Returns a fingerprint that detects changed data or code under the same path; None for an empty list."""
    from dataclasses import asdict, is_dataclass

    def plain(value: Any) -> Any:
        return asdict(value) if is_dataclass(value) and not isinstance(value, type) else type(value).__name__

    return json_digest(items, length=16, sort_keys=False, default=plain) if items else None


def _settings(assignments: Sequence[str], kind: Any) -> dict[str, str]:
    extra = {}
    for assignment in assignments:
        key, equals, value = assignment.partition("=")
        if not equals:
            raise UserError(f"--set {assignment}: must have the form KEY=VALUE")
        if key not in kind.settings:
            names = ", ".join(kind.settings) or "none"
            raise UserError(
                f"--set {key}: {kind.name} has no such setting{nearest(key, kind.settings)}; known: {names}"
            )
        extra[key] = value
    return extra


def _check_ids(tasks: Sequence[Any]) -> None:
    seen = set()
    for task in tasks:
        if task.id in seen:
            raise UserError(f"two examples have the id {task.id}; a rerun continues by id, so ids must be unique")
        seen.add(task.id)


def _report(out: Path) -> None:
    from xlam_jax.evaluate.page import write_page

    write_page(out, out / PAGE)
    print(f"report: {out / PAGE} ({(out / PAGE).stat().st_size / 1e6:.1f} MB)")


if __name__ == "__main__":
    run(main)
