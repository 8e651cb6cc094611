"""Types of the table of wire formats: how calls and reasoning are written in a model's text."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from xlam_jax.data.trajectory import ToolCall
from xlam_jax.data.wire.fronts import Fronts
from xlam_jax.data.wire.reasoning import Reasoning

Tools = Sequence[dict[str, Any]]
"""The OpenAI tool schemas of a request."""


class Parsed(NamedTuple):
    """What a completion (without its end token) contains."""

    reasoning: str
    """Empty where the text has none."""
    content: str
    calls: tuple[ToolCall, ...] | None
    """None where the text has no calls, or some that cannot be parsed."""


@dataclass(frozen=True)
class WireFormat:
    """A row of the table: how calls are written in a text, and which parsers read them."""

    name: str
    example: str
    """A call in this format, in one line."""
    vllm: str
    """Name of vLLM's tool parser for it."""
    sglang: str
    """Name of SGLang's tool parser for it, empty where it has none."""
    fronts: Fronts
    """What calls begin with: a stream holds everything from there on."""
    read_calls: Callable[[str, Tools], tuple[str, tuple[ToolCall, ...] | None]]
    """Splits a text without reasoning into content and calls."""
    lossy: str = ""
    """Which values do not come back exactly, and why; empty where all do."""
    read_reasoning: Callable[[str], str] | None = None
    """Returns the reasoning of a text, in formats that mark it in their own way."""


@dataclass(frozen=True)
class Wire:
    """A wire format and, if the model reasons, how its reasoning is marked."""

    format: WireFormat
    reasoning: Reasoning | None = None
    opened: bool | None = None
    """Whether the prompt ends with the opening mark of the reasoning. None: unknown, so text without the opening mark
    is reasoning where a closing mark follows; a stream then has no certain content before that mark."""

    def parse(self, text: str, tools: Tools = ()) -> Parsed:
        """Splits a completion into reasoning, content and calls.

        All calls of a text are returned or none; where some cannot be parsed, the text is the content. Nothing of the
        text but marks, and white space next to them, is dropped. `tools`: the schemas of the request, for formats
        without types. Nothing raises.
        """
        reasoning = ""
        if self.reasoning is not None:
            reasoning, text = self.reasoning.split(text, self.opened)
        content, calls = self.format.read_calls(text, tools)
        if self.format.read_reasoning is not None:
            reasoning = reasoning or self.format.read_reasoning(text)
        return Parsed(reasoning, content, calls)


def may_call(tools: Sequence[Any] | None, tool_choice: object) -> bool:
    """Returns whether the answer to a request may have calls; otherwise it is text, whatever it looks like."""
    return bool(tools) and tool_choice != "none"


def arguments_json(call: ToolCall) -> str:
    """Returns a call's arguments as the JSON text of the OpenAI form."""
    return json.dumps(call.arguments, ensure_ascii=False)
