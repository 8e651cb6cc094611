"""Asks the examples of a suite, many at once, and records each as it ends."""

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
from xlam_jax.training.progress import Progress, Status, duration

EVERY = 10.0
"""Seconds between the lines of a log."""
UNREACHED = 10
"""Examples in a row for which a server failed, after which the run ends: the others would end like them."""
_SERVERS = ("refused", "environment")
"""Kinds of faults of which the cause is a server that is not there: the model's, or the suite's own."""


def ask(
    suite: Suite, agent: Agent, model: Model, tasks: Sequence[Task], records: Records, concurrency: int = 1
) -> None:
    """Asks the tasks that have no score yet, `concurrency` at once; those that ended in an error are asked again.

    Raises `UserError` where no server is reached, or no request can succeed; what was written stays.
    """
    pending = [task for task in tasks if "error" in records.examples.get(task.id, {"error": None})]
    with Progress() as progress:
        if records.torn:
            progress.line("the last line of examples.jsonl was cut off; its example is asked again")
        if len(pending) < len(tasks):
            again = sum(task.id in records.examples for task in pending)
            told = f"; {again} that ended in an error are asked again" if again else ""
            progress.line(f"{len(tasks) - len(pending)} of {len(tasks)} examples are scored already{told}")
        try:
            asyncio.run(_ask(suite, agent, model, pending, records, concurrency, _Told(progress, len(pending))))
        except BaseExceptionGroup as group:
            raise group.exceptions[0] from None


async def _ask(
    suite: Suite,
    agent: Agent,
    model: Model,
    pending: Sequence[Task],
    records: Records,
    concurrency: int,
    told: "_Told",
) -> None:
    async def work(tasks: Iterator[Task]) -> None:
        for task in tasks:
            record = await _example(suite, agent, model, task)
            _check_scores(record, records)
            records.add(record)
            told.add(record)
            if told.unreached >= UNREACHED:
                raise UserError(
                    f"{record['error']['message']} ({told.unreached} examples in a row ended like this). Start that "
                    "server, or correct its address; the same command continues"
                )

    shared = iter(pending)
    async with model, asyncio.TaskGroup() as group:
        for _ in range(min(concurrency, len(pending))):
            group.create_task(work(shared))


async def _example(suite: Suite, agent: Agent, model: Model, task: Task) -> dict[str, Any]:
    """The record of a task."""
    began = time.monotonic()
    record: dict[str, Any] = {"id": task.id, "group": task.group}
    calls: list[ToolCall] = []
    CALLS.set(calls)
    try:
        outcome = await suite.run(task, model, agent)
        messages = list(outcome.messages)
        record |= _ended(outcome)
    except EndpointFault as error:
        messages = error.messages
        record["error"] = {"kind": error.kind, "message": str(error)}
    except UserError:
        raise
    except Exception as error:  # one answer, or one row, that a suite is not made for ends no evaluation
        messages = []
        record["error"] = {"kind": "suite", "message": fault(error)}
    record["seconds"] = round(time.monotonic() - began, 3)
    record["calls"] = [{"name": call.name, "arguments": call.arguments} for call in calls]
    return record | {"messages": messages}


def _ended(outcome: Outcome) -> dict[str, Any]:
    scores = {name: float(score) for name, score in outcome.scores.items()}
    return {"scores": scores, "failure": outcome.failure, "details": dict(outcome.details)}


def _check_scores(record: dict[str, Any], records: Records) -> None:
    """Means over examples that were scored by different rules would be none."""
    if "error" in record:
        return
    before = next((one for one in records.examples.values() if "error" not in one), record)
    if set(record["scores"]) != set(before["scores"]):
        named = [", ".join(sorted(one["scores"])) for one in (before, record)]
        raise UserError(
            f"example {record['id']} has the scores {named[1]}, example {before['id']} has {named[0]}; every "
            "outcome of a suite has the same"
        )


class _Told:
    """Says how far it is: a panel on a terminal, a line every ten seconds in a log."""

    def __init__(self, progress: Progress, total: int):
        self._progress, self._total, self._done = progress, total, 0
        self.errors: Counter[str] = Counter()
        self.unreached = 0
        """Examples in a row for which a server failed."""
        self._began = self._said = time.monotonic()

    def add(self, record: dict[str, Any]) -> None:
        """An example that ended."""
        self._done += 1
        self.unreached = self.unreached + 1 if record.get("error", {}).get("kind") in _SERVERS else 0
        if "error" in record:
            kind = record["error"]["kind"]
            self.errors[kind] += 1
            if self.errors[kind] == 1:  # the first of its kind is told in full, the others counted
                self._progress.line(f"example {record['id']}: {kind}: {record['error']['message']}")
        now = time.monotonic()
        rate = self._done / max(now - self._began, 1e-9)
        left = (self._total - self._done) / rate
        errors = sum(self.errors.values())
        speed = f"{rate:.1f} examples/s"
        line = f"{self._done} of {self._total} examples  {speed}  left {duration(left)}"
        line += f"  errors {errors}" if errors else ""
        fields = (("", speed), ("errors", str(errors)))
        keep = now - self._said >= EVERY or self._done == self._total
        self._said = now if keep else self._said
        status = Status(step=self._done, steps=self._total, left=left, fields=fields, line=line)
        self._progress.step(status, keep=keep)
