"""Reads a completion from a model's tokens: text, tool calls, finish reason."""

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from xlam_jax.data.render import end_tokens, wire_of
from xlam_jax.data.trajectory import ToolCall

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class Completion(NamedTuple):
    """A model's answer to a prompt."""

    text: str
    """The whole text, without the end token."""
    content: str
    """The text without reasoning and calls, and without white space around it."""
    calls: tuple[ToolCall, ...] | None
    """None where the text has no calls, or some that cannot be parsed."""
    finish_reason: str
    """`tool_calls` or `stop` after an end token, `length` without one."""
    reasoning: str = ""
    """What the model wrote in front of its answer, between the marks of reasoning."""


def read_completion(
    new: list[int],
    tokenizer: "PreTrainedTokenizerFast",
    *,
    format: str | None = None,
    stops: Collection[int] | None = None,
    tools: Sequence[dict[str, Any]] = (),
) -> Completion:
    """Decodes a model's new tokens and parses them with the wire format of `format`.

    `format`: as in `render_prompt`. `stops`: the tokens that end an answer (default: `end_tokens` of the format).
    `tools`: the tools of the request; formats without types in their text need their schemas.
    """
    ended = bool(new) and new[-1] in (end_tokens(tokenizer, format) if stops is None else stops)
    text = str(tokenizer.decode(new[:-1] if ended else new, skip_special_tokens=False))
    reasoning, content, calls = wire_of(tokenizer, format).parse(text, tools)
    finish_reason = ("tool_calls" if calls else "stop") if ended else "length"
    return Completion(text, content.strip(), calls, finish_reason, reasoning.strip())


def named(calls: Sequence[ToolCall] | None) -> list[dict[str, Any]]:
    """Returns calls as JSON objects, `{"name", "arguments"}`."""
    return [{"name": call.name, "arguments": call.arguments} for call in calls or ()]
