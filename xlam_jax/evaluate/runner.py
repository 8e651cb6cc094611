"""Runs the examples of a suite concurrently, and records each as it ends."""

import asyncio
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from xlam_jax.data.trajectory import ToolCall
from xlam_jax.errors import UserError, fault
from xlam_jax.evaluate.agents import Agent
from xlam_jax.evaluate.endpoint import CALLS, EndpointFault, Model
from xlam_jax.evaluate.records import Records
from xlam_jax.evaluate.suite import Outcome, Suite, Task
from xlam_jax.progress import Progress, Throughput

UNREACHED = 10
"""Consecutive examples for which a server failed, after which the evaluation ends: the others would fail too."""
_SERVERS = ("refused", "environment")
"""Kinds of faults that mean a server is down: the model's, or the suite's."""


def run_tasks(
    suite: Suite, agent: Agent, model: Model, tasks: Sequence[Task], records: Records, concurrency: int = 1
) -> None:
    """Runs the tasks without a score, `concurrency` at a time; tasks that ended in an error run again.

    Raises `UserError` when no server is reached, or no request can succeed; existing records are kept.
    """
    pending = [task for task in tasks if "error" in records.examples.get(task.id, {"error": None})]
    with Progress() as progress:
        if records.torn:
            progress.line("the last line of examples.jsonl was cut off; its example is evaluated again")
        if len(pending) < len(tasks):
            again = sum(task.id in records.examples for task in pending)
            note = f"; {again} that ended in an error are evaluated again" if again else ""
            progress.line(f"{len(tasks) - len(pending)} of {len(tasks)} examples are scored already{note}")
        try:
            asyncio.run(_run_tasks(suite, agent, model, pending, records, concurrency, _Report(progress, len(pending))))
        except BaseExceptionGroup as group:
            raise group.exceptions[0] from None


async def _run_tasks(
    suite: Suite,
    agent: Agent,
    model: Model,
    pending: Sequence[Task],
    records: Records,
    concurrency: int,
    report: "_Report",
) -> None:
    async def work(tasks: Iterator[Task]) -> None:
        for task in tasks:
            record = await _example(suite, agent, model, task)
            _check_scores(record, records)
            records.add(record)
            report.add(record)
            if report.unreached >= UNREACHED:
                raise UserError(
                    f"{record['error']['message']} ({report.unreached} examples in a row ended like this). Start that "
                    "server, or correct its address; the same command continues"
                )

    shared = iter(pending)
    async with model, asyncio.TaskGroup() as group:
        for _ in range(min(concurrency, len(pending))):
            group.create_task(work(shared))


async def _example(suite: Suite, agent: Agent, model: Model, task: Task) -> dict[str, Any]:
    """Runs one task and returns its record."""
    began = time.monotonic()
    record: dict[str, Any] = {"id": task.id, "group": task.group}
    calls: list[ToolCall] = []
    CALLS.set(calls)
    try:
        outcome = await suite.run(task, model, agent)
        messages = list(outcome.messages)
        record |= _result(outcome)
    except EndpointFault as error:
        messages = error.messages
        record["error"] = {"kind": error.kind, "message": str(error)}
    except UserError:
        raise
    except Exception as error:  # an answer or a row that the suite did not expect must not end the evaluation
        messages = []
        record["error"] = {"kind": "suite", "message": fault(error)}
    record["seconds"] = round(time.monotonic() - began, 3)
    record["calls"] = [{"name": call.name, "arguments": call.arguments} for call in calls]
    return record | {"messages": messages}


def _result(outcome: Outcome) -> dict[str, Any]:
    scores = {name: float(score) for name, score in outcome.scores.items()}
    return {"scores": scores, "failure": outcome.failure, "details": dict(outcome.details)}


def _check_scores(record: dict[str, Any], records: Records) -> None:
    """Raises `UserError` when a record has other scores than earlier ones: their means would not be comparable."""
    if "error" in record:
        return
    first = next((example for example in records.examples.values() if "error" not in example), record)
    names, expected = (", ".join(sorted(example["scores"])) for example in (record, first))
    if names != expected:
        raise UserError(
            f"example {record['id']} has the scores {names}, example {first['id']} has {expected}; all outcomes of a "
            "suite must have the same scores"
        )


class _Report:
    """Prints the number of finished examples and of errors."""

    def __init__(self, progress: Progress, total: int):
        self._progress, self._total = progress, total
        self._ended = Throughput("examples", total, unit="examples", out=progress)
        self._errors: Counter[str] = Counter()
        self.unreached = 0
        """Consecutive examples for which a server failed."""

    def add(self, record: dict[str, Any]) -> None:
        """Counts a finished example."""
        kind = record.get("error", {}).get("kind")
        self.unreached = self.unreached + 1 if kind in _SERVERS else 0
        if kind is not None:
            self._errors[kind] += 1
            if self._errors[kind] == 1:  # the first of its kind is printed, the others are counted
                self._progress.line(f"example {record['id']}: {kind}: {record['error']['message']}")
        last = self._ended.done + 1 == self._total
        self._ended.add(last=last, errors=f"{self._errors.total():,}")
