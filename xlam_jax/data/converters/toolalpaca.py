"""ToolAlpaca: simulated use of public APIs (Tang et al. 2023, arXiv:2306.05301), one API with its tasks per row.

Raw: a JSON list of {"Name", "Documentation": an OpenAPI document in a string, "Function_Projection": {function: [path,
method]}, "Function_Description", …}, with "Instances" [{"input", "output", "intermediate_steps": [[[action, action
input, log], observation], …]}, …] in training data, or "Instructions" and "Golden_Answers" [[{"Action",
"Action_Input"}, …], …] in evaluation data.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from xlam_jax.data.converters.common import (
    Converted,
    Dropped,
    Repaired,
    StepDropped,
    call,
    convert_rows,
    declared_arguments,
    field,
    json_schema,
    tool,
)
from xlam_jax.data.row_json import decode_arguments, parse_json
from xlam_jax.data.trajectory import InvalidTrajectory

INSTRUCTION = "Answer the user's request with the tools. Ask for what is missing; make nothing up."
ASK = "getDetails"
ASK_TOOL = tool(
    ASK,
    "Ask the user for information that is needed and missing.",
    {"Question": {"type": "string", "description": "The question to the user."}},
    ["Question"],
)
PLACEHOLDER = "${"
STOPPED = "Agent stopped due to"  # replaces the answer after too many steps
NODES, LEVELS = 10_000, 20  # maximum number of schemas of a document, and of nested ones; references can be endless

Item = dict[str, Any] | StepDropped | Repaired | InvalidTrajectory


def convert(paths: list[Path]) -> Iterator[Converted | Dropped]:
    """Converts each task to a trajectory; tools are `getDetails` and the API's functions, with the document's types.

    Instances: actions become calls with their thought as text, and the output becomes the last turn. Its thought and
    hints in the input are dropped, and so are steps whose action or input the environment could not read.
    Golden answers have no results: the calls become one turn, up to the first call with placeholders as arguments or
    after a question to the user. The calls from there on are dropped, and so is a task without remaining calls.
    Numbers in text become numbers; empty texts of optional arguments are dropped.
    """
    return convert_rows(paths, convert_row)


def convert_row(row: dict[str, Any], name: str) -> Iterator[Item]:
    """Converts the tasks of one API; yields `InvalidTrajectory` for each task that is dropped."""
    tools = _tools(row)
    instances = row.get("Instances") or []
    if not isinstance(instances, list):
        raise InvalidTrajectory("missing-field", f"`Instances` is a {type(instances).__name__}, not a list")
    if instances:
        tasks = [_instance(instance, tools) for instance in instances]
    else:
        instructions, answers = field(row, "Instructions", list), field(row, "Golden_Answers", list)
        if len(instructions) != len(answers):
            raise InvalidTrajectory("uneven-lists", f"{len(instructions)} instructions, {len(answers)} golden answers")
        tasks = [_golden(*task, tools) for task in zip(instructions, answers, strict=True)]
    for i, task in enumerate(tasks):
        try:
            for item in task:
                if isinstance(item, list):
                    yield {
                        "unique_trajectory_id": f"toolalpaca_{name}_{i}",
                        "source": "toolalpaca",
                        "task_instruction": INSTRUCTION,
                        "tools": list(tools.values()),
                        "conversation": item,
                    }
                else:
                    yield item
        except InvalidTrajectory as invalid:  # the API's other tasks may be valid
            yield invalid


def _instance(
    instance: Any, tools: dict[str, dict[str, Any]]
) -> Iterator[list[dict[str, Any]] | StepDropped | Repaired]:
    request = field(instance, "input", str)
    turns: list[dict[str, Any]] = [{"role": "user", "content": (request.rpartition("\nHint: ")[0] or request).strip()}]
    number = 0
    for i, step in enumerate(field(instance, "intermediate_steps", list)):
        match step:
            case [[str(action), str(text), str(log), *_], observation]:
                pass
            case _:
                raise InvalidTrajectory("bad-step", f"step {i} is not [[action, input, log], observation]")
        if action not in tools:
            yield StepDropped("unknown-action", f"step {i}: {action[:200]}")
            continue
        try:
            arguments, repairs = _arguments(action, text, tools)
        except InvalidTrajectory as invalid:
            yield StepDropped(invalid.reason, f"step {i}: {invalid.detail}")
            continue
        yield from repairs
        number += 1
        turns.append({"role": "assistant", "content": _thought(log), "tool_calls": [call(number, action, arguments)]})
        turns.append({"role": "tool", "tool_call_id": f"call_{number}", "name": action, "content": observation})
    if number == 0:
        raise InvalidTrajectory("no-tool-call", "no step calls a tool")
    output = instance.get("output")
    if isinstance(output, str) and output.strip() and not output.startswith(STOPPED):
        turns.append({"role": "assistant", "content": output.strip()})
    else:
        yield StepDropped("no-answer", f"the output is {str(output)[:200]!r}")
        turns.pop()
    yield turns


def _golden(
    instruction: Any, answer: Any, tools: dict[str, dict[str, Any]]
) -> Iterator[list[dict[str, Any]] | StepDropped | Repaired]:
    if not isinstance(instruction, str) or not isinstance(answer, list):
        raise InvalidTrajectory("missing-field", "an instruction is not text, or its golden answer is not a list")
    calls: list[dict[str, Any]] = []
    waits = ""
    for i, step in enumerate(answer):
        action, text = field(step, "Action", str), field(step, "Action_Input", str)
        if waits:
            yield StepDropped("after-missing-result", f"step {i}: '{action[:200]}' comes after {waits}")
        elif action.startswith("[Optional]"):
            yield StepDropped("optional-step", f"step {i}: {action[:200]}")
        elif PLACEHOLDER in text:
            waits = f"'{action[:200]}' with {text[:200]}"
            if not calls:
                raise InvalidTrajectory("placeholder-argument", waits)
            yield StepDropped("placeholder-argument", f"step {i}: {waits}")
        elif action not in tools:
            raise InvalidTrajectory("undeclared-tool", f"step {i} calls '{action}'")
        else:
            arguments, repairs = _arguments(action, text, tools)
            yield from repairs
            calls.append(call(len(calls) + 1, action, arguments))
            waits = f"'{ASK}', whose answer is not recorded" if action == ASK else ""
    if not calls:
        raise InvalidTrajectory("no-tool-call", "the golden answer has no call")
    yield [{"role": "user", "content": instruction}, {"role": "assistant", "content": "", "tool_calls": calls}]


def _thought(log: str) -> str:
    """Returns the text before "Action: … Action Input: …"."""
    log = "\n" + log.replace("\nASSISTANT Action", "\nAction")
    head = log.rpartition("\nAction Input:")[0] or log
    return head.rpartition("\nAction:")[0].strip().removeprefix("Thought:").strip()


def _arguments(name: str, text: str, tools: dict[str, dict[str, Any]]) -> tuple[dict[str, Any], list[Repaired]]:
    """Returns (arguments in `text` with their declared types, repairs). Raises `InvalidTrajectory`."""
    repairs: list[Repaired] = []
    raw = decode_arguments(text, f"'{name}' has", lambda reason, detail: repairs.append(Repaired(reason, detail)))
    if not isinstance(raw, dict):
        raise InvalidTrajectory("bad-arguments", f"'{name}' has a {type(raw).__name__}, not an object: {text[:200]}")
    parameters = tools[name]["function"]["parameters"]
    properties, required = parameters["properties"], parameters["required"]
    arguments, changes = declared_arguments(name, raw, properties)
    for key in [key for key, value in arguments.items() if value == "" and key not in required]:
        schema = properties.get(key, {})
        if "" not in schema.get("enum", [""]) or schema.get("type", "string") != "string":
            del arguments[key]
            changes.append(Repaired("empty-option", f"'{name}' has an empty `{key}`, which must not be empty"))
    return arguments, repairs + changes


def _tools(row: dict[str, Any]) -> dict[str, dict[str, Any]]:
    document = parse_json(field(row, "Documentation", str))
    paths = field(document, "paths", dict)
    components = _Components(_object(_object(document.get("components")).get("schemas")))
    descriptions = _object(row.get("Function_Description"))
    tools = {ASK: ASK_TOOL}
    for name, place in field(row, "Function_Projection", dict).items():
        match place:
            case [str(path), str(method)]:
                pass
            case _:
                raise InvalidTrajectory("bad-tools", f"'{name}' is at {place!r}, not at a path and method")
        item = field(paths, path, dict)
        operation = field(item, method, dict)
        description = descriptions.get(name) or operation.get("summary") or operation.get("description") or ""
        properties, required = components.parameters(
            [*_list(operation.get("parameters")), *_list(item.get("parameters"))], _object(operation.get("requestBody"))
        )
        tools[name] = tool(name, str(description).partition("\nParameters:")[0].strip(), properties, required)
    return tools


class _Components:
    """The named schemas of an OpenAPI document, which replace references to them."""

    def __init__(self, schemas: dict[str, Any]):
        self._schemas = schemas
        self._left = NODES

    def parameters(self, parameters: list[Any], body: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
        """Returns (properties, required names) of an operation's parameters and request body."""
        properties: dict[str, Any] = {}
        required: list[str] = []
        for parameter in parameters:
            if not isinstance(parameter, dict) or not isinstance(parameter.get("name"), str):
                continue
            schema = self.schema(parameter.get("schema"))
            if isinstance(parameter.get("description"), str):
                schema["description"] = parameter["description"]
            if parameter["name"] not in properties and parameter.get("required") is True:
                required.append(parameter["name"])
            properties.setdefault(parameter["name"], schema)
        for content in list(_object(body.get("content")).values())[:1]:
            schema = self.schema(_object(content).get("schema"))
            properties |= schema.get("properties", {})
            required += [name for name in schema.get("required", []) if name not in required]
        return properties, required

    def schema(self, raw: Any, inside: frozenset[str] = frozenset(), levels: int = LEVELS) -> dict[str, Any]:
        """Converts `raw` to JSON Schema; unknown types and recursive schemas become {}, which allows any value."""
        self._left -= 1
        if not isinstance(raw, dict) or self._left < 0 or levels < 0:
            return {}
        reference = raw.get("$ref")
        if isinstance(reference, str):
            name = reference.rpartition("/")[2]
            return {} if name in inside else self.schema(self._schemas.get(name), inside | {name}, levels - 1)
        schema: dict[str, Any] = json_schema(raw["type"])[0] if isinstance(raw.get("type"), str) else {}
        for key, kind in (("description", str), ("format", str), ("enum", list)):
            if isinstance(raw.get(key), kind) and raw[key]:
                schema[key] = raw[key]
        if isinstance(raw.get("items"), dict):
            schema["items"] = self.schema(raw["items"], inside, levels - 1)
        if isinstance(raw.get("properties"), dict):
            schema["properties"] = {
                key: self.schema(value, inside, levels - 1) for key, value in raw["properties"].items()
            }
            required = [name for name in schema["properties"] if name in _list(raw.get("required"))]
            if required:
                schema["required"] = required
        return schema


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
