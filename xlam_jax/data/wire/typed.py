"""Values without types in their text: the tools' schemas say what they are."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from xlam_jax.data.wire.base import Tools
from xlam_jax.data.wire.objects import parse_or_none

_PYTHON = {"True": True, "False": False, "None": None}
"""Constants that templates write in Python's notation."""
_MOST_SCHEMAS = 100
"""Number of schemas that are searched for the types of one value: a schema may refer to itself."""


def parameters_of(tools: Tools, name: str) -> Mapping[str, Any]:
    """Returns the JSON schema of a function's parameters, an empty one for an unknown function."""
    for tool in tools:
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        if isinstance(function, Mapping) and function.get("name") == name:
            schema = function.get("parameters")
            return schema if isinstance(schema, Mapping) else {}
    return {}


def typed_value(text: str, parameters: Mapping[str, Any], name: str) -> Any:
    """Returns the value of an argument that is written without its type: strings as they are, others as JSON.

    It is a string unless the schema of that parameter allows the type that the text has as JSON.
    """
    properties = parameters.get("properties")
    schema = properties.get(name) if isinstance(properties, Mapping) else None
    types = set(_types(schema, parameters))
    if not types or types == {"string"}:
        return text
    written = text.strip()
    if written in _PYTHON:
        value = _PYTHON[written]
    elif (value := parse_or_none(text)) is None and written != "null":
        return text
    return value if _types_of_value(value) & types else text


def _types_of_value(value: object) -> set[str]:
    match value:
        case None:
            return {"null"}
        case bool():
            return {"boolean"}
        case int():
            return {"integer", "number"}
        case float():
            return {"integer", "number"} if value.is_integer() else {"number"}
        case list():
            return {"array"}
        case dict():
            return {"object"}
    return set()  # quotes are part of a string


def _types(schema: object, root: Mapping[str, Any]) -> Iterator[str]:
    """Yields the types that a schema allows, none if it does not say."""
    pending, count = [schema], 0
    while pending and (count := count + 1) <= _MOST_SCHEMAS:
        schema = pending.pop()
        if not isinstance(schema, Mapping):
            continue
        kind = schema.get("type")
        yield from [kind] if isinstance(kind, str) else (name for name in _items(kind) if isinstance(name, str))
        if schema.get("nullable") is True:
            yield "null"
        if kind is None:
            values = [*_items(schema.get("enum")), *([schema["const"]] if "const" in schema else [])]
            for value in values:
                yield from ["string"] if isinstance(value, str) else _types_of_value(value)
        for key in ("anyOf", "oneOf", "allOf"):
            pending += _items(schema.get(key))
        if isinstance(reference := schema.get("$ref"), str):
            pending.append(_resolve(reference, root))


def _items(value: object) -> Iterable[Any]:
    return value if isinstance(value, list) else ()


def _resolve(reference: str, root: Mapping[str, Any]) -> object:
    """Returns the schema that `#/$defs/NAME` refers to, None for any other reference."""
    value: object = root
    head, *parts = reference.split("/")
    if head != "#":
        return None
    for part in parts:
        if not isinstance(value, Mapping):
            return None
        value = value.get(part.replace("~1", "/").replace("~0", "~"))
    return value
