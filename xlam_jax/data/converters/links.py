"""Links calls and results of formats without ids: joins parallel calls, adds ids where the pairing is unambiguous."""

from collections.abc import Sequence
from itertools import islice, takewhile
from typing import Any

from xlam_jax.data.call_links import pair_without_ids
from xlam_jax.data.converters.common import Repaired
from xlam_jax.data.raw_turns import join_calls
from xlam_jax.data.trajectory import Message, ToolCall


def link(turns: Sequence[dict[str, Any]], repairs: list[Repaired], ids: bool = True) -> list[dict[str, Any]]:
    """Joins parallel calls in separate turns; with `ids`, adds the ids that calls and their results lack.

    The parser handles turns in which a call or a result has an id, or whose pairing is ambiguous. `turns` need not be
    checked yet. Raises the errors of `join_calls`.
    """
    joined = join_calls(turns, lambda reason, detail: repairs.append(Repaired(reason, detail)))
    if not ids:
        return joined
    used = {str(call.get("id")) for turn in joined for call in _calls(turn)}
    number = 0
    for i, turn in enumerate(joined):
        calls = _calls(turn)
        if not calls:
            continue
        results = list(takewhile(lambda turn: turn.get("role") == "tool", islice(joined, i + 1, None)))
        pairs = _pairs(calls, results)
        for call in calls:
            number += 1
            while f"call_{number}" in used:
                number += 1
            if pairs is not None and call.get("id") is None:
                call["id"] = f"call_{number}"
        for result, k in zip(results, pairs or (), strict=False):
            result["tool_call_id"] = calls[k]["id"]
            if result.get("name") is None:
                result["name"] = calls[k]["function"]["name"]
    return joined


def _calls(turn: dict[str, Any]) -> list[dict[str, Any]]:
    calls = turn.get("tool_calls")
    return [call for call in calls if isinstance(call, dict)] if isinstance(calls, list) else []


def _pairs(calls: Sequence[dict[str, Any]], results: Sequence[dict[str, Any]]) -> list[int] | None:
    """For each result the index of its call; None if that is ambiguous, or if calls or results have ids."""
    functions = [call.get("function") for call in calls]
    names = [function.get("name") if isinstance(function, dict) else None for function in functions]
    result_names = [result.get("name") for result in results]
    have_ids = all(call.get("id") is not None for call in calls)
    if have_ids or any(result.get("tool_call_id") is not None for result in results):
        return None
    if not all(isinstance(name, str) for name in names):
        return None
    if not all(isinstance(name, str | None) for name in result_names):
        return None
    if not results:
        return []
    return pair_without_ids(
        [ToolCall(None, str(name), {}) for name in names], [Message("tool", "", name=name) for name in result_names]
    )
