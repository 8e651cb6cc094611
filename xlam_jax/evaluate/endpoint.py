"""The client of suites and agents: sends chat requests to the evaluated model's OpenAI-compatible server."""

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
"""Kinds of faults. `environment`: the suite's own server (a shop, a tool server) failed; `suite`: its code failed."""
CALLS: ContextVar[list[ToolCall]] = ContextVar("CALLS")
"""If set, collects the calls of all answers. The runner sets a new list for each example."""
REPEATS = 2
"""Maximum number of retries after an unreadable or truncated answer; `retries` applies to all other faults."""
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")
"""Half of a surrogate pair: valid in JSON, but not in files and databases."""
_FATAL = (401, 403, 404)
"""Statuses that every request would get: the key or the model's name is wrong."""
_NOT_REPEATED = ("broken-stream", "malformed")
"""Faults that the OpenAI client does not retry, because the response had status 200."""


class EndpointFault(Exception):  # noqa: N818 - not an error in this code
    """A request without an answer to score. `kind` is one of `KINDS`; `messages` are the messages that were sent."""

    def __init__(self, kind: str, message: str, messages: Sequence[dict[str, Any]] = ()):
        super().__init__(message)
        self.kind = kind
        self.messages = list(messages)


class Answer(NamedTuple):
    """The answer of a model."""

    prompt: list[dict[str, Any]]
    """The messages of the request."""
    content: str
    calls: tuple[ToolCall, ...]
    """Tool calls with unique ids."""
    finish_reason: str | None
    unreadable: bool = False
    """Whether the content was meant to be calls, but cannot be parsed."""

    @property
    def message(self) -> dict[str, Any]:
        """The assistant message in OpenAI form."""
        return to_openai([Message("assistant", self.content, self.calls)])[0]


class Model:
    """Sends requests to one model, also from concurrent tasks. An async context manager that closes the connections."""

    def __init__(self, llm: xLAMChatCompletion, *, stream: bool = False, seed: int | None = None):
        """`stream` requests streamed answers, so that proxies do not time out on slow ones. `seed` is sent with each
        request; greedy decoding needs none."""
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
        """Returns a client for a model, given the address of its server and its name there; see `xLAMConfig`.

        `timeout` is in seconds. Decoding is greedy unless `temperature` is above 0.
        """
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
        """The name of the model at its server."""
        return self._llm.config.model

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._llm.aclose()

    async def chat(
        self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]] | None = None, **options: Any
    ) -> Answer:
        """Returns one answer. `options` are parameters of OpenAI's chat completions (stop, max_tokens, …).

        `calls` of the answer are those that the server parsed or, if tools were given, those in the text. Any other
        text is `content`, for the suite to judge. Raises `EndpointFault` after the last retry, and `UserError` if no
        request can succeed (a wrong key, or a model that the server does not have).
        """
        prompt = list(messages)
        fault: EndpointFault | None = None
        for attempt in range(min(self._llm.config.retries, REPEATS) + 1):
            if attempt:
                await asyncio.sleep(0.5 * 2 ** (attempt - 1))
            try:
                reply = await self._request(prompt, tools, self._options | options)
            except ServerError as error:
                if error.status in _FATAL:
                    raise
                fault = EndpointFault(error.kind, str(error), prompt)
                if error.kind not in _NOT_REPEATED or not (self._stream or error.kind == "malformed"):
                    raise fault from None
            except UserError as error:  # the messages contain something that can't be sent
                raise EndpointFault("bad-request", str(error), prompt) from None
            else:
                parsed = reply["message"]["tool_calls"]
                if not parsed or "error" not in reply:  # otherwise some of the calls cannot be parsed
                    ids = call_ids([call["id"] for call in parsed], len(prompt))
                    calls = tuple(
                        ToolCall(id, call["name"], call["arguments"]) for id, call in zip(ids, parsed, strict=True)
                    )
                    CALLS.get([]).extend(calls)
                    content = _LONE_SURROGATE.sub("\ufffd", reply["message"]["content"])
                    unreadable = "error" in reply and bool(
                        content.strip()
                    )  # the error of an empty answer is not a call
                    return Answer(prompt, content, calls, reply["finish_reason"], unreadable)
                fault = EndpointFault("malformed", reply["error"], prompt)
        assert fault
        raise fault

    async def _request(
        self, messages: list[dict[str, Any]], tools: Sequence[dict[str, Any]] | None, options: dict[str, Any]
    ) -> dict[str, Any]:
        if not self._stream:
            return (await self._llm.acompletion(messages, tools, **options))["choices"][0]
        *_, last = [piece async for piece in self._llm.astream(messages, tools, **options)]
        assert isinstance(last, dict)
        return last["choices"][0]
