"""Renders the page about runs."""

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from xlam_jax.pages import document
from xlam_jax.report.figures import Report, by_objective, window
from xlam_jax.report.overview import make_cards
from xlam_jax.report.sections import make_sections

GENERATOR = "xlam_jax.report"
TEMPLATE = "report.html.jinja"


def all_warnings(report: Report) -> list[str]:
    """Returns the warnings of all runs, and one if their losses cannot be compared."""
    warnings = [warning for run in report.runs for warning in run.warnings]
    groups = by_objective(report.runs)
    if len(groups) > 1:
        names = "; ".join(f"{objective}: {', '.join(run.name for run in runs)}" for objective, runs in groups.items())
        warnings.append(f"the runs minimize different losses, which can't be compared and are drawn apart ({names})")
    return warnings


def render(report: Report) -> Iterator[str]:
    """Yields the page in parts."""
    return document.render(TEMPLATE, **_data(report))


def write(report: Report, path: Path) -> None:
    """Writes the page."""
    document.write(path, TEMPLATE, **_data(report))


def _data(report: Report) -> dict[str, Any]:
    names = ", ".join(run.name for run in report.runs)
    return {
        "title": f"Run {names}" if report.single else f"{len(report.runs)} runs: {names}",
        "generator": GENERATOR,
        "written": datetime.now(UTC),
        "warnings": all_warnings(report),
        "single": report.single,
        "cards": make_cards(report),
        "sections": make_sections(report),
        "windows": [(run.name, window(run)) for run in report.runs],
    }
