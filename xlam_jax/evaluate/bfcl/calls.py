"""Functions and calls in BFCL's two modes: tools of the request (fc), or Python source in the text (prompt)."""

import ast
import builtins
import json
import keyword
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from xlam_jax.evaluate.arithmetic import evaluate
from xlam_jax.evaluate.bfcl.package import prompts

Call = tuple[str, dict[str, Any]]
"""A function's name and its arguments."""

_TYPES = {
    **dict.fromkeys(("integer", "byte", "short", "long", "Bigint"), "integer"),
    **dict.fromkeys(("number", "float", "double"), "number"),
    **dict.fromkeys(("boolean", "bool", "Boolean"), "boolean"),
    **dict.fromkeys(("array", "list", "tuple", "ArrayList", "Array", "Queue", "Stack"), "array"),
    **dict.fromkeys(("dict", "object", "HashMap", "Hashtable"), "object"),
}
"""BFCL's type → JSON Schema's; all others, including `any`, are strings, as in BFCL's own handlers."""


class NoCalls(ValueError):  # noqa: N818 - most of these answers are not errors
    """A text that is not a list of calls."""


def tools(functions: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Converts functions to OpenAI form, with the types of JSON Schema, and names without dots."""
    return [{"type": "function", "function": _tool(function)} for function in functions]


def tool_name(name: str) -> str:
    """Converts a function's name to one that is valid for OpenAI's tools."""
    return name.replace(".", "_")


def _tool(function: Mapping[str, Any]) -> dict[str, Any]:
    parameters = function["parameters"]
    properties = {name: _schema(parameter) for name, parameter in parameters["properties"].items()}
    return {
        **function,
        "name": tool_name(function["name"]),
        "parameters": {**parameters, "type": "object", "properties": properties},
    }


def _schema(parameter: Mapping[str, Any], is_item: bool = False) -> dict[str, Any]:
    """Returns the schema of a parameter, or of a list's items. The description of items does not mention floats."""
    kind = parameter.get("type")
    schema = {**parameter, "type": _TYPES.get(kind, "string") if isinstance(kind, str) else "string"}
    if kind == "float" and not is_item:
        schema["format"] = "float"
        schema["description"] = f"{parameter.get('description', '')} This is a float type value."
    if isinstance(properties := parameter.get("properties"), dict):
        schema["properties"] = {name: _schema(nested) for name, nested in properties.items()}
    if isinstance(items := parameter.get("items"), dict):
        schema["items"] = _schema(items, is_item=True)
    return schema


def system_prompt(functions: Sequence[Mapping[str, Any]]) -> str:
    """Returns BFCL's default prompt (plain text, Python calls, functions as JSON)."""
    texts = prompts()
    style = texts.PROMPT_STYLE_TEMPLATES["classic"]
    language = "python"
    return texts.PROMPT_TEMPLATE_MAPPING["plaintext"].format(
        persona=style["persona"],
        task=style["task"],
        tool_call_format=style["tool_call_no_tag"].format(
            output_format=texts.OUTPUT_FORMAT_MAPPING[language], param_types=texts.PARAM_TYPE_MAPPING[language]
        ),
        multiturn_behavior=style["multiturn_behavior"],
        available_tools=style["available_tools"].format(format="json", functions=json.dumps(functions, indent=4)),
    )


def parse(text: str, language: str) -> list[Call]:
    """Parses the calls of an answer such as `[area(base=10, height=5)]`, without executing code. Raises `NoCalls`.

    Java and JavaScript: one call. Arguments remain the source text of their literals, strings without quotes.
    """
    text = text.strip("`\n ")
    text = text if text.startswith("[") else f"[{text}"
    text = text if text.endswith("]") else f"{text}]"
    if language != "python":
        return _parse_literals(text[1:-1].strip())
    try:
        body = ast.parse(text.strip().strip("'"), mode="eval").body
        calls = [body] if isinstance(body, ast.Call) else getattr(body, "elts", None)
        if calls is None or not all(isinstance(node, ast.Call) for node in calls):
            raise NoCalls("not a list of calls")
        return [_call(node) for node in calls]
    except (SyntaxError, ValueError, TypeError, ArithmeticError, RecursionError, MemoryError) as error:
        raise NoCalls(str(error)) from None


def _call(node: ast.Call) -> Call:
    """Converts a parsed call. Positional arguments are ignored, as in BFCL."""
    parts: list[str] = []
    function: ast.expr = node.func
    while isinstance(function, ast.Attribute):
        parts.append(function.attr)
        function = function.value
    if isinstance(function, ast.Name):
        parts.append(function.id)
    return ".".join(reversed(parts)), {str(keyword.arg): _value(keyword.value) for keyword in node.keywords}


def _value(node: ast.expr) -> Any:
    """Returns an argument's value by BFCL's rules: names become strings, and calls become `{name: arguments}`."""
    match node:
        case ast.Constant(value=value):
            return "..." if value is Ellipsis else value
        case ast.UnaryOp(operand=ast.Constant(value=int() | float() as value)):
            return -value  # whatever the operator
        case ast.List(elts=elements):
            return [_value(element) for element in elements]
        case ast.Tuple(elts=elements):
            return tuple(_value(element) for element in elements)
        case ast.Dict(keys=keys, values=values):
            return {_value(key): _value(element) for key, element in zip(keys, values, strict=True) if key is not None}
        case ast.Name(id=name):
            return name
        case ast.Call(keywords=[]):
            return ast.unparse(node)
        case ast.Call():
            name, arguments = _call(node)
            return {name: arguments}
        case ast.Subscript():
            return ast.unparse(node)
        case ast.BinOp():
            return evaluate(node)
    raise NoCalls(f"{type(node).__name__} is not an argument")


def _parse_literals(text: str) -> list[Call]:
    """Parses the single call of a Java or JavaScript answer."""
    match = re.match(r"(?:new\s+)?([\w$.]+)\s*\((.*)\)\s*+;?\s*+$", text, re.DOTALL)
    if match is None:
        raise NoCalls("no call")
    arguments: dict[str, Any] = {}
    for part in _split_arguments(match[2]):
        name, equals, value = part.partition("=")
        name, value = name.strip(), value.strip()
        if not equals or not re.fullmatch(r"[\w$]+", name):
            continue  # positional arguments are ignored, as in Python
        if name in arguments:
            raise NoCalls(f"two values for {name}")
        quoted = len(value) > 1 and value[0] in "\"'" and _find_string_end(value, 0) == len(value)
        arguments[name] = value[1:-1] if quoted else value
    return [(match[1], arguments)]


_TYPE_ARGUMENTS = re.compile(r"(?<=\w)<[\w\s,.<>?\[\]]*+")


def _split_arguments(text: str) -> Iterator[str]:
    """Splits a text at commas outside of brackets and strings."""
    depth = begin = at = unclosed = 0
    while at < len(text):
        if text[at] in "\"'`":
            at = _find_string_end(text, at)
            continue
        if at >= unclosed and (types := _TYPE_ARGUMENTS.match(text, at)):
            if (close := text.rfind(">", at, types.end())) >= 0:
                at = close + 1
                continue
            unclosed = types.end()  # no bracket before this position is closed either
        depth += (text[at] in "([{") - (text[at] in ")]}")
        if depth < 0:
            raise NoCalls("brackets that do not match")
        if text[at] == "," and depth == 0:
            yield text[begin:at]
            begin = at + 1
        at += 1
    if depth:
        raise NoCalls("brackets that do not match")
    if text[begin:].strip():
        yield text[begin:]


def _find_string_end(text: str, begin: int) -> int:
    """Returns the position after the string literal that starts at `begin`."""
    at = begin + 1
    while at < len(text) and text[at] != text[begin]:
        at += 2 if text[at] == "\\" else 1
    if at >= len(text):
        raise NoCalls("a string that does not end")
    return at + 1


def to_source(call: Call, methods: Collection[str]) -> str:
    """Returns a call as the source text that BFCL executes.

    BFCL executes a model's calls with `eval`. For safety, anything other than a call of one of the `methods` with plain
    values becomes a call of a function that does not exist, and the model receives the error.
    """
    name, arguments = call
    if name not in methods:
        unknown_to_python = name.isidentifier() and not keyword.iskeyword(name) and not hasattr(builtins, name)
        return f"{name}()" if unknown_to_python and name not in _RESERVED_NAMES else "unknown_function()"
    if not all(key.isidentifier() and not keyword.iskeyword(key) for key in arguments):
        return "unknown_argument()"
    if name == "power" and _is_too_large(arguments):
        return "too_large()"
    return f"{name}({','.join(f'{key}={_value_to_source(value, methods)}' for key, value in arguments.items())})"


def _is_too_large(arguments: Mapping[str, Any]) -> bool:
    """Returns whether computing a power of integers would take minutes; BFCL cannot print more than 4,300 digits."""
    base, exponent = arguments.get("base"), arguments.get("exponent")
    if isinstance(base, dict) or isinstance(exponent, dict):
        return True  # nested calls with unknown results
    return isinstance(base, int) and isinstance(exponent, int) and exponent * base.bit_length() > 10**6


_RESERVED_NAMES = frozenset(
    (
        *("copy", "importlib", "inspect", "json", "re", "CLASS_FILE_PATH_MAPPING", "STATELESS_CLASSES"),
        *("execute_multi_turn_func_call", "is_empty_execute_response", "_process_method_calls"),
    )
)
"""Names that are defined where BFCL executes calls, but are not methods."""


def _value_to_source(value: Any, methods: Collection[str]) -> str:
    if isinstance(value, dict) and len(value) == 1:
        (name, arguments), *_ = value.items()
        if isinstance(arguments, dict) and name in methods:  # a nested call
            return to_source((name, arguments), methods)
    return repr(value)
