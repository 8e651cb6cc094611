"""Makes preference pairs from scored trajectories of one task that agree up to an assistant turn and differ there.

`xlam_jax.data.pair` defines tasks and equal turns. Where the first difference is in a user or tool turn, neither answer
was worse, so the two trajectories are not a pair.

The files are read once. In memory are 9 bytes per turn and about 300 bytes per scored trajectory; the trajectories are
in a temporary file next to the output.
"""

import heapq
import json
import math
import tempfile
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from xlam_jax.config import Source
from xlam_jax.data import sources
from xlam_jax.data.pair import context, fingerprint, first_difference, task
from xlam_jax.data.trajectory import Trajectory, to_dict
from xlam_jax.errors import UserError
from xlam_jax.outputs import check_file, new_file, write_json

EXAMPLES = 3  # rows listed per reason


class Scored(NamedTuple):
    """A scored trajectory: its offset in the temporary file, and the fingerprints of its turns after the context."""

    score: float
    id: str
    offset: int
    turns: bytes


class Pair(NamedTuple):
    """Two trajectories of a task that first differ in an assistant turn, `turn` turns after the context."""

    chosen: Scored
    rejected: Scored
    turn: int


class Report:
    """Counts of dropped trajectories and pairs by reason, with the first rows of each."""

    def __init__(self) -> None:
        self.counts: dict[str, Counter[str]] = {"trajectory": Counter(), "pair": Counter()}
        self._rows: dict[tuple[str, str], list[str]] = {}

    def drop(self, unit: str, reason: str, row: str, count: int = 1) -> None:
        """Counts dropped trajectories or pairs."""
        if count:
            self.counts[unit][reason] += count
            rows = self._rows.setdefault((unit, reason), [])
            if len(rows) < EXAMPLES:
                rows.append(row)

    def as_dict(self) -> dict[str, Any]:
        """Returns unit → reason → count and first rows, the most frequent reason first."""
        return {
            unit: {reason: {"count": count, "rows": self._rows[unit, reason]} for reason, count in counts.most_common()}
            for unit, counts in self.counts.items()
        }


def write(
    files: Sequence[Path],
    out: Path,
    *,
    min_gap: float = 0.0,
    per_task: int = 10,
    report_path: Path | None = None,
    force: bool = False,
) -> dict[str, Any]:
    """Writes the pairs of `files` to `out`, one JSON object per line, and returns (and writes) the report.

    Outputs appear only when they are complete. Raises `UserError` for an input that cannot be read, for an output that
    exists (unless `force`), and when there are no pairs.
    """
    for path in filter(None, (out, report_path)):
        check_file(path, force=force)
    report = Report()
    with new_file(out) as lines:
        with tempfile.TemporaryFile(dir=out.parent) as spool:
            tasks, read = _index(files, spool, report)
            pairs, at_turn, paired = 0, Counter[int](), 0
            for scored in tasks:
                before = pairs
                for pair in select(scored, report, min_gap=min_gap, per_task=per_task):
                    lines.write(json.dumps(_row(pair, spool), ensure_ascii=False) + "\n")
                    at_turn[pair.turn] += 1
                    pairs += 1
                paired += pairs > before
        result = {
            "inputs": [str(path) for path in files],
            "trajectories": read,
            "tasks": len(tasks),
            "tasks_with_pairs": paired,
            "pairs": pairs,
            "turns_shared_after_the_context": dict(sorted(at_turn.items())),
            "dropped": report.as_dict(),
        }
        if not pairs:
            raise UserError(f"no pairs in {read} trajectories of {len(tasks)} tasks{_explain(report)}")
    if report_path:
        write_json(report_path, result)
    return result


def select(task: Sequence[Scored], report: Report, *, min_gap: float, per_task: int) -> Iterator[Pair]:
    """Yields at most `per_task` pairs of a task, ordered by the gap between scores, largest first, then by the ids.

    The chosen score is higher by at least `min_gap`.
    """
    if len(task) == 1:
        report.drop("trajectory", "alone-in-its-task", task[0].id)
        return
    seen: set[tuple[bytes, float]] = set()
    ranked: list[Scored] = []
    for scored in sorted(task, key=lambda scored: (scored.id, scored.offset)):
        if (scored.turns, scored.score) in seen:
            report.drop("trajectory", "repeated", scored.id)
        else:
            seen.add((scored.turns, scored.score))
            ranked.append(scored)
    ranked.reverse()  # among equal scores, ids then rise from the end to the start
    ranked.sort(key=lambda scored: scored.score)
    count = len(ranked)

    def is_far(low: int, high: int) -> bool:
        gap = ranked[high].score - ranked[low].score
        return gap > 0 and gap >= min_gap

    def ordered(low: int, high: int) -> tuple[float, str, str, int, int]:
        return (ranked[low].score - ranked[high].score, ranked[high].id, ranked[low].id, low, high)

    def names(low: int, high: int) -> str:
        return f"{ranked[high].id} > {ranked[low].id}"

    eligible = sum(
        count - bisect_left(range(count), True, lo=low + 1, key=lambda high, low=low: is_far(low, high))
        for low in range(count)
    )
    close = count * (count - 1) // 2 - eligible
    if close:
        first = next(names(*pair) for pair in combinations(range(count), 2) if not is_far(*pair))
        report.drop("pair", "gap-too-small", first, close)
    heap = [ordered(low, count - 1) for low in range(count - 1) if is_far(low, count - 1)]
    heapq.heapify(heap)
    taken = 0
    while heap:
        *_, low, high = heap[0]
        if taken == per_task:
            report.drop("pair", "over-the-cap-of-its-task", names(low, high), eligible)
            return
        if high - 1 > low and is_far(low, high - 1):
            heapq.heapreplace(heap, ordered(low, high - 1))
        else:
            heapq.heappop(heap)
        eligible -= 1
        turn = first_difference(ranked[high].turns, ranked[low].turns)
        if isinstance(turn, str):
            report.drop("pair", turn, names(low, high))
        else:
            taken += 1
            yield Pair(ranked[high], ranked[low], turn)


def _index(files: Sequence[Path], spool: BinaryIO, report: Report) -> tuple[list[list[Scored]], int]:
    """Writes the scored trajectories to `spool`. Returns (scored trajectories by task, number of rows read)."""
    tasks: dict[bytes, list[Scored]] = {}
    read, offset = 0, 0
    for item in sources.read(Source(name="pairs", files=[str(path) for path in files])):
        read += 1
        trajectory = item.trajectory
        if not isinstance(trajectory, Trajectory):
            report.drop("trajectory", getattr(trajectory, "reason", "a-pair-already"), item.where)
        elif trajectory.score is None or not math.isfinite(trajectory.score):
            report.drop("trajectory", "no-score", item.where)
        else:
            turns = fingerprint(trajectory.conversation[context(trajectory) :])
            tasks.setdefault(task(trajectory), []).append(Scored(trajectory.score, trajectory.id, offset, turns))
            offset += spool.write(json.dumps(to_dict(trajectory)).encode() + b"\n")
    return list(tasks.values()), read


def _row(pair: Pair, spool: BinaryIO) -> dict[str, Any]:
    """The pair as a JSON object."""
    chosen, rejected = _unspool(pair.chosen, spool), _unspool(pair.rejected, spool)
    shared = next(at for at, turn in enumerate(chosen["conversation"]) if turn["role"] == "assistant") + pair.turn
    return {
        "unique_trajectory_id": f"{pair.chosen.id} > {pair.rejected.id}",
        "tools": chosen["tools"],
        "task_instruction": chosen.get("task_instruction", ""),
        "conversation": chosen["conversation"][:shared],
        "chosen": chosen["conversation"][shared:],
        "rejected": rejected["conversation"][shared:],
        "chosen_score": pair.chosen.score,
        "rejected_score": pair.rejected.score,
    }


def _unspool(scored: Scored, spool: BinaryIO) -> dict[str, Any]:
    spool.seek(scored.offset)
    return json.loads(spool.readline())


def _explain(report: Report) -> str:
    counts = report.as_dict()
    lines = [
        f"\n  {entry['count']} ({unit}, {reason}), first {entry['rows'][0]}"
        for unit, reasons in counts.items()
        for reason, entry in reasons.items()
    ]
    return ":" + "".join(lines) if lines else ""


def summary(out: Path, result: dict[str, Any]) -> str:
    """Returns the report as text."""
    lines = [
        f"{out}: {result['pairs']} pairs from {result['tasks_with_pairs']} of {result['tasks']} tasks, "
        f"{result['trajectories']} trajectories read"
    ]
    for unit, reasons in result["dropped"].items():
        for reason, entry in reasons.items():
            lines.append(f"  dropped {entry['count']} ({unit}, {reason}), first {entry['rows'][0]}")
    return "\n".join(lines)
