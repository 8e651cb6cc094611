"""The report of an evaluation: the scores next to published ones, failures by kind, and all transcripts."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from xlam_jax import documents
from xlam_jax.errors import UserError
from xlam_jax.evaluate import records
from xlam_jax.evaluate.records import RUN, SUMMARY
from xlam_jax.evaluate.summary import OVERALL, list_notes
from xlam_jax.pages import document

GENERATOR = "xlam_jax.evaluate"
PUBLISHED = Path(__file__).with_name("published.json")
"""The tables of xLAM's README, with their source."""


class Run(NamedTuple):
    """An evaluation, read from its folder."""

    folder: Path
    about: dict[str, Any]
    """run.json."""
    summary: dict[str, Any]
    """summary.json."""


class Table(NamedTuple):
    """A table of texts and numbers, with a note below."""

    header: list[str]
    rows: list[list[Any]]
    note: str = ""


class Value(NamedTuple):
    """A number in large type and its name."""

    text: str
    label: str
    detail: str | None = None


class Published(NamedTuple):
    """Published scores of a suite, with those of this model in the first row of each table."""

    source: str
    tables: list[Table]
    claims: list[str]
    siblings: str
    """Runs in neighboring folders that also contribute to the first row."""


class Content(NamedTuple):
    """What the page shows, except for the transcripts."""

    written: datetime
    warnings: list[str]
    values: list[Value]
    facts: list[tuple[str, Any]]
    scores: Table
    published: Published | None
    failures: Table
    filters: list[tuple[str, list[str]]]
    """Names and options of the menus that filter the transcripts."""


def write_page(folder: Path, out: Path) -> None:
    """Writes the page of an evaluation, finished or not.

    Raises `UserError` if the folder contains no evaluation, or `out` is a file that this command did not write.
    """
    run = read_run(folder)
    document.check_output(out, GENERATOR, advice="move it away, and run again")
    examples = list(records.read(folder).values())
    document.write(
        out,
        "evaluation.html.jinja",
        title=f"{run.about.get('suite')}: {run.about.get('model')}, {run.about.get('agent')}",
        generator=GENERATOR,
        content=_content(run, examples, [run, *siblings(run)]),
        examples=({**record, "outcome": outcome(record)} for record in examples),
    )


def read_run(folder: Path) -> Run:
    """Reads run.json and summary.json. Raises `UserError` if one is missing or invalid."""
    about = records.about(folder)
    path = folder / SUMMARY
    again = "run the evaluation again, it continues"
    summary = documents.read_object(path, again)
    if not isinstance(summary.get("scores"), dict):
        raise UserError(f"{path}: has no scores; {again}")
    return Run(folder, about, summary)


def siblings(run: Run) -> Iterator[Run]:
    """Yields the evaluations in neighboring folders of the same model, suite and data with other agents."""
    for path in sorted(run.folder.absolute().parent.iterdir()):
        try:
            if path == run.folder.absolute() or not (path / RUN).is_file() or not (path / SUMMARY).is_file():
                continue
            other = read_run(path)
        except (OSError, UserError):  # another user's, perhaps
            continue
        same = all(other.about.get(key) == run.about.get(key) for key in ("suite", "model", "data"))
        if same and other.about.get("agent") != run.about.get("agent"):
            yield other


def published(suite: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]], str]:
    """Returns the published tables and claims about a suite, and their source."""
    data = json.loads(PUBLISHED.read_text(encoding="utf-8"))
    tables = [table for table in data["tables"] if table["suite"] == suite]
    claims = [claim for claim in data["claims"] if claim["suite"] == suite]
    return tables, claims, f"{data['source']}, {data['url']}"


def cell(runs: Sequence[Run], column: Mapping[str, Any]) -> float | None:
    """Returns the score of the first run that fits a column of a published table; None if there is none."""
    for run in runs:
        if "agent" in column and run.about.get("agent") != column["agent"]:
            continue
        counts = run.summary.get("groups", {}).get(column["group"], {}) if "group" in column else run.summary
        if column["score"] in counts.get("scores", {}):
            return counts["scores"][column["score"]]
    return None


def outcome(record: Mapping[str, Any]) -> str:
    """Returns how an example ended, for the table of failures and the filter."""
    if "error" in record:
        return f"error: {record['error']['kind']}"
    return f"failure: {record['failure']}" if record.get("failure") else "no failure"


def _content(run: Run, examples: Sequence[Mapping[str, Any]], runs: Sequence[Run]) -> Content:
    outcomes = Counter(map(outcome, examples)).most_common()
    scores = _main_score_first(run.summary)
    return Content(
        written=datetime.now(UTC),
        warnings=[line for line in list_notes(run.summary) if not line.startswith("failures")],
        values=[Value(_number(run.summary["scores"][name]), name) for name in scores],
        facts=_facts(run),
        scores=_scores(run.summary),
        published=_published(run, runs),
        failures=Table(
            ["", "examples", "share"], [[kind, count, f"{count / len(examples):.1%}"] for kind, count in outcomes]
        ),
        filters=[
            ("outcome", [kind for kind, _ in outcomes]),
            ("group", sorted({str(record.get("group") or "") for record in examples} - {""})),
        ],
    )


def _facts(run: Run) -> list[tuple[str, Any]]:
    about, summary = run.about, run.summary
    facts = [
        ("examples", f"{summary['scored']} scored of {summary['wanted']}"),
        ("agent", about.get("agent")),
        ("data", about.get("data")),
        ("settings", ", ".join(f"{key}={value}" for key, value in (about.get("settings") or {}).items())),
        ("sampling", f"temperature {about.get('temperature')}, seed {about.get('seed')}"),
        ("server", about.get("base_url")),
        ("started", about.get("started")),
    ]
    return [(name, value) for name, value in facts if value]


def _main_score_first(summary: Mapping[str, Any]) -> list[str]:
    return sorted(summary["scores"], key=lambda name: name != summary.get("main_score"))


def _number(value: float | None, percent: bool = False) -> str:
    return "–" if value is None else f"{100 * value:.2f}" if percent else f"{value:.4f}"


def _scores(summary: Mapping[str, Any]) -> Table:
    names = _main_score_first(summary)
    groups = [*summary.get("groups", {}).items(), (summary.get("overall", OVERALL), summary)]
    counts = ["examples", "scored", *(["unreadable_calls"] if "unreadable_calls" in summary else [])]
    return Table(
        ["group", *(count.replace("_", " ") for count in counts), *names],
        [
            [
                group or "(none)",
                *(counted.get(count, 0) for count in counts),
                *(_number(counted["scores"].get(name)) for name in names),
            ]
            for group, counted in groups
        ],
    )


def _published(run: Run, runs: Sequence[Run]) -> Published | None:
    tables, claims, source = published(str(run.about.get("suite")))
    if not tables and not claims:
        return None
    return Published(
        source=source,
        tables=[_published_table(str(run.about.get("model")), runs, table) for table in tables],
        claims=[f"{claim['said']}; {claim['benchmark']}" for claim in claims],
        siblings=", ".join(f"{other.about.get('agent')} ({other.folder.name})" for other in runs[1:]),
    )


def _published_table(model: str, runs: Sequence[Run], table: Mapping[str, Any]) -> Table:
    percent = table.get("percent", False)
    ours = [_number(cell(runs, column), percent) for column in table["columns"]]
    digits = max(len(str(value).partition(".")[2]) for row in table["rows"] for value in row[1:])
    rows = [
        [name, *("–" if value is None else f"{value:.{digits}f}" for value in values)]
        for name, *values in table["rows"]
    ]
    note = f"{table['note']}; " if table["note"] else ""
    header = [table["title"], *(column["label"] for column in table["columns"])]
    return Table(header, [[f"{model} (this)", *ours], *rows], f"{note}{table['benchmark']}")
