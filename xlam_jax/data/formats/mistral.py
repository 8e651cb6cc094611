"""Mistral's own formats, as the encoders of mistral-common write them; `mistral_v1.jinja` and `mistral_v3.jinja` agree.

v1 (Mistral 7B v0.1 and v0.2, Mixtral 8x7B) has no tools, and its tags are plain text. v3 (Mistral 7B v0.3) has control
tokens, and writes tools and system text in front of the last user turn of a request.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

from xlam_jax.data.codec import TOOL_CALLS, Codec, Segment, to_json
from xlam_jax.data.control import NO_MARKS
from xlam_jax.data.formats import (
    PLAIN,
    Layout,
    Variant,
    not_representable,
    read_template,
    refuse_reasoning,
    without_loss,
    written_calls,
)
from xlam_jax.data.trajectory import Message, ToolCall, Trajectory, system_text
from xlam_jax.data.wire import ARRAY

ID_LENGTH = 9
_ASCII_ALNUM = frozenset("0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz")

Turns = list[tuple[int, Message]]


class MistralV1:
    """Chats without tools: `<s>[INST] system\\n\\nuser [/INST] answer</s>[INST] …`."""

    instructions = 0
    sections = 0
    marks = NO_MARKS
    wire = ARRAY

    def __init__(self, codec: Codec):
        self._codec = codec
        self.template = read_template("mistral_v1")

    @staticmethod
    def fits(codec: Codec) -> bool:
        """True: the format works with any tokenizer."""
        return True

    def layouts(self, trajectory: Trajectory, variant: Variant = PLAIN) -> Iterator[Layout]:
        """Yields the only layout. Raises `InvalidTrajectory` for tools, calls, tool results and reasoning."""
        refuse_reasoning(trajectory.conversation, "Mistral's v1 format")
        system = system_text(trajectory.task_instruction, trajectory.conversation)
        yield Layout(trajectory, self.prompt(system, trajectory.tools, trajectory.conversation))

    def prompt(self, system: str, tools: list[dict[str, Any]], messages: Sequence[Message]) -> list[Segment]:
        """Returns the text of the turns; the answer directly follows the last one."""
        if tools or any(message.role == "tool" or message.tool_calls for message in messages):
            raise not_representable("Mistral's v1 format has no tools; use the format xlam with this tokenizer")
        segments = [Segment(self._codec.bos, "prompt", -1, control=True)]
        front = system + "\n\n" if system else ""
        for role, turns in _by_role(messages):
            if role == "user":
                segments.append(Segment("[INST] " + front, "prompt", -1 if front else turns[0][0]))
                segments += [Segment(text, "prompt", turn) for turn, text in _joined(turns)]
                segments.append(Segment(" [/INST]", "prompt", turns[-1][0]))
                front = ""
            elif role == "assistant":
                segments.append(Segment(" ", "answer", turns[0][0]))
                segments += [Segment(text, "answer", turn) for turn, text in _joined(turns)]
                segments.append(Segment(self._codec.eos, "eos", turns[-1][0], control=True))
        return segments


class MistralV3:
    """`<s>[INST]user[/INST]answer</s>[AVAILABLE_TOOLS]…[/AVAILABLE_TOOLS][INST]system\\n\\nuser[/INST]…`.

    A call that has an id is written with it, `{"name", "arguments", "id"}`, and a result with the id of its call.
    Mistral's ids are nine letters and digits; other ids become the last nine of their letters and digits, padded with
    zeros in front.
    """

    instructions = 0
    sections = 0
    marks = NO_MARKS
    wire = ARRAY

    def __init__(self, codec: Codec):
        self._codec = codec
        self.template = read_template("mistral_v3")

    @staticmethod
    def fits(codec: Codec) -> bool:
        """Whether the tokenizer has Mistral's control tokens."""
        return codec.control_tokens

    def layouts(self, trajectory: Trajectory, variant: Variant = PLAIN) -> Iterator[Layout]:
        """Yields a layout per answered user turn, because tools and system text move there; one layout without those.

        Raises `InvalidTrajectory` for turns with text and calls, for reasoning, and for results without the id of their
        call.
        """
        refuse_reasoning(trajectory.conversation, "Mistral's v3 format")
        system = system_text(trajectory.task_instruction, trajectory.conversation)
        turns = trajectory.conversation
        trained = [i for i, turn in enumerate(turns) if turn.role == "assistant" and turn.loss is not False]
        if not system and not trajectory.tools:
            yield Layout(trajectory, self.prompt(system, [], turns))
            return
        start = 0
        for end in [*_exchanges(turns), len(turns)]:
            if any(start <= i < end for i in trained):
                part = replace(trajectory, conversation=without_loss(turns[:end], before=start))
                yield Layout(part, self.prompt(system, trajectory.tools, part.conversation))
            start = end

    def prompt(self, system: str, tools: list[dict[str, Any]], messages: Sequence[Message]) -> list[Segment]:
        """Returns the text of the turns; the answer directly follows the last one."""
        segments: list[Segment] = []

        def control(token: str, turn: int) -> None:
            segments.append(Segment(token, "prompt", turn, control=True))

        control(self._codec.bos, -1)
        groups = list(_by_role(messages))
        last_user = max((at for at, (role, _) in enumerate(groups) if role == "user"), default=-1)
        for at, (role, turns) in enumerate(groups):
            first, last = turns[0][0], turns[-1][0]
            if role == "user":
                front = system + "\n\n" if system and at == last_user else ""
                if tools and at == last_user:
                    control("[AVAILABLE_TOOLS]", -1)
                    segments.append(Segment(to_json([_tool(tool) for tool in tools]), "prompt", -1))
                    control("[/AVAILABLE_TOOLS]", -1)
                control("[INST]", -1 if front else first)
                segments.append(Segment(front, "prompt", -1))
                segments += [Segment(text, "prompt", turn) for turn, text in _joined(turns)]
                control("[/INST]", last)
            elif role == "tool":
                for turn, message in turns:
                    control("[TOOL_RESULTS]", turn)
                    segments.append(Segment(_result(turn, message), "prompt", turn))
                    control("[/TOOL_RESULTS]", turn)
            elif role == "assistant":
                segments += _answer(turns)
                segments.append(Segment(self._codec.eos, "eos", last, control=True))
        return [segment for segment in segments if segment.text]


def _exchanges(turns: Sequence[Message]) -> list[int]:
    """The indices of the user turns that follow a turn of another role, without the first one."""
    starts = [i for i, turn in enumerate(turns) if turn.role == "user" and (i == 0 or turns[i - 1].role != "user")]
    return starts[1:]


def _by_role(messages: Sequence[Message]) -> Iterator[tuple[str, Turns]]:
    """Groups consecutive turns of one role, with their indices."""
    for role, turns in groupby(enumerate(messages), key=lambda turn: turn[1].role):
        yield role, list(turns)


def _joined(turns: Turns) -> Iterator[tuple[int, str]]:
    """Yields (turn, text) of the turns with text; all texts but the first start with the separator."""
    between = ""
    for turn, message in turns:
        if message.content:
            yield turn, between + message.content
            between = "\n\n"


def _answer(turns: Turns) -> Iterator[Segment]:
    texts = list(_joined(turns))
    calling = [(turn, message) for turn, message in turns if message.tool_calls]
    if not calling:
        for at, (turn, text) in enumerate(texts, start=1):
            yield Segment(text.rstrip(" ") if at == len(texts) else text, "answer", turn)
        return
    turn, message = calling[0]
    if texts or len(turns) > 1:
        raise not_representable(
            f"turn {turn} has text and tool calls, which Mistral's v3 format cannot write together; use the format xlam"
            if message.content
            else f"turns {turns[0][0]} and {turns[1][0]} are both by the assistant, which Mistral's v3 format cannot "
            "write where one of them calls tools; use the format xlam"
        )
    calls = (
        ToolCall(_id(call.id) if call.id and call.id != "null" else None, call.name, call.arguments)
        for call in message.tool_calls
    )
    yield Segment(TOOL_CALLS, "tool_call", turn, control=True)
    yield from written_calls(calls, turn, ids=True)


def _tool(tool: dict[str, Any]) -> dict[str, Any]:
    function = tool["function"]
    description, parameters = function.get("description"), function.get("parameters")
    return {
        "type": "function",
        "function": {
            "name": function["name"],
            "description": "" if description is None else description,
            "parameters": {} if parameters is None else parameters,
        },
    }


def _result(turn: int, message: Message) -> str:
    if not message.tool_call_id:
        raise not_representable(
            f"turn {turn} is a tool result without `tool_call_id`, which Mistral's v3 format needs; use the format xlam"
        )
    identity = _id(message.tool_call_id)
    try:
        written = to_json({"content": json.loads(message.content or "{}"), "call_id": identity})
        written.encode()  # fails for an escape of half a character
    except (ValueError, RecursionError):  # text, or JSON that is nested too deeply or has a too long number
        return to_json({"content": message.content, "call_id": identity})
    return written


def _id(call_id: str) -> str:
    kept = "".join(character for character in call_id if character in _ASCII_ALNUM)
    return kept[-ID_LENGTH:].rjust(ID_LENGTH, "0")
