"""The report of an evaluation: one page with the scores, the published ones beside them, what went wrong by kind, and
every transcript. It holds all that it shows; no request leaves it."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from xlam_jax import documents
from xlam_jax.data import html
from xlam_jax.errors import UserError
from xlam_jax.evaluate import records
from xlam_jax.evaluate.records import RUN, SUMMARY
from xlam_jax.evaluate.summary import OVERALL, told
from xlam_jax.report import page as report
from xlam_jax.report import plots
from xlam_jax.report.__main__ import check_output

GENERATOR = "xlam_jax.evaluate"
PUBLISHED = Path(__file__).with_name("published.json")
"""The tables of xLAM's README, with their source."""


class Run(NamedTuple):
    """An evaluation that is there."""

    folder: Path
    about: dict[str, Any]
    """run.json."""
    summary: dict[str, Any]


def write_page(folder: Path, out: Path) -> None:
    """Writes the page of an evaluation, finished or not. Raises `UserError`, also for an `out` that is there and is no
    page of this command."""
    run = read_run(folder)
    check_output(out, html.generator_mark(GENERATOR), advice="move it away, and run again")
    found = list(records.read(folder).values())
    beside = [run, *(one for one in siblings(run))]
    html.write(out, _page(run, found, beside))


def read_run(folder: Path) -> Run:
    """Reads run.json and summary.json. Raises `UserError`."""
    about = records.about(folder)
    path = folder / SUMMARY
    again = "run the evaluation again, it continues"
    summary = documents.read_object(path, again)
    if not isinstance(summary.get("scores"), dict):
        raise UserError(f"{path}: has no scores; {again}")
    return Run(folder, about, summary)


def siblings(run: Run) -> Iterator[Run]:
    """Evaluations beside this one's folder, of the same model and suite with other agents: they fill a table."""
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
    """The tables and the claims about a suite, and where they are from."""
    found = json.loads(PUBLISHED.read_text(encoding="utf-8"))
    tables = [table for table in found["tables"] if table["suite"] == suite]
    claims = [claim for claim in found["claims"] if claim["suite"] == suite]
    return tables, claims, f"{found['source']}, {found['url']}"


def cell(runs: Sequence[Run], column: Mapping[str, Any]) -> float | None:
    """The score of the runs that belongs into a column of a published table; None where none was run so."""
    for run in runs:
        if "agent" in column and run.about.get("agent") != column["agent"]:
            continue
        counted = run.summary.get("groups", {}).get(column["group"], {}) if "group" in column else run.summary
        if column["score"] in counted.get("scores", {}):
            return counted["scores"][column["score"]]
    return None


def _page(run: Run, found: Sequence[Mapping[str, Any]], beside: Sequence[Run]) -> Iterator[str]:
    title = f"{run.about.get('suite')}: {run.about.get('model')}, {run.about.get('agent')}"
    style = plots.STYLE + report.STYLE + STYLE
    yield from html.page(title, _body(run, found, beside), style, SCRIPT, generator=GENERATOR)


def _body(run: Run, found: Sequence[Mapping[str, Any]], beside: Sequence[Run]) -> Iterator[str]:
    yield f'<p class="quiet">Written {datetime.now(UTC):%Y-%m-%d %H:%M} UTC.</p>\n'
    if warnings := [line for line in told(run.summary) if not line.startswith("failures")]:
        yield '<ul class="warnings">' + "".join(f"<li>{escape(one)}</li>" for one in warnings) + "</ul>\n"
    yield from _about(run)
    yield f"<section><h2>Scores</h2>\n{_scores(run.summary)}</section>\n"
    yield from _published(run, beside)
    yield from _kinds(found)
    yield from _examples(found)


def _about(run: Run) -> Iterator[str]:
    summary = run.summary
    big = "".join(
        f"<div><b>{_number(value)}</b>{escape(name)}</div>" for name, value in _ordered(summary, summary["scores"])
    )
    facts = {
        "examples": f"{summary['scored']} scored of {summary['wanted']}",
        "agent": run.about.get("agent"),
        "data": run.about.get("data"),
        "settings": ", ".join(f"{key}={value}" for key, value in (run.about.get("settings") or {}).items()),
        "sampling": f"temperature {run.about.get('temperature')}, seed {run.about.get('seed')}",
        "server": run.about.get("base_url"),
        "started": run.about.get("started"),
    }
    rows = "".join(f"<div><dt>{name}</dt><dd>{escape(str(value))}</dd></div>" for name, value in facts.items() if value)
    yield f'<div class="run single"><div class="values">{big}</div>\n<dl>{rows}</dl></div>\n'


def _ordered(summary: Mapping[str, Any], scores: Mapping[str, float]) -> list[tuple[str, float]]:
    return sorted(scores.items(), key=lambda one: one[0] != summary.get("main_score"))


def _number(value: float | None, percent: bool = False) -> str:
    return "–" if value is None else f"{100 * value:.2f}" if percent else f"{value:.4f}"


def _scores(summary: Mapping[str, Any]) -> str:
    names = [name for name, _ in _ordered(summary, summary["scores"])]
    counted = [*summary.get("groups", {}).items(), (summary.get("overall", OVERALL), summary)]
    counts = ["examples", "scored", *(["unreadable_calls"] if "unreadable_calls" in summary else [])]
    rows = [
        [name or "(none)", *(one.get(count, 0) for count in counts), *(_number(one["scores"].get(n)) for n in names)]
        for name, one in counted
    ]
    return _scrolled(html.table(["group", *(count.replace("_", " ") for count in counts), *names], rows))


def _scrolled(table: str, kind: str = "") -> str:
    return f'<div class="scroll {kind}">{table}</div>\n'


def _published(run: Run, beside: Sequence[Run]) -> Iterator[str]:
    tables, claims, source = published(str(run.about.get("suite")))
    if not tables and not claims:
        return
    yield f'<section><h2>Beside the published scores</h2>\n<p class="quiet">As in the {escape(source)}. '
    yield "They were made with that benchmark's own code, prompts and data, in full; compare with care.</p>\n"
    for table in tables:
        percent = table.get("percent", False)
        ours = [_number(cell(beside, column), percent) for column in table["columns"]]
        digits = max(len(str(value).partition(".")[2]) for row in table["rows"] for value in row[1:])
        rows = [
            [name, *("–" if value is None else f"{value:.{digits}f}" for value in values)]
            for name, *values in table["rows"]
        ]
        head = [table["title"], *(column["label"] for column in table["columns"])]
        yield _scrolled(html.table(head, [[f"{run.about.get('model')} (this)", *ours], *rows]), "published")
        note = f"{table['note']}; " if table["note"] else ""
        yield f'<p class="quiet">{escape(note)}{escape(table["benchmark"])}</p>\n'
    for claim in claims:
        yield f'<p class="quiet">{escape(claim["said"])}; {escape(claim["benchmark"])}</p>\n'
    if len(beside) > 1:
        names = ", ".join(f"{one.about.get('agent')} ({one.folder.name})" for one in beside[1:])
        yield f'<p class="quiet">The row of the model also holds the runs in folders beside: {escape(names)}.</p>\n'
    yield "</section>\n"


def outcome(record: Mapping[str, Any]) -> str:
    """How an example ended, as the page tells and filters it."""
    if "error" in record:
        return f"error: {record['error']['kind']}"
    return f"failure: {record['failure']}" if record.get("failure") else "no failure"


def _kinds(found: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    counts = Counter(map(outcome, found))
    rows = [(kind, count, f"{count / len(found):.1%}") for kind, count in counts.most_common()]
    yield f"<section><h2>Failures by kind</h2>\n{_scrolled(html.table(['', 'examples', 'share'], rows))}</section>\n"


def _examples(found: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """The transcripts as data, one block each; the script shows the one that is chosen."""
    yield '<section><h2>Examples</h2>\n<div class="filters">'
    for name, values in (
        ("outcome", [kind for kind, _ in Counter(map(outcome, found)).most_common()]),
        ("group", sorted({str(record.get("group") or "") for record in found} - {""})),
    ):
        options = "".join(f'<option value="{escape(one)}">{escape(one)}</option>' for one in values)
        yield f'<label>{name} <select id="{name}"><option value="">all</option>{options}</select></label>\n'
    yield '<label>text <input id="text" type="search" placeholder="in the transcript"></label>'
    yield '<output id="count"></output></div>\n'
    yield '<div class="browse"><div id="list" role="listbox" aria-label="examples"></div>'
    yield '<article id="shown"></article></div>\n'
    yield '<noscript><p class="warnings">The transcripts are shown by a script.</p></noscript>\n'
    for record in found:
        data = {**record, "outcome": outcome(record)}
        text = json.dumps(data, ensure_ascii=False).replace("<", "\\u003c")
        yield f'<script type="application/json" class="example">{text}</script>\n'
    yield "</section>\n"


STYLE = """
.published tr:nth-child(2) td { font-weight: 600; background: var(--shade); }
.filters { display: flex; flex-wrap: wrap; gap: .4rem 1.2rem; align-items: baseline; font-size: 13px; }
.filters select, .filters input { font: inherit; color: inherit; background: var(--paper);
  border: 1px solid var(--line); padding: .15rem .3rem; max-width: 16rem; }
.browse { display: grid; grid-template-columns: minmax(12rem, 1fr) minmax(0, 2.4fr); gap: 1.2rem; margin-top: .8rem; }
@media (max-width: 44rem) { .browse { grid-template-columns: minmax(0, 1fr); } #list { max-height: 40vh; } }
#list { overflow-y: auto; max-height: 80vh; border: 1px solid var(--line); }
#list button { display: block; width: 100%; text-align: left; font: inherit; font-size: 13px; color: inherit;
  background: none; border: 0; border-bottom: 1px solid var(--line); padding: .3rem .5rem; cursor: pointer;
  overflow-wrap: anywhere; }
#list button[aria-selected=true] { background: var(--shade); font-weight: 600; }
#list small { display: block; font-size: 12px; color: var(--quiet); font-weight: 400; }
#shown { min-width: 0; max-height: 80vh; overflow-y: auto; }
#shown h3 { margin-top: 0; }
#shown .message { display: grid; grid-template-columns: 5.5rem minmax(0, 1fr); gap: .8rem; padding: .4rem 0;
  border-top: 1px solid var(--line); font-size: 13px; }
#shown .text { white-space: pre-wrap; overflow-wrap: anywhere; }
#shown pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: .3rem 0; }
@media print { .browse, .filters { display: none; } }
"""

SCRIPT = """
// The examples are read once; the list shows those that fit the filters, and one transcript is written out at a time.
// All text is set as text, never as HTML.
const PART = 300;
const examples = [...document.querySelectorAll("script.example")].map(block => {
  const text = block.textContent;
  const { id, group, outcome } = JSON.parse(text);
  return { id, group, outcome, text, lower: text.toLowerCase() };
});
const [list, shown, count] = ["list", "shown", "count"].map(id => document.getElementById(id));
const filters = ["outcome", "group", "text"].map(id => document.getElementById(id));

function element(parent, tag, text, css) {
  const made = parent.appendChild(document.createElement(tag));
  if (text !== undefined) made.textContent = text;
  if (css) made.className = css;
  return made;
}

function show(example, button) {
  for (const other of list.querySelectorAll("[aria-selected=true]")) other.setAttribute("aria-selected", "false");
  button.setAttribute("aria-selected", "true");
  const record = JSON.parse(example.text);
  shown.replaceChildren();
  shown.scrollTop = 0;
  element(shown, "h3", record.id);
  const scores = Object.entries(record.scores ?? {}).map(([name, value]) => `${name} ${+value.toFixed(4)}`);
  const facts = [record.outcome, ...scores, `${record.seconds} s`];
  element(shown, "p", facts.join("; "), "quiet");
  if (record.error) element(shown, "pre", record.error.message);
  if (Object.keys(record.details ?? {}).length) {
    const details = element(shown, "details");
    details.open = true;
    element(details, "summary", "details");
    element(details, "pre", JSON.stringify(record.details, null, 1));
  }
  for (const message of record.messages ?? []) {
    const row = element(shown, "div", undefined, "message");
    element(row, "b", message.name && message.role !== "tool" ? `${message.role}, ${message.name}` : message.role);
    const said = element(row, "div");
    const content = typeof message.content === "string" ? message.content : JSON.stringify(message.content ?? "");
    if (content) element(said, "div", content, "text");
    for (const call of message.tool_calls ?? []) {
      const { name, arguments: given } = call.function ?? call;
      element(said, "pre", `${name} ${typeof given === "string" ? given : JSON.stringify(given)}`);
    }
  }
}

function filter(parts = 1) {
  const [outcome, group, text] = filters.map(one => one.value);
  const wanted = text.toLowerCase();
  const fitting = examples.filter(one => (!outcome || one.outcome === outcome) && (!group || one.group === group)
    && (!wanted || one.lower.includes(wanted)));
  count.textContent = `${fitting.length} of ${examples.length}`;
  list.replaceChildren();
  for (const one of fitting.slice(0, parts * PART)) {
    const button = element(list, "button", one.id);
    button.setAttribute("role", "option");
    element(button, "small", [one.group, one.outcome].filter(Boolean).join("; "));
    button.addEventListener("click", () => show(one, button));
  }
  if (fitting.length > parts * PART) {
    element(list, "button", `${fitting.length - parts * PART} more`).addEventListener("click", () => filter(parts + 1));
  }
  shown.replaceChildren();
}

for (const one of filters) one.addEventListener("input", () => filter());
filter();
"""
