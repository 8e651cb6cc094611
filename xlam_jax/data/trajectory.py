"""The unified trajectory: one conversation with its tools, checked when read (the canonical form of all data)."""

import contextlib
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice, takewhile
from pathlib import Path
from typing import Any, NoReturn

from xlam_jax.data import nulls
from xlam_jax.data.files import read_lines, stem
from xlam_jax.errors import nearest

ROLES = ("system", "user", "assistant", "tool")
ROW_KEYS = frozenset({"unique_trajectory_id", "source", "score", "task_instruction", "tools", "conversation"})
REASONING_KEYS = ("reasoning", "reasoning_content", "thinking")
"""Spellings of the key with an assistant turn's reasoning; the first is the canonical one."""
TURN = "turn_in_file"
"""Key of a turn's number in the file that it was converted from: messages name it. Converters set it."""
MESSAGE_KEYS = frozenset({"role", "content", "tool_calls", "tool_call_id", "name", "loss", TURN})
CALL_KEYS = frozenset({"type", "id", "function"})
FUNCTION_KEYS = frozenset({"name", "arguments"})
DEEPEST = 400
"""Levels of nesting of any JSON that is read; below where recursion ends on any Python."""
DEEPEST_ROW = 64
"""Levels of nesting of a trajectory, so that nothing that walks its schemas and arguments meets that end."""
DEEPEST_TEXT = 48
"""The same for arguments and tools that are JSON in a text, and come to lie inside the row."""
LONGEST_DETAIL = 1000
HALF_SURROGATE = "half of a surrogate pair (\\ud8xx … \\udfxx) is no character"

Note = Callable[[str, str], None]
"""Is told (reason, detail) of each thing that was mended."""


class InvalidTrajectory(ValueError):  # noqa: N818 - it is also a value: readers yield it in place of the trajectory
    """Why a row is no trajectory: `reason` is a short code to count by, `detail` says what is wrong in words."""

    def __init__(self, reason: str, detail: str):
        if len(detail) > LONGEST_DETAIL:
            detail = f"{detail[:LONGEST_DETAIL]} …"
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
    """One turn. `content` of an assistant turn with calls is the thought; `loss` False takes its loss away.

    `reasoning` is what a reasoning model writes before its answer; only an assistant turn has it, and no format renders
    it yet.
    """

    role: str
    content: str
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    name: str | None = None
    loss: bool | None = None
    reasoning: str = ""
    number: int | None = field(default=None, compare=False)
    """Its turn in the file that it was converted from, where that may be another one than here."""


@dataclass(frozen=True, slots=True)
class Trajectory:
    """One conversation and the tools it may call. `tools` are OpenAI tool schemas, key order as read."""

    id: str
    source: str | None
    score: float | None
    task_instruction: str
    tools: list[dict[str, Any]]
    conversation: tuple[Message, ...]


def parse_trajectory(
    obj: object, default_id: str = "", repaired: Note | None = None, *, padded: bool = False, keep_end: bool = False
) -> Trajectory:
    """Checks one row and returns it typed.

    What is mended, and what is left out, is told by `repaired(reason, detail)`:
    string-arguments, missing-arguments (none become {}), trailing-text-after-json (prose behind the arguments),
    call-in-text (calls of declared tools that the text of an assistant turn holds become tool calls),
    null-content, text-parts (`[{"type": "text", …}]`), structured-content (a tool's list or object becomes JSON text),
    missing-call-id and mismatched-call-id (where calls and results leave no doubt; then each result has its call's id),
    parallel-calls-as-turns (see `join_calls`), results-out-of-order (results follow in the order of their calls),
    null-fields (padding of a union schema, see `xlam_jax.data.nulls`; `padded` where the row is known to have it),
    string-tools, tool-without-list, flat-tool, missing-tool-type, string-turns, string-calls, call-without-list,
    flat-call, empty-last-turn and refused-last-turn (unless `keep_end`, and where another assistant turn is left to
    learn from), text-score, number-as-id, unknown-key (this format has no such key).
    `default_id` names rows without `unique_trajectory_id`.
    Text that is meant as a call and cannot be read as one of a declared tool stays as it is (see `unread_calls`).
    Raises `InvalidTrajectory`, and nothing else, for whatever `obj` is; arguments are not yet checked against the
    tools' JSON Schema.
    """
    note = repaired or _no_note
    if not isinstance(obj, dict):
        _fail("not-an-object", f"a row is a JSON object, got {_kind(obj)}")
    check_json(obj)
    dropped: list[str] = []
    tools = _read_tools(obj.get("tools"), note, padded, dropped)
    declared = {tool["function"]["name"]: tool["function"].get("parameters") for tool in tools}
    turns = obj.get("conversation")
    conversation = _parse_messages(turns if keep_end else without_empty_end(turns, note), note, declared)
    if not any(message.role == "assistant" for message in conversation):
        _fail("no-assistant-turn", f"none of the {len(conversation)} turns is by the assistant")
    for i, message in enumerate(conversation):
        for call in message.tool_calls:
            if call.name not in declared:
                known = ", ".join(declared) or "none"
                hint = nearest(call.name[:100], declared)
                _fail(
                    "undeclared-tool",
                    f"turn {turn_number(i, message)} calls '{call.name}', declared tools: {known}{hint}",
                )
    conversation = _without_padding(conversation, declared, padded, dropped)
    if dropped:
        note("null-fields", f"left out, as null: {', '.join(sorted(set(dropped)))}")
    _note_unknown(obj, ROW_KEYS, "the row", note)
    identity = _optional_id(obj, "unique_trajectory_id", "the row", note)
    return Trajectory(
        id=default_id if identity is None else identity,
        source=_optional_text(obj, "source", "the row"),
        score=_score(obj.get("score"), note),
        task_instruction=_optional_text(obj, "task_instruction", "the row") or "",
        tools=tools,
        conversation=conversation,
    )


def without_empty_end(turns: Any, note: Note) -> Any:
    """The turns without a last one in which the assistant says nothing, or only refuses, where an earlier one is left
    to learn from. They may be JSON in a text."""
    if isinstance(turns, str):
        turns = parse_text(turns, "no-conversation", "`conversation`", DEEPEST_ROW)
        note("string-turns", "`conversation` is JSON in a text")
    if not isinstance(turns, list | tuple) or not turns:
        return turns
    *before, last = turns
    taught = any(isinstance(turn, dict) and turn.get("role") == "assistant" and turn.get("loss") is not False
                 for turn in before)  # fmt: skip
    if not taught or not isinstance(last, dict) or last.get("role") != "assistant" or last.get("tool_calls"):
        return turns
    try:
        said = _content("assistant", last.get("content"), "the last turn", _no_note, [])
    except InvalidTrajectory:
        said = "" if _refuses(last.get("content")) else "?"
    if said.strip():
        return turns
    refused = bool(last.get("refusal")) or _refuses(last.get("content"))
    what = "refused-last-turn" if refused else "empty-last-turn"
    note(
        what, f"turn {turn_number(len(before), last)} {'only refuses' if refused else 'says nothing'}, and is left out"
    )
    return before


def _refuses(content: Any) -> bool:
    """Whether all parts of a content are refusals."""
    parts = content if isinstance(content, list) else []
    return bool(parts) and all(isinstance(part, dict) and part.get("type") == "refusal" for part in parts)


def parse_tools(obj: object, repaired: Note | None = None) -> list[dict[str, Any]]:
    """Checks tool schemas, `[{"type": "function", "function": {"name": …}}, …]`; None is no tools.

    Raises `InvalidTrajectory`.
    """
    check_json(obj)
    return _parse_tools(obj, repaired or _no_note)


def parse_messages(obj: object, repaired: Note | None = None, *, assistant_first: bool = False) -> tuple[Message, ...]:
    """Checks turns in OpenAI form (string or object arguments), their order and their call ids.

    System turns come first, then a user turn (with `assistant_first`, or one by the assistant); tool turns follow the
    assistant turn that calls. Call ids are unique within a turn. Mends what `parse_trajectory` mends. Raises
    `InvalidTrajectory`.
    """
    check_json(obj)
    return _parse_messages(obj, repaired or _no_note, assistant_first=assistant_first)


def unread_calls(messages: Sequence[Message], declared: Collection[str]) -> Iterator[str]:
    """Yields a description of each assistant turn whose text still holds what is meant as a tool call."""
    from xlam_jax.data import text_calls  # which needs this module

    for i, message in enumerate(messages):
        if message.role != "assistant":
            continue
        where = f"turn {turn_number(i, message)}"
        found = text_calls.read(message.content, declared, where)
        if found is not None:
            problem = found.problem or f"calls '{found.calls[0].name}', and the turn has tool calls as well"
            yield f"the text of {where} {problem}"


def turn_number(place: int, turn: Any) -> int:
    """The number of a turn for a message about it: in the user's file, or else its place in the conversation.

    `turn` is a `Message`, or an object that need not be checked yet.
    """
    number = turn.number if isinstance(turn, Message) else turn.get(TURN) if isinstance(turn, dict) else None
    return number if isinstance(number, int) else place


def system_text(task_instruction: str, messages: Sequence[Message]) -> str:
    """Returns the task instruction and the system turns as one text, blank ones left out."""
    parts = [task_instruction, *(message.content for message in messages if message.role == "system")]
    return "\n\n".join(part for part in parts if part)


def to_dict(trajectory: Trajectory, numbers: bool = False) -> dict[str, Any]:
    """Returns the canonical JSON object; `parse_trajectory` reads it back equal. Absent optional keys stay absent.

    With `numbers`, turns keep those that messages name.
    """
    row: dict[str, Any] = {"unique_trajectory_id": trajectory.id}
    if trajectory.source is not None:
        row["source"] = trajectory.source
    if trajectory.score is not None:
        row["score"] = trajectory.score
    if trajectory.task_instruction:
        row["task_instruction"] = trajectory.task_instruction
    row["tools"] = trajectory.tools
    row["conversation"] = [
        _message_to_dict(message) | ({TURN: message.number} if numbers and message.number is not None else {})
        for message in trajectory.conversation
    ]
    return row


def to_messages(trajectory: Trajectory, reasoning: bool = False) -> list[dict[str, Any]]:
    """Returns the conversation as chat messages; the task instruction becomes a system message at the front.

    With `reasoning`, that of assistant turns is their `reasoning_content`; without, as what is trained, it is left out.
    """
    front = [{"role": "system", "content": trajectory.task_instruction}] if trajectory.task_instruction else []
    turns = [_message_to_dict(message) for message in trajectory.conversation]
    for turn in turns:
        turn.pop("loss", None)  # no part of what a server is sent
        text = turn.pop("reasoning", None)
        if reasoning and text:
            turn["reasoning_content"] = text
    return front + turns


def read_jsonl(path: str | Path) -> Iterator[tuple[int, Trajectory | InvalidTrajectory]]:
    """Streams (line number from 1, trajectory or why the line is none) from a JSONL file (also .gz, .zst).

    Blank lines are skipped. A row without an id is named `<file stem>:<line>`. Raises `UserError` when the file cannot
    be read.
    """
    path = Path(path)
    for number, line in read_lines(path):
        try:
            yield number, parse_trajectory(parse_json(line), default_id=f"{stem(path)}:{number}")
        except InvalidTrajectory as invalid:
            yield number, invalid


def parse_json(text: str | bytes) -> Any:
    """Parses strict JSON in UTF-8: no NaN, Infinity, overflowing number, key that stands twice or lone surrogate.

    Raises `InvalidTrajectory("malformed-json", …)`.
    """
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8-sig")
        value = _DECODER.decode(text)
        if "\\ud" in text or "\\uD" in text:  # an escaped surrogate pair is fine, half of one no tokenizer takes
            _encode(value).encode()
    except UnicodeDecodeError as error:
        _fail("malformed-json", f"not UTF-8: byte 0x{error.object[error.start]:02x} at position {error.start}")
    except UnicodeEncodeError:
        _fail("malformed-json", HALF_SURROGATE)
    except RecursionError:
        _fail("malformed-json", "nested too deeply")
    except ValueError as error:
        _fail("malformed-json", str(error))
    if _too_deep(text, DEEPEST):
        _fail("malformed-json", f"nested too deeply (more than {DEEPEST} levels)")
    return value


def decode_arguments(text: str, where: str, repaired: Note | None = None) -> Any:
    """The value of arguments that are JSON in a text; `where` says in words whose they are.

    Mends prose behind the JSON, JSON encoded twice, and an empty text (becomes {}); raises `InvalidTrajectory`.
    """
    note = repaired or _no_note
    if not text or text.isspace():
        note("missing-arguments", f"{where} an empty text")
        return {}
    try:
        try:
            value = parse_json(text)
        except InvalidTrajectory:
            value, rest = _leading_json(text)
            note("trailing-text-after-json", f"{where} arguments, then {rest[:80]!r}")
        if isinstance(value, str):
            value = parse_json(value)
            note("string-arguments", f"{where} JSON that was encoded twice")
        check_json(value, DEEPEST_TEXT)
    except InvalidTrajectory as invalid:
        _fail("bad-arguments", f"{where} a text that is not valid JSON: {invalid.detail}")
    return value


def _leading_json(text: str) -> tuple[Any, str]:
    """The JSON object a text begins with, and the prose after it; raises as `parse_json` does where that is not all."""
    start = len(text) - len(text.lstrip())
    try:
        _, end = _DECODER.raw_decode(text, start)
    except (ValueError, RecursionError):
        end = len(text)
    rest = text[end:].strip()
    if text[start : start + 1] != "{" or "{" in rest or rest.startswith((",", ":", "}", "[", "]", '"', "'")):
        end = len(text)  # more JSON, or the object closed too early: which part counts is not clear
    return parse_json(text[:end]), rest


def _json_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    obj = dict(pairs)
    if len(obj) < len(pairs):
        key, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"key {key!r} stands twice in one object")
    return obj


def _not_json(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"number {digits} is out of range")
    return value


_DECODER = json.JSONDecoder(parse_constant=_not_json, parse_float=_finite, object_pairs_hook=_json_object)
_encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False).encode


def parse_text(text: str, reason: str, what: str, deepest: int = DEEPEST_TEXT) -> Any:
    """Parses JSON that a row holds as a text; `what` names it. Raises `InvalidTrajectory(reason, …)`."""
    try:
        value = parse_json(text)
        check_json(value, deepest)
    except InvalidTrajectory as invalid:
        _fail(reason, f"{what} is a text that is not valid JSON: {invalid.detail}")
    return value


def check_json(obj: object, deepest: int = DEEPEST_ROW) -> None:
    """Raises `InvalidTrajectory` for values that JSON in UTF-8 can't hold, or that have more levels than `deepest`.

    Rows need not come from JSON.
    """
    try:
        text = _encode(obj)
        text.encode()
    except UnicodeEncodeError:
        _fail("malformed-json", HALF_SURROGATE)
    except RecursionError:
        _fail("malformed-json", "nested too deeply")
    except (TypeError, ValueError) as error:
        _fail("malformed-json", str(error))
    if _too_deep(text, deepest):
        _fail("malformed-json", f"nested too deeply (more than {deepest} levels)")


def _too_deep(text: str, deepest: int) -> bool:
    """Whether JSON has more than `deepest` levels of lists and objects."""
    if text.count("[") + text.count("{") <= deepest:
        return False
    brackets = _STRING.sub(b"", text.encode("utf-8", "surrogatepass")).translate(_ONE_KIND, _NO_BRACKETS)
    for _ in range(deepest):
        brackets = brackets.replace(b"[]", b"")  # takes the innermost level away
    return bool(brackets)


_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)
_ONE_KIND = bytes.maketrans(b"{}", b"[]")
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))


def _parse_tools(obj: object, note: Note) -> list[dict[str, Any]]:
    dropped: list[str] = []
    tools = _read_tools(obj, note, padded=False, dropped=dropped)
    if dropped:
        note("null-fields", f"left out, as null: {', '.join(sorted(set(dropped)))}")
    return tools


def _read_tools(obj: object, note: Note, padded: bool, dropped: list[str]) -> list[dict[str, Any]]:
    """The tools without null fields, whose paths are appended to `dropped`."""
    if isinstance(obj, str):
        obj = parse_text(obj, "bad-tools", "`tools`")
        note("string-tools", "`tools` is JSON in a text")
    if obj is None:
        return []
    if isinstance(obj, dict):
        note("tool-without-list", "`tools` is one tool, not in a list")
        obj = [obj]
    if not isinstance(obj, list):
        _fail("bad-tools", f"`tools` is a list, got {_kind(obj)}")
    obj = [unflattened(tool, "tool", note) for tool in obj]
    obj = nulls.clean_tools(obj, padded, dropped)
    seen: set[str] = set()
    tools: list[dict[str, Any]] = []
    for i, tool in enumerate(obj):
        function = tool.get("function") if isinstance(tool, dict) else None
        name = function.get("name") if isinstance(function, dict) else None
        if not isinstance(tool, dict) or not isinstance(function, dict) or not isinstance(name, str) or not name:
            _fail("tool-without-name", f'tool {i} lacks {{"type": "function", "function": {{"name": …}}}}')
        if name in seen:
            _fail("duplicate-tool", f"tool {i} is named '{name}' like a tool before it")
        seen.add(name)
        parameters = function.get("parameters")
        if not isinstance(parameters, dict | None):
            _fail("bad-tools", f"`parameters` of tool '{name}' is {_kind(parameters)}, not an object")
        if not isinstance((parameters or {}).get("properties"), dict | None):
            _fail("bad-tools", f"`properties` of tool '{name}' is {_kind((parameters or {})['properties'])}, no object")
        if tool.get("type") is None:
            note("missing-tool-type", f"tool '{name}' does not say that it is a function")
            tool = {"type": "function"} | {key: value for key, value in tool.items() if key != "type"}
        tools.append(tool)
    return tools


def unflattened(obj: Any, what: str, note: Note) -> Any:
    """Returns a flat tool or call, `{"name", …}`, with its fields in `function`, and anything else unchanged.

    `what` is "tool" or "call", for the reported repair; a call also has an id and, in a stream, an index.
    """
    if not isinstance(obj, dict) or not isinstance(obj.get("name"), str) or obj.get("function") is not None:
        return obj
    note(f"flat-{what}", f"{what} '{obj['name'][:100]}' is written without `function`")
    outer = {key: obj[key] for key in (("type", "id", "index") if what == "call" else ("type",)) if key in obj}
    inner = {key: value for key, value in obj.items() if key not in outer and key != "function"}
    return {**outer, "type": "function", "function": inner}


def _without_padding(
    conversation: tuple[Message, ...], declared: dict[str, Any], padded: bool, dropped: list[str]
) -> tuple[Message, ...]:
    """The turns whose calls have no null arguments but those that were meant."""
    calls = [call for message in conversation for call in message.tool_calls]
    padded = padded or any(nulls.has_padding(call.arguments, declared[call.name]) for call in calls)

    def clean(call: ToolCall) -> ToolCall:
        arguments = nulls.clean_arguments(call.arguments, declared[call.name], padded, dropped)
        return call if arguments is call.arguments else replace(call, arguments=arguments)

    return tuple(
        replace(message, tool_calls=tuple(map(clean, message.tool_calls))) if message.tool_calls else message
        for message in conversation
    )


def _parse_messages(
    obj: object, note: Note, declared: Collection[str] = (), assistant_first: bool = False
) -> tuple[Message, ...]:
    if not isinstance(obj, list | tuple) or not obj:
        _fail("no-conversation", f"a conversation is a non-empty list of turns, got {_kind(obj)}")
    turns = [with_call_list(i, turn, note) for i, turn in enumerate(obj)]
    messages = [_parse_message(i, message, note) for i, message in enumerate(join_calls(turns, note))]
    if declared:
        read = [_read_text_calls(i, message, declared, note) for i, message in enumerate(messages)]
        if read != messages:  # such turns may be parallel calls as well
            numbered = [
                _message_to_dict(message) | ({} if message.number is None else {TURN: message.number})
                for message in read
            ]
            joined = join_calls(numbered, note)
            messages = [_parse_message(i, message, note) for i, message in enumerate(joined)]
    _check_order(messages, ("user", "assistant") if assistant_first else ("user",))
    for i, message in enumerate(messages):
        if message.tool_calls:
            _link(messages, i, note)
    return tuple(messages)


def join_calls(turns: Sequence[Any], note: Note) -> list[Any]:
    """Joins assistant turns with calls that follow each other into one turn: parallel calls, written a turn each.

    `turns` are objects in OpenAI form that need not be checked yet. Raises `InvalidTrajectory` where their results do
    not show which call each of them answers.
    """
    joined: list[Any] = []
    starts: list[int] = []
    for i, turn in enumerate(turns):
        if joined and _calls_tools(joined[-1]) and _calls_tools(turn):
            joined[-1] = _joined(i, joined[-1], turn)
            starts.append(len(joined) - 1)
            number = turn_number(i, turn)
            note("parallel-calls-as-turns", f"turn {number} calls like the turn before it, and becomes part of that")
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
            _fail(
                "ambiguous-parallel-calls",
                f"turn {turn_number(at, joined[at])} and those after it call {len(calls)} tools in turns of their own, "
                f"and {len(results)} results follow without the ids of their calls: which call has none is not known",
            )
    return joined


def _calls_tools(turn: Any) -> bool:
    calls = turn.get("tool_calls") if isinstance(turn, dict) else None
    return bool(calls) and isinstance(calls, list | tuple) and turn.get("role") == "assistant"


def _joined(i: int, first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Two turns as one: calls behind each other, texts in paragraphs."""
    whole = second | first | {"tool_calls": [*first["tool_calls"], *second["tool_calls"]]}
    losses = [first.get("loss"), second.get("loss")]
    if (losses[0] is False) != (losses[1] is False):
        numbers = f"{turn_number(i - 1, first)} and {turn_number(i, second)}"
        _fail("bad-loss", f"turns {numbers} call tools in parallel, and have loss {losses[0]} and {losses[1]}")
    if losses != [None, None]:
        whole["loss"] = next(loss for loss in losses if loss is not None)
    for key in ("content", *REASONING_KEYS):
        texts = [turn[key] for turn in (first, second) if turn.get(key)]
        if len(texts) == 2 and not all(isinstance(text, str) for text in texts):
            parts = [[{"type": "text", "text": text}] if isinstance(text, str) else text for text in texts]
            if not all(isinstance(part, list) for part in parts):
                _fail("bad-content", f"turn {i} has {key} that is {_kind(second[key])}, not text")
            whole[key] = [*parts[0], *parts[1]]
        elif texts:
            whole[key] = "\n\n".join(texts) if len(texts) == 2 else texts[0]
    return whole


def _parse_message(i: int, obj: object, note: Note) -> Message:
    i = turn_number(i, obj)
    if not isinstance(obj, dict):
        _fail("bad-turn", f"turn {i} is {_kind(obj)}, not an object")
    role = obj.get("role")
    if role not in ROLES:
        hint = nearest(role[:100], ROLES) if isinstance(role, str) else ""
        _fail("unknown-role", f"turn {i} has role {role!r}, known roles: {', '.join(ROLES)}{hint}")
    where = f"turn {i}"
    reasoning: list[str] = []
    content = _content(role, obj.get("content"), f"{where} ({role})", note, reasoning)
    unknown = dict(obj)
    if role == "assistant":
        reasoning = [*_reasoning(unknown), *reasoning]
    calls = obj.get("tool_calls")
    if not isinstance(calls, list | tuple | None):
        _fail("bad-call", f"turn {i} has `tool_calls` that is {_kind(calls)}, not a list")
    if calls and role != "assistant":
        _fail("bad-role-order", f"turn {i} ({role}) has tool calls; only assistant turns call tools")
    if role == "assistant" and not calls and not content:
        _fail("empty-assistant-turn", f"turn {i} has neither text nor tool calls")
    loss = obj.get("loss")
    if not isinstance(loss, bool | None):
        _fail("bad-loss", f"turn {i} has loss {loss!r}, not true or false")
    _note_unknown(unknown, MESSAGE_KEYS, where, note)
    return Message(
        role=role,
        content=content,
        tool_calls=tuple(_parse_call(i, call, note) for call in calls or ()),
        tool_call_id=_optional_id(obj, "tool_call_id", where, note),
        name=_optional_text(obj, "name", where),
        loss=loss,
        reasoning="\n\n".join(dict.fromkeys(reasoning)),
        number=i if TURN in obj else None,
    )


def with_call_list(i: int, turn: Any, note: Note) -> Any:
    """A turn whose calls are a list in OpenAI form: they may be JSON in a text, one call without a list, or flat.

    What can't be read is left to the reader. Raises `InvalidTrajectory` for a text that is not valid JSON.
    """
    calls = turn.get("tool_calls") if isinstance(turn, dict) else None
    if not calls or not isinstance(calls, str | dict | list):
        return turn
    where = f"turn {turn_number(i, turn)}"
    if isinstance(calls, str):
        calls = parse_text(calls, "bad-call", f"`tool_calls` of {where}")
        note("string-calls", f"{where} has `tool_calls` that are JSON in a text")
    if isinstance(calls, dict):
        calls = [calls]
        note("call-without-list", f"{where} has one call, not in a list")
    if isinstance(calls, list):
        calls = [unflattened(call, "call", note) for call in calls]
    return turn | {"tool_calls": calls}


def _read_text_calls(i: int, message: Message, declared: Collection[str], note: Note) -> Message:
    """The turn with the calls of declared tools that its text holds as tool calls, and the text before as thought."""
    if message.role != "assistant" or message.tool_calls or not message.content:
        return message
    from xlam_jax.data import text_calls  # which needs this module

    i = turn_number(i, message)
    found = text_calls.read(message.content, declared, f"turn {i}")
    if found is None or found.problem:
        return message
    for reason, detail in found.repairs:
        note(reason, detail)
    names = ", ".join(dict.fromkeys(call.name for call in found.calls))
    note("call-in-text", f"turn {i} calls {names} in its text, {message.content[-80:]!r}")
    return replace(message, content=found.thought, tool_calls=found.calls)


def _reasoning(message: dict[str, Any]) -> Iterator[str]:
    """Takes the texts under the keys of `REASONING_KEYS` out of an assistant's message; other values stay there."""
    for key in REASONING_KEYS:
        value = message.get(key)
        texts = [value] if isinstance(value, str) else _texts(value)
        if texts is not None:
            del message[key]
            yield from filter(None, texts)


def _texts(parts: object) -> list[str] | None:
    """The texts of a list of parts, which may be texts; None for what is none."""
    if not isinstance(parts, list) or not parts:
        return None
    texts = [part if isinstance(part, str) else _part(part, "text", *_REASONING_PARTS) for part in parts]
    return None if None in texts else [text for text in texts if text is not None]


def _part(part: object, *kinds: str) -> str | None:
    """The text of a content part of these types, None for any other."""
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(part, dict) or kind not in kinds:
        return None
    text = next((part[key] for key in ("text", *REASONING_KEYS, "summary") if part.get(key) is not None), None)
    if isinstance(text, list) and kind != "text":
        text = "\n".join(texts) if (texts := _texts(text)) is not None else None
    return text if isinstance(text, str) else None


_REASONING_PARTS = ("thinking", "reasoning", "summary_text", "reasoning_text")


def _content(role: str, content: object, where: str, note: Note, reasoning: list[str]) -> str:
    """The text of a content; what an assistant's parts of reasoning say is appended to `reasoning`."""
    if isinstance(content, str):
        return content
    if content is None:
        note("null-content", f"{where} has no content")
        return ""
    if isinstance(content, list) and content:
        thoughts = [_part(part, *_REASONING_PARTS) if role == "assistant" else None for part in content]
        spoken = [part for part, thought in zip(content, thoughts, strict=True) if thought is None]
        texts = [text for part in spoken if (text := _part(part, "text")) is not None]
        if len(texts) == len(spoken):
            reasoning += filter(None, thoughts)
            if texts:
                note("text-parts", f"{where} has its text in {len(texts)} parts")
            return "\n".join(texts)
    if role != "tool":
        _fail("bad-content", f"{where} has content that is {_kind(content)}, not text")
    note("structured-content", f"{where} has content that is {_kind(content)}")
    return _encode(content)


def _parse_call(i: int, obj: object, note: Note) -> ToolCall:
    function = obj.get("function") if isinstance(obj, dict) else None
    if not isinstance(obj, dict) or not isinstance(function, dict) or not isinstance(function.get("name"), str):
        _fail("bad-call", f'turn {i} has a call without {{"function": {{"name": …, "arguments": {{…}}}}}}')
    where = f"turn {i} calls '{function['name']}' with"
    arguments = function.get("arguments")
    if arguments is None:
        note("missing-arguments", f"{where} no arguments")
        arguments = {}
    elif isinstance(arguments, str):
        note("string-arguments", f"{where} arguments in a text")
        arguments = decode_arguments(arguments, where, note)
    if not isinstance(arguments, dict):
        _fail("bad-arguments", f"{where} {_kind(arguments)}, not an object")
    _note_unknown(obj, CALL_KEYS, f"turn {i}, a call", note)
    _note_unknown(function, FUNCTION_KEYS, f"turn {i}, a call's function", note)
    return ToolCall(_optional_id(obj, "id", f"turn {i}", note), function["name"], arguments)


def _check_order(messages: Sequence[Message], first: Collection[str] = ("user",)) -> None:
    """Refuses turns that are out of place; `first` are the roles of the first turn after the system's."""
    previous = "system"
    calls_open = False  # whether tool results may follow
    for place, message in enumerate(messages):
        role, i = message.role, turn_number(place, message)
        if role == "system" and previous != "system":
            _fail("bad-role-order", f"turn {i} is a system turn after a {previous} turn; system turns come first")
        if previous == "system" and role not in ("system", *first):
            _fail("bad-role-order", f"turn {i} is by the {role}; the first turn after the system's is the user's")
        if role == "tool" and (previous not in ("assistant", "tool") or not calls_open):
            _fail("bad-role-order", f"turn {i} is a tool result after a {previous} turn without calls")
        calls_open = bool(message.tool_calls) or (calls_open and role == "tool")
        previous = role


def _link(messages: list[Message], i: int, note: Note) -> None:
    """Gives the tool results after turn `i`, and its calls, the ids that they lack, where no other way is possible.

    The results are put into the order of their calls.
    """
    calls = list(messages[i].tool_calls)
    caller = turn_number(i, messages[i])
    ids = [call.id for call in calls if call.id is not None]
    if len(set(ids)) < len(ids):
        _fail("duplicate-call-id", f"turn {caller} gives two calls one id: {', '.join(ids)}")
    end = next((j for j in range(i + 1, len(messages)) if messages[j].role != "tool"), len(messages))
    answered = answered_calls(calls, messages[i + 1 : end])
    if answered is None:
        known = set(ids)
        loose = [j for j in range(i + 1, end) if messages[j].tool_call_id not in known]
        j = next((j for j in loose if messages[j].tool_call_id is not None), loose[0])
        stray, number = messages[j].tool_call_id, turn_number(j, messages[j])
        if stray is None:
            _fail(
                "orphan-tool-result", f"turn {number} does not say which of the {len(calls)} calls before it it answers"
            )
        _fail(
            "orphan-tool-call-id",
            f"turn {number} answers call '{stray}', calls before it: {', '.join(ids) or 'none with an id'}",
        )
    for j, k in enumerate(answered, start=i + 1):
        call, result = calls[k], messages[j]
        number = turn_number(j, result)
        if call.id == result.tool_call_id:
            continue
        if call.id is None:
            note(
                "missing-call-id",
                f"turn {caller} calls '{call.name}' without an id, turn {number} has '{result.tool_call_id}'",
            )
            calls[k] = replace(call, id=result.tool_call_id)
        elif result.tool_call_id is None:
            note("missing-call-id", f"turn {number} does not say that it answers call '{call.id}'")
        else:
            note("mismatched-call-id", f"turn {number} answers '{result.tool_call_id}', the call is '{call.id}'")
        messages[j] = replace(result, tool_call_id=calls[k].id)
    messages[i] = replace(messages[i], tool_calls=tuple(calls))
    if answered != sorted(answered):  # formats without ids know a result's call by its place alone
        note("results-out-of-order", f"the results after turn {caller} come in another order than its calls")
        results = messages[i + 1 : end]
        messages[i + 1 : end] = [results[at] for at in sorted(range(len(results)), key=answered.__getitem__)]


def answered_calls(calls: Sequence[ToolCall], results: Sequence[Message]) -> list[int] | None:
    """For each tool result after a turn the index of the call it answers; None where that is in doubt.

    By ids; what these leave open by the order where there are as many results as calls, unless their names tell another
    order, or else by names that stand for one call each. Without any ids the order tells.
    """
    at = {call.id: k for k, call in enumerate(calls) if call.id is not None}
    by_id = {j: at[result.tool_call_id] for j, result in enumerate(results) if result.tool_call_id in at}
    taken = set(by_id.values())
    free = [k for k in range(len(calls)) if k not in taken]
    loose = [j for j in range(len(results)) if j not in by_id]
    found = pair_without_ids([calls[k] for k in free], [results[j] for j in loose]) if loose else []
    if found is None:
        if at or len(results) > len(calls) or any(result.tool_call_id is not None for result in results):
            return None
        found = range(len(results))
    others = {j: free[k] for j, k in zip(loose, found, strict=True)}
    return [by_id[j] if j in by_id else others[j] for j in range(len(results))]


def pair_without_ids(calls: Sequence[ToolCall], results: Sequence[Message]) -> list[int] | None:
    """The same without looking at the ids that calls and results share, and None also where only the order tells."""
    ids = [result.tool_call_id for result in results if result.tool_call_id is not None]
    names = [result.name for result in results]
    if len(calls) == 1 and len(results) > 1:  # they belong to it, or not all of them
        one = len({result.tool_call_id for result in results}) == 1
        return [0] * len(results) if one and set(names) <= {None, calls[0].name} else None
    if len(results) > len(calls) or len(set(ids)) < len(ids):
        return None
    if len(results) == len(calls) and all(name in (None, call.name) for call, name in zip(calls, names, strict=True)):
        return list(range(len(calls)))
    at = {call.name: k for k, call in enumerate(calls)}
    if len(at) < len(calls) or len(set(names)) < len(names):
        return None
    found = [at[name] for name in names if name is not None and name in at]
    return found if len(found) == len(results) else None


def _message_to_dict(message: Message) -> dict[str, Any]:
    row: dict[str, Any] = {"role": message.role}
    if message.tool_call_id is not None:
        row["tool_call_id"] = message.tool_call_id
    if message.name is not None:
        row["name"] = message.name
    if message.reasoning:
        row["reasoning"] = message.reasoning
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


def _score(value: object, note: Note) -> float | None:
    if value is None:
        return None
    score = math.nan
    if isinstance(value, int | float | str) and not isinstance(value, bool):
        with contextlib.suppress(ValueError, OverflowError):
            score = float(value)
    if not math.isfinite(score):
        _fail("bad-score", f"score is a finite number, got {value!r}")
    if isinstance(value, str):
        note("text-score", f"score is the text {value!r}")
    return score


def _optional_text(obj: dict[str, Any], key: str, where: str) -> str | None:
    value = obj.get(key)
    if not isinstance(value, str | None):
        _fail("bad-value", f"`{key}` of {where} is text, got {_kind(value)}")
    return value


def _optional_id(obj: dict[str, Any], key: str, where: str, note: Note) -> str | None:
    value = obj.get(key)
    if isinstance(value, int) and not isinstance(value, bool):
        note("number-as-id", f"`{key}` of {where} is the number {value}")
        return str(value)
    return _optional_text(obj, key, where)


def _note_unknown(obj: dict[str, Any], known: frozenset[str], where: str, note: Note) -> None:
    for key, value in obj.items():
        if key not in known and value is not None:
            note("unknown-key", f"`{key}` of {where} is left out")


def _kind(value: object) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"


def _no_note(reason: str, detail: str) -> None:
    pass


def _fail(reason: str, detail: str) -> NoReturn:
    raise InvalidTrajectory(reason, detail)
