"""Functions and calls in the two ways of asking: tools of the request, or Python source in the text."""

import ast
import builtins
import json
import keyword
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from xlam_jax.evaluate.arithmetic import number
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
"""BFCL's types → JSON Schema's; what is not named, `any` as well, is a string, as in BFCL's own handlers."""


class NoCalls(ValueError):  # noqa: N818 - most answers of this kind are none that went wrong
    """A text that is no list of calls."""


def tools(functions: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Functions in OpenAI form: types of JSON Schema, and names without dots."""
    return [{"type": "function", "function": _tool(one)} for one in functions]


def tool_name(name: str) -> str:
    """A function's name as OpenAI's tools may have it."""
    return name.replace(".", "_")


def _tool(function: Mapping[str, Any]) -> dict[str, Any]:
    parameters = function["parameters"]
    properties = {name: _schema(one) for name, one in parameters["properties"].items()}
    return {
        **function,
        "name": tool_name(function["name"]),
        "parameters": {**parameters, "type": "object", "properties": properties},
    }


def _schema(given: Mapping[str, Any], item: bool = False) -> dict[str, Any]:
    """A parameter's schema, or that of a list's items, which do not say in words that they are floats."""
    kind = given.get("type")
    schema = {**given, "type": _TYPES.get(kind, "string") if isinstance(kind, str) else "string"}
    if kind == "float" and not item:
        schema["format"] = "float"
        schema["description"] = f"{given.get('description', '')} This is a float type value."
    if isinstance(properties := given.get("properties"), dict):
        schema["properties"] = {name: _schema(one) for name, one in properties.items()}
    if isinstance(items := given.get("items"), dict):
        schema["items"] = _schema(items, item=True)
    return schema


def system_prompt(functions: Sequence[Mapping[str, Any]]) -> str:
    """BFCL's default prompt (plain text, Python calls, functions as JSON)."""
    texts = prompts()
    style = texts.PROMPT_STYLE_TEMPLATES["classic"]
    kind = "python"
    return texts.PROMPT_TEMPLATE_MAPPING["plaintext"].format(
        persona=style["persona"],
        task=style["task"],
        tool_call_format=style["tool_call_no_tag"].format(
            output_format=texts.OUTPUT_FORMAT_MAPPING[kind], param_types=texts.PARAM_TYPE_MAPPING[kind]
        ),
        multiturn_behavior=style["multiturn_behavior"],
        available_tools=style["available_tools"].format(format="json", functions=json.dumps(functions, indent=4)),
    )


def parse(text: str, language: str) -> list[Call]:
    """The calls of an answer such as `[area(base=10, height=5)]`; raises `NoCalls`. Nothing is executed.

    Java and JavaScript: one call; arguments stay the source text of their literals, strings without their quotes.
    """
    text = text.strip("`\n ")
    text = text if text.startswith("[") else f"[{text}"
    text = text if text.endswith("]") else f"{text}]"
    if language != "python":
        return _literals(text[1:-1].strip())
    try:
        body = ast.parse(text.strip().strip("'"), mode="eval").body
        calls = [body] if isinstance(body, ast.Call) else getattr(body, "elts", None)
        if calls is None or not all(isinstance(one, ast.Call) for one in calls):
            raise NoCalls("no list of calls")
        return [_call(one) for one in calls]
    except (SyntaxError, ValueError, TypeError, ArithmeticError, RecursionError, MemoryError) as error:
        raise NoCalls(str(error)) from None


def _call(node: ast.Call) -> Call:
    """Positional arguments are left out, as BFCL does."""
    parts: list[str] = []
    function: ast.expr = node.func
    while isinstance(function, ast.Attribute):
        parts.append(function.attr)
        function = function.value
    if isinstance(function, ast.Name):
        parts.append(function.id)
    return ".".join(reversed(parts)), {str(one.arg): _value(one.value) for one in node.keywords}


def _value(node: ast.expr) -> Any:
    """An argument's value by BFCL's rules: names stand for their text, and calls for `{name: arguments}`."""
    match node:
        case ast.Constant(value=value):
            return "..." if value is Ellipsis else value
        case ast.UnaryOp(operand=ast.Constant(value=int() | float() as value)):
            return -value  # whatever the operator
        case ast.List(elts=elements):
            return [_value(one) for one in elements]
        case ast.Tuple(elts=elements):
            return tuple(_value(one) for one in elements)
        case ast.Dict(keys=keys, values=values):
            return {_value(key): _value(one) for key, one in zip(keys, values, strict=True) if key is not None}
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
            return number(node)
    raise NoCalls(f"{type(node).__name__} is no argument")


def _literals(text: str) -> list[Call]:
    """The one call of a Java or JavaScript answer."""
    match = re.match(r"(?:new\s+)?([\w$.]+)\s*\((.*)\)\s*+;?\s*+$", text, re.DOTALL)
    if match is None:
        raise NoCalls("no call")
    arguments: dict[str, Any] = {}
    for part in _parts(match[2]):
        name, equals, value = part.partition("=")
        name, value = name.strip(), value.strip()
        if not equals or not re.fullmatch(r"[\w$]+", name):
            continue  # positional: left out, as in Python
        if name in arguments:
            raise NoCalls(f"two values for {name}")
        quoted = len(value) > 1 and value[0] in "\"'" and _string_end(value, 0) == len(value)
        arguments[name] = value[1:-1] if quoted else value
    return [(match[1], arguments)]


_TYPE_ARGUMENTS = re.compile(r"(?<=\w)<[\w\s,.<>?\[\]]*+")


def _parts(text: str) -> Iterator[str]:
    """What stands between the commas that are in no bracket and no string."""
    depth = begin = at = unclosed = 0
    while at < len(text):
        if text[at] in "\"'`":
            at = _string_end(text, at)
            continue
        if at >= unclosed and (types := _TYPE_ARGUMENTS.match(text, at)):
            if (close := text.rfind(">", at, types.end())) >= 0:
                at = close + 1
                continue
            unclosed = types.end()  # nor is any bracket up to there
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


def _string_end(text: str, begin: int) -> int:
    """Behind the string that begins there."""
    at = begin + 1
    while at < len(text) and text[at] != text[begin]:
        at += 2 if text[at] == "\\" else 1
    if at >= len(text):
        raise NoCalls("a string that does not end")
    return at + 1


def source(call: Call, methods: Collection[str]) -> str:
    """A call as the source text that BFCL executes.

    A model's words are executed nowhere else, so whatever is not a call of one of the `methods` with plain values
    becomes a call of a function that does not exist, of which the model is told.
    """
    name, arguments = call
    if name not in methods:
        known = name.isidentifier() and not keyword.iskeyword(name) and not hasattr(builtins, name)
        return f"{name}()" if known and name not in _MODULE_NAMES else "unknown_function()"
    if not all(key.isidentifier() and not keyword.iskeyword(key) for key in arguments):
        return "unknown_argument()"
    if name == "power" and _endless(arguments):
        return "too_large()"
    return f"{name}({','.join(f'{key}={_source(value, methods)}' for key, value in arguments.items())})"


def _endless(arguments: Mapping[str, Any]) -> bool:
    """Whether a power of integers would be computed for minutes; BFCL could not write down 4,300 digits of it."""
    base, exponent = arguments.get("base"), arguments.get("exponent")
    if isinstance(base, dict) or isinstance(exponent, dict):
        return True  # calls within it, whose results are not known
    return isinstance(base, int) and isinstance(exponent, int) and exponent * base.bit_length() > 10**6


_MODULE_NAMES = frozenset(
    (
        *("copy", "importlib", "inspect", "json", "re", "CLASS_FILE_PATH_MAPPING", "STATELESS_CLASSES"),
        *("execute_multi_turn_func_call", "is_empty_execute_response", "_process_method_calls"),
    )
)
"""What has a meaning where BFCL executes calls, and is no method."""


def _source(value: Any, methods: Collection[str]) -> str:
    if isinstance(value, dict) and len(value) == 1:
        (name, arguments), *_ = value.items()
        if isinstance(arguments, dict) and name in methods:  # a call within a call
            return source((name, arguments), methods)
    return repr(value)
