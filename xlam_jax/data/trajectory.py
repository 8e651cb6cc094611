"""The unified trajectory, the canonical form of all data: one conversation with its tools.

`xlam_jax.data.parse` reads and checks it. This module has the types, the keys of their JSON form, and the way back to
JSON and to chat messages.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

ROLES = ("system", "user", "assistant", "tool")
ROW_KEYS = frozenset({"unique_trajectory_id", "source", "score", "task_instruction", "tools", "conversation"})
REASONING_KEYS = ("reasoning", "reasoning_content", "thinking")
"""Spellings of the key with the reasoning of an assistant turn; the first is the canonical one."""
TURN = "turn_in_file"
"""Key of a turn's number in the file that it was converted from; messages name it. Converters set it."""
MESSAGE_KEYS = frozenset({"role", "content", "tool_calls", "tool_call_id", "name", "loss", TURN})
CALL_KEYS = frozenset({"type", "id", "function"})
FUNCTION_KEYS = frozenset({"name", "arguments"})
LONGEST_DETAIL = 1000
"""Characters of `InvalidTrajectory.detail`; longer details are cut."""


class InvalidTrajectory(ValueError):  # noqa: N818 - it is also a value: readers yield it in place of the trajectory
    """Why a row is not a trajectory: `reason` is a short code to count by, `detail` a sentence."""

    def __init__(self, reason: str, detail: str):
        if len(detail) > LONGEST_DETAIL:
            detail = f"{detail[:LONGEST_DETAIL]} …"
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call of a tool. `arguments` keeps the order of its keys; `id` is None where the source has none."""

    id: str | None
    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. In an assistant turn with calls, `content` is the thought; `loss: False` excludes a turn from the loss.

    `reasoning` is the text that a reasoning model writes before its answer. Only assistant turns have it.
    """

    role: str
    content: str
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    name: str | None = None
    loss: bool | None = None
    reasoning: str = ""
    number: int | None = field(default=None, compare=False)
    """The turn's number in the file that it was converted from, where it may differ from its place here."""


@dataclass(frozen=True, slots=True)
class Trajectory:
    """One conversation and the tools that it may call. `tools` are OpenAI tool schemas in the key order of the file."""

    id: str
    source: str | None
    score: float | None
    task_instruction: str
    tools: list[dict[str, Any]]
    conversation: tuple[Message, ...]


def turn_number(place: int, turn: Any) -> int:
    """The number by which messages name a turn: that of the source file, or else its place in the conversation.

    `turn` is a `Message`, or an object that is not checked yet.
    """
    number = turn.number if isinstance(turn, Message) else turn.get(TURN) if isinstance(turn, dict) else None
    return number if isinstance(number, int) else place


def system_text(task_instruction: str, messages: Sequence[Message]) -> str:
    """Joins the task instruction and the system turns with blank lines, without empty ones."""
    parts = [task_instruction, *(message.content for message in messages if message.role == "system")]
    return "\n\n".join(part for part in parts if part)


def to_dict(trajectory: Trajectory, numbers: bool = False) -> dict[str, Any]:
    """Returns the canonical JSON object, which `parse_trajectory` reads back equal. Optional keys may be absent.

    With `numbers`, turns keep their numbers in the source file.
    """
    row: dict[str, Any] = {"unique_trajectory_id": trajectory.id}
    if trajectory.source is not None:
        row["source"] = trajectory.source
    if trajectory.score is not None:
        row["score"] = trajectory.score
    if trajectory.task_instruction:
        row["task_instruction"] = trajectory.task_instruction
    row["tools"] = trajectory.tools
    row["conversation"] = [message_to_dict(message, numbers) for message in trajectory.conversation]
    return row


def to_messages(trajectory: Trajectory) -> list[dict[str, Any]]:
    """Returns the conversation as chat messages; the task instruction becomes a system message at the front.

    The reasoning of an assistant message is its `reasoning_content`, as in OpenAI-compatible servers.
    """
    front = [{"role": "system", "content": trajectory.task_instruction}] if trajectory.task_instruction else []
    turns = [message_to_dict(message) for message in trajectory.conversation]
    for turn in turns:
        turn.pop("loss", None)  # not a part of a request
        text = turn.pop("reasoning", None)
        if text:
            turn["reasoning_content"] = text
    return front + turns


def without_reasoning(trajectory: Trajectory) -> Trajectory:
    """Returns the trajectory without the reasoning of its turns; the same object where no turn has any."""
    if not any(turn.reasoning for turn in trajectory.conversation):
        return trajectory
    turns = (replace(turn, reasoning="") if turn.reasoning else turn for turn in trajectory.conversation)
    return replace(trajectory, conversation=tuple(turns))


def message_to_dict(message: Message, numbers: bool = False) -> dict[str, Any]:
    """Returns the canonical JSON object of a turn; with `numbers`, with its number in the source file."""
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
    if numbers and message.number is not None:
        row[TURN] = message.number
    return row
