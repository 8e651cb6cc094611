"""From the records of examples to scores: means over what was scored; errors are counted, and never a score."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

OVERALL = "all"
"""The name of the row of all examples, unless the suite has another."""


def summarize(
    about: Mapping[str, Any], records: Iterable[Mapping[str, Any]], wanted: int, overall: str = OVERALL
) -> dict[str, Any]:
    """summary.json of an evaluation that was to ask `wanted` examples; `about` is its run.json.

    `scores` are means over the scored examples, 0 to 1; a group without any has none. `overall` names the row of all.
    Where records have details `unreadable_calls`, the number of answers whose calls cannot be read, they are added up.
    """
    every = list(records)
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for record in every:
        groups.setdefault(record.get("group") or "", []).append(record)
    summary = {
        **{key: about.get(key) for key in ("suite", "model", "agent", "seed", "data", "main_score")},
        "overall": overall,
        "wanted": wanted,
        **_counted(every),
        "errors": dict(Counter(record["error"]["kind"] for record in every if "error" in record).most_common()),
        "failures": dict(Counter(record["failure"] for record in every if record.get("failure")).most_common()),
    }
    if set(groups) != {""}:
        summary["groups"] = {name: _counted(found) for name, found in sorted(groups.items())}
    return summary


def _counted(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    scored = [record["scores"] for record in records if "error" not in record]
    names = list(scored[0]) if scored else []
    details = [record.get("details") or {} for record in records]
    unreadable = [one["unreadable_calls"] for one in details if "unreadable_calls" in one]
    return {
        "examples": len(records),
        "scored": len(scored),
        **({"unreadable_calls": sum(unreadable)} if unreadable else {}),
        "scores": {name: sum(one[name] for one in scored) / len(scored) for name in names},
    }


def table(summary: Mapping[str, Any]) -> str:
    """The scores as text: a row for each group, and one for all examples."""
    main = summary["main_score"]
    names = sorted(summary["scores"], key=lambda name: name != main)
    rows = [["", "scored", *names]]
    rows += [_row(name or "(none)", one, names) for name, one in summary.get("groups", {}).items()]
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


def told(summary: Mapping[str, Any]) -> list[str]:
    """What a reader of the table must know besides."""
    lines = list(summary.get("notes", ()))
    if summary["failures"]:
        lines.append("failures: " + ", ".join(f"{kind} {count}" for kind, count in summary["failures"].items()))
    if summary["errors"]:
        kinds = ", ".join(f"{kind} {count}" for kind, count in summary["errors"].items())
        count = sum(summary["errors"].values())
        lines.append(
            f"{count} of {summary['examples']} examples ended in an error and are in no score ({kinds}); "
            "the same command asks them again"
        )
    if missing := summary["wanted"] - summary["examples"]:
        lines.append(f"{missing} of {summary['wanted']} examples have not been asked; the same command goes on")
    return lines
