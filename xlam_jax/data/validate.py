"""What is wrong with files of trajectories: everything that a reader would refuse, mend or leave out, and every call
that its tool's JSON Schema does not allow.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from xlam_jax.config import Source
from xlam_jax.data import sources
from xlam_jax.data import trajectory as reader
from xlam_jax.data.converters.preference import is_other_layout, pair_row
from xlam_jax.data.declarations import find_tools
from xlam_jax.data.pair import parse_pair
from xlam_jax.data.schemas import Parameters, Problem, compiled
from xlam_jax.data.trajectory import (
    InvalidTrajectory,
    Message,
    ToolCall,
    Trajectory,
    parse_trajectory,
    system_text,
)
from xlam_jax.digest import key_digest
from xlam_jax.errors import UserError, nearest

LONGEST_DETAIL = 400
Limit = Callable[[Trajectory], Iterable[Problem]]
"""Says what keeps a trajectory out of a config's rows."""


class Finding(NamedTuple):
    """One thing that is wrong, and where. `id` is the trajectory's, empty where it has none."""

    file: str
    line: int
    id: str
    reason: str
    detail: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.reason}: {self.detail}"


def validate(path: Path, limit: Limit | None = None) -> Iterator[list[Finding]]:
    """Yields the findings of each row of a file, none for a row without fault; any file that a config may name.

    Keeps 16 bytes of each id in memory. Raises `UserError` when the file can't be read or holds no row.
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
            given = row.get("unique_trajectory_id")
            if isinstance(given, str | int):
                identity = str(given)
                digest = key_digest(identity)
                first = seen.setdefault(digest, line)
                if first != line:
                    problems.append(Problem("duplicate-trajectory-id", f"'{identity}' is line {first}'s too"))
        yield [Finding(str(path), line, identity, problem.reason, _one_line(problem.detail)) for problem in problems]
    if not line:
        raise UserError(f"{path}: holds no row; expected trajectories, one JSON object a line")


def check_row(row: object, limit: Limit | None = None, *, padded: bool = False) -> Iterator[Problem]:
    """Yields everything that is wrong with one row, but for ids that another row has.

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
    found: list[Problem] = []

    def note(reason: str, detail: str) -> None:
        found.append(Problem(reason, detail))

    if isinstance(row, dict) and row.get("unique_trajectory_id") is None:
        note("missing-trajectory-id", "`unique_trajectory_id` is missing; the line's number becomes its name")
    try:
        trajectory = parse_trajectory(row, repaired=note, padded=padded)
    except InvalidTrajectory as invalid:
        yield from _check_pieces(row, invalid)
        return
    yield from found
    yield from _empty_turns(trajectory.conversation)
    for at in range(len(trajectory.conversation)):
        yield from _unanswered(trajectory.conversation, at)
    yield from _unread_calls(trajectory.tools, trajectory.conversation)
    yield from _unread_tools(trajectory)
    yield from check_calls(trajectory)
    if limit:
        yield from limit(trajectory)


def _check_pair(row: dict[str, Any], limit: Limit | None, padded: bool) -> Iterator[Problem]:
    """Yields what is wrong with each side, taken for itself, and with the two together."""
    found = False
    shared = {key: row[key] for key in reader.ROW_KEYS & row.keys()}
    for side in ("chosen", "rejected"):
        turns = [row.get("conversation"), row[side]]
        if not all(isinstance(part, list) for part in turns):
            break  # said below
        for problem in check_row(shared | {"conversation": [*turns[0], *turns[1]]}, limit, padded=padded):
            found = True
            yield Problem(problem.reason, f"{side}: {problem.detail}")
    try:
        parse_pair(row, "", lambda reason, detail: None, padded=padded)
    except InvalidTrajectory as invalid:
        if not found:
            yield Problem(invalid.reason, invalid.detail)


def check_calls(trajectory: Trajectory) -> Iterator[Problem]:
    """Yields what is wrong with the tools' JSON Schemas, and with the calls' arguments under them.

    Reasons: bad-schema, missing-argument, extra-argument, wrong-type, wrong-value.
    """
    yield from _check_calls(trajectory.tools, trajectory.conversation)


def _check_calls(tools: Sequence[dict[str, Any]], turns: Sequence[Message]) -> Iterator[Problem]:
    schemas = _schemas(tools)
    for name, parameters in schemas.items():
        for problem in parameters.problems:
            yield Problem("bad-schema", f"tool '{name}': {problem}")
    for at, turn in enumerate(turns):
        for call in turn.tool_calls:
            if call.name in schemas:
                for reason, detail in schemas[call.name].check(call.arguments):
                    yield Problem(reason, f"turn {reader.turn_number(at, turn)} calls '{call.name}': {detail}")


def _schemas(tools: Sequence[dict[str, Any]]) -> dict[str, Parameters]:
    """Name → schema. Equal tools are compiled once."""
    return _compiled(json.dumps([(tool["function"]["name"], tool["function"].get("parameters")) for tool in tools]))


@lru_cache(maxsize=64)
def _compiled(tools: str) -> dict[str, Parameters]:
    return {name: compiled(json.dumps(parameters)) for name, parameters in json.loads(tools)}


def _unread_calls(tools: Sequence[dict[str, Any]], turns: Sequence[Message]) -> Iterator[Problem]:
    """Yields the turns whose text holds what is meant as a tool call, and is not read as one."""
    declared = {tool["function"]["name"]: None for tool in tools}  # a set that keeps their order
    for detail in reader.unread_calls(turns, declared):
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
    """Yields turns in which nobody says anything. A tool may well give nothing back."""
    for at, turn in enumerate(turns):
        if turn.role != "tool" and not turn.tool_calls and not turn.content.strip():
            yield Problem("empty-turn", f"turn {reader.turn_number(at, turn)} ({turn.role}) has no text")


def _unanswered(turns: Sequence[Message], at: int) -> Iterator[Problem]:
    """Yields the calls of turn `at` that have no result though the conversation goes on."""
    calls = turns[at].tool_calls
    results = [turn for _, turn in _results(turns, at)] if calls else []
    if at + 1 + len(results) < len(turns):
        ids = {turn.tool_call_id for turn in results}
        number = reader.turn_number(at, turns[at])
        for order, call in enumerate(calls):
            if (call.id not in ids) if call.id is not None else order >= len(results):
                yield Problem(
                    "unanswered-call",
                    f"turn {number} calls '{call.name}', and the next turn comes before a result",
                )


def _results(turns: Sequence[Message], at: int) -> Iterator[tuple[int, Message]]:
    """The tool turns right after turn `at`."""
    return takewhile(lambda item: item[1].role == "tool", enumerate(turns[at + 1 :], at + 1))


def _check_pieces(row: object, refused: InvalidTrajectory) -> Iterator[Problem]:
    """Yields what is wrong with a row that the reader refuses, piece by piece: it tells the first thing only."""
    first = Problem(refused.reason, refused.detail)
    if not isinstance(row, dict) or refused.reason == "malformed-json":
        yield first
        return
    found: list[Problem] = []

    def note(reason: str, detail: str) -> None:
        found.append(Problem(reason, detail))

    def attempt(parse: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return parse(*arguments)
        except InvalidTrajectory as invalid:
            note(invalid.reason, invalid.detail)
            return None

    if row.get("unique_trajectory_id") is None:
        note("missing-trajectory-id", "`unique_trajectory_id` is missing; the line's number becomes its name")
    reader._note_unknown(row, reader.ROW_KEYS, "the row", note)
    attempt(reader._optional_id, row, "unique_trajectory_id", "the row", note)
    for key in ("source", "task_instruction"):
        attempt(reader._optional_text, row, key, "the row")
    attempt(reader._score, row.get("score"), note)
    tools = _tool_pieces(row.get("tools"), note)
    raw = attempt(reader.without_empty_end, row.get("conversation"), note)
    if not isinstance(raw, list) or not raw:
        attempt(reader._parse_messages, raw, note)
        raw = []
    raw = [attempt(reader.with_call_list, at, turn, note) or turn for at, turn in enumerate(raw)]
    raw = attempt(reader.join_calls, raw, note) or raw
    turns: list[Message] = []
    for at, item in enumerate(raw):
        turn = attempt(reader._parse_message, at, item, note)
        if turn is None:  # its calls are looked at one by one
            fields = item if isinstance(item, dict) else {}
            raw_calls = fields.get("tool_calls")
            calls = [
                attempt(reader._parse_call, at, call, note) or _nameless(call)
                for call in (raw_calls if isinstance(raw_calls, list) else [])
            ]
            role = fields.get("role")
            turn = Message(role if role in reader.ROLES else "", "?", tuple(calls), _text(fields, "tool_call_id"))
        turns.append(turn)
    names = {tool["function"]["name"]: None for tool in tools}  # a set that keeps their order
    turns = [reader._read_text_calls(at, turn, names, note) for at, turn in enumerate(turns)]
    if raw and not any(turn.role == "assistant" for turn in turns):
        note("no-assistant-turn", f"none of the {len(raw)} turns is by the assistant")
    found += _order_pieces(turns)
    for at, turn in enumerate(turns):
        if turn.tool_calls:
            found += _link_pieces(turns, at, note)
    found += _empty_turns(turns)
    found += _unread_calls(tools, turns)
    for at, turn in enumerate(turns):
        for call in turn.tool_calls:
            if call.name and call.name not in names:
                known, hint = ", ".join(names) or "none", nearest(call.name[:100], names)
                note("undeclared-tool", f"turn {at} calls '{call.name}', declared tools: {known}{hint}")
    found += _check_calls(
        [tool for tool in tools if isinstance(tool["function"].get("parameters"), dict | None)], turns
    )
    if refused.reason not in {problem.reason for problem in found}:
        yield first
    yield from dict.fromkeys(found)  # some pieces are parsed twice


def _text(fields: dict[str, Any], key: str) -> str | None:
    return value if isinstance(value := fields.get(key), str) else None


def _nameless(call: object) -> ToolCall:
    """Stands for a call that the reader refuses: its id may still be another's too."""
    return ToolCall(_text(call, "id") if isinstance(call, dict) else None, "", {})


def _link_pieces(turns: Sequence[Message], at: int, note: reader.Note) -> Iterator[Problem]:
    """Yields what is wrong between the calls of turn `at` and their results, notes what is mended."""
    linked = list(turns)
    try:
        reader._link(linked, at, note)
        yield from _unanswered(linked, at)
    except InvalidTrajectory as invalid:
        yield Problem(invalid.reason, invalid.detail)
        ids = [call.id for call in turns[at].tool_calls if call.id is not None]
        known = ", ".join(ids) or "none with an id"
        for j, turn in _results(turns, at):
            if turn.tool_call_id is not None and turn.tool_call_id not in ids:
                yield Problem(
                    "orphan-tool-call-id", f"turn {j} answers call '{turn.tool_call_id}', calls before it: {known}"
                )


def _tool_pieces(raw: object, note: reader.Note) -> list[dict[str, Any]]:
    """Notes what is wrong with each tool, and returns those that have a name."""
    try:
        return reader.parse_tools(raw, note)
    except InvalidTrajectory as invalid:
        if not isinstance(raw, list):
            note(invalid.reason, invalid.detail)
            return []
    named: dict[str, dict[str, Any]] = {}
    for at, tool in enumerate(raw):
        tool = reader.unflattened(tool, "tool", lambda reason, detail: None)
        try:
            reader.parse_tools([tool], note)
        except InvalidTrajectory as invalid:
            note(invalid.reason, re.sub("^tool 0 ", f"tool {at} ", invalid.detail))
        function = tool.get("function") if isinstance(tool, dict) else None
        name = function.get("name") if isinstance(function, dict) else None
        if isinstance(name, str) and name:
            if name in named:
                note("duplicate-tool", f"tool {at} is named '{name}' like a tool before it")
            named.setdefault(name, tool)
    return list(named.values())


def _order_pieces(turns: Sequence[Message]) -> Iterator[Problem]:
    """Yields every turn that stands where it can't."""
    for at, turn in enumerate(turns):
        before = turns[at - 1].role if at else "system"
        if not turn.role or not before:  # already told as an unknown role
            continue
        calling = next((one for one in reversed(turns[:at]) if one.role != "tool"), None)
        wrong = ""
        if turn.role == "system" and before != "system":
            wrong = f"is a system turn after a {before} turn; system turns come first"
        elif turn.role == "assistant" and before == "system":
            wrong = "is by the assistant; the first turn after the system's is the user's"
        elif turn.role == "tool" and (calling is None or (calling.role and not calling.tool_calls)):
            wrong = f"is a tool result after a {before} turn without calls"
        if wrong:
            yield Problem("bad-role-order", f"turn {at} {wrong}")


def length_limit(config: Path, overrides: Sequence[str] = ()) -> Limit:
    """Returns what finds trajectories that a config can't train on whole: too long for its rows, or not to be written.

    Raises `UserError` for a config or tokenizer that can't be used.
    """
    from xlam_jax import config as configs
    from xlam_jax.data.lengths import fit
    from xlam_jax.data.tokenizer import load_tokenizer

    data = configs.load(config, list(overrides)).config.data.model_copy(update={"on_long": "drop"})
    tokenizer = load_tokenizer(data.tokenizer)

    def limit(trajectory: Trajectory) -> Iterator[Problem]:
        fitted = fit(trajectory, tokenizer, data)
        for reason in fitted.reasons:
            if reason == "reasoning-not-rendered":
                yield Problem(reason, f"the reasoning of its turns is not written in the format {data.format}")
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
    """The text cut to a length and without characters that a terminal acts upon."""
    if len(text) > LONGEST_DETAIL:
        text = text[: LONGEST_DETAIL - 1] + "…"
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
