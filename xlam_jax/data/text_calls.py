"""Finds tool calls in the text of assistant turns, in the spellings of the models that wrote them.

The text before the calls is the thought. Calls are read
- after a mark: `<tool_call>`, `[TOOL_CALLS]`, `<functioncall>`, `<|python_tag|>`, `<function=NAME>{…}`, `Action: NAME`
  with `Action Input: {…}`, and the marks of `_MARK`;
- without a mark, at the end of the text: a list or an object of calls, also in a code fence; xLAM's
  `{"thought", "tool_calls"}`; `[name(key="value"), …]`; and `name(key="value")` as the whole text.
Values are JSON or Python literals, which are never evaluated. All functions take time linear in the text.
"""

import re
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NamedTuple

from xlam_jax.data.embedded import closing, keyword_arguments, value_at
from xlam_jax.data.row_json import DEEPEST_TEXT, check_json, decode_arguments, parse_json
from xlam_jax.data.trajectory import InvalidTrajectory, Message, ToolCall, turn_number
from xlam_jax.errors import nearest

MOST_FAILURES = 8
"""Number of values that may fail to parse before the search for calls without a mark ends."""


class TextCalls(NamedTuple):
    """The calls in a text. A `problem` that is not empty explains why they are not valid calls of declared tools."""

    thought: str
    calls: tuple[ToolCall, ...]
    problem: str = ""
    repairs: tuple[tuple[str, str], ...] = ()
    """(reason, detail) of each repair within the calls."""
    style: str = ""
    """The mark before the first call, empty where there is none."""


class _Call(NamedTuple):
    """A call as written: its arguments may be missing, or be JSON in a text."""

    name: str
    arguments: Any = None
    id: Any = None


class _UnreadableError(ValueError):
    """Text after a mark, or text that looks like a call, cannot be read as a call."""

    style = ""


_NAME = r"[^\[\](){}\"'=,<>`\n]{1,128}"
_FENCE = r"```[\w-]{0,20}"
_THINKING = re.compile(r"\s*+<think>.*?</think>\s*+", re.DOTALL)
_TAGS = re.compile(r"<(?:\||｜)?(?:tool|function|python_tag|action_start)")
_KEYS = re.compile(r"[\"'](?:name|function)[\"']\s*+:")
_BRACKETS = re.compile(rf"\[(?:TOOL_CALLS|\s*+{_NAME}\()")
_FIRST = re.compile(rf"\s*+(?:{_FENCE}\s*+)?+{_NAME}\(")
_MARK = re.compile(
    r"<tool_calls?>|<function_?calls?>|<\|python_tag\|>|\[TOOL_CALLS\]|<\|tool_calls?\|>|<function=(?P<function>[^<>\s]{1,128})>"
    rf"|^Action:[ \t]*+(?P<action>{_NAME})\n[ \t]*+Action Input:"
    # calls after the marks below are not read, but reported
    r"|<｜tool▁calls?▁begin｜>|<\|tool_calls?(?:_section)?_begin\|>|<\|action_start\|>|✿FUNCTION✿:|<tool_use>",
    re.MULTILINE,
)
_CLOSERS = {
    "<tool_call>": "</tool_call>",
    "<tool_calls>": "</tool_calls>",
    "<functioncall>": "</functioncall>",
    "<functioncalls>": "</functioncalls>",
    "<function_call>": "</function_call>",
    "<function_calls>": "</function_calls>",
}
_END = r"<\|eom_id\|>|<\|eot_id\|>|<\|endoftext\|>|<\|im_end\|>|</s>"
_CLOSER = re.compile(rf"(?:\s|```|</tool_calls?>|</function(?:_?calls?)?>|{_END})*+")
_TAIL = re.compile(rf"\s*+(?:```\s*+)?+(?:(?:{_END})\s*+)*+\Z")
_OPENING_FENCE = re.compile(rf"{_FENCE}[ \t]*+\n?\s*+\Z")
_SEPARATOR = re.compile(r"\s*+[,;]?+\s*+")
_PAYLOAD = re.compile(rf"\s*+(?:{_FENCE}\s*+)?+(?=[\[{{])")
_FRONT = re.compile(rf"\s*+(?:{_FENCE}\s*+)?+")
_SPACE = re.compile(r"\s*+")
_MISTRAL = re.compile(r"([\w.-]{1,128})(?:\[CALL_ID\]([\w-]{1,64}))?+(?:\[ARGS\])?+\s*+(?=\{)")
_GLAIVE = re.compile(r"""\{\s*+"name"\s*+:\s*+"([^"\n]{1,128})"\s*+,\s*+"arguments"\s*+:\s*+'""")
_GLAIVE_END = re.compile(r"'\s*+\}\s*+\Z")
_REGION_END = re.compile(rf"</?function_?calls?>|</?tool_calls?>|{_END}")
_JSON_START = re.compile(
    r"""(?:\[\s*+)?+\{\s*+["'](?:name|id|type|function|tool_calls|thought|tool_call|function_call|arguments|parameters)["']"""
    r"\s*+:"
)
_NAMED = re.compile(
    r"""["'](?:name|function)["']\s*+:\s*+["']([^"'\n]{1,128})["']\s*+,\s*+["'](?:arguments|parameters|args)["']\s*+:"""
)
_BRACKET_CALL = re.compile(rf"\[\s*+({_NAME})\(")
_CALL = re.compile(rf"\s*+({_NAME})(?=\()")
_FIRST_ARGUMENT = re.compile(r"\(\s*+(?:\)|[\"']|[^\W\d][\w.-]{0,127}\s*+=(?!=))")
_ARGUMENTS = ("arguments", "parameters", "args")
_CALL_KEYS = frozenset({"name", "function", "id", "type", "index", *_ARGUMENTS})


def find_calls(text: str, declared: Collection[str], where: str) -> TextCalls | None:
    """Returns the calls in a text, None where it has no calls and nothing that is clearly meant as a call.

    `declared` are the names of the tools that may be called; `where` names the turn in details. Text that is meant as a
    call but cannot be read gives a `TextCalls` with a `problem`.
    """
    if not _may_hold_calls(text):
        return None
    thinking = _THINKING.match(text)
    if thinking:  # reasoning may consider calls without making them
        calls = find_calls(text[thinking.end() :], declared, where)
        return calls and calls._replace(thought=(thinking[0] + calls.thought).rstrip())
    written = None
    try:
        written = _read_marked(text, declared) or _read_unmarked(text, declared)
        return None if written is None else _check(written, declared, where)
    except _UnreadableError as error:
        return TextCalls(text, (), str(error), style=written.mark if written else error.style)


def unread_calls(messages: Sequence[Message], declared: Collection[str]) -> Iterator[str]:
    """Yields a description of each assistant turn whose text is meant as a tool call but was not read as one."""
    for i, message in enumerate(messages):
        if message.role != "assistant":
            continue
        where = f"turn {turn_number(i, message)}"
        written = find_calls(message.content, declared, where)
        if written is not None:
            problem = written.problem or f"calls '{written.calls[0].name}', and the turn has tool calls as well"
            yield f"the text of {where} {problem}"


def _may_hold_calls(text: str) -> bool:
    """A fast test, true for every text with calls and for few others: it runs on all training data."""
    return bool(
        ("<" in text and _TAGS.search(text))
        or ("[" in text and _BRACKETS.search(text))
        or ("{" in text and _KEYS.search(text))
        or "Action Input:" in text
        or "✿FUNCTION" in text
        or _FIRST.match(text)
    )


class _Written(NamedTuple):
    """Calls as written, the text before them (`thought`) and between or after them, and the mark of the first."""

    thought: str
    calls: list[_Call]
    trailing: str = ""
    mark: str = ""


def _check(written: _Written, declared: Collection[str], where: str) -> TextCalls:
    """Decodes the arguments and checks the names. Raises `_UnreadableError` for arguments that are not an object."""
    repairs: list[tuple[str, str]] = []
    if written.trailing:
        repairs.append(("trailing-text-after-json", f"{where} has text after its calls: {written.trailing[:80]!r}"))
    calls: list[ToolCall] = []
    for call in written.calls:
        arguments = call.arguments
        calls_with = f"{where} calls '{call.name}' with"
        try:
            if arguments is None:
                arguments = {}
            elif isinstance(arguments, str):
                arguments = decode_arguments(arguments, calls_with, lambda *repair: repairs.append(repair))
            check_json(arguments, DEEPEST_TEXT)
        except InvalidTrajectory as invalid:
            raise _UnreadableError(invalid.detail.removeprefix(f"{where} ")) from None
        if not isinstance(arguments, dict):
            raise _UnreadableError(f"calls '{call.name}' with a {type(arguments).__name__}, not an object")
        identity = str(call.id) if isinstance(call.id, str | int) else None
        calls.append(ToolCall(identity, call.name, arguments))
    unknown = next((call.name for call in calls if call.name not in declared), None)
    problem = ""
    if unknown is not None:
        names = ", ".join(declared) or "none"
        problem = f"calls '{unknown}', declared tools: {names}{nearest(unknown[:100], declared)}"
    return TextCalls(written.thought, tuple(calls), problem, tuple(repairs), written.mark)


# Calls after a mark


def _read_marked(text: str, declared: Collection[str]) -> _Written | None:
    last = {mark: text.rfind(closer) for mark, closer in _CLOSERS.items()}

    def attempt(at: int) -> re.Match[str] | None:
        """The next mark before a call: prose may mention marks as well."""
        return next((mark for mark in _MARK.finditer(text, at) if _is_attempt(text, mark, declared, last)), None)

    first = attempt(0)
    if first is None:
        return None
    try:
        calls, trailing = _calls_after(text, first, attempt)
    except _UnreadableError as error:
        error.style = first[0]
        raise
    return _Written(_thought(text[: first.start()], first), calls, trailing, first[0])


def _calls_after(
    text: str, first: re.Match[str], attempt: Callable[[int], re.Match[str] | None]
) -> tuple[list[_Call], str]:
    """The calls after the first mark and later ones, and the prose between and after them."""
    calls: list[_Call] = []
    prose: list[str] = []
    mark: re.Match[str] | None = first
    while mark is not None:
        marked_calls, end = _payload(text, mark)
        calls += marked_calls
        after = _CLOSER.match(text, end)
        closes, end = (after[0], after.end()) if after else ("", end)
        closer = _CLOSERS.get(mark[0])
        if closer and end < len(text) and closer not in closes:
            raise _UnreadableError(f"opens {mark[0]} and does not close it")
        mark = attempt(end)
        rest = text[end : mark.start() if mark else len(text)].strip()
        if "tool_response>" in rest or rest.startswith("Observation:"):
            raise _UnreadableError(f"has a result after its call in the same turn: {rest[:80]!r}")
        if rest:
            prose.append(rest)
    return calls, "\n".join(prose)


def _thought(before: str, mark: re.Match[str]) -> str:
    before = _OPENING_FENCE.sub("", before.rstrip())
    return (before.strip().removeprefix("Thought:").strip()) if mark["action"] else before.rstrip()


def _is_attempt(text: str, mark: re.Match[str], declared: Collection[str], last: dict[str, int]) -> bool:
    """Whether the text after a mark is a call or an attempt at one, rather than prose about the mark."""
    if mark["action"]:
        return mark["action"].strip() in declared
    if mark["function"] or _PAYLOAD.match(text, mark.end()):
        return True
    if mark[0] == "[TOOL_CALLS]" and mark.end() < len(text):
        return bool(_MISTRAL.match(text, mark.end()))
    if _before(text, mark.start()) not in ("", ">", "]"):  # within a line
        return bool(_MARK.match(text, mark.end()))
    closer = _CLOSERS.get(mark[0])
    if closer is None or mark.end() == len(text):
        return True
    return last[mark[0]] > mark.end() and not text.startswith(closer, _end(_SPACE, text, mark.end()))


def _before(text: str, at: int) -> str:
    """The last character before `at` on the same line that is not white space, or ""."""
    return text[max(0, at - 40) : at].rpartition("\n")[2].rstrip()[-1:]


def _payload(text: str, mark: re.Match[str]) -> tuple[list[_Call], int]:
    """The calls after a mark, and where they end."""
    at = _end(_FRONT, text, mark.end())
    while (inner := _MARK.match(text, at)) is not None:  # <tool_call><function=name>
        mark, at = inner, _end(_FRONT, text, inner.end())
    try:
        if name := mark["function"] or mark["action"]:
            arguments, end = value_at(text, at) if text[at : at + 1] == "{" else _no_arguments(text, at)
            return [_Call(name.strip(), arguments)], end
        if mark[0] == "[TOOL_CALLS]" and (named := _MISTRAL.match(text, at)):
            arguments, end = value_at(text, named.end())
            return [_Call(named[1], arguments, named[2])], end
        if mark[0] == "<|python_tag|>" and (call := _CALL.match(text, at)):
            arguments, end = keyword_arguments(text, call.end())
            return [_Call(call[1].strip().removesuffix(".call"), arguments)], end
        return _values(text, at)
    except ValueError as error:
        closer = _CLOSERS.get(mark[0])
        if closer and text.find(closer, at) < 0:
            raise _UnreadableError(f"opens {mark[0]} and does not close it") from None
        raise _UnreadableError(
            f"has text after {mark[0].strip()[:40]} that cannot be read as a call: {error}"
        ) from None


def _no_arguments(text: str, at: int) -> tuple[None, int]:
    if text.startswith("</function>", at):
        return None, at
    raise ValueError("no JSON object follows")


def _values(text: str, at: int) -> tuple[list[_Call], int]:
    """The calls of consecutive lists and objects, and where they end."""
    calls: list[_Call] = []
    end, limit = at, -1
    while text[at : at + 1] in ("[", "{"):
        if _BRACKET_CALL.match(text, at):
            next_calls, end = _python_calls(text, at)
        elif opening := _GLAIVE.match(text, at):
            if limit < at:
                closes = _REGION_END.search(text, at)
                limit = closes.start() if closes else len(text)
            call, end = _glaive(text, opening, limit)
            next_calls = [call]
        else:
            value, end = value_at(text, at)
            next_calls = _calls_of_value(value, marked=True)
            if next_calls is None:
                raise ValueError('a call is {"name": …, "arguments": {…}}')
        calls += next_calls
        at = _end(_SEPARATOR, text, end)
    if not calls:
        raise ValueError("no JSON follows")
    return calls, end


def _glaive(text: str, opening: re.Match[str], limit: int) -> tuple[_Call, int]:
    """`{"name": "f", "arguments": '{"a": 1}'}`, as glaive writes it: apostrophes in the quoted JSON are not escaped."""
    try:
        end = closing(text, opening.start(), limit)
        return _Call(opening[1], _quoted_json(text[opening.end() : end])), end
    except ValueError:  # with an apostrophe: all text up to the next mark is one call
        return _Call(opening[1], _quoted_json(text[opening.end() : limit])), limit


def _quoted_json(text: str) -> Any:
    """The JSON before the `'}` at the end of the text."""
    ending = _GLAIVE_END.search(text, max(0, len(text) - 200))
    if ending is None:
        raise ValueError("a quote is not closed")
    return parse_json(text[: ending.start()].replace("\\'", "'"))


# Calls without a mark


def _read_unmarked(text: str, declared: Collection[str]) -> _Written | None:
    if not declared:
        return None
    return _json_calls(text, declared) or _bracket_calls(text, declared) or _bare_calls(text, declared)


def _json_calls(text: str, declared: Collection[str]) -> _Written | None:
    """Lists and objects of calls at the end of the text."""
    calls: list[_Call] = []
    thought = ""
    begin = end = at = failures = 0
    apart = False
    while failures < MOST_FAILURES and (start := _JSON_START.search(text, at)) is not None:
        try:
            value, stop = value_at(text, start.start())
        except ValueError as error:
            named = _NAMED.search(text, start.start(), start.start() + 2000)
            if named and named[1] in declared:
                raise _UnreadableError(f"names '{named[1]}' in text that cannot be read as a call: {error}") from None
            failures, at = failures + 1, start.start() + 1
            continue
        at = stop
        next_calls = _calls_of_value(value, marked=False)
        if next_calls is None:
            continue
        apart |= bool(calls) and _end(_SEPARATOR, text, end) != start.start()
        if not calls:
            begin = start.start()
            thought = _thought_of_value(value)
        calls += next_calls
        end = stop
    if failures == MOST_FAILURES:
        named = next((named for named in _NAMED.finditer(text, at) if named[1] in declared), None)
        if named:
            raise _UnreadableError(f"names '{named[1]}' in text that cannot be read as a call")
    if not calls:
        return None
    before = _OPENING_FENCE.sub("", text[:begin]).rstrip()
    if apart or not _TAIL.match(text, end) or before.endswith(("=", "(", ",", "[")):
        if not any(call.name in declared for call in calls):
            return None  # an example
        names = ", ".join(dict.fromkeys(call.name for call in calls))
        raise _UnreadableError(f"shows calls ({names}) within text: {text[begin : begin + 80]!r}")
    return _Written("\n".join(part for part in (before, thought) if part), calls)


def _thought_of_value(value: object) -> str:
    """The thought in xLAM's object of a thought and calls."""
    texts = [value.get(key) for key in ("thought", "content")] if isinstance(value, dict) else []
    return "\n".join(text for text in texts if isinstance(text, str) and text)


def _calls_of_value(value: object, marked: bool) -> list[_Call] | None:
    """The calls in a JSON value, None for any other value. After a mark, a name without arguments is a call too."""
    if isinstance(value, list):
        calls_of_items = [_calls_of_value(item, marked) for item in value if isinstance(item, dict)]
        if not value or len(calls_of_items) < len(value):
            return None
        return [call for calls in calls_of_items for call in calls or ()] if all(calls_of_items) else None
    if not isinstance(value, dict):
        return None
    if isinstance(calls := value.get("tool_calls"), list) and value.keys() <= {"tool_calls", "thought", "content"}:
        return _calls_of_value(calls, marked)
    for key in ("tool_call", "function_call"):
        if isinstance(value.get(key), dict) and len(value) == 1:
            return _calls_of_value(value[key], marked)
    if not value.keys() <= _CALL_KEYS:
        return None
    function = value.get("function")
    if isinstance(function, dict):
        inner = _calls_of_value(function, marked)
        return inner and [inner[0]._replace(id=value.get("id"))]
    name = value.get("name", function)
    keys = [key for key in _ARGUMENTS if key in value]
    if not isinstance(name, str) or not name or len(keys) > 1 or not (keys or marked):
        return None
    arguments = value[keys[0]] if keys else None
    if keys == ["parameters"] and _is_schema(arguments):
        return None  # the schema of a tool, not a call
    return [_Call(name.removeprefix("functions."), arguments, value.get("id"))]


def _is_schema(value: object) -> bool:
    return isinstance(value, dict) and isinstance(value.get("properties"), dict) and "type" in value


def _bracket_calls(text: str, declared: Collection[str]) -> _Written | None:
    """`[name(key="value"), …]` at the end of the text."""
    at, first = 0, _end(_SPACE, text, 0)
    while (start := _BRACKET_CALL.search(text, at)) is not None:
        name, at = start[1].strip(), start.end()
        whole = start.start() == first
        if not _FIRST_ARGUMENT.match(text, start.end() - 1) or not (name in declared or whole):
            continue
        if _before(text, start.start()) not in ("", ":", ".", "!", "?", ">", "`"):  # code
            continue
        try:
            calls, end = _python_calls(text, start.start())
        except ValueError as error:
            if name not in declared or _is_link(text, start.start()):
                continue
            raise _UnreadableError(f"names '{name}' in text that cannot be read as a call: {error}") from None
        at = end
        if text.startswith("(", end):  # a link in Markdown
            continue
        last = _TAIL.match(text, end)
        if last:
            return _Written(_OPENING_FENCE.sub("", text[: start.start()]).rstrip(), calls)
        if name in declared:
            raise _UnreadableError(f"shows calls ({name}) within text: {text[start.start() : start.start() + 80]!r}")
    return None


def _is_link(text: str, at: int) -> bool:
    """Whether the bracket begins a Markdown link, `[text](address)`."""
    closes = text.find("](", at, at + 300)
    return closes >= 0 and "\n" not in text[at:closes]


def _bare_calls(text: str, declared: Collection[str]) -> _Written | None:
    """One or more `name(key="value")` that are the whole text."""
    calls: list[_Call] = []
    end = _end(_FRONT, text, 0)
    while (start := _CALL.match(text, end)) is not None:
        name = start[1].strip()
        if name not in declared or not _FIRST_ARGUMENT.match(text, start.end()):
            return None
        try:
            arguments, end = keyword_arguments(text, start.end())
        except ValueError as error:
            if not text.rstrip("` \n").endswith(")"):
                return None  # prose
            raise _UnreadableError(f"names '{name}' in text that cannot be read as a call: {error}") from None
        calls.append(_Call(name, arguments))
        end = _end(_SEPARATOR, text, end)
    return _Written("", calls) if calls and _TAIL.match(text, end) else None


def _python_calls(text: str, at: int) -> tuple[list[_Call], int]:
    """The calls of `[name(key="value"), …]`, and where the list ends."""
    calls: list[_Call] = []
    at += 1
    while (call := _CALL.match(text, at)) is not None:
        arguments, end = keyword_arguments(text, call.end())
        calls.append(_Call(call[1].strip(), arguments))
        at = _end(_SPACE, text, end)
        if text[at : at + 1] == "]":
            return calls, at + 1
        if text[at : at + 1] != ",":
            break
        at += 1
    raise ValueError("a list of calls is [name(key=value), …]")


def _end(pattern: re.Pattern[str], text: str, at: int) -> int:
    """Where the match of a pattern at `at` ends; the pattern also matches the empty text."""
    match = pattern.match(text, at)
    return match.end() if match else at
