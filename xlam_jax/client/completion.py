"""The client: requests with tools to any OpenAI-compatible server, answers with thought and calls parsed.

    llm = xLAMChatCompletion.from_config(xLAMConfig(base_url="http://localhost:8000/v1/", model="xlam"))
    answer = llm.completion(messages, tools=tools)["choices"][0]
    answer["message"]["content"], answer["message"]["tool_calls"]  # "…", [{"name": …, "arguments": {…}, "id": …}]

Messages and tools are those of OpenAI, or flat as xLAM's own client took them: `{"name", "description", "parameters"}`
as a tool, `{"name", "arguments"}` as a call. Servers without a tool parser serve as well: the calls are read from the
text. With `format="xlam_v1"` the conversation is sent as xLAM v1's one message, and the answer read as its object.
"""

import json
import os
import re
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import takewhile
from typing import TYPE_CHECKING, Any, Literal

from xlam_jax.client.answers import AnswerStream, MalformedAnswer, read_response, shortened
from xlam_jax.data.call_links import answered_calls
from xlam_jax.data.messages import call_ids, openai_tool, parse_request
from xlam_jax.data.parse import parse_tools
from xlam_jax.data.trajectory import InvalidTrajectory, Message
from xlam_jax.data.wire import arguments_json, may_call
from xlam_jax.errors import UserError, check_address

if TYPE_CHECKING:
    from openai import AsyncOpenAI, OpenAI

_OF_THE_CLIENT = {"extra_body", "extra_headers", "extra_query", "timeout"}
"""Options that are no part of what is sent."""


class ServerError(UserError):
    """A server that cannot be reached, does not answer in time, refuses, or does not answer with a chat completion."""

    def __init__(self, message: str, status: int | None = None, kind: str = "malformed"):
        super().__init__(message)
        self.status = status
        """The HTTP status, where there was one."""
        self.kind = kind
        """refused (not reached), timeout, broken-stream (it hung up), rate-limited (429), server-error (5xx),
        over-length, bad-request (any other status), or malformed (not a chat completion)."""


class BadOutput(UserError):  # noqa: N818 - as errors are named that are also returned as marks
    """A model's answer that is empty, or whose calls cannot be read. `answer` is what `completion` would return."""

    def __init__(self, message: str, answer: dict[str, Any]):
        super().__init__(message)
        self.answer = answer


API_KEY = "OPENAI_API_KEY"
"""The variable that holds the key of a server, as for OpenAI's own client."""


def checked_key(api_key: str | None, name: str = "api_key", variable: str = API_KEY) -> str:
    """A server's key: the given, else that of the environment, else EMPTY. Raises `UserError` for an invalid key.

    `name` is what the user calls the given key.
    """
    key = (os.environ.get(variable) or "EMPTY") if api_key is None else api_key
    name = variable if api_key is None else name
    if not key or not (key.isascii() and key.isprintable()):
        raise UserError(f"{name}: is empty, or holds characters that no key has; check it for a line's end")
    return key


@dataclass(frozen=True, kw_only=True)
class xLAMConfig:  # noqa: N801 - the name that xLAM's users know
    """Where the model is served, and how it is asked."""

    base_url: str
    """Up to and with /v1."""
    model: str
    """The name under which the server has it."""
    api_key: str | None = field(default=None, repr=False)
    """None: the variable OPENAI_API_KEY, or EMPTY where it is not set, for servers that ask for none."""
    format: Literal["tools", "xlam_v1"] = "tools"
    """tools: the server renders messages and tools; xlam_v1: they are sent in one message."""
    timeout: float = 120.0
    """Seconds to wait for an answer, or in a stream for its next piece."""
    retries: int = 2
    """How often a request is repeated, with growing pauses, where the server is not reached, is overloaded (429) or
    fails (5xx). A stream that has begun is not repeated."""
    temperature: float | None = 0.0
    """None: the server's default."""
    max_tokens: int | None = None
    """Tokens of an answer; None: as many as the model has room for."""
    bad_output: Literal["raise", "mark"] = "raise"
    """What is done about an answer that is empty or whose calls cannot be read: `BadOutput` is raised, or the answer
    returned with the reason under "error"."""
    task_instruction: str | None = None
    """For xlam_v1, in place of the trained one."""
    format_instruction: str | None = None
    """For xlam_v1, in place of the trained one."""

    def __post_init__(self) -> None:
        check_address("base_url", self.base_url)
        object.__setattr__(self, "api_key", checked_key(self.api_key))


class xLAMChatCompletion:  # noqa: N801 - the name that xLAM's users know
    """Asks a served model. One client may be used by several threads."""

    def __init__(self, base_url: str, model: str, **config: Any):
        self.config = xLAMConfig(base_url=base_url, model=model, **config)

    @classmethod
    def from_config(cls, config: xLAMConfig) -> "xLAMChatCompletion":
        """A client for a config."""
        client = cls.__new__(cls)
        client.config = config
        return client

    def completion(self, messages: Sequence[Any], tools: Sequence[Any] | None = None, **options: Any) -> dict[str, Any]:
        """Returns `{"choices": [{"message": {"role", "content", "tool_calls"}, "finish_reason"}], "usage"}`.

        Each call is `{"name", "arguments", "id"}`, arguments an object. `options` are further parameters of OpenAI's
        chat completions (temperature, max_tokens, tool_choice, …), which go before those of the config. Raises
        `UserError` for malformed messages and tools, `ServerError`, and `BadOutput`.
        """
        request = self._request(messages, tools, options)
        with self._told():
            response = self._client.chat.completions.create(**request)
            answer = read_response(response, self.config.format, may_call(tools, options.get("tool_choice")))
        return self._checked(answer)

    async def acompletion(
        self, messages: Sequence[Any], tools: Sequence[Any] | None = None, **options: Any
    ) -> dict[str, Any]:
        """`completion` without blocking."""
        request = self._request(messages, tools, options)
        with self._told():
            if request.keys() & _OF_THE_CLIENT:
                response = await self._async_client.chat.completions.create(**request)
            else:  # the typed method takes three quarters longer: it walks through all messages, and models the answer
                response = await self._async_client.post("/chat/completions", cast_to=object, body=request)
            answer = read_response(response, self.config.format, may_call(tools, options.get("tool_choice")))
        return self._checked(answer)

    def stream(
        self, messages: Sequence[Any], tools: Sequence[Any] | None = None, **options: Any
    ) -> Iterator[str | dict[str, Any]]:
        """Yields the content in pieces as it is written, and last what `completion` returns.

        Raises as `completion`, and `ServerError` where the stream breaks off.
        """
        request = self._request(messages, tools, options)
        answer = AnswerStream(self.config.format, may_call(tools, options.get("tool_choice")))
        with self._told(), self._client.chat.completions.create(**request, stream=True) as chunks:
            for chunk in chunks:
                if piece := answer.add(chunk):
                    yield piece
        rest, response = self._finished(answer)
        if rest:
            yield rest
        yield self._checked(response)

    async def astream(
        self, messages: Sequence[Any], tools: Sequence[Any] | None = None, **options: Any
    ) -> AsyncIterator[str | dict[str, Any]]:
        """`stream` without blocking."""
        request = self._request(messages, tools, options)
        answer = AnswerStream(self.config.format, may_call(tools, options.get("tool_choice")))
        with self._told():
            async with await self._async_client.chat.completions.create(**request, stream=True) as chunks:
                async for chunk in chunks:
                    if piece := answer.add(chunk):
                        yield piece
        rest, response = self._finished(answer)
        if rest:
            yield rest
        yield self._checked(response)

    def models(self) -> list[str]:
        """The names of the models that the server has. Raises `ServerError`."""
        with self._told():
            page = self._client.models.list()
            names = [getattr(model, "id", None) for model in getattr(page, "data", None) or []]
        known = [name for name in names if isinstance(name, str)]
        if not known:
            raise ServerError(f"{self.config.base_url}: names no models; is it an OpenAI-compatible server, up to /v1?")
        return known

    def close(self) -> None:
        """Closes the connections; they open again when they are needed."""
        if (client := self.__dict__.pop("_client", None)) is not None:
            client.close()

    async def aclose(self) -> None:
        """Closes the connections of `acompletion` and `astream`; belongs into the loop that they ran in."""
        if (client := self.__dict__.pop("_async_client", None)) is not None:
            await client.close()

    def __enter__(self) -> "xLAMChatCompletion":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def __aenter__(self) -> "xLAMChatCompletion":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    @cached_property
    def _client(self) -> "OpenAI":
        from openai import OpenAI

        return OpenAI(**self._connection())

    @cached_property
    def _async_client(self) -> "AsyncOpenAI":
        from openai import AsyncOpenAI

        return AsyncOpenAI(**self._connection())

    def _connection(self) -> dict[str, Any]:
        config = self.config
        return {
            "base_url": config.base_url,
            "api_key": config.api_key,
            "timeout": config.timeout,
            "max_retries": config.retries,
        }

    def _request(self, messages: Sequence[Any], tools: Sequence[Any] | None, options: dict[str, Any]) -> dict[str, Any]:
        config = self.config
        if "stream" in options:
            raise UserError("completion() takes no `stream`; call stream() or astream()")
        defaults = {"temperature": config.temperature, "max_tokens": config.max_tokens}
        request = {key: value for key, value in defaults.items() if value is not None} | options
        try:
            turns = parse_request(messages)
            schemas = parse_tools([openai_tool(tool) for tool in tools or ()])
        except InvalidTrajectory as invalid:
            raise UserError(f"the request is malformed: {invalid.detail}") from None
        request["model"] = config.model
        if config.format == "xlam_v1":
            from xlam_jax.data.formats.xlam_v1 import user_message

            text = user_message(schemas, turns, config.task_instruction, config.format_instruction)
            return request | {"messages": [{"role": "user", "content": text}]}
        return request | {"messages": to_openai(turns)} | ({"tools": schemas} if schemas else {})

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Tells what can go wrong on the way to the server and back."""
        import openai

        where = self.config.base_url
        try:
            yield
        except openai.APITimeoutError:
            raise ServerError(f"{where}: no answer within {self.config.timeout:g} seconds", kind="timeout") from None
        except openai.APIConnectionError as error:
            cause = f" ({error.__cause__})" if error.__cause__ else ""
            kind = "refused" if type(error.__cause__).__name__ == "ConnectError" else "broken-stream"
            message = f"{where}: cannot be reached, or hung up{cause}; is the server running?"
            raise ServerError(message, kind=kind) from None
        except openai.APIStatusError as error:
            raise ServerError(f"{where}: {_refusal(error)}", error.status_code, _kind(error)) from None
        except openai.APIError as error:
            message = f"{where}: the server failed while answering: {error.message}"
            raise ServerError(message, kind="server-error") from None
        except MalformedAnswer as error:
            raise ServerError(f"{where}: {error}") from None
        except json.JSONDecodeError as error:
            raise ServerError(f"{where}: did not answer with JSON: {shortened(error.doc)!r}") from None
        except (UnicodeDecodeError, RecursionError) as error:
            raise ServerError(f"{where}: answered with what cannot be read ({type(error).__name__})") from None

    def _finished(self, answer: AnswerStream) -> tuple[str, dict[str, Any]]:
        """The rest of a stream's content, and the whole answer. Raises `ServerError` where the stream broke off."""
        if (finished := answer.finish()) is None:
            raise ServerError(
                f"{self.config.base_url}: the stream broke off after {len(answer.content)} characters: "
                f"{shortened(answer.content)!r}; ask again",
                kind="broken-stream",
            )
        return finished

    def _checked(self, answer: dict[str, Any]) -> dict[str, Any]:
        """The answer. Raises `BadOutput` for one that is to be raised instead of being marked."""
        for choice in answer["choices"]:
            if "error" in choice and self.config.bad_output == "raise":
                raise BadOutput(f"{self.config.model}: {choice['error']}", answer)
        return answer


def to_openai(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Turns as servers take them: arguments as text, and an id for each call and its result."""
    written: list[dict[str, Any]] = []
    answered: list[str] = []  # the ids of the calls that the next tool results answer
    for turn, message in enumerate(messages):
        one: dict[str, Any] = {"role": message.role, "content": message.content}
        if message.role == "tool" and answered:
            one["tool_call_id"] = answered.pop(0)
        if message.name is not None:
            one["name"] = message.name
        if message.tool_calls:
            ids = call_ids([call.id for call in message.tool_calls], turn)
            results = list(takewhile(lambda after: after.role == "tool", messages[turn + 1 :]))
            answered = [ids[at] for at in answered_calls(message.tool_calls, results) or ()]
            one["tool_calls"] = [
                {"id": id, "type": "function", "function": {"name": call.name, "arguments": arguments_json(call)}}
                for id, call in zip(ids, message.tool_calls, strict=True)
            ]
        written.append(one)
    return written


def _refusal(error: Any) -> str:
    """What a status other than 200 means to a user."""
    said = error.body.get("message") if isinstance(error.body, dict) else None
    said = shortened(str(said or error.body or error.message))
    advice = ""
    if _kind(error) == "over-length":
        advice = "; shorten the conversation or the tools, or ask for fewer tokens (max_tokens)"
    elif error.status_code == 404:
        advice = "; base_url ends in /v1, and model is one of the names that models() gives"
    elif error.status_code in (401, 403):
        advice = f"; give the server's api_key, or set {API_KEY}"
    return f"the server answered {error.status_code}: {said}{advice}"


def _kind(error: Any) -> str:
    """The kind of `ServerError` that a status other than 200 is."""
    if error.status_code == 429:
        return "rate-limited"
    if error.status_code in (408, 409) or error.status_code >= 500:
        return "server-error"
    said = str(error.body or error.message)
    too_long = re.search(r"context.{0,10}(length|window|size)|max_tokens|too long", said) is not None
    return "over-length" if error.status_code in (400, 413, 422) and too_long else "bad-request"
