"""Converts chat messages and tools from the forms that callers pass to one form, which is checked, rendered and sent.

Callers pass what their libraries return: dictionaries, objects of an SDK (`response.choices[0].message`), the older
`function_call` and role `function`, the newer role `developer`, a call that is flat or not in a list, a system message
in the middle. All code that takes messages from a caller (the client, evaluations, `generate`, `parity`) reads them
with `parse_request`.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import count
from typing import Any

from xlam_jax.data.parse import parse_messages
from xlam_jax.data.raw_turns import unflattened
from xlam_jax.data.trajectory import InvalidTrajectory, Message

_ROLES = {"developer": "system", "function": "tool"}
"""Other spellings of roles → ours."""
_TEXT_PARTS = {"input_text": "text", "output_text": "text", "refusal": "refusal"}
"""Types of content parts with text → the key of that text."""


def parse_request(messages: Sequence[Any]) -> tuple[Message, ...]:
    """Reads the messages of a request; the assistant may speak first. Raises `InvalidTrajectory`."""
    return parse_messages(normal_messages(messages), assistant_first=True)


def normal_messages(messages: Sequence[Any]) -> list[Any]:
    """Returns the messages in OpenAI form, as dictionaries; other values stay as they are, for the parser to refuse.

    - Objects with `model_dump` (pydantic, the SDKs) become dictionaries, also calls and content parts.
    - `developer` becomes `system`; `function` and `function_call` become `tool` and `tool_calls`.
    - A call may be flat, `{"name", "arguments"}`, and the only one need not be in a list.
    - Calls of one turn that share an id get different ids, and so do their results, in their order.
    - The `refusal` of an assistant turn without content becomes its content. An empty answer becomes one space: servers
      and chat templates refuse an empty turn.
    - A system message after the first turn becomes text of the user, because our chat formats have no place for it, and
      most servers refuse it. It is put in front of the next user turn, as the formats do with system text at the
      beginning. Before an answer, it is appended to the user turn that is answered, or becomes a user turn.
    """
    turns = [_message(message, f"turn {at}") for at, message in enumerate(messages)]
    return list(_without_late_system(_with_own_ids(turns)))


def modern_turn(turn: dict[str, Any], where: str) -> dict[str, Any]:
    """Returns a message with the current names in place of `developer`, `function` and `function_call`.

    `where` names the message in errors. Raises `InvalidTrajectory` where a message has both spellings of a call.
    """
    role = turn.get("role")
    turn = turn | {"role": _ROLES.get(role, role)} if isinstance(role, str) else dict(turn)
    if (function := legacy_call(turn)) is not None and turn.get("tool_calls"):
        raise InvalidTrajectory("bad-call", f"{where} has `function_call` and `tool_calls`; keep one of them")
    if function is not None:
        turn["tool_calls"] = [{"type": "function", "function": function}]
    turn.pop("function_call", None)
    return turn


def legacy_call(message: Mapping[str, Any]) -> Any:
    """Returns a message's older `function_call`; None where it has none, or only nulls (a union schema's padding)."""
    function = message.get("function_call")
    if isinstance(function, dict) and function and not any(value is not None for value in function.values()):
        return None
    return function


def openai_tool(tool: Any) -> Any:
    """Returns a tool in OpenAI form, from that form or from a flat one; other values stay as they are."""
    return unflattened(plain(tool), "tool", _unreported)


def openai_call(call: Any) -> Any:
    """Returns a call in OpenAI form, from that form or from a flat one; other values stay as they are."""
    call = unflattened(plain(call), "call", _unreported)
    if isinstance(call, dict) and call.get("function") is not None:
        return call | {"function": plain(call["function"])}
    return call


def _unreported(reason: str, detail: str) -> None:
    """Reports nothing: callers may pass any of the forms, so a conversion is not a repair."""


def unique_ids(ids: Sequence[Any]) -> list[str | None]:
    """Returns the ids of one turn's calls as different texts: the first of equal ids stays. None stays None."""
    texts = [_id(id) for id in ids]
    taken, used = set(texts), set[str]()
    unique: list[str | None] = []
    for id in texts:
        if id in used:
            id = next(name for name in (f"{id}_{number}" for number in count(2)) if name not in taken)
        if id is not None:
            taken.add(id)
            used.add(id)
        unique.append(id)
    return unique


def call_ids(ids: Sequence[Any], turn: int) -> list[str]:
    """Returns an id for each call of a turn, all different; `turn` is its index in the conversation."""
    names = [f"call_{turn}_{at}" if id is None else id for at, id in enumerate(unique_ids(ids))]
    return [id or "" for id in unique_ids(names)]


def _id(id: Any) -> str | None:
    """A call's id as text; None for other values."""
    return str(id) if isinstance(id, str | int) and not isinstance(id, bool) and id != "" else None


def _message(message: Any, where: str) -> Any:
    """One message in OpenAI form, independent of the messages around it."""
    message = plain(message)
    if not isinstance(message, dict):
        return message
    if "function_call" in message:
        message = message | {"function_call": plain(message["function_call"])}
    turn = modern_turn(message, where)
    calls = turn.get("tool_calls")
    if isinstance(calls, Mapping):
        calls = [calls]
    if isinstance(calls, list | tuple):
        turn["tool_calls"] = [openai_call(call) for call in calls]
    if isinstance(turn.get("content"), list | tuple):
        turn["content"] = [_text_part(plain(part)) for part in turn["content"]]
    if turn.get("role") == "assistant":
        refusal = turn.pop("refusal", None)
        turn["content"] = turn.get("content") or refusal
        if turn["content"] in (None, "") and not turn.get("tool_calls"):
            turn["content"] = " "
    return turn


def _text_part(part: Any) -> Any:
    """A content part; all types of text parts become OpenAI's `{"type": "text", …}`."""
    key = _TEXT_PARTS.get(part["type"]) if isinstance(part, dict) and isinstance(part.get("type"), str) else None
    return {"type": "text", "text": part.get(key)} if key else part


def plain(value: Any) -> Any:
    """Converts an SDK's object or a mapping to a dictionary; returns other values as they are."""
    if callable(dump := getattr(value, "model_dump", None)):
        return dump(warnings=False)  # an SDK does not check the types of what a server sent
    return dict(value) if isinstance(value, Mapping) else value


def _with_own_ids(turns: Sequence[Any]) -> Iterator[Any]:
    """Gives the calls of each turn different ids, and their results the same ids, in the order of the calls."""
    renamed: dict[str | None, list[str]] = {}  # shared id → new ids of the calls that have no result yet
    for turn in turns:
        role, calls = (turn.get("role"), turn.get("tool_calls")) if isinstance(turn, dict) else (None, None)
        if role == "assistant":
            renamed = {}
            ids = [_id(call.get("id")) if isinstance(call, dict) else None for call in calls or ()]
            if calls and (unique := unique_ids(ids)) != ids:
                for id, name in zip(ids, unique, strict=True):
                    renamed.setdefault(id, []).append(name or "")
                turn = turn | {"tool_calls": [c | {"id": id} for c, id in zip(calls, unique, strict=True)]}
        elif role == "tool" and (names := renamed.get(_id(turn.get("tool_call_id")))):
            turn = turn | {"tool_call_id": names.pop(0)}
        yield turn


def _without_late_system(turns: Iterable[Any]) -> Iterator[Any]:
    """Moves the system texts after the first turn into user turns."""
    before: Any = None  # the previous turn, not yielded yet: text may be added to it
    held: list[str] = []
    started = False
    for turn in turns:
        role = turn.get("role") if isinstance(turn, dict) else None
        if role == "system" and started and (text := _text(turn.get("content"))) is not None:
            held += [text] if text else []
            continue
        started |= role != "system"
        if held and role == "user" and (text := _text(turn.get("content"))) is not None:
            turn = turn | {"content": "\n\n".join(filter(None, [*held, text]))}
            held = []
        elif held and role != "tool":  # results stay next to their calls
            before, *own = _with_user_text(before, held)
            held = []
            if own:
                yield before
                before = own[0]
        if before is not None:
            yield before
        before = turn
    yield from _with_user_text(before, held) if held else [] if before is None else [before]


def _with_user_text(before: Any, texts: Sequence[str]) -> list[Any]:
    """Adds text of the user to a user turn, or as a new user turn after any other turn."""
    text = _text(before.get("content")) if isinstance(before, dict) and before.get("role") == "user" else None
    if text is not None:
        return [before | {"content": "\n\n".join(filter(None, [text, *texts]))}]
    return [before, {"role": "user", "content": "\n\n".join(texts)}]


def _text(content: Any) -> str | None:
    """A content as text; None where it has parts that are not text."""
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        return None
    texts = [part.get("text") if part.get("type") == "text" else None for part in content]
    return "\n".join(text for text in texts if text) if all(isinstance(text, str) for text in texts) else None
