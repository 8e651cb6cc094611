"""Computes the scores of an evaluation: means over the scored examples. Errors are counted, but never scored."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

OVERALL = "all"
"""Default name of the row for all examples; a suite can set another."""


def summarize(
    about: Mapping[str, Any], records: Iterable[Mapping[str, Any]], wanted: int, overall: str = OVERALL
) -> dict[str, Any]:
    """Returns summary.json of an evaluation of `wanted` examples; `about` is its run.json.

    `scores` are means over the scored examples, 0 to 1; they are empty for a group without scored examples. `overall`
    names the row for all examples. If the details of records contain `unreadable_calls` (the number of answers whose
    calls cannot be parsed), the summary contains their sum.
    """
    all_records = list(records)
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for record in all_records:
        groups.setdefault(record.get("group") or "", []).append(record)
    summary = {
        **{key: about.get(key) for key in ("suite", "model", "agent", "seed", "data", "main_score")},
        "overall": overall,
        "wanted": wanted,
        **_counted(all_records),
        "errors": dict(Counter(record["error"]["kind"] for record in all_records if "error" in record).most_common()),
        "failures": dict(Counter(record["failure"] for record in all_records if record.get("failure")).most_common()),
    }
    if set(groups) != {""}:
        summary["groups"] = {name: _counted(members) for name, members in sorted(groups.items())}
    return summary


def _counted(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    scored = [record["scores"] for record in records if "error" not in record]
    names = list(scored[0]) if scored else []
    details = [record.get("details") or {} for record in records]
    unreadable = [detail["unreadable_calls"] for detail in details if "unreadable_calls" in detail]
    return {
        "examples": len(records),
        "scored": len(scored),
        **({"unreadable_calls": sum(unreadable)} if unreadable else {}),
        "scores": {name: sum(scores[name] for scores in scored) / len(scored) for name in names},
    }


def table(summary: Mapping[str, Any]) -> str:
    """Returns the scores as a text table: one row per group, and one for all examples."""
    main = summary["main_score"]
    names = sorted(summary["scores"], key=lambda name: name != main)
    rows = [["", "scored", *names]]
    rows += [_row(name or "(none)", counts, names) for name, counts in summary.get("groups", {}).items()]
    rows.append(_row(summary.get("overall", OVERALL), summary, names))
    widths = [max(len(row[at]) for row in rows) for at in range(len(rows[0]))]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
    return "\n".join(line.rstrip() for line in lines)


def _row(name: str, counted: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    scores = counted["scores"]
    return [
        name,
        f"{counted['scored']}/{counted['examples']}",
        *(f"{scores[n]:.4f}" if n in scores else "–" for n in names),
    ]


def list_notes(summary: Mapping[str, Any]) -> list[str]:
    """Returns the lines to print below the table: the suite's notes, failures, errors, and missing examples."""
    lines = list(summary.get("notes", ()))
    if summary["failures"]:
        lines.append("failures: " + ", ".join(f"{kind} {count}" for kind, count in summary["failures"].items()))
    if summary["errors"]:
        kinds = ", ".join(f"{kind} {count}" for kind, count in summary["errors"].items())
        count = sum(summary["errors"].values())
        lines.append(
            f"{count} of {summary['examples']} examples ended in an error and are not scored ({kinds}); "
            "the same command runs them again"
        )
    if missing := summary["wanted"] - summary["examples"]:
        lines.append(f"{missing} of {summary['wanted']} examples have not been run yet; the same command continues")
    return lines
