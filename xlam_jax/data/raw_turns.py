"""Turns and calls in the spellings of their sources, brought into OpenAI form before they are checked."""

from collections.abc import Sequence
from itertools import islice, takewhile
from typing import Any

from xlam_jax.data.content import is_refusal, read_content
from xlam_jax.data.problems import Report, Sink, ignore, type_name
from xlam_jax.data.row_json import DEEPEST_ROW, parse_text
from xlam_jax.data.trajectory import REASONING_KEYS, InvalidTrajectory, turn_number


def unflattened(value: Any, what: str, repaired: Report) -> Any:
    """Returns a flat tool or call, `{"name", …}`, with its fields in `function`, and anything else unchanged.

    `what` is "tool" or "call", for the reported repair; a call also has an id and, in a stream, an index.
    """
    if not isinstance(value, dict) or not isinstance(value.get("name"), str) or value.get("function") is not None:
        return value
    repaired(f"flat-{what}", f"{what} '{value['name'][:100]}' is written without `function`")
    outer = {key: value[key] for key in (("type", "id", "index") if what == "call" else ("type",)) if key in value}
    inner = {key: item for key, item in value.items() if key not in outer and key != "function"}
    return {**outer, "type": "function", "function": inner}


def without_empty_end(turns: Any, sink: Sink) -> Any:
    """Returns the turns without a last assistant turn that is empty or only a refusal, if an earlier turn is trained.

    `turns` may be JSON in a text.
    """
    if isinstance(turns, str):
        turns = sink.attempt(None, parse_text, turns, "no-conversation", "`conversation`", DEEPEST_ROW)
        if turns is None:  # the parser reports it as well
            return turns
        sink.repaired("string-turns", "`conversation` is JSON in a text")
    if not isinstance(turns, list | tuple) or not turns:
        return turns
    *before, last = turns
    is_trained = any(
        isinstance(turn, dict) and turn.get("role") == "assistant" and turn.get("loss") is not False for turn in before
    )
    if not is_trained or not isinstance(last, dict) or last.get("role") != "assistant" or last.get("tool_calls"):
        return turns
    try:
        text, _ = read_content("assistant", last.get("content"), "the last turn", ignore)
    except InvalidTrajectory:
        text = "" if is_refusal(last.get("content")) else "?"
    if text.strip():
        return turns
    refused = bool(last.get("refusal")) or is_refusal(last.get("content"))
    sink.repaired(
        "refused-last-turn" if refused else "empty-last-turn",
        f"turn {turn_number(len(before), last)} {'only refuses' if refused else 'is empty'}, and is dropped",
    )
    return before


def has_calls(turn: Any) -> bool:
    """Whether a turn has tool calls, in any form."""
    return isinstance(turn, dict) and bool(turn.get("tool_calls"))


def with_call_list(i: int, turn: Any, repaired: Report) -> Any:
    """Returns a turn with its calls as a list in OpenAI form: they may be JSON in a text, a single call, or flat.

    Other values stay as they are, for the parser to refuse. Raises `InvalidTrajectory` for a text that is not JSON.
    """
    calls = turn["tool_calls"] if has_calls(turn) else None
    if not isinstance(calls, str | dict | list):
        return turn
    where = f"turn {turn_number(i, turn)}"
    if isinstance(calls, str):
        calls = parse_text(calls, "bad-call", f"`tool_calls` of {where}")
        repaired("string-calls", f"{where} has `tool_calls` that are JSON in a text")
    if isinstance(calls, dict):
        calls = [calls]
        repaired("call-without-list", f"{where} has one call, not in a list")
    if isinstance(calls, list):
        calls = [unflattened(call, "call", repaired) for call in calls]
    return turn | {"tool_calls": calls}


def join_calls(turns: Sequence[Any], repaired: Report) -> list[Any]:
    """Joins consecutive assistant turns with calls into one turn: these are parallel calls, one per turn.

    `turns` are objects in OpenAI form that need not be checked yet. Raises `InvalidTrajectory` where their results do
    not show which call each of them answers.
    """
    joined: list[Any] = []
    starts: list[int] = []
    for i, turn in enumerate(turns):
        if joined and _is_calling(joined[-1]) and _is_calling(turn):
            joined[-1] = _joined(i, joined[-1], turn)
            starts.append(len(joined) - 1)
            number = turn_number(i, turn)
            repaired("parallel-calls-as-turns", f"turn {number} calls like the turn before it, and becomes part of it")
        else:
            joined.append(turn)
    for at in dict.fromkeys(starts):
        results = list(
            takewhile(lambda turn: isinstance(turn, dict) and turn.get("role") == "tool", islice(joined, at + 1, None))
        )
        calls = joined[at]["tool_calls"]
        ids = [call.get("id") for call in calls if isinstance(call, dict)]
        answered = [result.get("tool_call_id") for result in results]
        if len(results) not in (0, len(calls)) and not all(id is not None and id in ids for id in answered):
            raise InvalidTrajectory(
                "ambiguous-parallel-calls",
                f"turn {turn_number(at, joined[at])} and those after it call {len(calls)} tools in separate turns, and "
                f"{len(results)} results follow without the ids of their calls: which call has no result is unknown",
            )
    return joined


def _is_calling(turn: Any) -> bool:
    return has_calls(turn) and isinstance(turn["tool_calls"], list | tuple) and turn.get("role") == "assistant"


def _joined(i: int, first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Two turns as one: the calls of both, and their texts as paragraphs."""
    whole = second | first | {"tool_calls": [*first["tool_calls"], *second["tool_calls"]]}
    losses = [first.get("loss"), second.get("loss")]
    if (losses[0] is False) != (losses[1] is False):
        numbers = f"{turn_number(i - 1, first)} and {turn_number(i, second)}"
        raise InvalidTrajectory(
            "bad-loss", f"turns {numbers} call tools in parallel, and have loss {losses[0]} and {losses[1]}"
        )
    if losses != [None, None]:
        whole["loss"] = next(loss for loss in losses if loss is not None)
    for key in ("content", *REASONING_KEYS):
        texts = [turn[key] for turn in (first, second) if turn.get(key)]
        if len(texts) == 2 and not all(isinstance(text, str) for text in texts):
            parts = [[{"type": "text", "text": text}] if isinstance(text, str) else text for text in texts]
            if not all(isinstance(part, list) for part in parts):
                raise InvalidTrajectory("bad-content", f"turn {i} has {key} that is {type_name(second[key])}, not text")
            whole[key] = [*parts[0], *parts[1]]
        elif texts:
            whole[key] = "\n\n".join(texts) if len(texts) == 2 else texts[0]
    return whole
