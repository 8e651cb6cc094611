"""Writes the results of the conformance benchmark as Markdown."""

from collections.abc import Mapping, Sequence
from typing import Any

from _conformance_compare import Defect

Results = Mapping[str, Mapping[str, Sequence[Defect]]]
"""Template → row → defects."""


def render(columns: Mapping[str, Mapping[str, Any]], rows: Sequence[str], templates: Sequence[str]) -> str:
    """Returns the tables. A column is a peer: its `version`, and `error` or `results`."""
    parts = [_summary(columns, rows, templates), _matrix(columns, rows, templates)]
    parts += [_details(name, column, templates) for name, column in columns.items() if "results" in column]
    return "\n".join(parts)


def _summary(columns: Mapping[str, Mapping[str, Any]], rows: Sequence[str], templates: Sequence[str]) -> str:
    lines = ["| tool | version | " + " | ".join(templates) + " |", "|---" * (2 + len(templates)) + "|"]
    for name, column in columns.items():
        if "error" in column:
            cells = [f"not run: {_cell(column['error'])}", *[""] * (len(templates) - 1)]
        else:
            wrong = [sum(bool(column["results"][template][row]) for row in rows) for template in templates]
            cells = [f"{count} of {len(rows)} rows with defects" for count in wrong]
        lines.append(f"| {name} | {column['version']} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _matrix(columns: Mapping[str, Mapping[str, Any]], rows: Sequence[str], templates: Sequence[str]) -> str:
    """The kinds of defects of each row; `✓` for none. The templates are separated by a slash where they differ."""
    run = {name: column["results"] for name, column in columns.items() if "results" in column}
    lines = ["| row | " + " | ".join(run) + " |", "|---" * (1 + len(run)) + "|"]
    for row in rows:
        cells = []
        for results in run.values():
            kinds = [", ".join(dict.fromkeys(d.kind for d in results[template][row])) or "✓" for template in templates]
            cells.append(kinds[0] if len(set(kinds)) == 1 else " / ".join(kinds))
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _details(name: str, column: Mapping[str, Any], templates: Sequence[str]) -> str:
    """The defects of a peer; equal ones of several rows are one line."""
    grouped: dict[tuple[str, str, str, str], dict[str, None]] = {}
    for template in templates:
        for row, defects in column["results"][template].items():
            for defect in defects:
                key = (template, defect.kind, defect.expected, defect.found)
                grouped.setdefault(key, {})[row] = None
    if not grouped:
        return f"### {name}\n\nNo defects.\n"
    lines = [f"### {name}", "", "| template | defect | expected | found | rows |", "|---|---|---|---|---|"]
    for (template, kind, expected, found), rows in grouped.items():
        lines.append(f"| {template} | {kind} | {_code(expected)} | {_code(found)} | {', '.join(rows)} |")
    return "\n".join(lines) + "\n"


def _code(text: str) -> str:
    return f"`{_cell(text)}`" if text else ""


def _cell(text: str) -> str:
    return text.replace("\n", "⏎").replace("`", "'").replace("|", "\\|").replace("\ufffd", "?")
