"""Which tool result answers which call of the turn before it."""

from collections.abc import Sequence
from dataclasses import replace

from xlam_jax.data.problems import Sink
from xlam_jax.data.trajectory import Message, ToolCall, turn_number


def link_results(messages: list[Message], i: int, sink: Sink) -> None:
    """Adds to the calls of turn `i` and to their results the ids that they lack, where there is only one possibility.

    The results are put into the order of their calls. Changes `messages`. Problems: duplicate-call-id,
    orphan-tool-call-id, orphan-tool-result.
    """
    calls = list(messages[i].tool_calls)
    caller = turn_number(i, messages[i])
    ids = [call.id for call in calls if call.id is not None]
    end = next((j for j in range(i + 1, len(messages)) if messages[j].role != "tool"), len(messages))
    if len(set(ids)) < len(ids):
        sink.problem("duplicate-call-id", f"turn {caller} gives two calls one id: {', '.join(ids)}")
        answered = None
    else:
        answered = answered_calls(calls, messages[i + 1 : end])
    if answered is None:
        _report_orphans(messages, range(i + 1, end), calls, ids, sink)
        return
    for j, k in enumerate(answered, start=i + 1):
        call, result = calls[k], messages[j]
        number = turn_number(j, result)
        if call.id == result.tool_call_id:
            continue
        if call.id is None:
            sink.repaired(
                "missing-call-id",
                f"turn {caller} calls '{call.name}' without an id, turn {number} has '{result.tool_call_id}'",
            )
            calls[k] = replace(call, id=result.tool_call_id)
        elif result.tool_call_id is None:
            sink.repaired("missing-call-id", f"turn {number} does not name the call that it answers, '{call.id}'")
        else:
            sink.repaired(
                "mismatched-call-id", f"turn {number} answers '{result.tool_call_id}', the call is '{call.id}'"
            )
        messages[j] = replace(result, tool_call_id=calls[k].id)
    messages[i] = replace(messages[i], tool_calls=tuple(calls))
    if answered != sorted(answered):  # formats without ids identify a result's call by its place alone
        sink.repaired("results-out-of-order", f"the results after turn {caller} come in another order than its calls")
        results = messages[i + 1 : end]
        messages[i + 1 : end] = [results[at] for at in sorted(range(len(results)), key=answered.__getitem__)]


def _report_orphans(
    messages: Sequence[Message], places: range, calls: Sequence[ToolCall], ids: Sequence[str], sink: Sink
) -> None:
    """Reports the results at `places` whose id no call has, or else the first one without an id."""
    unmatched = [j for j in places if messages[j].tool_call_id not in ids]
    strays = [j for j in unmatched if messages[j].tool_call_id is not None]
    for j in strays:
        number, call_ids = turn_number(j, messages[j]), ", ".join(ids) or "none with an id"
        sink.problem(
            "orphan-tool-call-id",
            f"turn {number} answers call '{messages[j].tool_call_id}', calls before it: {call_ids}",
        )
    if unmatched and not strays:
        number = turn_number(unmatched[0], messages[unmatched[0]])
        sink.problem(
            "orphan-tool-result", f"turn {number} does not name which of the {len(calls)} calls before it it answers"
        )


def answered_calls(calls: Sequence[ToolCall], results: Sequence[Message]) -> list[int] | None:
    """Returns for each tool result after a turn the index of the call that it answers, None where that is in doubt.

    Ids come first. The other results are matched by order where there are as many as calls, unless their names say
    otherwise; else by names that belong to one call each. Without any ids, the order decides.
    """
    at = {call.id: k for k, call in enumerate(calls) if call.id is not None}
    by_id = {j: at[result.tool_call_id] for j, result in enumerate(results) if result.tool_call_id in at}
    taken = set(by_id.values())
    free = [k for k in range(len(calls)) if k not in taken]
    open_results = [j for j in range(len(results)) if j not in by_id]
    matches = pair_without_ids([calls[k] for k in free], [results[j] for j in open_results]) if open_results else []
    if matches is None:
        if at or len(results) > len(calls) or any(result.tool_call_id is not None for result in results):
            return None
        matches = range(len(results))
    others = {j: free[k] for j, k in zip(open_results, matches, strict=True)}
    return [by_id[j] if j in by_id else others[j] for j in range(len(results))]


def pair_without_ids(calls: Sequence[ToolCall], results: Sequence[Message]) -> list[int] | None:
    """As `answered_calls`, without the ids that calls and results share; None also where only the order decides."""
    ids = [result.tool_call_id for result in results if result.tool_call_id is not None]
    names = [result.name for result in results]
    if len(calls) == 1 and len(results) > 1:  # all of them belong to it, or the pairing is in doubt
        same_id = len({result.tool_call_id for result in results}) == 1
        return [0] * len(results) if same_id and set(names) <= {None, calls[0].name} else None
    if len(results) > len(calls) or len(set(ids)) < len(ids):
        return None
    if len(results) == len(calls) and all(name in (None, call.name) for call, name in zip(calls, names, strict=True)):
        return list(range(len(calls)))
    at = {call.name: k for k, call in enumerate(calls)}
    if len(at) < len(calls) or len(set(names)) < len(names):
        return None
    matches = [at[name] for name in names if name is not None and name in at]
    return matches if len(matches) == len(results) else None
