"""An evaluation as one page: its scores, beside the published ones where there are some, why examples failed, and
every transcript. It holds all that it shows."""

import json
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from xlam_jax.data import html
from xlam_jax.errors import UserError
from xlam_jax.evaluate.records import RUN, SUMMARY, read
from xlam_jax.report.__main__ import check_output
from xlam_jax.report.page import STYLE as LOOK

GENERATOR = "xlam_jax.evaluate"
LONGEST = 20_000
"""Characters that are shown of a message."""


def write_page(folder: Path, out: Path) -> None:
    """Writes the page of an evaluation's folder. Raises `UserError` where it is none, and for an `out` that
    is there and is no page of this command."""
    try:
        about = json.loads((folder / RUN).read_text(encoding="utf-8"))
        summary = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{folder}: no {Path(error.filename).name} there; name the --out of an evaluation") from None
    except ValueError as error:
        raise UserError(f"{folder}: {RUN} or {SUMMARY} is no JSON ({error}); evaluate into a new folder") from None
    title = f"{about['suite']}: {about['model']}"
    check_output(out, html.generator_mark(GENERATOR), force=False)
    body = _body(about, summary, list(read(folder).values()))
    html.write(out, html.page(title, body, LOOK + STYLE, SCRIPT, generator=GENERATOR))


def _body(about: Mapping[str, Any], summary: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    from xlam_jax.evaluate.summary import told

    settings = ", ".join(f"{key}={value}" for key, value in (about.get("settings") or {}).items())
    facts = {
        "agent": about["agent"],
        "server": about.get("base_url"),
        "data": about.get("data"),
        "settings": settings,
        "started": str(about.get("started") or "").replace("T", " ").removesuffix("+00:00") + " UTC",
        "examples": f"{summary['examples']:,}, of which {summary['scored']:,} are scored",
    }
    main = summary["main_score"]
    names = sorted(summary["scores"], key=lambda name: name != main)
    if warnings := [line for line in told(summary) if not line.startswith("failures")]:
        yield '<ul class="warnings">' + "".join(f"<li>{escape(one)}</li>" for one in warnings) + "</ul>\n"
    big = "".join(f"<div><b>{summary['scores'][name]:.1%}</b>{escape(_spoken(name))}</div>" for name in names)
    said = "".join(f"<div><dt>{key}</dt><dd>{escape(str(text))}</dd></div>" for key, text in facts.items() if text)
    yield f'<div class="runs single"><div class="run"><div class="values">{big}</div>\n<dl>{said}</dl></div></div>\n'
    if groups := summary.get("groups"):
        yield "<section><h2>Scores by group</h2>\n" + _groups(groups, summary, names) + "</section>\n"
    if tables := "".join(_published(about, summary)):
        yield f'<section><h2 id="published">Beside published scores</h2>\n{tables}</section>\n'
    if summary["failures"] or summary["errors"]:
        yield "<section><h2>What went wrong</h2>\n" + _failures(summary) + "</section>\n"
    yield '<section><h2>Examples</h2>\n<div id="examples"><p class="quiet">A script lists them here.</p></div>\n'
    yield "</section>\n"
    shown = {"main": main, "names": names, "records": [_shown(record) for record in records]}
    # `<` would let a text end the element that holds it
    text = json.dumps(shown, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    yield f'<script type="application/json" id="records">{text}</script>\n'


def _spoken(name: str) -> str:
    return name.replace("_", " ")


def _groups(groups: Mapping[str, Any], summary: Mapping[str, Any], names: Sequence[str]) -> str:
    def row(name: str, one: Mapping[str, Any], kind: str = "") -> str:
        cells = "".join(
            f'<td class="heat" style="--heat:{40 * one["scores"][score]:.0f}%">{one["scores"][score]:.1%}</td>'
            if score in one["scores"]
            else "<td>–</td>"
            for score in names
        )
        return f"<tr{kind}><td>{escape(name)}</td><td>{one['scored']:,} of {one['examples']:,}</td>{cells}</tr>\n"

    head = "".join(f"<th>{escape(_spoken(name))}</th>" for name in names)
    rows = "".join(row(name or "(none)", one) for name, one in groups.items())
    return (
        f'<div class="scroll"><table><tr><th>group</th><th>scored</th>{head}</tr>\n{rows}'
        + row("all", summary, ' class="all"')
        + "</table></div>\n"
    )


def published() -> dict[str, Any]:
    """Scores that others published, with their source: `tables` of a suite each, and where ours belong in it."""
    return json.loads(files("xlam_jax.evaluate").joinpath("published.json").read_text(encoding="utf-8"))


def _published(about: Mapping[str, Any], summary: Mapping[str, Any]) -> Iterator[str]:
    known = published()
    tables = [table for table in known["tables"] if table["suite"] == about["suite"]]
    for table in tables:
        ours = [_ours(where, about, summary) for where in table["ours"]]
        if all(value is None for value in ours):
            continue
        head = "".join(f"<th>{escape(name)}</th>" for name in ["model", *table["columns"]])
        digits = 2 if any("times" in where for where in table["ours"]) else 3
        rows = [
            (f"{about['model']} (this run)", ours, ' class="ours"'),
            *((row[0], row[1:], "") for row in table["rows"]),
        ]
        lines = "".join(
            f"<tr{kind}><td>{escape(name)}</td>"
            + "".join("<td>–</td>" if one is None else f"<td>{one:.{digits}f}</td>" for one in values)
            + "</tr>\n"
            for name, values, kind in rows
        )
        yield f'<h3>{escape(table["title"])}</h3>\n<div class="scroll"><table><tr>{head}</tr>\n{lines}</table></div>\n'
        yield f'<p class="quiet">Published: {escape(known["source"])}. Their prompts, data and versions differ.</p>\n'


def _ours(where: Mapping[str, Any], about: Mapping[str, Any], summary: Mapping[str, Any]) -> float | None:
    """This evaluation's score for a column; None where it has none."""
    if where.get("agent", about["agent"]) != about["agent"]:
        return None
    if "setting" in where:
        name, value = where["setting"]
        if str((about.get("settings") or {}).get(name)) != value:
            return None
    of = summary.get("groups", {}).get(where["group"], {"scores": {}}) if "group" in where else summary
    score = of["scores"].get(where["score"])
    return None if score is None else score * where.get("times", 1)


def _failures(summary: Mapping[str, Any]) -> str:
    rows = [("failure", kind, count) for kind, count in summary["failures"].items()]
    rows += [("error, not scored", kind, count) for kind, count in summary["errors"].items()]
    lines = "".join(
        f'<tr><td>{kind}</td><td>{what}</td><td>{count:,}</td><td class="heat" '
        f'style="--heat:{40 * count / summary["examples"]:.0f}%">{count / summary["examples"]:.1%}</td></tr>\n'
        for what, kind, count in ((what, escape(kind), count) for what, kind, count in rows)
    )
    head = "<tr><th>kind</th><th></th><th>examples</th><th></th></tr>"
    return f'<div class="scroll"><table class="wrong">{head}\n{lines}</table></div>\n'


def _shown(record: Mapping[str, Any]) -> dict[str, Any]:
    """What the page holds of an example."""
    error = record.get("error")
    shown: dict[str, Any] = {
        "id": record["id"],
        "group": record.get("group") or "",
        "scores": record.get("scores"),
        "failure": record.get("failure") or "",
        "error": f"{error['kind']}: {_cut(error['message'])}" if error else "",
        "details": _cut(json.dumps(record.get("details") or {}, ensure_ascii=False, indent=1)),
    }
    return shown | {"messages": [_message(message) for message in record.get("messages") or ()]}


def _message(message: Mapping[str, Any]) -> list[str]:
    """Its role, its text, and its calls, one a line."""
    content = message.get("content")
    text = content if isinstance(content, str) else "" if content is None else json.dumps(content, ensure_ascii=False)
    calls = [call.get("function", call) for call in message.get("tool_calls") or ()]
    lines = "\n".join(f"{call.get('name')}({_arguments(call.get('arguments'))})" for call in calls)
    role = str(message.get("role"))
    return [f"{role} {message['name']}" if message.get("name") else role, _cut(text), _cut(lines)]


def _arguments(arguments: Any) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def _cut(text: str) -> str:
    more = len(text) - LONGEST
    return text if more <= 0 else f"{text[:LONGEST]} … ({more:,} more characters)"


STYLE = """
:root { --c0: #0072b2; }
tr.all td { font-weight: 600; } tr.ours td { font-weight: 600; background: var(--shade); }
.wrong td:nth-child(2) { color: var(--quiet); text-align: left; }
.narrow { display: flex; flex-wrap: wrap; gap: .5rem 1.2rem; align-items: center; font-size: 13px;
  margin-bottom: .8rem; }
.narrow input, .narrow select, .pages button { font: inherit; color: inherit; background: var(--paper);
  border: 1px solid var(--line); border-radius: 4px; padding: .15rem .4rem; max-width: 100%; }
.narrow input { width: 14rem; }
#list details { border-top: 1px solid var(--line); margin: 0; padding: .35rem 0; }
#list summary { color: inherit; display: flex; gap: .2rem 1rem; flex-wrap: wrap; align-items: baseline; }
#list summary b { font-weight: 500; overflow-wrap: anywhere; } #list summary span { color: var(--quiet); }
#list summary .score { font-variant-numeric: tabular-nums; color: inherit; }
.said { display: grid; grid-template-columns: 6.5rem minmax(0, 1fr); gap: .2rem .8rem; font-size: 13px;
  padding: .35rem 0; }
.said b { font-weight: 400; color: var(--quiet); overflow-wrap: anywhere; }
.said div { white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate; }
.said .calls { font: 12.5px/1.55 ui-monospace, monospace; padding-left: .7rem;
  border-left: 3px solid var(--c0); }
.pages { display: flex; gap: .8rem; align-items: center; font-size: 13px; margin-top: .8rem; }
.bad { color: var(--bad); } .good { color: var(--good); }
"""

SCRIPT = """
// Lists the examples, narrowed down as the reader wants, a page at a time; a transcript is made when it is opened.
const { main, names, records } = JSON.parse(document.getElementById("records").textContent);
const PAGE = 50;
const place = document.getElementById("examples");
const make = (tag, attributes = {}, ...children) => {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes))
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value); else node.setAttribute(name, value);
  node.append(...children);
  return node;
};
const choice = (label, values) => {
  const select = make("select", { "aria-label": label, onchange: () => show(0) },
    make("option", { value: "" }, label), ...values.map(value => make("option", { value }, value)));
  return select;
};
const kinds = key => [...new Set(records.map(record => record[key]).filter(Boolean))].sort();
const verdict = record => record.error ? "error" : record.scores[main] === 1 ? "full score"
  : record.scores[main] > 0 ? "part of it" : "no score";
const byVerdict = choice("all scores", [...new Set(records.map(verdict))].sort());
const byGroup = choice("all groups", kinds("group"));
const byFailure = choice("all failures", kinds("failure"));
const words = make("input", { type: "search", placeholder: "words of id or transcript", oninput: () => show(0) });
const count = make("span", { class: "quiet", id: "count" });
const list = make("div", { id: "list" });
const pages = make("div", { class: "pages" });
const matches = record => (!byVerdict.value || verdict(record) === byVerdict.value)
  && (!byGroup.value || record.group === byGroup.value)
  && (!byFailure.value || record.failure === byFailure.value)
  && (!words.value || JSON.stringify([record.id, record.messages, record.error, record.details]).toLowerCase()
    .includes(words.value.toLowerCase()));
const said = (who, text, kind) =>
  make("div", { class: "said" }, make("b", {}, who), make("div", { class: kind }, text));
const opened = (details, record) => {
  if (!details.open || details.childElementCount > 1) return;
  for (const [role, text, calls] of record.messages) {
    if (text || !calls) details.append(said(role, text || "(says nothing)", "text"));
    if (calls) details.append(said(text ? "" : role, calls, "calls"));
  }
  if (record.error) details.append(said("error", record.error, "bad"));
  if (record.details !== "{}") details.append(said("details", record.details, "quiet"));
};
const line = record => {
  const scores = record.scores
    ? names.map(name => `${name.replaceAll("_", " ")} ${+record.scores[name].toFixed(3)}`).join(", ") : "error";
  const good = record.scores && record.scores[main] === 1;
  const details = make("details", {}, make("summary", {}, make("b", {}, record.id), make("span", {}, record.group),
    make("span", { class: "score " + (good ? "good" : "bad") }, scores),
    make("span", {}, record.failure || record.error)));
  details.addEventListener("toggle", () => opened(details, record));
  return details;
};
const show = from => {
  const found = records.filter(matches), shown = found.slice(from, from + PAGE);
  count.textContent = `${found.length} of ${records.length} examples`;
  list.replaceChildren(...shown.map(line));
  pages.replaceChildren();
  if (from > 0) pages.append(make("button", { onclick: () => show(from - PAGE) }, "before"));
  if (found.length > PAGE) pages.append(`${from + 1} to ${from + shown.length}`);
  if (from + PAGE < found.length) pages.append(make("button", { onclick: () => show(from + PAGE) }, "next"));
};
place.replaceChildren(make("div", { class: "narrow" }, byVerdict, byGroup, byFailure, words, count), list, pages);
show(0);
"""
