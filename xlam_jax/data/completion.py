"""What a model wrote, from its tokens: text, calls, and why it ended."""

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from xlam_jax.data.render import end_tokens
from xlam_jax.data.trajectory import ToolCall
from xlam_jax.data.wire import parse_completion

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class Completion(NamedTuple):
    """What a model wrote."""

    text: str
    """As it was written, without the end token."""
    content: str
    """The text that is no call, without white space around it."""
    calls: tuple[ToolCall, ...] | None
    finish_reason: str
    """tool_calls or stop, where it came to its end; length, where it was cut."""


def read_completion(
    new: list[int], tokenizer: "PreTrainedTokenizerFast", stops: Collection[int] | None = None
) -> Completion:
    """Reads a model's new tokens; `stops` are those that end it (default: `end_tokens` of the tokenizer)."""
    ended = bool(new) and new[-1] in (end_tokens(tokenizer) if stops is None else stops)
    text = str(tokenizer.decode(new[:-1] if ended else new, skip_special_tokens=False))
    content, calls = parse_completion(text)
    return Completion(text, content.strip(), calls, ("tool_calls" if calls else "stop") if ended else "length")


def named(calls: Sequence[ToolCall] | None) -> list[dict[str, Any]]:
    """Calls as they are written out."""
    return [{"name": call.name, "arguments": call.arguments} for call in calls or ()]
