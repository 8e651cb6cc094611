"""The `xlam` format; `xlam_jax/data/templates/xlam.jinja` writes the same text. With Mistral's control tokens:

    <s>[AVAILABLE_TOOLS]…[/AVAILABLE_TOOLS][INST]system\\n\\nuser[/INST]
    thought[TOOL_CALLS][{"name": …, "arguments": {…}}, …]</s>
    [TOOL_RESULTS]…[/TOOL_RESULTS]answer</s>[INST]…

in one line. For tokenizers without those tokens, the tags are plain text, and calls are a JSON array without a mark.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from xlam_jax.data.codec import TOOL_CALLS, Codec, Kind, Segment, to_json
from xlam_jax.data.formats import PLAIN, Layout, Variant, read_template, written_calls
from xlam_jax.data.trajectory import Message, Trajectory, system_text
from xlam_jax.data.wire import ARRAY

# explain the form of calls where no token marks them; the template has the first one
INSTRUCTIONS = (
    'To call tools, end with one line: [{"name": ..., "arguments": {...}}, ...]',
    'Calls of tools are one JSON array in the last line: [{"name": ..., "arguments": {...}}, ...]',
    'If a tool helps, put the call last, in one line: [{"name": ..., "arguments": {...}}]; calls share the list',
    'Only when tools are needed, the last line is a JSON list with one {"name": ..., "arguments": {...}} a call',
    'Use tools by ending the reply with a line [{"name": ..., "arguments": {...}}, ...]; otherwise reply in words',
)


class Xlam:
    """Writes every turn once and never rewrites it, so that one sequence trains a whole conversation."""

    wire = ARRAY

    def __init__(self, codec: Codec):
        self._codec = codec
        in_words = not codec.control_tokens
        self.instructions = len(INSTRUCTIONS) if in_words else 0
        self.sections = 2 if in_words else 0
        self.template = read_template(
            "xlam", control_tokens=codec.control_tokens, tool_calls_token=codec.tool_calls_token
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
        control, eos = self._codec.control_tokens, self._codec.eos
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
        sections = [system] if system else []
        if tools and control:
            tagged("AVAILABLE_TOOLS", "", to_json(tools), -1)
        elif tools:
            sections.append(f"Tools: {to_json(tools)}\n{INSTRUCTIONS[variant.instruction]}")
            if variant.sections == (1, 0):
                sections.reverse()
        front = "".join(section + "\n\n" for section in sections)
        previous = ""
        for turn, message in enumerate(messages):
            if message.role == "assistant":
                calls = message.tool_calls
                if message.content:
                    add(space + message.content, "thought" if calls else "answer", turn)
                if calls and self._codec.tool_calls_token:
                    add(TOOL_CALLS, "tool_call", turn, control=True)
                    segments += written_calls(calls, turn)
                elif calls:
                    segments += written_calls(calls, turn, front="\n" if message.content else " ")
                add(eos, "eos", turn, control=True)
            elif message.role in ("user", "tool"):
                if previous in ("user", "tool"):
                    add(space, "prompt", turn)
                tagged("INST" if message.role == "user" else "TOOL_RESULTS", front, message.content, turn)
                front = ""
            previous = message.role
        return segments
