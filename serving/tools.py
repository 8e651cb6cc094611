"""Tools that are Python functions, and the loop in which a served model calls them.

from xlam_jax.client.completion import xLAMChatCompletion
from serving.tools import run_tools

def get_weather(city: str, unit: Literal["C", "F"] = "C") -> dict:
    "Current weather."
    return {"t": 3, "unit": unit}

done = run_tools(xLAMChatCompletion("http://localhost:8000/v1", "xlam"), messages, [get_weather])
done.content, done.messages
"""

import inspect
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from xlam_jax import user_code
from xlam_jax.client.completion import xLAMChatCompletion
from xlam_jax.data.messages import call_ids, openai_tool
from xlam_jax.data.parse import parse_tools
from xlam_jax.data.trajectory import InvalidTrajectory
from xlam_jax.errors import UserError, nearest

Missing = Callable[[str, dict[str, Any]], str]
"""Gives the result of a call: (name, arguments) → text."""


@dataclass(frozen=True)
class Tool:
    """A tool schema in OpenAI form, and the function behind it; None where there is only the schema."""

    schema: dict[str, Any]
    function: Callable[..., Any] | None = None

    @property
    def name(self) -> str:
        """The name by which models call it."""
        return self.schema["function"]["name"]

    def check(self, arguments: dict[str, Any]) -> str:
        """What is wrong with arguments under the tool's JSON Schema, in words; empty where nothing is."""
        from xlam_jax.data.schemas import compiled

        problems = compiled(json.dumps(self.schema["function"].get("parameters"))).check(arguments)
        return "; ".join(problem.detail for problem in problems)


@dataclass(frozen=True)
class Loop:
    """How a conversation with tools ended."""

    messages: list[dict[str, Any]]
    """The whole conversation, to be continued."""
    content: str
    """What the model said last."""
    ended: Literal["answered", "refused", "max_turns", "length", "bad_output"]
    """answered: in words; refused: the server marked the answer as a refusal; max_turns: it would still have called
    tools; length: cut off at max_tokens; bad_output: the answer is empty or its calls cannot be read, and `llm` is to
    mark that instead of raising it."""


def as_tool(function: Callable[..., Any]) -> Tool:
    """A tool from a function: its name, its docstring, and the JSON Schema of its annotated parameters.

    Raises `UserError` for parameters that cannot be told by name, or whose type has no JSON Schema.
    """
    from pydantic import ConfigDict, create_model
    from pydantic.errors import PydanticUserError

    name = getattr(function, "__name__", repr(function))
    if inspect.iscoroutinefunction(function):
        raise UserError(f"tool {name}: is a coroutine function; give one that returns its result")
    fields: dict[str, Any] = {}
    for parameter in inspect.signature(function, eval_str=True).parameters.values():
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise UserError(f"tool {name}: parameter '{parameter}' has no name to give it by; write it out")
        annotation = Any if parameter.annotation is parameter.empty else parameter.annotation
        fields[parameter.name] = (annotation, ... if parameter.default is parameter.empty else parameter.default)
    try:
        model = create_model(name, __config__=ConfigDict(extra="forbid"), **fields)
        parameters = model.model_json_schema()
    except (PydanticUserError, NameError) as error:
        raise UserError(f"tool {name}: its parameters have no JSON Schema: {error}") from None
    schema = _without_titles({key: value for key, value in parameters.items() if key != "description"})
    described = {"name": name, "description": inspect.getdoc(function) or ""}
    return Tool({"type": "function", "function": described | {"parameters": schema}}, function)


def load_tools(path: Path) -> list[Tool]:
    """The tools of a file: JSON (a list of schemas, flat or in OpenAI form), or Python.

    Of a Python file it is what `TOOLS` lists, or else each public function that it defines. Raises `UserError`.
    """
    if path.suffix == ".py":
        return [one if isinstance(one, Tool) else as_tool(one) for one in _functions(path)]
    from xlam_jax.documents import read_json

    given = read_json(path)
    if not isinstance(given, list):
        raise UserError(f"{path}: holds a {type(given).__name__}; a list of tool schemas is expected")
    try:
        return [Tool(schema) for schema in parse_tools([openai_tool(one) for one in given])]
    except InvalidTrajectory as invalid:
        raise UserError(f"{path}: {invalid.detail}") from None


def call_tool(tools: Iterable[Tool], name: str, arguments: Any, missing: Missing | None = None) -> str:
    """Runs the tool that a model called; its result as text, JSON where it is none.

    What the model did wrong, and what the function raised, come back as `{"error": …}`, for the model to read.
    `missing` gives the result of a tool that has no function; without it such a tool is a `UserError`.
    """
    known = {tool.name: tool for tool in tools}
    tool = known.get(name)
    if tool is None:
        return _error(f"there is no tool '{name}'; there are: {', '.join(known)}{nearest(str(name), known)}")
    if not isinstance(arguments, dict):
        return _error(f"the arguments of {name} are no JSON object: {arguments!r}")
    if problem := tool.check(arguments):
        return _error(problem)
    if tool.function is None:
        if missing is None:
            raise UserError(f"tool '{name}' is only a schema; give the function that it stands for")
        return missing(name, arguments)
    try:
        result = tool.function(**arguments)
        return result if isinstance(result, str) else json.dumps(result, ensure_ascii=False, default=str)
    except Exception as error:  # whatever a tool raises is its answer
        return _error(f"{type(error).__name__}: {error}")


def run_tools(
    llm: xLAMChatCompletion,
    messages: Sequence[dict[str, Any]],
    tools: Iterable[Tool | Callable[..., Any]],
    *,
    max_turns: int = 8,
    told: Callable[[dict[str, Any]], object] | None = None,
    written: Callable[[str], object] | None = None,
    missing: Missing | None = None,
    **options: Any,
) -> Loop:
    """Lets a model call tools until it answers in words, `max_turns` answers at most.

    Each message that is added is passed to `told`. With `written` answers are streamed, and it gets their content in
    pieces. `missing(name, arguments)` gives the results of tools without a function. `options` go to `completion`,
    whose errors are raised.
    """
    known = [one if isinstance(one, Tool) else as_tool(one) for one in tools]
    schemas = [tool.schema for tool in known]
    conversation = list(messages)

    def add(message: dict[str, Any]) -> None:
        conversation.append(message)
        if told is not None:
            told(message)

    content = ""
    for _ in range(max_turns):
        choice = _answer(llm, conversation, schemas, written, options)
        content = choice["message"]["content"]
        calls = choice["message"]["tool_calls"]
        ids = call_ids([call["id"] for call in calls], len(conversation))
        calls = [call | {"id": id} for call, id in zip(calls, ids, strict=True)]
        refused = {key: text for key, text in choice["message"].items() if key == "refusal"}
        add({"role": "assistant", "content": content} | refused | ({"tool_calls": calls} if calls else {}))
        if not calls:
            return Loop(conversation, content, _ending(choice))
        for call in calls:
            result = call_tool(known, call["name"], call["arguments"], missing)
            add({"role": "tool", "tool_call_id": call["id"], "name": call["name"], "content": result})
    return Loop(conversation, content, "max_turns")


def _answer(
    llm: xLAMChatCompletion,
    messages: list[dict[str, Any]],
    schemas: list[dict[str, Any]],
    written: Callable[[str], object] | None,
    options: dict[str, Any],
) -> dict[str, Any]:
    if written is None:
        return llm.completion(messages, schemas, **options)["choices"][0]
    answer: dict[str, Any] = {}
    for piece in llm.stream(messages, schemas, **options):
        if isinstance(piece, str):
            written(piece)
        else:
            answer = piece["choices"][0]
    return answer


def _ending(choice: dict[str, Any]) -> Literal["answered", "refused", "length", "bad_output"]:
    """How an answer without calls ends the conversation."""
    if choice["finish_reason"] == "length":
        return "length"
    if "error" in choice:
        return "bad_output"
    return "refused" if "refusal" in choice["message"] else "answered"


def _error(text: str) -> str:
    return json.dumps({"error": text}, ensure_ascii=False)


def _functions(path: Path) -> list[Any]:
    module = user_code.load(path, "a Python file with functions")
    found = getattr(module, "TOOLS", None)
    if found is None:
        found = [
            value
            for name, value in vars(module).items()
            if inspect.isfunction(value) and value.__module__ == module.__name__ and not name.startswith("_")
        ]
    if not found:
        raise UserError(f"{path}: defines no public function; each becomes a tool")
    return list(found)


def _without_titles(schema: Any) -> Any:
    """Pydantic's schema without the titles that it makes of names."""
    if isinstance(schema, list):
        return [_without_titles(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    kept = {key: value for key, value in schema.items() if key != "title" or not isinstance(value, str)}
    return {
        key: {name: _without_titles(one) for name, one in value.items()}
        if key in ("properties", "$defs") and isinstance(value, dict)
        else value
        if key in ("default", "enum", "const", "examples")
        else _without_titles(value)
        for key, value in kept.items()
    }
