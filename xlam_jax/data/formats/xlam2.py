"""xLAM-2's format, in the variants of its Qwen and Llama models; `xlam_jax/data/templates/xlam2.jinja` agrees.

    <|im_start|>system\\n{system}\\n{tool}\\n\\n{tool}\\n\\n<|im_end|>\\n<|im_start|>user\\n{text}<|im_end|>\\n
    <|im_start|>assistant\\n[{"name": …, "arguments": {…}}, …]<|im_end|>\\n<|im_start|>tool\\n{result}<|im_end|>\\n

in one line. The token ids equal those of the published templates (`tool_chat_template_xlam_qwen.jinja` and
`tool_chat_template_xlam_llama.jinja` of vLLM), which omit the text next to tool calls. Here that thought is written
before the calls, on lines of its own, and no content spells a control token (`control.Marks`).
"""

import json
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from xlam_jax.data.codec import Codec, Kind, Segment
from xlam_jax.data.control import Marks, control_marks
from xlam_jax.data.formats import PLAIN, Layout, Variant, not_representable, read_template, written_calls
from xlam_jax.data.trajectory import Message, Trajectory, system_text, turn_number
from xlam_jax.data.wire import ARRAY, parse_completion
from xlam_jax.errors import UserError

# The wording of both texts is that of the published templates, because the released models were trained with it.
DEFAULT_SYSTEM = "You are a helpful assistant. You are developed by Salesforce xLAM team."
FORMAT_INSTRUCTION = (
    "You have access to a set of tools. When using tools, make calls in a single JSON array: \n\n"
    '[{"name": "tool_call_name", "arguments": {"arg1": "value1", "arg2": "value2"}}, '
    "... (additional parallel tool calls as needed)]\n\n"
    "If no tool is suitable, state that explicitly. If the user's input lacks required parameters, ask for "
    "clarification. Do not interpret or respond until tool results are returned. Once they are available, process them "
    "or make additional calls if needed. For tasks that don't require tools, such as casual conversation or general "
    "advice, respond directly in plain text. The available tools are:"
)

_indented = json.JSONEncoder(ensure_ascii=False, indent=4)


class _Tags(NamedTuple):
    """What is written around the turns of a variant; "" for a tag that it does not have."""

    before_role: str
    after_role: str
    role_gap: str
    """Text between the tags of a role and its content."""
    end: str
    end_gap: str
    """Text after the end of a turn."""
    result_role: str


_QWEN = _Tags("<|im_start|>", "", "\n", "<|im_end|>", "\n", "tool")
_LLAMA = _Tags("<|start_header_id|>", "<|end_header_id|>", "\n\n", "<|eot_id|>", "", "ipython")


class Xlam2:
    """Writes every turn once and never rewrites it, so that one sequence trains a whole conversation.

    As in the published templates, white space around the text of system, user and assistant turns is removed, and the
    format instruction is written only without a system message. Raises `UserError` for a tokenizer that does not have
    the control tokens of exactly one variant, and whose end-of-sequence token does not decide between two.
    """

    instructions = 0
    sections = 0
    wire = ARRAY

    def __init__(self, codec: Codec):
        variants = _variants(codec)
        if len(variants) != 1:
            raise UserError(
                f"the format xlam2 needs a tokenizer with the control tokens {_needed(_QWEN)} (Qwen) or "
                f"{_needed(_LLAMA)} (Llama), and "
                + (
                    f"this one has both; set its eos_token, now {codec.eos}, to {_QWEN.end} or {_LLAMA.end}"
                    if variants
                    else "this one has neither; use the tokenizer of such a model, or the format xlam or native"
                )
            )
        self._tags = variants[0]
        self.marks = control_marks(codec)
        self._bos = codec.bos if self._tags == _LLAMA else ""
        self.template = read_template("xlam2", self.marks, llama=self._tags == _LLAMA)

    @staticmethod
    def fits(codec: Codec) -> bool:
        """Whether the tokenizer's control tokens determine a variant."""
        return len(_variants(codec)) == 1

    def layouts(self, trajectory: Trajectory, variant: Variant = PLAIN) -> Iterator[Layout]:
        """Yields the only layout.

        Raises `InvalidTrajectory` for a trained turn that a server would not parse as the same text and calls.
        """
        turns = trajectory.conversation
        for turn, message in enumerate(turns):
            if message.role == "assistant" and message.loss is not False:
                _check(turn, message, self.marks)
        system = system_text(trajectory.task_instruction, turns)
        yield Layout(trajectory, self._segments(system, trajectory.tools, turns))

    def prompt(self, system: str, tools: list[dict[str, Any]], messages: Sequence[Message]) -> list[Segment]:
        """Returns the text of the turns, and the header of the answer."""
        return self._segments(system, tools, messages, prompt=True)

    def _segments(
        self, system: str, tools: list[dict[str, Any]], messages: Sequence[Message], prompt: bool = False
    ) -> list[Segment]:
        tags, marks = self._tags, self.marks
        segments: list[Segment] = []

        def add(text: str, turn: int, kind: Kind = "prompt", control: bool = False) -> None:
            if text:
                segments.append(Segment(text, kind, turn, control))

        def open_turn(role: str, turn: int) -> None:
            add(tags.before_role, turn, control=True)
            add(role, turn)
            add(tags.after_role, turn, control=True)
            add(tags.role_gap, turn)

        def close_turn(turn: int, kind: Kind = "prompt") -> None:
            add(tags.end, turn, kind, control=True)
            add(tags.end_gap, turn)

        add(self._bos, -1, control=True)
        open_turn("system", -1)
        if system or any(message.role == "system" for message in messages):
            add(marks.in_text(system.strip()) + "\n", -1)
        else:
            add(DEFAULT_SYSTEM + "\n" + (FORMAT_INSTRUCTION + "\n\n" if tools else ""), -1)
        add("".join(marks.in_json(_indented.encode(tool)) + "\n\n" for tool in tools), -1)
        close_turn(-1)
        for turn, message in enumerate(messages):
            if message.role == "system":
                continue
            open_turn(tags.result_role if message.role == "tool" else message.role, turn)
            if message.role == "assistant":
                for segment in _answer(turn, message, marks):
                    add(segment.text, turn, segment.kind)
                close_turn(turn, "eos")
            else:
                add(marks.in_text(message.content if message.role == "tool" else message.content.strip()), turn)
                close_turn(turn)
        if prompt:
            open_turn("assistant", len(messages))
        return segments


def _variants(codec: Codec) -> list[_Tags]:
    """The variants whose control tokens a tokenizer has; of two, the one whose end ends its sequences."""
    variants = [tags for tags in (_QWEN, _LLAMA) if all(token in codec.special for token in _tokens(tags))]
    return [each for each in variants if each.end == codec.eos] or variants


def _tokens(tags: _Tags) -> list[str]:
    return [token for token in (tags.before_role, tags.after_role, tags.end) if token]


def _needed(tags: _Tags) -> str:
    return " and ".join(_tokens(tags))


def _answer(turn: int, message: Message, marks: Marks) -> Iterator[Segment]:
    """Yields what the model writes in a turn, without its end."""
    text = marks.in_text(message.content.strip())
    if text:
        yield Segment(text, "thought" if message.tool_calls else "answer", turn)
    if message.tool_calls:
        yield from written_calls(message.tool_calls, turn, front="\n" if text else "", marks=marks)


def _check(turn: int, message: Message, marks: Marks) -> None:
    """Raises `InvalidTrajectory` unless the parser returns the text and the calls of a turn."""
    content, calls = parse_completion("".join(segment.text for segment in _answer(turn, message, marks)))
    expected = [(call.name, call.arguments) for call in message.tool_calls]
    same_text = content == marks.in_text(message.content.strip())
    if same_text and [(call.name, call.arguments) for call in calls or ()] == expected:
        return
    number = turn_number(turn, message)
    advice = "change it, set `loss: false` in the turn, or use the format xlam_v1"
    if not expected:
        raise not_representable(
            f"the text of turn {number} would be parsed as tool calls: {message.content[-80:]!r}; {advice}"
        )
    if message.content.strip():
        raise not_representable(
            f"the text next to the tool calls of turn {number} would be parsed as a part of them, or hide them: "
            f"{message.content[-80:]!r}; {advice}"
        )
    raise not_representable(
        f"the tool calls of turn {number} cannot be parsed from their JSON: {', '.join(name for name, _ in expected)}; "
        "remove values that are not JSON, such as NaN, or set `loss: false` in the turn"
    )
