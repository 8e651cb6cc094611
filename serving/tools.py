"""Python functions as tools, and the loop in which a served model calls them.

from xlam_jax.client.completion import xLAMChatCompletion
from serving.tools import run_tools

def get_weather(city: str, unit: Literal["C", "F"] = "C") -> dict:
    "Current weather."
    return {"t": 3, "unit": unit}

result = run_tools(xLAMChatCompletion("http://localhost:8000/v1", "xlam"), messages, [get_weather])
result.content, result.messages
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

MissingResult = Callable[[str, dict[str, Any]], str]
"""Returns the result of a call to a tool without a function: (name, arguments) → text."""


@dataclass(frozen=True)
class Tool:
    """A tool: its schema in OpenAI's format, and its function."""

    schema: dict[str, Any]
    function: Callable[..., Any] | None = None
    """None if there is only the schema."""

    @property
    def name(self) -> str:
        """The name by which models call the tool."""
        return self.schema["function"]["name"]

    def check(self, arguments: dict[str, Any]) -> str:
        """Validates arguments against the tool's JSON Schema. Returns the problems as text, empty if there are none."""
        from xlam_jax.data.schemas import compiled

        problems = compiled(json.dumps(self.schema["function"].get("parameters"))).check(arguments)
        return "; ".join(problem.detail for problem in problems)


@dataclass(frozen=True)
class LoopResult:
    """The result of a conversation with tools."""

    messages: list[dict[str, Any]]
    """The whole conversation, which can be continued."""
    content: str
    """Content of the model's last answer."""
    ended: Literal["answered", "refused", "max_turns", "length", "bad_output"]
    """answered: an answer without calls; refused: the server marked the answer as a refusal; max_turns: the last
    allowed answer still called tools; length: cut off at max_tokens; bad_output: the answer is empty or its calls
    cannot be read, and `llm` marks such answers instead of raising."""


def as_tool(function: Callable[..., Any]) -> Tool:
    """Makes a tool of a function: its name, its docstring, and the JSON Schema of its annotated parameters.

    Raises `UserError` for coroutine functions, parameters that can't be passed by name, and types without JSON Schema.
    """
    from pydantic import ConfigDict, create_model
    from pydantic.errors import PydanticUserError

    name = getattr(function, "__name__", repr(function))
    if inspect.iscoroutinefunction(function):
        raise UserError(f"tool {name}: is a coroutine function; use a function that returns its result")
    fields: dict[str, Any] = {}
    for parameter in inspect.signature(function, eval_str=True).parameters.values():
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise UserError(
                f"tool {name}: parameter '{parameter}' cannot be passed by name; declare each argument by name"
            )
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
    """Loads tools from a JSON file (a list of schemas, flat or in OpenAI's format), or from a Python file.

    From a Python file, the tools are those in its `TOOLS`, or else all public functions that it defines. Raises
    `UserError`.
    """
    if path.suffix == ".py":
        return [item if isinstance(item, Tool) else as_tool(item) for item in _functions(path)]
    from xlam_jax.documents import read_json

    schemas = read_json(path)
    if not isinstance(schemas, list):
        raise UserError(f"{path}: contains a {type(schemas).__name__}; a list of tool schemas is expected")
    try:
        return [Tool(schema) for schema in parse_tools([openai_tool(schema) for schema in schemas])]
    except InvalidTrajectory as invalid:
        raise UserError(f"{path}: {invalid.detail}") from None


def call_tool(tools: Iterable[Tool], name: str, arguments: Any, missing_result: MissingResult | None = None) -> str:
    """Runs the tool that a model called. Returns its result: a string as it is, any other value as JSON.

    Invalid calls, and exceptions of the function, are returned as `{"error": …}` for the model to read.
    `missing_result` returns the result of a tool without a function. Raises `UserError` for such a tool if it is None.
    """
    by_name = {tool.name: tool for tool in tools}
    tool = by_name.get(name)
    if tool is None:
        return _error(f"there is no tool '{name}'; there are: {', '.join(by_name)}{nearest(str(name), by_name)}")
    if not isinstance(arguments, dict):
        return _error(f"the arguments of {name} are not a JSON object: {arguments!r}")
    if problem := tool.check(arguments):
        return _error(problem)
    if tool.function is None:
        if missing_result is None:
            raise UserError(f"tool '{name}' is only a schema; pass its function")
        return missing_result(name, arguments)
    try:
        result = tool.function(**arguments)
        return result if isinstance(result, str) else json.dumps(result, ensure_ascii=False, default=str)
    except Exception as error:  # the model receives any exception as the result
        return _error(f"{type(error).__name__}: {error}")


def run_tools(
    llm: xLAMChatCompletion,
    messages: Sequence[dict[str, Any]],
    tools: Iterable[Tool | Callable[..., Any]],
    *,
    max_turns: int = 8,
    on_message: Callable[[dict[str, Any]], object] | None = None,
    on_text: Callable[[str], object] | None = None,
    missing_result: MissingResult | None = None,
    **options: Any,
) -> LoopResult:
    """Lets a model call tools until it answers without calls, or for `max_turns` answers.

    `on_message` is called with each new message. If `on_text` is given, answers are streamed, and it is called with
    pieces of their content. `missing_result` returns the results of tools without a function. `options` are passed to
    `completion` or `stream`. Raises their errors, and `UserError` as `call_tool`.
    """
    loaded = [tool if isinstance(tool, Tool) else as_tool(tool) for tool in tools]
    schemas = [tool.schema for tool in loaded]
    conversation = list(messages)

    def add(message: dict[str, Any]) -> None:
        conversation.append(message)
        if on_message is not None:
            on_message(message)

    content = ""
    for _ in range(max_turns):
        choice = _answer(llm, conversation, schemas, on_text, options)
        content = choice["message"]["content"]
        calls = choice["message"]["tool_calls"]
        ids = call_ids([call["id"] for call in calls], len(conversation))
        calls = [call | {"id": id} for call, id in zip(calls, ids, strict=True)]
        refusal = {key: text for key, text in choice["message"].items() if key == "refusal"}
        add({"role": "assistant", "content": content} | refusal | ({"tool_calls": calls} if calls else {}))
        if not calls:
            return LoopResult(conversation, content, _ending(choice))
        for call in calls:
            result = call_tool(loaded, call["name"], call["arguments"], missing_result)
            add({"role": "tool", "tool_call_id": call["id"], "name": call["name"], "content": result})
    return LoopResult(conversation, content, "max_turns")


def _answer(
    llm: xLAMChatCompletion,
    messages: list[dict[str, Any]],
    schemas: list[dict[str, Any]],
    on_text: Callable[[str], object] | None,
    options: dict[str, Any],
) -> dict[str, Any]:
    if on_text is None:
        return llm.completion(messages, schemas, **options)["choices"][0]
    answer: dict[str, Any] = {}
    for piece in llm.stream(messages, schemas, **options):
        if isinstance(piece, str):
            on_text(piece)
        else:
            answer = piece["choices"][0]
    return answer


def _ending(choice: dict[str, Any]) -> Literal["answered", "refused", "length", "bad_output"]:
    """Returns `LoopResult.ended` for an answer without calls."""
    if choice["finish_reason"] == "length":
        return "length"
    if "error" in choice:
        return "bad_output"
    return "refused" if "refusal" in choice["message"] else "answered"


def _error(text: str) -> str:
    return json.dumps({"error": text}, ensure_ascii=False)


def _functions(path: Path) -> list[Any]:
    module = user_code.load(path, "a Python file with functions")
    functions = getattr(module, "TOOLS", None)
    if functions is None:
        functions = [
            value
            for name, value in vars(module).items()
            if inspect.isfunction(value) and value.__module__ == module.__name__ and not name.startswith("_")
        ]
    if not functions:
        raise UserError(f"{path}: defines no tool; add a public function")
    return list(functions)


def _without_titles(schema: Any) -> Any:
    """Returns Pydantic's schema without the titles that it derives from names."""
    if isinstance(schema, list):
        return [_without_titles(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    kept = {key: value for key, value in schema.items() if key != "title" or not isinstance(value, str)}
    return {
        key: {name: _without_titles(item) for name, item in value.items()}
        if key in ("properties", "$defs") and isinstance(value, dict)
        else value
        if key in ("default", "enum", "const", "examples")
        else _without_titles(value)
        for key, value in kept.items()
    }
