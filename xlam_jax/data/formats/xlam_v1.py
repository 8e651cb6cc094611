"""xLAM v1's format: one user message with the whole conversation in sections, answered by one JSON object.

    {system text}\\n\\n[BEGIN OF TASK INSTRUCTION]…[BEGIN OF AVAILABLE TOOLS]…[BEGIN OF FORMAT INSTRUCTION]…
    [BEGIN OF QUERY]…[BEGIN OF HISTORY STEPS]…   →   {"thought": "…", "tool_calls": [{"name": …, "arguments": {…}}]}

The prompt contains the history, one step per assistant turn, so that every assistant turn has a separate prompt.
`xlam_jax/data/templates/xlam_v1.jinja` writes the same text. The message is between the tags of the format `xlam`.
No content spells a control token or one of these tags (`control.Marks`).
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from xlam_jax.data.codec import CONTROL_TOKENS, Codec, Kind, Segment, to_json
from xlam_jax.data.control import NO_MARKS, Marks, control_marks
from xlam_jax.data.formats import PLAIN, Layout, Variant, read_template, refuse_reasoning, without_loss, written_calls
from xlam_jax.data.trajectory import Message, Trajectory, system_text
from xlam_jax.data.wire import ARRAY

TASK_INSTRUCTION = (
    "Given the request below and the steps taken so far, take the next step: call the tools that bring the request "
    "forward, or reply in words where no tool fits or a needed value is missing."
)
_EXAMPLE = (
    '{"thought": "why this step, or the reply in words", '
    '"tool_calls": [{"name": "tool_name", "arguments": {"argument": "value"}}]}'
)
# the template has the first one
INSTRUCTIONS = (
    "Answer with one JSON object and nothing else, in the form below. Give each argument the type that the tool "
    f'declares. Without a call, "tool_calls" is an empty list.\n{_EXAMPLE}',
    f'Write a single JSON object like this one, with no text around it:\n{_EXAMPLE}\n"tool_calls" is [] if no tool is '
    "called; arguments have the declared types.",
    f"The output is strictly JSON:\n{_EXAMPLE}\nSeveral calls go into one list, no call is an empty list.",
    'Reply as a JSON object with the keys "thought" (text) and "tool_calls" (a list, empty if nothing is called), '
    f"for example\n{_EXAMPLE}",
)


class XlamV1:
    """Writes a separate sequence for each assistant turn."""

    instructions = len(INSTRUCTIONS)
    sections = 4
    wire = ARRAY

    def __init__(self, codec: Codec):
        self._codec = codec
        self.marks = control_marks(codec, *CONTROL_TOKENS)
        self.template = read_template("xlam_v1", self.marks, control_tokens=codec.control_tokens)

    @staticmethod
    def fits(codec: Codec) -> bool:
        """True: the format works with any tokenizer."""
        return True

    def layouts(self, trajectory: Trajectory, variant: Variant = PLAIN) -> Iterator[Layout]:
        """Yields a layout for each trained assistant turn. Raises `InvalidTrajectory` if one of them has reasoning."""
        turns = trajectory.conversation
        refuse_reasoning(turns, "the format xlam_v1")
        system = system_text(trajectory.task_instruction, turns)
        front, steps = self._pieces(system, trajectory.tools, turns, variant)
        context = without_loss(turns, before=len(turns))
        space = "" if self._codec.control_tokens else " "
        done = 0
        for turn, message in enumerate(turns):
            if message.role != "assistant":
                continue
            done += 1
            if message.loss is False:
                continue
            main = "tool_call" if message.tool_calls else "answer"
            segments = self._prompt(front, steps[: done - 1])
            thought: Kind = "thought" if message.tool_calls and message.content else main
            segments += [
                Segment(space + '{"thought": ', main, turn),
                Segment(_json(message.content, self.marks), thought, turn),
            ]
            if message.tool_calls:
                segments += written_calls(message.tool_calls, turn, ', "tool_calls": ', "}", marks=self.marks)
            else:
                segments.append(Segment(', "tool_calls": []}', main, turn))
            segments.append(Segment(self._codec.eos, "eos", turn, control=True))
            yield Layout(replace(trajectory, conversation=(*context[:turn], message)), segments)

    def prompt(self, system: str, tools: list[dict[str, Any]], messages: Sequence[Message]) -> list[Segment]:
        """Returns the message with the whole conversation; the answer directly follows it."""
        return self._prompt(*self._pieces(system, tools, messages, PLAIN))

    def _pieces(
        self, system: str, tools: list[dict[str, Any]], messages: Sequence[Message], variant: Variant
    ) -> tuple[list[Segment], list[Segment]]:
        """Returns (segments before the history, steps of the history)."""
        control = self._codec.control_tokens
        instruction = INSTRUCTIONS[variant.instruction]
        front, steps = _written(system, tools, messages, instruction, order=variant.sections, marks=self.marks)
        begin = [
            Segment(self._codec.bos, "prompt", -1, control=True),
            Segment("[INST]", "prompt", -1, control),
            Segment("" if control else " ", "prompt", -1),
            *front,
        ]
        return [segment for segment in begin if segment.text], steps

    def _prompt(self, front: list[Segment], steps: list[Segment]) -> list[Segment]:
        control = self._codec.control_tokens
        segments = front + _history(steps)
        if not control:
            segments.append(Segment(" ", "prompt", -1))
        segments.append(Segment("[/INST]", "prompt", -1, control))
        return segments


def user_message(
    tools: list[dict[str, Any]],
    messages: Sequence[Message],
    task_instruction: str | None = None,
    format_instruction: str | None = None,
) -> str:
    """Returns a conversation as one user message, for servers whose chat template is not that of the format."""
    front, steps = _written(
        system_text("", messages), tools, messages, format_instruction or INSTRUCTIONS[0], task_instruction
    )
    return "".join(segment.text for segment in front + _history(steps))


def _written(
    system: str,
    tools: list[dict[str, Any]],
    messages: Sequence[Message],
    format_instruction: str,
    task_instruction: str | None = None,
    order: Sequence[int] = (),
    marks: Marks = NO_MARKS,
) -> tuple[list[Segment], list[Segment]]:
    """Returns (system text and sections, steps of the history)."""
    query, steps = _steps(messages, marks)
    first = next((turn for turn, message in enumerate(messages) if message.role == "user"), -1)
    sections = [
        ("TASK INSTRUCTION", task_instruction or TASK_INSTRUCTION, -1),
        ("AVAILABLE TOOLS", f"[{', '.join(_written_tool(tool, marks) for tool in tools)}]", -1),
        ("FORMAT INSTRUCTION", format_instruction, -1),
        ("QUERY", marks.in_text(query), first),
    ]
    front = [Segment(marks.in_text(system + "\n\n"), "prompt", -1)] if system else []
    for name, text, turn in [sections[at] for at in order or range(len(sections))]:
        front.append(Segment(f"[BEGIN OF {name}]\n{text}\n[END OF {name}]\n\n", "prompt", turn))
    written = [
        Segment(f'{", " if at else ""}{{"step_id": {at + 1}, {step}}}', "prompt", turn)
        for at, (turn, step) in enumerate(steps)
    ]
    return front, written


def _history(steps: list[Segment]) -> list[Segment]:
    """The section of the history, empty without steps."""
    if not steps:
        return []
    return [
        Segment("\n[BEGIN OF HISTORY STEPS]\n[", "prompt", -1),
        *steps,
        Segment("]\n[END OF HISTORY STEPS]\n", "prompt", -1),
    ]


def _steps(messages: Sequence[Message], marks: Marks) -> tuple[str, list[tuple[int, str]]]:
    """Returns (request that opens the conversation, steps): each assistant turn with the turns up to the next one.

    A step is the inner part of a JSON object.
    """
    query: list[str] = []
    steps: list[tuple[int, str]] = []
    observations: list[str] = []
    inputs: list[str] = []

    def close() -> None:
        if steps:
            observed = observations[0] if len(observations) == 1 else observations or ""
            user_input = "\n\n".join(text for text in inputs if text)
            turn, step = steps.pop()
            step += f', "next_observation": {_json(observed, marks)}, "user_input": {_json(user_input, marks)}'
            steps.append((turn, step))
        observations.clear()
        inputs.clear()

    for turn, message in enumerate(messages):
        if message.role == "assistant":
            close()
            calls = "".join(segment.text for segment in written_calls(message.tool_calls, turn, marks=marks))
            steps.append((turn, f'"thought": {_json(message.content, marks)}, "tool_calls": {calls}'))
        elif message.role == "tool":
            observations.append(message.content)
        elif message.role == "user":
            (inputs if steps else query).append(message.content)
    close()
    return "\n\n".join(text for text in query if text), steps


def _written_tool(tool: dict[str, Any], marks: Marks) -> str:
    function = tool["function"]
    parameters = function.get("parameters")
    properties = parameters.get("properties") if isinstance(parameters, dict) else None
    name, description = _json(function["name"], marks), _json(function.get("description") or "", marks)
    return f'{{"name": {name}, "description": {description}, "parameters": {_json(properties or {}, marks)}}}'


def _json(value: object, marks: Marks) -> str:
    return marks.in_json(to_json(value))
