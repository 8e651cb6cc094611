"""A preference pair: two continuations of one conversation, a chosen and a rejected one.

Turns are equal when a model could not distinguish them: calls are compared by name and arguments, results by the call
that they answer, assistant turns also by their reasoning; ids are ignored. A task is everything before the first
assistant turn: tools, instruction, system and user turns.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

from xlam_jax.data.parse import parse_trajectory
from xlam_jax.data.problems import Report
from xlam_jax.data.trajectory import ROW_KEYS, InvalidTrajectory, Message, Trajectory, without_reasoning
from xlam_jax.digest import key_digest

PAIR_KEYS = (*sorted(ROW_KEYS - {"score"}), "chosen", "rejected", "chosen_score", "rejected_score")
TURN = 9
"""Bytes of a turn's fingerprint: its role and a hash."""


@dataclass(frozen=True, slots=True)
class Pair:
    """Both sides, each a complete conversation. Assistant turns that both sides share have `loss: false`."""

    id: str
    chosen: Trajectory
    """Its id is the pair's, its score the chosen side's."""
    rejected: Trajectory


def parse_pair(row: object, default_id: str, repaired: Report, *, padded: bool = False) -> Pair:
    """Checks a row in the form that `python -m xlam_jax.data pairs` writes, and returns it typed.

    `conversation` has the turns that both sides share, `chosen` and `rejected` have the following turns; equal turns at
    their beginnings are shared too. Each side is checked and repaired like a trajectory. `default_id`: id of a row
    without one. `repaired` receives each repair, and unknown keys. `padded`: the row has the null fields of a union
    schema. Raises `InvalidTrajectory`, with the reason equal-sides where chosen and rejected are the same.
    """
    if not isinstance(row, dict):
        raise InvalidTrajectory("not-an-object", f"a row is a JSON object, got a {type(row).__name__}")
    missing = [key for key in ("conversation", "chosen", "rejected") if not isinstance(row.get(key), list)]
    if missing:
        raise InvalidTrajectory(
            "no-pair",
            f"a pair has conversation, chosen and rejected, lists of turns; {', '.join(missing)} is not a list",
        )
    unknown = sorted(row.keys() - set(PAIR_KEYS))
    if unknown:
        repaired("unknown-key", f"a pair has no key {', '.join(unknown)}")
    shared = {key: row[key] for key in ROW_KEYS & row.keys()}
    notes: dict[tuple[str, str], None] = {}  # repairs of shared turns are made twice, and reported once

    def side(name: str) -> Trajectory:
        whole = shared | {"conversation": [*row["conversation"], *row[name]], "score": row.get(f"{name}_score")}
        try:
            note = lambda reason, detail: notes.update({(reason, detail): None})  # noqa: E731
            return parse_trajectory(whole, default_id, note, padded=padded, keep_end=True)
        except InvalidTrajectory as invalid:
            raise InvalidTrajectory(invalid.reason, f"{name}: {invalid.detail}") from None

    chosen, rejected = side("chosen"), side("rejected")
    for reason, detail in notes:
        repaired(reason, detail)
    first = first_difference(fingerprint(chosen.conversation), fingerprint(rejected.conversation))
    if isinstance(first, str):
        raise InvalidTrajectory(*_no_pair(first, chosen.conversation, rejected.conversation, len(row["conversation"])))
    return Pair(chosen.id, _trained_from(chosen, first), _trained_from(rejected, first))


def _no_pair(reason: str, chosen: Sequence[Message], rejected: Sequence[Message], conversation: int) -> tuple[str, str]:
    """Returns (reason, detail) for a result of `first_difference` by which two sides are not a pair."""
    if reason == "identical":
        turns = len(chosen) - conversation
        return "equal-sides", f"chosen equals rejected ({turns} turns); a pair has two answers"
    if reason == "one-is-the-others-beginning":
        counts = f"chosen has {len(chosen)} turns and rejected {len(rejected)}"
        return reason, f"{counts}, and all common turns are equal; no turn has two answers"
    bytes_of_both = enumerate(zip(fingerprint(chosen), fingerprint(rejected), strict=False))
    at = next(at for at, (byte, other) in bytes_of_both if byte != other) // TURN
    roles = " and ".join(dict.fromkeys((chosen[at].role, rejected[at].role)))
    return reason, f"chosen and rejected first differ at turn {at} ({roles}), before their answers differ"


def drop_reasoning(pair: Pair) -> Pair | InvalidTrajectory:
    """Returns the pair without the reasoning of its turns, or why its sides are then no longer a pair."""
    chosen, rejected = without_reasoning(pair.chosen), without_reasoning(pair.rejected)
    if chosen is pair.chosen and rejected is pair.rejected:
        return pair
    first = first_difference(fingerprint(chosen.conversation), fingerprint(rejected.conversation))
    if isinstance(first, str):
        return InvalidTrajectory(*_no_pair(first, chosen.conversation, rejected.conversation, 0))
    return Pair(pair.id, _trained_from(chosen, first), _trained_from(rejected, first))


def _trained_from(side: Trajectory, first: int) -> Trajectory:
    """Returns the side with `loss: false` in the assistant turns before `first`."""
    turns = (
        replace(turn, loss=False) if turn.role == "assistant" and at < first else turn
        for at, turn in enumerate(side.conversation)
    )
    return replace(side, conversation=tuple(turns))


def first_difference(turns: bytes, others: bytes) -> int | str:
    """Compares two fingerprints. Returns the index of the first different turn if it is an assistant turn in both.

    Else returns the reason why the two are not a pair.
    """
    for at in range(0, min(len(turns), len(others)), TURN):
        if turns[at : at + TURN] != others[at : at + TURN]:
            if turns[at] == others[at] == ord("a"):
                return at // TURN
            return "first-differs-at-a-user-or-tool-turn"
    return "identical" if len(turns) == len(others) else "one-is-the-others-beginning"


def fingerprint(turns: Sequence[Message]) -> bytes:
    """Returns 9 bytes per turn, the role's initial and a hash; they are equal for equal turns."""
    parts: list[bytes] = []
    calls: dict[str, int] = {}
    for turn in turns:
        link: object = None
        if turn.role == "assistant":
            calls = {call.id: at for at, call in enumerate(turn.tool_calls) if call.id is not None}
        elif turn.role == "tool":
            link = calls.get(turn.tool_call_id or "", turn.name)
        values = [turn.content, [[call.name, call.arguments] for call in turn.tool_calls], link]
        if turn.reasoning:
            values.append(turn.reasoning)
        parts.append(turn.role[:1].encode() + _digest(values, 8))
    return b"".join(parts)


def context(trajectory: Trajectory) -> int:
    """Returns the number of turns before the first assistant turn."""
    return next(at for at, turn in enumerate(trajectory.conversation) if turn.role == "assistant")


def task(trajectory: Trajectory) -> bytes:
    """Returns a digest of the task, 16 bytes."""
    # the key order of tools is part of the prompt
    before = fingerprint(trajectory.conversation[: context(trajectory)]).hex()
    return _digest([json.dumps(trajectory.tools), trajectory.task_instruction, before], 16)


def _digest(value: object, size: int) -> bytes:
    return key_digest(json.dumps(value, sort_keys=True), size)
