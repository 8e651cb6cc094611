"""Parses rows into checked trajectories: the only reader of the unified format.

A row is repaired where its meaning is certain; each repair is reported. What cannot be repaired is a problem: the first
one is raised, or all of them are collected, as `xlam_jax.data.validate` does (see `xlam_jax.data.problems`).
"""

import contextlib
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from xlam_jax.data import nulls, text_calls
from xlam_jax.data.call_links import link_results
from xlam_jax.data.content import read_content, split_reasoning, take_reasoning
from xlam_jax.data.files import read_lines, stem
from xlam_jax.data.problems import Report, Sink, ignore, refuse, type_name
from xlam_jax.data.raw_turns import has_calls, join_calls, unflattened, with_call_list, without_empty_end
from xlam_jax.data.row_json import check_json, decode_arguments, parse_json, parse_text
from xlam_jax.data.trajectory import (
    CALL_KEYS,
    FUNCTION_KEYS,
    MESSAGE_KEYS,
    ROLES,
    ROW_KEYS,
    TURN,
    InvalidTrajectory,
    Message,
    ToolCall,
    Trajectory,
    message_to_dict,
    turn_number,
)
from xlam_jax.errors import nearest

UNKNOWN_ROLE = ""
"""Role of a turn whose role cannot be read; only where problems are collected."""
_UNREADABLE = "?"
"""Text in place of one that cannot be read, so that the turn is not also reported as empty."""
_FAILED = object()
"""Stands for a text that is not JSON, which is reported."""


@dataclass(frozen=True, slots=True)
class UnreadableCall(ToolCall):
    """Stands for a call that cannot be read; only where problems are collected. `name` may be ""."""


def parse_trajectory(
    row: object,
    default_id: str = "",
    repaired: Report | None = None,
    *,
    problem: Report | None = None,
    padded: bool = False,
    keep_end: bool = False,
) -> Trajectory:
    """Checks a row and returns it typed. The arguments of calls are not checked against the tools' JSON Schema.

    `repaired(reason, detail)` is called for each repair and for each part that is dropped:
    string-arguments, missing-arguments (become {}), trailing-text-after-json (prose behind the arguments),
    call-in-text (calls of declared tools in the text of an assistant turn become tool calls),
    reasoning-in-text (`<think>…</think>` or `[THINK]…[/THINK]` at the start of an assistant turn becomes its reasoning,
    unless the turn has nothing else),
    null-content, text-parts (`[{"type": "text", …}]`), structured-content (a tool's list or object becomes JSON text),
    missing-call-id and mismatched-call-id (where calls and results leave no doubt; then each result has its call's id),
    parallel-calls-as-turns (see `join_calls`), results-out-of-order (results follow in the order of their calls),
    null-fields (padding of a union schema, see `xlam_jax.data.nulls`; `padded` where the row is known to have it),
    string-tools, tool-without-list, flat-tool, missing-tool-type, string-turns, string-calls, call-without-list,
    flat-call, empty-last-turn and refused-last-turn (unless `keep_end`, and if an earlier assistant turn is trained),
    text-score, number-as-id, unknown-key (the format does not have this key).
    Text that is meant as a call of a tool but cannot be read stays as it is (see `text_calls.unread_calls`).

    `default_id` is the id of a row without `unique_trajectory_id`. `problem(reason, detail)` is called for what cannot
    be repaired; by default the first problem raises `InvalidTrajectory`, and nothing else is raised for any `row`. With
    a `problem` that returns, the result has only what can be read of the row: it is for inspection, not for training.
    A value that is not an object, or not JSON, raises in any case.
    """
    if not isinstance(row, dict):
        raise InvalidTrajectory("not-an-object", f"a row is a JSON object, got {type_name(row)}")
    check_json(row)
    sink = Sink(repaired or ignore, problem or refuse)
    null_fields: list[str] = []
    tools = _read_tools(row.get("tools"), sink, padded, null_fields)
    declared = {tool["function"]["name"]: tool["function"].get("parameters") for tool in tools}
    turns = row.get("conversation")
    conversation = _read_messages(turns if keep_end else without_empty_end(turns, sink), sink, declared)
    if conversation and not any(message.role == "assistant" for message in conversation):
        sink.problem("no-assistant-turn", f"none of the {len(conversation)} turns is by the assistant")
    _check_declared(conversation, declared, sink)
    conversation = _without_padding(conversation, declared, padded, null_fields)
    _report_null_fields(null_fields, sink)
    _report_unknown_keys(row, ROW_KEYS, "the row", sink)
    identity = _optional_id(row, "unique_trajectory_id", "the row", sink)
    return Trajectory(
        id=default_id if identity is None else identity,
        source=_optional_text(row, "source", "the row", sink),
        score=_score(row.get("score"), sink),
        task_instruction=_optional_text(row, "task_instruction", "the row", sink) or "",
        tools=tools,
        conversation=conversation,
    )


def parse_tools(tools: object, repaired: Report | None = None) -> list[dict[str, Any]]:
    """Checks tool schemas, `[{"type": "function", "function": {"name": …}}, …]`; None stands for no tools.

    Raises `InvalidTrajectory`.
    """
    check_json(tools)
    sink = Sink(repaired or ignore)
    null_fields: list[str] = []
    parsed = _read_tools(tools, sink, padded=False, null_fields=null_fields)
    _report_null_fields(null_fields, sink)
    return parsed


def parse_messages(
    turns: object, repaired: Report | None = None, *, assistant_first: bool = False
) -> tuple[Message, ...]:
    """Checks turns in OpenAI form (arguments as texts or objects), their order and their call ids.

    System turns come first, then a user turn (with `assistant_first`, or an assistant turn); tool turns follow the
    assistant turn that calls. Call ids are unique within a turn. Repairs what `parse_trajectory` repairs. Raises
    `InvalidTrajectory`.
    """
    check_json(turns)
    return _read_messages(
        turns, Sink(repaired or ignore), first=("user", "assistant") if assistant_first else ("user",)
    )


def read_jsonl(path: str | Path) -> Iterator[tuple[int, Trajectory | InvalidTrajectory]]:
    """Streams (line number from 1, trajectory or why the line is not one) from a JSONL file (also .gz, .zst).

    Blank lines are skipped. A row without an id is named `<file stem>:<line>`. Raises `UserError` for a file that
    cannot be read.
    """
    path = Path(path)
    for number, line in read_lines(path):
        try:
            yield number, parse_trajectory(parse_json(line), default_id=f"{stem(path)}:{number}")
        except InvalidTrajectory as invalid:
            yield number, invalid


def _read_tools(tools: object, sink: Sink, padded: bool, null_fields: list[str]) -> list[dict[str, Any]]:
    """Returns the tools without null fields, whose paths are appended to `null_fields`."""
    if isinstance(tools, str):
        tools = sink.attempt(_FAILED, parse_text, tools, "bad-tools", "`tools`")
        if tools is _FAILED:
            return []
        sink.repaired("string-tools", "`tools` is JSON in a text")
    if tools is None:
        return []
    if isinstance(tools, dict):
        sink.repaired("tool-without-list", "`tools` is one tool, not in a list")
        tools = [tools]
    if not isinstance(tools, list):
        sink.problem("bad-tools", f"`tools` is a list, got {type_name(tools)}")
        return []
    cleaned = nulls.clean_tools([unflattened(tool, "tool", sink.repaired) for tool in tools], padded, null_fields)
    named: dict[str, dict[str, Any]] = {}
    for i, tool in enumerate(cleaned):
        function = tool.get("function") if isinstance(tool, dict) else None
        name = function.get("name") if isinstance(function, dict) else None
        if not isinstance(tool, dict) or not isinstance(function, dict) or not isinstance(name, str) or not name:
            sink.problem("tool-without-name", f'tool {i} lacks {{"type": "function", "function": {{"name": …}}}}')
        elif name in named:
            sink.problem("duplicate-tool", f"tool {i} is named '{name}' like a tool before it")
        else:
            named[name] = _read_tool(tool, function, name, sink)
    return list(named.values())


def _read_tool(tool: dict[str, Any], function: dict[str, Any], name: str, sink: Sink) -> dict[str, Any]:
    parameters = function.get("parameters")
    invalid = ""
    if not isinstance(parameters, dict | None):
        invalid = f"`parameters` of tool '{name}' is {type_name(parameters)}, not an object"
    elif not isinstance((parameters or {}).get("properties"), dict | None):
        properties = (parameters or {})["properties"]
        invalid = f"`properties` of tool '{name}' is {type_name(properties)}, not an object"
    if invalid:
        sink.problem("bad-tools", invalid)
        tool = tool | {"function": function | {"parameters": {"additionalProperties": True}}}
    if tool.get("type") is None:
        sink.repaired("missing-tool-type", f"tool '{name}' does not say that it is a function")
        tool = {"type": "function"} | {key: value for key, value in tool.items() if key != "type"}
    return tool


def _read_messages(
    turns: object, sink: Sink, declared: Mapping[str, Any] | None = None, first: Collection[str] = ("user",)
) -> tuple[Message, ...]:
    """The turns of a conversation. `first` are the roles that may follow the system turns."""
    if not isinstance(turns, list | tuple) or not turns:
        sink.problem("no-conversation", f"a conversation is a non-empty list of turns, got {type_name(turns)}")
        return ()
    listed = [
        sink.attempt(turn, with_call_list, i, turn, sink.repaired) if has_calls(turn) else turn
        for i, turn in enumerate(turns)
    ]
    joined = sink.attempt(listed, join_calls, listed, sink.repaired)
    messages = [_read_message(i, turn, sink) for i, turn in enumerate(joined)]
    if declared is not None:  # the row of a file, not a request
        messages = [_with_reasoning(i, message, sink) for i, message in enumerate(messages)]
    if declared:
        messages = _with_text_calls(messages, declared, sink)
    _check_order(messages, first, sink)
    for i, message in enumerate(messages):
        if message.tool_calls:
            link_results(messages, i, sink)
    return tuple(messages)


def _read_message(i: int, turn: object, sink: Sink) -> Message:
    number = turn_number(i, turn)
    where = f"turn {number}"
    if not isinstance(turn, dict):
        sink.problem("bad-turn", f"{where} is {type_name(turn)}, not an object")
        return Message(UNKNOWN_ROLE, _UNREADABLE)
    role = turn.get("role")
    if role not in ROLES:
        hint = nearest(role[:100], ROLES) if isinstance(role, str) else ""
        sink.problem("unknown-role", f"{where} has role {role!r}, known roles: {', '.join(ROLES)}{hint}")
        role = UNKNOWN_ROLE
    content, reasoning = turn.get("content"), []
    if not isinstance(content, str):
        speaker = f"{where} ({role or 'unknown role'})"
        content, reasoning = sink.attempt((_UNREADABLE, []), read_content, role, content, speaker, sink.repaired)
    unread = dict(turn)
    if role == "assistant":
        reasoning = [*take_reasoning(unread), *reasoning]
    calls = turn.get("tool_calls")
    if not isinstance(calls, list | tuple | None):
        sink.problem("bad-call", f"{where} has `tool_calls` that is {type_name(calls)}, not a list")
        calls, content = (), content or _UNREADABLE
    if calls and role not in ("assistant", UNKNOWN_ROLE):
        sink.problem("bad-role-order", f"{where} ({role}) has tool calls; only assistant turns call tools")
    if role == "assistant" and not calls and not content:
        sink.problem("empty-assistant-turn", f"{where} has neither text nor tool calls")
        content = _UNREADABLE
    loss = turn.get("loss")
    if not isinstance(loss, bool | None):
        sink.problem("bad-loss", f"{where} has loss {loss!r}, not true or false")
        loss = None
    _report_unknown_keys(unread, MESSAGE_KEYS, where, sink)
    return Message(
        role=role,
        content=content,
        tool_calls=tuple([_read_call(where, call, sink) for call in calls]) if calls else (),
        tool_call_id=_optional_id(turn, "tool_call_id", where, sink),
        name=_optional_text(turn, "name", where, sink),
        loss=loss,
        reasoning="\n\n".join(dict.fromkeys(reasoning)),
        number=number if TURN in turn else None,
    )


def _read_call(where: str, call: object, sink: Sink) -> ToolCall:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(call, dict) or not isinstance(function, dict) or not isinstance(function.get("name"), str):
        sink.problem("bad-call", f'{where} has a call without {{"function": {{"name": …, "arguments": {{…}}}}}}')
        return UnreadableCall(_optional_id(call, "id", where, sink) if isinstance(call, dict) else None, "", {})
    calls_with = f"{where} calls '{function['name']}' with"
    arguments = function.get("arguments")
    if arguments is None:
        sink.repaired("missing-arguments", f"{calls_with} no arguments")
        arguments = {}
    elif isinstance(arguments, str):
        sink.repaired("string-arguments", f"{calls_with} arguments in a text")
        arguments = sink.attempt(_FAILED, decode_arguments, arguments, calls_with, sink.repaired)
    if not isinstance(arguments, dict):
        if arguments is not _FAILED:
            sink.problem("bad-arguments", f"{calls_with} {type_name(arguments)}, not an object")
        return UnreadableCall(_optional_id(call, "id", where, sink), function["name"], {})
    _report_unknown_keys(call, CALL_KEYS, f"{where}, a call", sink)
    _report_unknown_keys(function, FUNCTION_KEYS, f"{where}, a call's function", sink)
    return ToolCall(_optional_id(call, "id", where, sink), function["name"], arguments)


def _with_reasoning(i: int, message: Message, sink: Sink) -> Message:
    """Moves reasoning at the start of an assistant's text to its own field, without white space around it."""
    if message.role != "assistant":
        return message
    own = message.reasoning.strip()
    parts = split_reasoning(message.content)
    if parts is None or not (parts[1] or message.tool_calls):
        return message if own == message.reasoning else replace(message, reasoning=own)
    reasoning, rest = parts
    sink.repaired("reasoning-in-text", f"turn {turn_number(i, message)} has its reasoning in its text")
    texts = dict.fromkeys(text for text in (own, reasoning) if text)
    return replace(message, content=rest, reasoning="\n\n".join(texts))


def _with_text_calls(messages: list[Message], declared: Mapping[str, Any], sink: Sink) -> list[Message]:
    """Turns the calls of declared tools in the text of assistant turns into tool calls."""
    read = [_read_text_calls(i, message, declared, sink) for i, message in enumerate(messages)]
    if all(message is before for message, before in zip(read, messages, strict=True)):
        return messages
    turns = [message_to_dict(message, numbers=True) for message in read]
    joined = sink.attempt(turns, join_calls, turns, sink.repaired)  # such turns may be parallel calls as well
    if len(joined) == len(turns):
        return read
    quiet = Sink(problem=ignore)  # every turn was checked before
    return [_read_message(i, turn, quiet) for i, turn in enumerate(joined)]


def _read_text_calls(i: int, message: Message, declared: Mapping[str, Any], sink: Sink) -> Message:
    if message.role != "assistant" or message.tool_calls or not message.content:
        return message
    number = turn_number(i, message)
    written = text_calls.find_calls(message.content, declared, f"turn {number}")
    if written is None or written.problem:
        return message
    for reason, detail in written.repairs:
        sink.repaired(reason, detail)
    names = ", ".join(dict.fromkeys(call.name for call in written.calls))
    sink.repaired("call-in-text", f"turn {number} calls {names} in its text, {message.content[-80:]!r}")
    return replace(message, content=written.thought, tool_calls=written.calls)


def _check_order(messages: Sequence[Message], first: Collection[str], sink: Sink) -> None:
    """Reports turns that are out of place. Nothing is known of the turn after one whose role is unknown."""
    previous = "system"
    results_may_follow = False
    for place, message in enumerate(messages):
        role, number = message.role, turn_number(place, message)
        if role == UNKNOWN_ROLE or previous == UNKNOWN_ROLE:
            results_may_follow = True
        elif role == "system" and previous != "system":
            sink.problem(
                "bad-role-order", f"turn {number} is a system turn after a {previous} turn; system turns come first"
            )
        elif previous == "system" and role not in ("system", *first):
            sink.problem(
                "bad-role-order", f"turn {number} is by the {role}; the first turn after the system's is the user's"
            )
        elif role == "tool" and not results_may_follow:
            sink.problem("bad-role-order", f"turn {number} is a tool result after a {previous} turn without calls")
        results_may_follow = bool(message.tool_calls) or (results_may_follow and role in ("tool", UNKNOWN_ROLE))
        previous = role


def _check_declared(conversation: Sequence[Message], declared: Mapping[str, Any], sink: Sink) -> None:
    """Reports calls of tools that the row does not declare."""
    for i, message in enumerate(conversation):
        for call in message.tool_calls:
            if call.name not in declared and (call.name or not isinstance(call, UnreadableCall)):
                names = ", ".join(declared) or "none"
                hint = nearest(call.name[:100], declared)
                sink.problem(
                    "undeclared-tool",
                    f"turn {turn_number(i, message)} calls '{call.name}', declared tools: {names}{hint}",
                )


def _without_padding(
    conversation: tuple[Message, ...], declared: Mapping[str, Any], padded: bool, null_fields: list[str]
) -> tuple[Message, ...]:
    """Removes the null arguments that are padding, and appends their paths to `null_fields`."""
    calls = [call for message in conversation for call in message.tool_calls if call.name in declared]
    padded = padded or any(nulls.has_padding(call.arguments, declared[call.name]) for call in calls)

    def clean(call: ToolCall) -> ToolCall:
        if call.name not in declared:
            return call
        arguments = nulls.clean_arguments(call.arguments, declared[call.name], padded, null_fields)
        return call if arguments is call.arguments else replace(call, arguments=arguments)

    return tuple(
        replace(message, tool_calls=tuple(map(clean, message.tool_calls))) if message.tool_calls else message
        for message in conversation
    )


def _score(value: object, sink: Sink) -> float | None:
    if value is None:
        return None
    score = math.nan
    if isinstance(value, int | float | str) and not isinstance(value, bool):
        with contextlib.suppress(ValueError, OverflowError):
            score = float(value)
    if not math.isfinite(score):
        sink.problem("bad-score", f"score is a finite number, got {value!r}")
        return None
    if isinstance(value, str):
        sink.repaired("text-score", f"score is the text {value!r}")
    return score


def _optional_text(row: dict[str, Any], key: str, where: str, sink: Sink) -> str | None:
    value = row.get(key)
    if not isinstance(value, str | None):
        sink.problem("bad-value", f"`{key}` of {where} is text, got {type_name(value)}")
        return None
    return value


def _optional_id(row: dict[str, Any], key: str, where: str, sink: Sink) -> str | None:
    value = row.get(key)
    if isinstance(value, int) and not isinstance(value, bool):
        sink.repaired("number-as-id", f"`{key}` of {where} is the number {value}")
        return str(value)
    return _optional_text(row, key, where, sink)


def _report_unknown_keys(row: dict[str, Any], keys: frozenset[str], where: str, sink: Sink) -> None:
    for key, value in row.items():
        if key not in keys and value is not None:
            sink.repaired("unknown-key", f"`{key}` of {where} is dropped")


def _report_null_fields(null_fields: list[str], sink: Sink) -> None:
    if null_fields:
        sink.repaired("null-fields", f"dropped, as null: {', '.join(sorted(set(null_fields)))}")
