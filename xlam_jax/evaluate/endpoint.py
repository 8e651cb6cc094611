"""The model behind an OpenAI-compatible server, as suites and agents ask it."""

import asyncio
import re
from collections.abc import Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple, Self

from xlam_jax.client.completion import ServerError, to_openai, xLAMChatCompletion, xLAMConfig
from xlam_jax.data.messages import call_ids
from xlam_jax.data.trajectory import Message, ToolCall
from xlam_jax.errors import UserError

KINDS = (
    "refused",
    "timeout",
    "rate-limited",
    "server-error",
    "broken-stream",
    "malformed",
    "over-length",
    "bad-request",
    "environment",
    "suite",
)
"""Of faults. `environment`: the suite's own server (a shop, a tool server) failed; `suite`: its code did."""
CALLS: ContextVar[list[ToolCall]] = ContextVar("CALLS")
"""Where it is set, the calls of all answers are added: the runner sets it anew for each example."""
REPEATS = 2
"""Of a request whose answer was unreadable or broke off, at most; for all other faults `retries` holds."""
_LONE = re.compile("[\ud800-\udfff]")
"""Half a surrogate pair, which JSON can hold and neither files nor databases can."""
_HOPELESS = (401, 403, 404)
"""Statuses that no other request would change: the key or the model's name is wrong."""
_NOT_REPEATED = ("broken-stream", "malformed")
"""Faults that the OpenAI client does not repeat by itself: what came had the status 200."""


class EndpointFault(Exception):  # noqa: N818 - a fault of the way, no error of ours
    """A request that got no answer to be scored. `kind` is one of `KINDS`; `messages` are those that were sent."""

    def __init__(self, kind: str, message: str, messages: Sequence[dict[str, Any]] = ()):
        super().__init__(message)
        self.kind = kind
        self.messages = list(messages)


class Answer(NamedTuple):
    """What a model answered."""

    asked: list[dict[str, Any]]
    """The messages that it answered."""
    content: str
    calls: tuple[ToolCall, ...]
    """Each with an id of its own."""
    finish_reason: str | None
    unreadable: bool = False
    """The content was meant to be calls, and cannot be read as such."""

    @property
    def message(self) -> dict[str, Any]:
        """The assistant's message in OpenAI form."""
        return to_openai([Message("assistant", self.content, self.calls)])[0]


class Model:
    """Asks one model; usable by many tasks at once. An async context manager, which closes the connections."""

    def __init__(self, llm: xLAMChatCompletion, *, stream: bool = False, seed: int | None = None):
        """`stream` asks for answers in pieces, which keeps slow ones from the time-outs of proxies. `seed` goes with
        each request; a greedy answer needs none."""
        self._llm, self._stream = llm, stream
        self._options: dict[str, Any] = {} if seed is None else {"seed": seed}

    @classmethod
    def connect(
        cls,
        base_url: str,
        model: str,
        *,
        api_key: str | None = None,
        timeout: float = 120.0,
        retries: int = 5,
        temperature: float = 0.0,
        max_tokens: int | None = None,
        stream: bool = False,
        seed: int = 0,
    ) -> Self:
        """A model by its server's address and its name there; see `xLAMConfig`. Greedy but for a `temperature`."""
        config = xLAMConfig(
            base_url=base_url,
            model=model,
            api_key=api_key,
            timeout=timeout,
            retries=retries,
            temperature=temperature,
            max_tokens=max_tokens,
            bad_output="mark",
        )
        return cls(xLAMChatCompletion.from_config(config), stream=stream, seed=seed if temperature else None)

    @property
    def name(self) -> str:
        """The model's, at its server."""
        return self._llm.config.model

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._llm.aclose()

    async def chat(
        self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]] | None = None, **options: Any
    ) -> Answer:
        """One answer. `options` are parameters of OpenAI's chat completions (stop, max_tokens, …).

        Calls that the server found, or that stand in the text where tools were given, are `calls`; text that is no
        readable call is `content`, for the suite to judge. Raises `EndpointFault` once repeating does not help, and
        `UserError` where no request can succeed (a wrong key, a model that the server does not have).
        """
        asked = list(messages)
        fault: EndpointFault | None = None
        for attempt in range(min(self._llm.config.retries, REPEATS) + 1):
            if attempt:
                await asyncio.sleep(0.5 * 2 ** (attempt - 1))
            try:
                choice = await self._ask(asked, tools, self._options | options)
            except ServerError as error:
                if error.status in _HOPELESS:
                    raise
                fault = EndpointFault(error.kind, str(error), asked)
                if error.kind not in _NOT_REPEATED or not (self._stream or error.kind == "malformed"):
                    raise fault from None
            except UserError as error:  # what the model or the data put into the messages can't be sent
                raise EndpointFault("bad-request", str(error), asked) from None
            else:
                found = choice["message"]["tool_calls"]
                if not found or "error" not in choice:  # or else some of them cannot be read
                    ids = call_ids([call["id"] for call in found], len(asked))
                    calls = tuple(
                        ToolCall(id, call["name"], call["arguments"]) for id, call in zip(ids, found, strict=True)
                    )
                    CALLS.get([]).extend(calls)
                    content = _LONE.sub("\ufffd", choice["message"]["content"])
                    unreadable = "error" in choice and bool(content.strip())  # the other error is an empty answer
                    return Answer(asked, content, calls, choice["finish_reason"], unreadable)
                fault = EndpointFault("malformed", choice["error"], asked)
        assert fault
        raise fault

    async def _ask(
        self, messages: list[dict[str, Any]], tools: Sequence[dict[str, Any]] | None, options: dict[str, Any]
    ) -> dict[str, Any]:
        if not self._stream:
            return (await self._llm.acompletion(messages, tools, **options))["choices"][0]
        *_, last = [piece async for piece in self._llm.astream(messages, tools, **options)]
        assert isinstance(last, dict)
        return last["choices"][0]
