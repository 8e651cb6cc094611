"""Finds everything that is wrong with files of trajectories: what the parser refuses, repairs or drops, and each call
that its tool's JSON Schema does not allow.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from xlam_jax.config import Source
from xlam_jax.data import sources
from xlam_jax.data.converters.preference import is_other_layout, pair_row
from xlam_jax.data.declarations import find_tools
from xlam_jax.data.pair import parse_pair
from xlam_jax.data.parse import UNKNOWN_ROLE, UnreadableCall, parse_trajectory
from xlam_jax.data.problems import ignore
from xlam_jax.data.schemas import Parameters, Problem, compiled
from xlam_jax.data.text_calls import unread_calls
from xlam_jax.data.trajectory import (
    ROW_KEYS,
    InvalidTrajectory,
    Message,
    Trajectory,
    system_text,
    turn_number,
)
from xlam_jax.digest import key_digest
from xlam_jax.errors import UserError

LONGEST_DETAIL = 400
Limit = Callable[[Trajectory], Iterable[Problem]]
"""Finds the problems that keep a trajectory out of a config's rows."""


class Finding(NamedTuple):
    """A problem and its place. `id` is the trajectory's, empty where it has none."""

    file: str
    line: int
    id: str
    reason: str
    detail: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.reason}: {self.detail}"


def validate(path: Path, limit: Limit | None = None) -> Iterator[list[Finding]]:
    """Yields a list of findings for each row of a file, empty for a valid row. Reads any file that a config may name.

    Keeps 16 bytes of each id in memory. Raises `UserError` when the file cannot be read or has no rows.
    """
    seen: dict[bytes, int] = {}
    line = 0
    source = Source(name="validate", files=[str(path)])
    sources.check(source)
    for _, _, number, row, padded, begins in sources.file_rows(source, path):
        line = begins or number
        identity = ""
        if isinstance(row, InvalidTrajectory):
            problems = [Problem(row.reason, row.detail)]
        else:
            problems = list(check_row(row, limit, padded=padded))
            row_id = row.get("unique_trajectory_id")
            if isinstance(row_id, str | int):
                identity = str(row_id)
                digest = key_digest(identity)
                first = seen.setdefault(digest, line)
                if first != line:
                    problems.append(Problem("duplicate-trajectory-id", f"'{identity}' is line {first}'s too"))
        yield [Finding(str(path), line, identity, problem.reason, _one_line(problem.detail)) for problem in problems]
    if not line:
        raise UserError(f"{path}: has no rows; expected trajectories, one JSON object per line")


def check_row(row: object, limit: Limit | None = None, *, padded: bool = False) -> Iterator[Problem]:
    """Yields every problem of one row, except ids that another row has.

    A row with `chosen` and `rejected` is a pair.
    """
    if isinstance(row, dict) and is_other_layout(row):
        notes: list[Problem] = []
        try:
            row = pair_row(row, "", lambda reason, detail: notes.append(Problem(reason, detail)))
        except InvalidTrajectory as invalid:
            yield Problem(invalid.reason, invalid.detail)
            return
        yield from notes
    if isinstance(row, dict) and {"chosen", "rejected"} <= row.keys():
        yield from _check_pair(row, limit, padded)
        return
    notes, refusals = [], []
    if isinstance(row, dict) and row.get("unique_trajectory_id") is None:
        detail = "`unique_trajectory_id` is missing; the line's number becomes its name"
        notes.append(Problem("missing-trajectory-id", detail))
    try:
        trajectory = parse_trajectory(
            row,
            repaired=lambda *note: notes.append(Problem(*note)),
            problem=lambda *refusal: refusals.append(Problem(*refusal)),
            padded=padded,
        )
    except InvalidTrajectory as invalid:
        yield Problem(invalid.reason, invalid.detail)
        return
    yield from notes
    yield from refusals
    yield from _empty_turns(trajectory.conversation)
    yield from _unanswered(trajectory.conversation)
    yield from _unread_calls(trajectory)
    yield from check_calls(trajectory)
    if not refusals:  # else tools and turns may be missing
        yield from _unread_tools(trajectory)
        if limit:
            yield from limit(trajectory)


def _check_pair(row: dict[str, Any], limit: Limit | None, padded: bool) -> Iterator[Problem]:
    """Yields the problems of each side, or else those of the two sides together."""
    is_faulty = False
    shared = {key: row[key] for key in ROW_KEYS & row.keys()}
    for side in ("chosen", "rejected"):
        turns = [row.get("conversation"), row[side]]
        if not all(isinstance(part, list) for part in turns):
            break  # `parse_pair` reports it
        for problem in check_row(shared | {"conversation": [*turns[0], *turns[1]]}, limit, padded=padded):
            is_faulty = True
            yield Problem(problem.reason, f"{side}: {problem.detail}")
    try:
        parse_pair(row, "", ignore, padded=padded)
    except InvalidTrajectory as invalid:
        if not is_faulty:
            yield Problem(invalid.reason, invalid.detail)


def check_calls(trajectory: Trajectory) -> Iterator[Problem]:
    """Yields the problems of the tools' JSON Schemas, and of the arguments of calls under them.

    Reasons: bad-schema, missing-argument, extra-argument, wrong-type, wrong-value.
    """
    schemas = _schemas(trajectory.tools)
    for name, parameters in schemas.items():
        for problem in parameters.problems:
            yield Problem("bad-schema", f"tool '{name}': {problem}")
    for at, turn in enumerate(trajectory.conversation):
        for call in turn.tool_calls:
            if call.name in schemas and not isinstance(call, UnreadableCall):
                for reason, detail in schemas[call.name].check(call.arguments):
                    yield Problem(reason, f"turn {turn_number(at, turn)} calls '{call.name}': {detail}")


def _schemas(tools: Sequence[dict[str, Any]]) -> dict[str, Parameters]:
    """Name → schema. Equal tools are compiled once."""
    return _compiled(json.dumps([(tool["function"]["name"], tool["function"].get("parameters")) for tool in tools]))


@lru_cache(maxsize=64)
def _compiled(tools: str) -> dict[str, Parameters]:
    return {name: compiled(json.dumps(parameters)) for name, parameters in json.loads(tools)}


def _unread_calls(trajectory: Trajectory) -> Iterator[Problem]:
    """Yields turns whose text is meant as a tool call but was not read as one."""
    declared = {tool["function"]["name"]: None for tool in trajectory.tools}  # an ordered set
    for detail in unread_calls(trajectory.conversation, declared):
        yield Problem("call-in-text", f"{detail}; write it under `tool_calls`")


def _unread_tools(trajectory: Trajectory) -> Iterator[Problem]:
    """Yields a system text that declares tools where the trajectory has none."""
    if trajectory.tools:
        return
    try:
        tools, _ = find_tools(system_text(trajectory.task_instruction, trajectory.conversation))
    except InvalidTrajectory as invalid:
        yield Problem(invalid.reason, invalid.detail)
        return
    if tools:
        names = ", ".join(tool["function"]["name"] for tool in tools)
        yield Problem("tools-in-system", f"the system text declares {names}, and `tools` is empty; write them there")


def _empty_turns(turns: Sequence[Message]) -> Iterator[Problem]:
    """Yields turns without text and calls. The result of a tool may be empty."""
    for at, turn in enumerate(turns):
        if turn.role not in ("tool", UNKNOWN_ROLE) and not turn.tool_calls and not turn.content.strip():
            yield Problem("empty-turn", f"turn {turn_number(at, turn)} ({turn.role}) has no text")


def _unanswered(turns: Sequence[Message]) -> Iterator[Problem]:
    """Yields calls without a result before the next turn. Results without a call were reported before."""
    for at, turn in enumerate(turns):
        if not turn.tool_calls:
            continue
        results = list(takewhile(lambda following: following.role == "tool", turns[at + 1 :]))
        ids = {result.tool_call_id for result in results}
        if at + 1 + len(results) == len(turns) or not ids <= {call.id for call in turn.tool_calls}:
            continue
        for order, call in enumerate(turn.tool_calls):
            if (call.id not in ids) if call.id is not None else order >= len(results):
                yield Problem(
                    "unanswered-call",
                    f"turn {turn_number(at, turn)} calls '{call.name}', and the next turn comes before a result",
                )


def length_limit(config: Path, overrides: Sequence[str] = ()) -> Limit:
    """Returns a check for trajectories that a config cannot train on completely: too long, or not representable.

    Raises `UserError` for an invalid config or tokenizer.
    """
    from xlam_jax import config as configs
    from xlam_jax.data.lengths import fit
    from xlam_jax.data.tokenizer import open_tokenizer

    data = configs.load(config, list(overrides)).config.data.model_copy(update={"on_long": "drop"})
    tokenizer = open_tokenizer(data)

    def limit(trajectory: Trajectory) -> Iterator[Problem]:
        fitted = fit(trajectory, tokenizer, data)
        for reason in fitted.reasons:
            if reason == "reasoning-dropped":
                yield Problem(reason, "its turns have reasoning, which data.reasoning drops")
            else:
                yield Problem(reason, f"{fitted.detail} (data.sequence_length is {data.sequence_length})")

    return limit


def run(
    files: Sequence[Path], out: TextIO, *, limit: Limit | None = None, as_json: bool = False, most: int | None = None
) -> tuple[str, int]:
    """Writes the findings of all files to `out`, stops after the `most`-th, and returns a summary and their number."""
    rows = faulty = written = 0
    reasons: Counter[str] = Counter()
    rows_with: Counter[str] = Counter()
    stopped = False
    for path in files:
        for findings in validate(path, limit):
            rows += 1
            faulty += bool(findings)
            kept = findings if most is None else findings[: most - written]
            for finding in kept:
                out.write((json.dumps(finding._asdict(), ensure_ascii=False) if as_json else str(finding)) + "\n")
            written += len(kept)
            reasons.update(finding.reason for finding in kept)
            rows_with.update({finding.reason for finding in kept})
            if most is not None and written >= most:
                stopped = True
                break
        if stopped:
            break
    lines = [f"{_many(rows, 'row')}, " + (f"{faulty:,} with {_many(written, 'finding')}" if written else "no finding")]
    if stopped:
        lines[0] += f"; stopped there, as --max-errors {most} asks"
    width = max((len(reason) for reason in reasons), default=0)
    lines += [
        f"  {reason:{width}}  {count} in {_many(rows_with[reason], 'row')}" for reason, count in reasons.most_common()
    ]
    return "\n".join(lines), written


def _many(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'s' if count != 1 else ''}"


def _one_line(text: str) -> str:
    """The text, truncated to a length and without control characters of a terminal."""
    if len(text) > LONGEST_DETAIL:
        text = text[: LONGEST_DETAIL - 1] + "…"
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
