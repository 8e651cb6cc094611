"""The `xlam` format; `xlam_jax/data/templates/xlam.jinja` writes the same text. With Mistral's control tokens:

    <s>[AVAILABLE_TOOLS]…[/AVAILABLE_TOOLS][INST]system\\n\\nuser[/INST]
    thought[TOOL_CALLS][{"name": …, "arguments": {…}}, …]</s>
    [TOOL_RESULTS]…[/TOOL_RESULTS]answer</s>[INST]…

in one line. For tokenizers without those tokens, the tags are plain text, and calls are a JSON array without a mark.
The reasoning of a turn is in front of its text, as `[THINK]…[/THINK]` if the tokenizer has these tokens, else as
`<think>\\n…\\n</think>\\n`. Every later prompt repeats it. Content spells none of these marks (`control.Marks`).
"""

from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

from xlam_jax.data.codec import CONTROL_TOKENS, THINK_TOKENS, TOOL_CALLS, Codec, Kind, Segment, to_json
from xlam_jax.data.control import control_marks
from xlam_jax.data.formats import PLAIN, Layout, Variant, as_unguarded, read_template, written_calls
from xlam_jax.data.trajectory import Message, Trajectory, system_text
from xlam_jax.data.wire import ARRAY, REASONINGS, Wire

THINK_TAGS = tuple(mark for row in REASONINGS.values() for mark in (row.opening, row.closing))
# explain the form of calls where no token marks them; the template has the first one
INSTRUCTIONS = (
    'To call tools, end with one line: [{"name": ..., "arguments": {...}}, ...]',
    'Calls of tools are one JSON array in the last line: [{"name": ..., "arguments": {...}}, ...]',
    'If a tool helps, put the call last, in one line: [{"name": ..., "arguments": {...}}]; calls share the list',
    'Only when tools are needed, the last line is a JSON list with one {"name": ..., "arguments": {...}} a call',
    'Use tools by ending the reply with a line [{"name": ..., "arguments": {...}}, ...]; otherwise reply in words',
)


def earlier_template(control_tokens: bool, tool_calls_token: bool) -> str:
    """Returns the template that exports had before the format could write reasoning.

    Without reasoning, both templates write the same text.
    """
    return read_template("xlam_before_reasoning", control_tokens=control_tokens, tool_calls_token=tool_calls_token)


def as_earliest(template: object) -> object:
    """Returns a template of the formats in its earliest text; other templates are unchanged.

    Digests of tokenizers in checkpoints are those of the earliest text.
    """
    if not isinstance(template, str):
        return template
    template = as_unguarded(template)
    for control, calls, think in product((True, False), repeat=3):
        if template == read_template("xlam", control_tokens=control, tool_calls_token=calls, think_tokens=think):
            return earlier_template(control, calls)
    return template


class Xlam:
    """Writes every turn once and never rewrites it, so that one sequence trains a whole conversation."""

    def __init__(self, codec: Codec):
        self._codec = codec
        self.wire = Wire(ARRAY.format, REASONINGS["mistral" if codec.think_tokens else "think"], opened=False)
        self._around_reasoning = THINK_TOKENS if codec.think_tokens else ("<think>\n", "\n</think>\n")
        self.marks = control_marks(codec, *CONTROL_TOKENS, *THINK_TAGS)
        in_words = not codec.control_tokens
        self.instructions = len(INSTRUCTIONS) if in_words else 0
        self.sections = 2 if in_words else 0
        self.template = read_template(
            "xlam",
            self.marks,
            control_tokens=codec.control_tokens,
            tool_calls_token=codec.tool_calls_token,
            think_tokens=codec.think_tokens,
        )

    @staticmethod
    def fits(codec: Codec) -> bool:
        """True: the format works with any tokenizer."""
        return True

    def layouts(self, trajectory: Trajectory, variant: Variant = PLAIN) -> Iterator[Layout]:
        """Yields the only layout."""
        system = system_text(trajectory.task_instruction, trajectory.conversation)
        yield Layout(trajectory, self._segments(system, trajectory.tools, trajectory.conversation, variant))

    def prompt(self, system: str, tools: list[dict[str, Any]], messages: Sequence[Message]) -> list[Segment]:
        """Returns the text of the turns; the answer directly follows the last one."""
        return self._segments(system, tools, messages, PLAIN)

    def _segments(
        self, system: str, tools: list[dict[str, Any]], messages: Sequence[Message], variant: Variant
    ) -> list[Segment]:
        control, in_text = self._codec.control_tokens, self.marks.in_text
        space = "" if control else " "
        segments: list[Segment] = []

        def add(text: str, kind: Kind, turn: int, control: bool = False) -> None:
            if text:
                segments.append(Segment(text, kind, turn, control))

        def tagged(tag: str, front: str, text: str, turn: int) -> None:
            add(f"[{tag}]", "prompt", -1 if front else turn, control)
            add(space + front, "prompt", -1 if front else turn)
            add(text + space, "prompt", turn)
            add(f"[/{tag}]", "prompt", turn, control)

        add(self._codec.bos, "prompt", -1, control=True)
        sections = [in_text(system + "\n\n")] if system else []
        written_tools = self.marks.in_json(to_json(tools)) if tools else ""
        if tools and control:
            tagged("AVAILABLE_TOOLS", "", written_tools, -1)
        elif tools:
            sections.append(f"Tools: {written_tools}\n{INSTRUCTIONS[variant.instruction]}\n\n")
            if variant.sections == (1, 0):
                sections.reverse()
        front = "".join(sections)
        previous = ""
        for turn, message in enumerate(messages):
            if message.role == "assistant":
                segments += self._answer(message, turn)
            elif message.role in ("user", "tool"):
                if previous in ("user", "tool"):
                    add(space, "prompt", turn)
                tagged("INST" if message.role == "user" else "TOOL_RESULTS", front, in_text(message.content), turn)
                front = ""
            previous = message.role
        return segments

    def _answer(self, message: Message, turn: int) -> Iterator[Segment]:
        """Yields the text of an assistant turn: reasoning, thought or answer, calls, end token."""
        codec, calls, marks = self._codec, message.tool_calls, self.marks
        space = "" if codec.control_tokens else " "
        reasoning = marks.in_text(message.reasoning.strip())
        if reasoning:
            opening, closing = self._around_reasoning
            marked = (Segment(text, "reasoning", turn, codec.think_tokens) for text in (opening, closing))
            texts = (Segment(text, "reasoning", turn) for text in (space, reasoning))
            yield from (segment for pair in zip(texts, marked, strict=True) for segment in pair if segment.text)
            space = ""
        if message.content:
            yield Segment(space + marks.in_text(message.content), "thought" if calls else "answer", turn)
        if calls and codec.tool_calls_token:
            yield Segment(TOOL_CALLS, "tool_call", turn, control=True)
            yield from written_calls(calls, turn, marks=marks)
        elif calls:
            yield from written_calls(calls, turn, front="\n" if message.content else space, marks=marks)
        yield Segment(codec.eos, "eos", turn, control=True)
