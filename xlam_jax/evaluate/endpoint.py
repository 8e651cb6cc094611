"""The model behind an OpenAI-compatible server, as suites and agents ask it."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from serving.client import xLAMChatCompletion
from xlam_jax.data.trajectory import ToolCall


class EndpointFault(Exception):
    """A request that got no answer to be scored. `kind` is one for many requests: refused, timeout, rate-limited, …"""

    def __init__(self, kind: str, message: str):
        super().__init__(message)
        self.kind = kind


class Answer(NamedTuple):
    """What a model answered."""

    asked: list[dict[str, Any]]
    """The messages that it answered."""
    content: str
    calls: tuple[ToolCall, ...]
    finish_reason: str | None

    @property
    def message(self) -> dict[str, Any]:
        """The assistant's message in OpenAI form."""
        raise NotImplementedError


class Model:
    """Asks one model; usable by many tasks at once."""

    def __init__(self, llm: xLAMChatCompletion):
        self._llm = llm

    async def chat(
        self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]] | None = None, **options: Any
    ) -> Answer:
        """One answer. `options` are parameters of OpenAI's chat completions (stop, max_tokens, …). Raises `EndpointFault`."""
        raise NotImplementedError
