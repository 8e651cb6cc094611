"""Reads a completion from a model's tokens: text, tool calls, finish reason."""

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from xlam_jax.data.render import end_tokens
from xlam_jax.data.trajectory import ToolCall
from xlam_jax.data.wire import parse_completion

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class Completion(NamedTuple):
    """A model's answer to a prompt."""

    text: str
    """The whole text, without the end token."""
    content: str
    """The text without the calls, and without white space around it."""
    calls: tuple[ToolCall, ...] | None
    """None where the text has no calls, or some that cannot be parsed."""
    finish_reason: str
    """`tool_calls` or `stop` after an end token, `length` without one."""


def read_completion(
    new: list[int], tokenizer: "PreTrainedTokenizerFast", stops: Collection[int] | None = None
) -> Completion:
    """Decodes a model's new tokens; `stops` are the tokens that end it (default: `end_tokens` of the tokenizer)."""
    ended = bool(new) and new[-1] in (end_tokens(tokenizer) if stops is None else stops)
    text = str(tokenizer.decode(new[:-1] if ended else new, skip_special_tokens=False))
    content, calls = parse_completion(text)
    return Completion(text, content.strip(), calls, ("tool_calls" if calls else "stop") if ended else "length")


def named(calls: Sequence[ToolCall] | None) -> list[dict[str, Any]]:
    """Returns calls as JSON objects, `{"name", "arguments"}`."""
    return [{"name": call.name, "arguments": call.arguments} for call in calls or ()]
