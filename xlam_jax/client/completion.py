"""The client for OpenAI-compatible servers: sends messages and tools, parses thoughts and tool calls of the answers.

    llm = xLAMChatCompletion.from_config(xLAMConfig(base_url="http://localhost:8000/v1/", model="xlam"))
    answer = llm.completion(messages, tools=tools)["choices"][0]
    answer["message"]["content"], answer["message"]["tool_calls"]  # "…", [{"name": …, "arguments": {…}, "id": …}]

Messages and tools have OpenAI's format, or the flat one of xLAM's own client: `{"name", "description", "parameters"}`
for a tool, `{"name", "arguments"}` for a call. Servers without a tool parser work too: the client parses the calls in
the text. With `format="xlam_v1"` the conversation is sent as the single message of xLAM v1, and the answer is parsed as
its JSON object.
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

from xlam_jax.client.answers import AnswerStream, MalformedAnswer, read_response, shorten
from xlam_jax.data.call_links import answered_calls
from xlam_jax.data.messages import call_ids, openai_tool, parse_request
from xlam_jax.data.parse import parse_tools
from xlam_jax.data.trajectory import InvalidTrajectory, Message
from xlam_jax.data.wire import arguments_json, may_call
from xlam_jax.errors import UserError, check_address

if TYPE_CHECKING:
    from openai import AsyncOpenAI, OpenAI

_CLIENT_OPTIONS = {"extra_body", "extra_headers", "extra_query", "timeout"}
"""Options for OpenAI's client, which are not part of the request body."""


class ServerError(UserError):
    """The server cannot be reached, times out, refuses the request, or does not answer with a chat completion."""

    def __init__(self, message: str, status: int | None = None, kind: str = "malformed"):
        super().__init__(message)
        self.status = status
        """The HTTP status, or None if there was no response."""
        self.kind = kind
        """refused (not reached), timeout, broken-stream (connection lost), rate-limited (429), server-error (5xx),
        over-length, bad-request (any other status), or malformed (not a chat completion)."""


class BadOutput(UserError):  # noqa: N818 - may also be returned as a mark, so it is not called an error
    """The model's answer is empty, or its calls cannot be read. `answer`: what `completion` would have returned."""

    def __init__(self, message: str, answer: dict[str, Any]):
        super().__init__(message)
        self.answer = answer


API_KEY = "OPENAI_API_KEY"
"""Environment variable with the server's key, as in OpenAI's own client."""


def resolve_key(api_key: str | None, name: str = "api_key", variable: str = API_KEY) -> str:
    """Returns the server's key: `api_key`, else the environment variable, else EMPTY.

    `name`: the option that `api_key` comes from. Raises `UserError` for an invalid key.
    """
    key = (os.environ.get(variable) or "EMPTY") if api_key is None else api_key
    name = variable if api_key is None else name
    if not key or not (key.isascii() and key.isprintable()):
        raise UserError(f"{name}: is empty, or contains invalid characters; check it for a line break")
    return key


@dataclass(frozen=True, kw_only=True)
class xLAMConfig:  # noqa: N801 - the name that xLAM's users know
    """Address of the server, model, and request settings."""

    base_url: str
    """The server's URL, up to and including /v1."""
    model: str
    """Name of the model on the server."""
    api_key: str | None = field(default=None, repr=False)
    """None: the environment variable OPENAI_API_KEY, or EMPTY if it is not set, for servers that need no key."""
    format: Literal["tools", "xlam_v1"] = "tools"
    """tools: the server renders messages and tools; xlam_v1: the client sends them as one message."""
    timeout: float = 120.0
    """Seconds to wait for an answer, or for the next chunk of a stream."""
    retries: int = 2
    """Maximum number of retries, with growing pauses, if the server is not reached, is overloaded (429) or fails (5xx).
    A stream that has begun is not repeated."""
    temperature: float | None = 0.0
    """Sampling temperature; None: the server's default."""
    max_tokens: int | None = None
    """Maximum number of tokens of an answer; None: up to the model's context length."""
    bad_output: Literal["raise", "mark"] = "raise"
    """If an answer is empty or its calls cannot be read: raise `BadOutput`, or return the answer with the reason under
    "error"."""
    task_instruction: str | None = None
    """Replaces the trained task instruction of xlam_v1."""
    format_instruction: str | None = None
    """Replaces the trained format instruction of xlam_v1."""

    def __post_init__(self) -> None:
        check_address("base_url", self.base_url)
        object.__setattr__(self, "api_key", resolve_key(self.api_key))


class xLAMChatCompletion:  # noqa: N801 - the name that xLAM's users know
    """Sends requests to a served model. Thread-safe."""

    def __init__(self, base_url: str, model: str, **config: Any):
        self.config = xLAMConfig(base_url=base_url, model=model, **config)

    @classmethod
    def from_config(cls, config: xLAMConfig) -> "xLAMChatCompletion":
        """Creates a client from a config."""
        client = cls.__new__(cls)
        client.config = config
        return client

    def completion(self, messages: Sequence[Any], tools: Sequence[Any] | None = None, **options: Any) -> dict[str, Any]:
        """Returns `{"choices": [{"message": {"role", "content", "tool_calls"}, "finish_reason"}], "usage"}`.

        Each call is `{"name", "arguments", "id"}`, its arguments an object. `options`: further parameters of OpenAI's
        chat completions (temperature, max_tokens, tool_choice, …), which override the config. Raises `UserError` for
        malformed messages and tools, `ServerError`, and `BadOutput`.
        """
        request = self._request(messages, tools, options)
        with self._server_errors():
            response = self._client.chat.completions.create(**request)
            answer = read_response(response, self.config.format, _callable_tools(request, tools, options))
        return self._check(answer)

    async def acompletion(
        self, messages: Sequence[Any], tools: Sequence[Any] | None = None, **options: Any
    ) -> dict[str, Any]:
        """`completion` without blocking."""
        request = self._request(messages, tools, options)
        with self._server_errors():
            if request.keys() & _CLIENT_OPTIONS:
                response = await self._async_client.chat.completions.create(**request)
            else:  # the typed method takes 75 % longer: it visits all messages, and builds a model of the answer
                response = await self._async_client.post("/chat/completions", cast_to=object, body=request)
            answer = read_response(response, self.config.format, _callable_tools(request, tools, options))
        return self._check(answer)

    def stream(
        self, messages: Sequence[Any], tools: Sequence[Any] | None = None, **options: Any
    ) -> Iterator[str | dict[str, Any]]:
        """Yields pieces of the content as they arrive, then the whole answer as from `completion`.

        Raises as `completion`, and `ServerError` if the stream breaks off.
        """
        request = self._request(messages, tools, options)
        answer = AnswerStream(self.config.format, _callable_tools(request, tools, options))
        with self._server_errors(), self._client.chat.completions.create(**request, stream=True) as chunks:
            for chunk in chunks:
                if piece := answer.add(chunk):
                    yield piece
        rest, response = self._finish(answer)
        if rest:
            yield rest
        yield self._check(response)

    async def astream(
        self, messages: Sequence[Any], tools: Sequence[Any] | None = None, **options: Any
    ) -> AsyncIterator[str | dict[str, Any]]:
        """`stream` without blocking."""
        request = self._request(messages, tools, options)
        answer = AnswerStream(self.config.format, _callable_tools(request, tools, options))
        with self._server_errors():
            async with await self._async_client.chat.completions.create(**request, stream=True) as chunks:
                async for chunk in chunks:
                    if piece := answer.add(chunk):
                        yield piece
        rest, response = self._finish(answer)
        if rest:
            yield rest
        yield self._check(response)

    def models(self) -> list[str]:
        """Returns the names of the server's models. Raises `ServerError`."""
        with self._server_errors():
            page = self._client.models.list()
            ids = [getattr(model, "id", None) for model in getattr(page, "data", None) or []]
        names = [name for name in ids if isinstance(name, str)]
        if not names:
            raise ServerError(f"{self.config.base_url}: lists no models; is it an OpenAI-compatible server, up to /v1?")
        return names

    def close(self) -> None:
        """Closes the connections. The next request opens new ones."""
        if (client := self.__dict__.pop("_client", None)) is not None:
            client.close()

    async def aclose(self) -> None:
        """Closes the connections of `acompletion` and `astream`. Call it in the event loop that they ran in."""
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
    def _server_errors(self) -> Iterator[None]:
        """Context manager that converts errors of the request and of the answer to `ServerError`."""
        import openai

        where = self.config.base_url
        try:
            yield
        except openai.APITimeoutError:
            raise ServerError(f"{where}: no answer within {self.config.timeout:g} seconds", kind="timeout") from None
        except openai.APIConnectionError as error:
            cause = f" ({error.__cause__})" if error.__cause__ else ""
            kind = "refused" if type(error.__cause__).__name__ == "ConnectError" else "broken-stream"
            message = f"{where}: cannot be reached, or closed the connection{cause}; is the server running?"
            raise ServerError(message, kind=kind) from None
        except openai.APIStatusError as error:
            raise ServerError(f"{where}: {_describe_status(error)}", error.status_code, _kind(error)) from None
        except openai.APIError as error:
            message = f"{where}: the server failed while answering: {error.message}"
            raise ServerError(message, kind="server-error") from None
        except MalformedAnswer as error:
            raise ServerError(f"{where}: {error}") from None
        except json.JSONDecodeError as error:
            raise ServerError(f"{where}: did not answer with JSON: {shorten(error.doc)!r}") from None
        except (UnicodeDecodeError, RecursionError) as error:
            raise ServerError(f"{where}: the answer cannot be decoded ({type(error).__name__})") from None

    def _finish(self, answer: AnswerStream) -> tuple[str, dict[str, Any]]:
        """Returns the rest of a stream's content, and the whole answer. Raises `ServerError` for a broken stream."""
        if (finished := answer.finish()) is None:
            raise ServerError(
                f"{self.config.base_url}: the stream broke off after {len(answer.content)} characters: "
                f"{shorten(answer.content)!r}; send the request again",
                kind="broken-stream",
            )
        return finished

    def _check(self, answer: dict[str, Any]) -> dict[str, Any]:
        """Returns the answer. Raises `BadOutput` if a choice has an error and `bad_output` is "raise"."""
        for choice in answer["choices"]:
            if "error" in choice and self.config.bad_output == "raise":
                raise BadOutput(f"{self.config.model}: {choice['error']}", answer)
        return answer


def _callable_tools(
    request: dict[str, Any], tools: Sequence[Any] | None, options: dict[str, Any]
) -> list[dict[str, Any]] | None:
    """Returns the tools that the answer may call, None if it may call none."""
    return request.get("tools", []) if may_call(tools, options.get("tool_choice")) else None


def to_openai(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Converts messages to OpenAI's format: arguments as JSON text, and an id for each call and its result."""
    converted: list[dict[str, Any]] = []
    pending_ids: list[str] = []  # ids of the calls that the following tool results answer, in order
    for turn, message in enumerate(messages):
        entry: dict[str, Any] = {"role": message.role, "content": message.content}
        if message.role == "tool" and pending_ids:
            entry["tool_call_id"] = pending_ids.pop(0)
        if message.name is not None:
            entry["name"] = message.name
        if message.reasoning:
            entry["reasoning_content"] = message.reasoning
        if message.tool_calls:
            ids = call_ids([call.id for call in message.tool_calls], turn)
            results = list(takewhile(lambda later: later.role == "tool", messages[turn + 1 :]))
            pending_ids = [ids[index] for index in answered_calls(message.tool_calls, results) or ()]
            entry["tool_calls"] = [
                {"id": id, "type": "function", "function": {"name": call.name, "arguments": arguments_json(call)}}
                for id, call in zip(ids, message.tool_calls, strict=True)
            ]
        converted.append(entry)
    return converted


def _describe_status(error: Any) -> str:
    """Returns an error message for a status other than 200, with advice if there is any."""
    reason = error.body.get("message") if isinstance(error.body, dict) else None
    reason = shorten(str(reason or error.body or error.message))
    advice = ""
    if _kind(error) == "over-length":
        advice = "; shorten the conversation or the tools, or request fewer tokens (max_tokens)"
    elif error.status_code == 404:
        advice = "; base_url must end in /v1, and model must be one of the names that models() returns"
    elif error.status_code in (401, 403):
        advice = f"; pass the server's api_key, or set {API_KEY}"
    return f"the server answered {error.status_code}: {reason}{advice}"


def _kind(error: Any) -> str:
    """Returns `ServerError.kind` for a status other than 200."""
    if error.status_code == 429:
        return "rate-limited"
    if error.status_code in (408, 409) or error.status_code >= 500:
        return "server-error"
    reason = str(error.body or error.message)
    too_long = re.search(r"context.{0,10}(length|window|size)|max_tokens|too long", reason) is not None
    return "over-length" if error.status_code in (400, 413, 422) and too_long else "bad-request"
