"""The unified trajectory: one conversation with its tools, checked when read (the canonical form of all data)."""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from xlam_jax.errors import UserError, nearest

ROLES = ("system", "user", "assistant", "tool")


class InvalidTrajectory(ValueError):  # noqa: N818 - it is also a value: readers yield it in place of the trajectory
    """Why a row is no trajectory: `reason` is a short code to count by, `detail` says what is wrong in words."""

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One call of a tool; `arguments` keeps the order of its keys. `id` is None where the source has none."""

    id: str | None
    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. `content` of an assistant turn with calls is the thought; `loss` False takes its loss away."""

    role: str
    content: str
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    name: str | None = None
    loss: bool | None = None


@dataclass(frozen=True, slots=True)
class Trajectory:
    """One conversation and the tools it may call. `tools` are OpenAI tool schemas, key order as read."""

    id: str
    source: str | None
    score: float | None
    task_instruction: str
    tools: list[dict[str, Any]]
    conversation: tuple[Message, ...]


def parse_trajectory(obj: object, default_id: str = "") -> Trajectory:
    """Checks one row and returns it typed.

    Repaired: string `arguments`, `content: null`, tool `content` that is a list or an object (becomes compact JSON).
    `default_id` names rows without `unique_trajectory_id`. Keys this format does not know are left out.
    Raises `InvalidTrajectory`; arguments are not yet checked against the tools' JSON Schema.
    """
    if not isinstance(obj, dict):
        _fail("not-an-object", f"a row is a JSON object, got {_kind(obj)}")
    tools = parse_tools(obj.get("tools"))
    conversation = parse_messages(obj.get("conversation"))
    if not any(message.role == "assistant" for message in conversation):
        _fail("no-assistant-turn", f"none of the {len(conversation)} turns is by the assistant")
    declared = [tool["function"]["name"] for tool in tools]
    for i, message in enumerate(conversation):
        for call in message.tool_calls:
            if call.name not in declared:
                known = ", ".join(declared) or "none"
                hint = nearest(call.name, declared)
                _fail("undeclared-tool", f"turn {i} calls '{call.name}', declared tools: {known}{hint}")
    score = obj.get("score")
    if score is not None:
        try:
            score = float(score)  # some sources write it as a string
        except (TypeError, ValueError):
            score = math.nan
        if not math.isfinite(score):
            _fail("bad-score", f"score is a finite number, got {obj['score']!r}")
    identity = obj.get("unique_trajectory_id")
    return Trajectory(
        id=default_id if identity is None else str(identity),
        source=_optional_text(obj, "source", "the row"),
        score=score,
        task_instruction=_optional_text(obj, "task_instruction", "the row") or "",
        tools=tools,
        conversation=conversation,
    )


def parse_tools(obj: object) -> list[dict[str, Any]]:
    """Checks tool schemas, `[{"type": "function", "function": {"name": …}}, …]`; None is no tools.

    Raises `InvalidTrajectory`.
    """
    if obj is None:
        return []
    if not isinstance(obj, list):
        _fail("bad-tools", f"`tools` is a list, got {_kind(obj)}")
    seen: set[str] = set()
    for i, tool in enumerate(obj):
        function = tool.get("function") if isinstance(tool, dict) else None
        name = function.get("name") if isinstance(function, dict) else None
        if not isinstance(name, str) or not name:
            _fail("tool-without-name", f'tool {i} lacks {{"type": "function", "function": {{"name": …}}}}')
        if name in seen:
            _fail("duplicate-tool", f"tool {i} is named '{name}' like a tool before it")
        seen.add(name)
    return obj


def parse_messages(obj: object) -> tuple[Message, ...]:
    """Checks turns in OpenAI form (string or object arguments), their order and their call ids.

    System turns come first, then a user turn; tool turns follow the assistant turn that calls. Call ids are unique
    within a turn. Raises `InvalidTrajectory`.
    """
    if not isinstance(obj, list | tuple) or not obj:
        _fail("no-conversation", f"a conversation is a non-empty list of turns, got {_kind(obj)}")
    messages = tuple(_parse_message(i, message) for i, message in enumerate(obj))
    _check_order(messages)
    return messages


def system_text(task_instruction: str, messages: Sequence[Message]) -> str:
    """Returns the task instruction and the system turns as one text, blank ones left out."""
    parts = [task_instruction, *(message.content for message in messages if message.role == "system")]
    return "\n\n".join(part for part in parts if part)


def to_dict(trajectory: Trajectory) -> dict[str, Any]:
    """Returns the canonical JSON object; `parse_trajectory` reads it back equal. Absent optional keys stay absent."""
    row: dict[str, Any] = {"unique_trajectory_id": trajectory.id}
    if trajectory.source is not None:
        row["source"] = trajectory.source
    if trajectory.score is not None:
        row["score"] = trajectory.score
    if trajectory.task_instruction:
        row["task_instruction"] = trajectory.task_instruction
    row["tools"] = trajectory.tools
    row["conversation"] = [_message_to_dict(message) for message in trajectory.conversation]
    return row


def to_messages(trajectory: Trajectory) -> list[dict[str, Any]]:
    """Returns the conversation as chat messages; the task instruction becomes a system message at the front."""
    front = [{"role": "system", "content": trajectory.task_instruction}] if trajectory.task_instruction else []
    turns = [_message_to_dict(message) for message in trajectory.conversation]
    for turn in turns:
        turn.pop("loss", None)  # no part of what a server is sent
    return front + turns


def read_jsonl(path: str | Path) -> Iterator[tuple[int, Trajectory | InvalidTrajectory]]:
    """Streams (line number from 1, trajectory or why the line is none) from a JSONL file; blank lines are skipped.

    A row without an id is named `<file stem>:<line>`. Raises `UserError` when the file cannot be read.
    """
    path = Path(path)
    for number, line in read_lines(path):
        try:
            yield number, parse_trajectory(parse_json(line), default_id=f"{path.stem}:{number}")
        except InvalidTrajectory as invalid:
            yield number, invalid


def read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Streams (line number from 1, line) of a file, blank lines left out. Raises `UserError` on an unreadable file."""
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.isspace():
                    yield number, line
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the path") from None


def parse_json(text: str | bytes) -> Any:
    """Parses strict JSON in UTF-8: no NaN, Infinity, overflowing number or lone surrogate.

    Raises `InvalidTrajectory("malformed-json", …)`.
    """
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8-sig")
        value = json.loads(text, parse_constant=_not_json, parse_float=_finite)
        if "\\ud" in text or "\\uD" in text:  # an escaped surrogate pair is fine, half of one no tokenizer takes
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except UnicodeDecodeError as error:
        _fail("malformed-json", f"not UTF-8: byte 0x{error.object[error.start]:02x} at position {error.start}")
    except UnicodeEncodeError:
        _fail("malformed-json", "half of a surrogate pair (\\ud8xx … \\udfxx) is no character")
    except RecursionError:
        _fail("malformed-json", "nested too deeply")
    except ValueError as error:
        _fail("malformed-json", str(error))


def _not_json(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"number {digits} is out of range")
    return value


def _parse_message(i: int, obj: object) -> Message:
    if not isinstance(obj, dict):
        _fail("bad-turn", f"turn {i} is {_kind(obj)}, not an object")
    role = obj.get("role")
    if role not in ROLES:
        hint = nearest(role, ROLES) if isinstance(role, str) else ""
        _fail("unknown-role", f"turn {i} has role {role!r}, known roles: {', '.join(ROLES)}{hint}")
    content = obj.get("content")
    if content is None:
        content = ""
    elif role == "tool" and isinstance(content, list | dict):
        content = json.dumps(content, ensure_ascii=False)
    elif not isinstance(content, str):
        _fail("bad-content", f"turn {i} ({role}) has content that is {_kind(content)}, not text")
    calls = obj.get("tool_calls") or []
    if calls and role != "assistant":
        _fail("bad-role-order", f"turn {i} ({role}) has tool calls; only assistant turns call tools")
    if not isinstance(calls, list | tuple):
        _fail("bad-call", f"turn {i} has `tool_calls` that is {_kind(calls)}, not a list")
    if role == "assistant" and not calls and not content:
        _fail("empty-assistant-turn", f"turn {i} has neither text nor tool calls")
    loss = obj.get("loss")
    if loss is not None and not isinstance(loss, bool):
        _fail("bad-loss", f"turn {i} has loss {loss!r}, not true or false")
    where = f"turn {i}"
    return Message(
        role=role,
        content=content,
        tool_calls=tuple(_parse_call(i, call) for call in calls),
        tool_call_id=_optional_text(obj, "tool_call_id", where),
        name=_optional_text(obj, "name", where),
        loss=loss,
    )


def _parse_call(i: int, obj: object) -> ToolCall:
    function = obj.get("function") if isinstance(obj, dict) else None
    if not isinstance(obj, dict) or not isinstance(function, dict) or not isinstance(function.get("name"), str):
        _fail("bad-call", f'turn {i} has a call without {{"function": {{"name": …, "arguments": {{…}}}}}}')
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = parse_json(arguments)
        except InvalidTrajectory as invalid:
            _fail("bad-arguments", f"turn {i} calls '{function['name']}' with a text that is no JSON: {invalid.detail}")
    if not isinstance(arguments, dict):
        _fail("bad-arguments", f"turn {i} calls '{function['name']}' with {_kind(arguments)}, not an object")
    return ToolCall(_optional_text(obj, "id", f"turn {i}"), function["name"], arguments)


def _check_order(messages: Sequence[Message]) -> None:
    previous = "system"
    calls_open = False  # whether tool results may follow
    open_ids: list[str] = []
    for i, message in enumerate(messages):
        role = message.role
        if role == "system" and previous != "system":
            _fail("bad-role-order", f"turn {i} is a system turn after a {previous} turn; system turns come first")
        if previous == "system" and role not in ("system", "user"):
            _fail("bad-role-order", f"turn {i} is by the {role}; the first turn after the system's is the user's")
        if role == "assistant":
            calls_open = bool(message.tool_calls)
            open_ids = [call.id for call in message.tool_calls if call.id is not None]
            if len(set(open_ids)) < len(open_ids):
                _fail("duplicate-call-id", f"turn {i} gives two calls one id: {', '.join(open_ids)}")
        elif role == "tool":
            if previous not in ("assistant", "tool") or not calls_open:
                _fail("bad-role-order", f"turn {i} is a tool result after a {previous} turn without calls")
            if message.tool_call_id is not None and message.tool_call_id not in open_ids:
                known = ", ".join(open_ids) or "none"
                _fail(
                    "orphan-tool-call-id", f"turn {i} answers call '{message.tool_call_id}', calls before it: {known}"
                )
        else:
            calls_open = False
        previous = role


def _message_to_dict(message: Message) -> dict[str, Any]:
    row: dict[str, Any] = {"role": message.role}
    if message.tool_call_id is not None:
        row["tool_call_id"] = message.tool_call_id
    if message.name is not None:
        row["name"] = message.name
    row["content"] = message.content
    if message.loss is not None:
        row["loss"] = message.loss
    if message.tool_calls:
        row["tool_calls"] = [
            {"type": "function"}
            | ({} if call.id is None else {"id": call.id})
            | {"function": {"name": call.name, "arguments": call.arguments}}
            for call in message.tool_calls
        ]
    return row


def _optional_text(obj: dict[str, Any], key: str, where: str) -> str | None:
    value = obj.get(key)
    if value is not None and not isinstance(value, str):
        _fail("bad-value", f"`{key}` of {where} is text, got {_kind(value)}")
    return value


def _kind(value: object) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"


def _fail(reason: str, detail: str) -> NoReturn:
    raise InvalidTrajectory(reason, detail)
