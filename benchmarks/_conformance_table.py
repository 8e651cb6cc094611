"""Writes the results of the conformance benchmark as Markdown."""

from collections.abc import Mapping, Sequence
from typing import Any

from _conformance_compare import PAST_END, Defect

Results = Mapping[str, Mapping[str, Sequence[Defect]]]
"""Template → row → defects."""


def render(columns: Mapping[str, Mapping[str, Any]], rows: Sequence[str], templates: Sequence[str]) -> str:
    """Returns the tables. A column is a tool: its `version`, its `results`, and an `error` if some are missing."""
    parts = [_summary(columns, rows, templates), _matrix(columns, rows, templates)]
    parts += [_details(name, column["results"], rows) for name, column in columns.items() if column["results"]]
    return "\n".join(parts)


def _summary(columns: Mapping[str, Mapping[str, Any]], rows: Sequence[str], templates: Sequence[str]) -> str:
    lines = ["| tool | version | " + " | ".join(templates) + " |", "|---" * (2 + len(templates)) + "|"]
    for name, column in columns.items():
        cells = [_count(column, template, rows) for template in templates]
        lines.append(f"| {name} | {column['version']} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _count(column: Mapping[str, Any], template: str, rows: Sequence[str]) -> str:
    if template not in column["results"]:
        return f"not run: {_cell(column['error'])}"
    kinds = [{defect.kind for defect in column["results"][template][row]} for row in rows]
    harmless = sum(row_kinds == {PAST_END} for row_kinds in kinds)
    note = f", {harmless} of them only trained past the end" if harmless else ""
    return f"{sum(map(bool, kinds))} of {len(rows)} rows with defects{note}"


def _matrix(columns: Mapping[str, Mapping[str, Any]], rows: Sequence[str], templates: Sequence[str]) -> str:
    """The kinds of defects of each row; `✓` for none. The templates are separated by a slash where they differ."""
    run = {name: column["results"] for name, column in columns.items() if column["results"]}
    lines = ["| | row | " + " | ".join(run) + " |", "|---" * (2 + len(run)) + "|"]
    for number, row in enumerate(rows, start=1):
        cells = [" / ".join(_kinds(results, row, templates)) for results in run.values()]
        lines.append(f"| {number} | {row} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _kinds(results: Results, row: str, templates: Sequence[str]) -> list[str]:
    """The kinds of defects of a row with each template, or only once if they are the same."""
    kinds: list[str] = []
    for template in templates:
        if template in results:
            kinds.append(", ".join(dict.fromkeys(defect.kind for defect in results[template][row])) or "✓")
        else:
            kinds.append("not run")
    return kinds[:1] if len(set(kinds)) == 1 else kinds


def _details(name: str, results: Results, rows: Sequence[str]) -> str:
    """The defects of a tool; equal ones of several rows are one line."""
    grouped: dict[tuple[str, str, str, str], dict[int, None]] = {}
    for template, actual in results.items():
        for row, defects in actual.items():
            for defect in defects:
                key = (template, defect.kind, defect.expected, defect.actual)
                grouped.setdefault(key, {})[rows.index(row) + 1] = None
    if not grouped:
        return f"### {name}\n\nNo defects.\n"
    lines = [f"### {name}", "", "| template | defect | expected | actual | rows |", "|---|---|---|---|---|"]
    for (template, kind, right, wrong), numbers in grouped.items():
        lines.append(f"| {template} | {kind} | {_code(right)} | {_code(wrong)} | {_ranges(sorted(numbers))} |")
    return "\n".join(lines) + "\n"


def _ranges(numbers: Sequence[int]) -> str:
    """Writes ascending numbers, with a dash for three and more that follow each other."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}–{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs)


def _code(text: str) -> str:
    return f"`{_cell(text)}`" if text else ""


def _cell(text: str) -> str:
    return text.replace("\n", "⏎").replace("`", "'").replace("|", "\\|").replace("\ufffd", "?")
