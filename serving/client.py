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
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from typing import TYPE_CHECKING, Any, Literal

from xlam_jax.data.trajectory import (
    InvalidTrajectory,
    Message,
    answered_calls,
    parse_json,
    parse_messages,
    parse_tools,
)
from xlam_jax.data.wire import TOOL_CALLS, CompletionStream, arguments_json, may_call, parse_completion
from xlam_jax.errors import UserError, check_address

if TYPE_CHECKING:
    from openai import AsyncOpenAI, OpenAI

_SHOWN = 300
"""Characters of a text in a message."""
_OF_THE_CLIENT = {"extra_body", "extra_headers", "extra_query", "timeout"}
"""Options that are no part of what is sent."""


class ServerError(UserError):
    """A server that cannot be reached, does not answer in time, refuses, or answers with what is no completion."""

    def __init__(self, message: str, status: int | None = None, kind: str = "malformed"):
        super().__init__(message)
        self.status = status
        """The HTTP status, where there was one."""
        self.kind = kind
        """refused (not reached), timeout, broken-stream (it hung up), rate-limited (429), server-error (5xx),
        over-length, bad-request (any other status), or malformed (what is no completion)."""


class BadOutput(UserError):  # noqa: N818 - as errors are named that are also returned as marks
    """A model's answer that is empty, or whose calls cannot be read. `answer` is what `completion` would return."""

    def __init__(self, message: str, answer: dict[str, Any]):
        super().__init__(message)
        self.answer = answer


API_KEY = "OPENAI_API_KEY"
"""The variable that holds the key of a server, as for OpenAI's own client."""


def checked_key(api_key: str | None) -> str:
    """A server's key: the given, else that of the environment, else EMPTY. Raises `UserError` for an invalid key."""
    name = API_KEY if api_key is None else "api_key"
    key = (os.environ.get(API_KEY) or "EMPTY") if api_key is None else api_key
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
    api_key: str | None = None
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

    def completion(
        self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]] | None = None, **options: Any
    ) -> dict[str, Any]:
        """Returns `{"choices": [{"message": {"role", "content", "tool_calls"}, "finish_reason"}], "usage"}`.

        Each call is `{"name", "arguments", "id"}`, arguments an object. `options` are further parameters of OpenAI's
        chat completions (temperature, max_tokens, tool_choice, …), which go before those of the config. Raises
        `UserError` for malformed messages and tools, `ServerError`, and `BadOutput`.
        """
        request = self._request(messages, tools, options)
        with self._told():
            response = self._client.chat.completions.create(**request)
        return self._checked(_read(response, self.config.base_url), may_call(tools, options.get("tool_choice")))

    async def acompletion(
        self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]] | None = None, **options: Any
    ) -> dict[str, Any]:
        """`completion` without blocking."""
        request = self._request(messages, tools, options)
        with self._told():
            if request.keys() & _OF_THE_CLIENT:
                response = await self._async_client.chat.completions.create(**request)
            else:  # the typed method takes three quarters longer: it walks through all messages, and models the answer
                response = await self._async_client.post("/chat/completions", cast_to=object, body=request)
        return self._checked(_read(response, self.config.base_url), may_call(tools, options.get("tool_choice")))

    def stream(
        self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]] | None = None, **options: Any
    ) -> Iterator[str | dict[str, Any]]:
        """Yields the content in pieces as it is written, and last what `completion` returns.

        Raises as `completion`, and `ServerError` where the stream breaks off.
        """
        request = self._request(messages, tools, options)
        answer = _Streamed(self.config, may_call(tools, options.get("tool_choice")))
        with self._told():
            with self._client.chat.completions.create(**request, stream=True) as chunks:
                for chunk in chunks:
                    if piece := answer.add(chunk):
                        yield piece
            rest, response = answer.finish()
        if rest:
            yield rest
        yield self._checked(response, may_call(tools, options.get("tool_choice")))

    async def astream(
        self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]] | None = None, **options: Any
    ) -> AsyncIterator[str | dict[str, Any]]:
        """`stream` without blocking."""
        request = self._request(messages, tools, options)
        answer = _Streamed(self.config, may_call(tools, options.get("tool_choice")))
        with self._told():
            async with await self._async_client.chat.completions.create(**request, stream=True) as chunks:
                async for chunk in chunks:
                    if piece := answer.add(chunk):
                        yield piece
            rest, response = answer.finish()
        if rest:
            yield rest
        yield self._checked(response, may_call(tools, options.get("tool_choice")))

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

    def _request(
        self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]] | None, options: dict[str, Any]
    ) -> dict[str, Any]:
        config = self.config
        if "stream" in options:
            raise UserError("completion() takes no `stream`; call stream() or astream()")
        defaults = {"temperature": config.temperature, "max_tokens": config.max_tokens}
        request = {key: value for key, value in defaults.items() if value is not None} | options
        try:
            turns = parse_messages([_message(message) for message in messages])
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
        except json.JSONDecodeError as error:
            raise ServerError(f"{where}: answered with what is no JSON: {_cut(error.doc)!r}") from None
        except (UnicodeDecodeError, RecursionError) as error:
            raise ServerError(f"{where}: answered with what cannot be read ({type(error).__name__})") from None

    def _checked(self, response: dict[str, Any], with_tools: bool) -> dict[str, Any]:
        """The answer with its calls parsed; bad output raised or marked."""
        choices = []
        for choice in response["choices"]:
            checked = _choice(choice, self.config.format, with_tools)
            choices.append(checked)
        answer = {"choices": choices, "usage": response.get("usage")}
        for choice in choices:
            if "error" in choice and self.config.bad_output == "raise":
                raise BadOutput(f"{self.config.model}: {choice['error']}", answer)
        return answer


def openai_tool(tool: Any) -> Any:
    """A tool in OpenAI form, from that or from a flat one; what is neither stays as it is."""
    if isinstance(tool, dict) and "function" not in tool and "name" in tool:
        return {"type": "function", "function": {key: value for key, value in tool.items() if key != "type"}}
    return tool


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
            ids = [f"call_{turn}_{at}" if call.id is None else call.id for at, call in enumerate(message.tool_calls)]
            results = list(takewhile(lambda after: after.role == "tool", messages[turn + 1 :]))
            answered = [ids[at] for at in answered_calls(message.tool_calls, results) or ()]
            one["tool_calls"] = [
                {"id": id, "type": "function", "function": {"name": call.name, "arguments": arguments_json(call)}}
                for id, call in zip(ids, message.tool_calls, strict=True)
            ]
        written.append(one)
    return written


def _message(message: Any) -> Any:
    """A message whose calls are a list in OpenAI form."""
    calls = message.get("tool_calls") if isinstance(message, dict) else None
    if isinstance(calls, dict):
        calls = [calls]
    if not isinstance(calls, list):
        return message
    return message | {"tool_calls": [_openai_call(call) for call in calls]}


def _openai_call(call: Any) -> Any:
    if not isinstance(call, dict) or "function" in call or "name" not in call:
        return call
    function = {key: value for key, value in call.items() if key not in ("id", "type")}
    return {"type": "function", "function": function} | ({"id": call["id"]} if call.get("id") is not None else {})


def _read(response: Any, where: str) -> dict[str, Any]:
    """The fields of a response that are used, from whatever the server sent."""
    sent = response.model_dump(warnings=False) if hasattr(response, "model_dump") else response
    choices = sent.get("choices") if isinstance(sent, dict) else None
    if not isinstance(choices, list) or not choices:
        raise ServerError(f"{where}: answered with what is no completion: {_cut(str(sent))!r}")
    for choice in choices:
        message = choice.get("message") if isinstance(choice, dict) else None
        if (
            not isinstance(message, dict)
            or not isinstance(message.get("content"), str | None)
            or not isinstance(message.get("tool_calls"), list | None)
        ):
            raise ServerError(f"{where}: answered with what is no completion: {_cut(str(sent))!r}")
    return sent


def _choice(choice: dict[str, Any], format: str, with_tools: bool) -> dict[str, Any]:
    """One choice in the shape that `completion` returns; `error` says what is bad about it."""
    sent = choice["message"]
    content, finish = sent.get("content") or "", choice.get("finish_reason")
    calls: list[dict[str, Any]] = []
    error = ""
    for call in sent.get("tool_calls") or []:
        function = call.get("function") if isinstance(call, dict) else None
        function = function if isinstance(function, dict) else {}
        name, text = function.get("name"), function.get("arguments")
        arguments: Any = None
        if isinstance(text, str):
            try:
                arguments = parse_json(text) if text.strip() else {}
            except InvalidTrajectory:
                arguments = None
        if not isinstance(name, str) or not isinstance(arguments, dict):
            error = error or f"the server sent a call that cannot be read: {_cut(json.dumps(call, default=str))}"
            arguments = text
        calls.append({"name": name, "arguments": arguments, "id": call.get("id") if isinstance(call, dict) else None})
    if not calls and (with_tools or format == "xlam_v1"):
        text = content
        content, found = parse_completion(text)
        calls = [{"name": call.name, "arguments": call.arguments, "id": call.id} for call in found or ()]
        if not calls and _meant_calls(text, content, format, cut_off=finish == "length"):
            error = f"the model's answer holds calls that cannot be read: {_cut(text)!r}"
    if not error and not calls and not content.strip():
        error = "the model's answer is empty" + (" (cut off at max_tokens)" if finish == "length" else "")
    if error and finish == "length" and "cut off" not in error:
        error += " (cut off at max_tokens)"
    message = {"role": "assistant", "content": content, "tool_calls": calls}
    checked: dict[str, Any] = {"message": message, "finish_reason": finish}
    if error:
        checked["error"] = error
    return checked


def _meant_calls(text: str, content: str, format: str, cut_off: bool) -> bool:
    """Whether a text in which no calls were found was meant to hold some."""
    if format == "xlam_v1":  # anything but the object is malformed
        return content == text and bool(text.strip())
    stream = CompletionStream()
    stream.feed(text)
    keys = ('"arguments"', '"tool_calls"', *(('"name"',) if cut_off else ()))
    return TOOL_CALLS in text or (stream.holding and content == text and any(key in text for key in keys))


class _Streamed:
    """A streamed answer as it is put together."""

    def __init__(self, config: xLAMConfig, with_tools: bool):
        self._where = config.base_url
        self._parsed = with_tools or config.format == "xlam_v1"
        self._stream = CompletionStream()
        self._released = 0
        self._text: list[str] = []
        self._calls: dict[int, dict[str, Any]] = {}
        self._arguments: dict[int, list[str]] = {}
        """In pieces: a text would be copied with each."""
        self._last = -1
        """The highest index in use."""
        self._at: dict[int, int] = {}
        """Where the call of an index is: servers exist that give all calls one index."""
        self._finish: str | None = None
        self._usage: Any = None

    def add(self, chunk: Any) -> str:
        """Takes a chunk; returns the content that is certain. Raises `ServerError` for what is none."""
        try:
            return self._add(chunk)
        except (AttributeError, TypeError):
            raise ServerError(f"{self._where}: streamed what is no completion: {_cut(str(chunk))!r}") from None

    def _add(self, chunk: Any) -> str:
        sent = chunk.model_dump(warnings=False) if hasattr(chunk, "model_dump") else chunk
        if not isinstance(sent, dict):
            raise ServerError(f"{self._where}: streamed what is no completion: {_cut(str(sent))!r}")
        self._usage = sent.get("usage") or self._usage
        piece = ""
        for choice in sent.get("choices") or []:
            if choice.get("index"):
                raise UserError("a stream of several choices can't be told apart; ask with n=1")
            delta = choice.get("delta") or {}
            self._finish = choice.get("finish_reason") or self._finish
            if text := delta.get("content"):
                self._text.append(text)
                piece += self._stream.feed(text) if self._parsed else text
            for call in delta.get("tool_calls") or []:
                self._add_call(call)
        self._released += len(piece)
        return piece

    def _add_call(self, call: dict[str, Any]) -> None:
        if not isinstance(index := call.get("index") or 0, int):
            raise TypeError(f"{index!r} is no index")
        at = self._at.get(index, index)
        before = self._calls.get(at, {}).get("id")
        if before and call.get("id") and call["id"] != before:  # another call, of a server that gives all one index
            at = self._last + 1
        self._at[index] = at
        self._last = max(self._last, at)
        known = self._calls.setdefault(at, {"id": None, "function": {"name": None, "arguments": ""}})
        function = call.get("function") or {}
        known["id"] = known["id"] or call.get("id")
        known["function"]["name"] = known["function"]["name"] or function.get("name")
        if not isinstance(arguments := function.get("arguments") or "", str):
            raise TypeError(f"{arguments!r} is not text")
        self._arguments.setdefault(at, []).append(arguments)

    def finish(self) -> tuple[str, dict[str, Any]]:
        """Returns the content that was held back, and the answer as `_read` gives it."""
        text = "".join(self._text)
        if self._finish is None:
            raise ServerError(
                f"{self._where}: the stream broke off after {len(text)} characters: {_cut(text)!r}; ask again",
                kind="broken-stream",
            )
        for at, call in self._calls.items():
            call["function"]["arguments"] = "".join(self._arguments[at])
        calls = [self._calls[at] for at in sorted(self._calls)]
        content = text if calls or not self._parsed else parse_completion(text)[0]
        message = {"role": "assistant", "content": text, "tool_calls": calls}
        choice = {"message": message, "finish_reason": self._finish}
        return content[self._released :], {"choices": [choice], "usage": self._usage}


def _refusal(error: Any) -> str:
    """What a status other than 200 means to a user."""
    said = error.body.get("message") if isinstance(error.body, dict) else None
    said = _cut(str(said or error.body or error.message))
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


def _cut(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]} … ({len(text)} characters)"
