"""Removes the null fields that a union schema adds to rows, and keeps nulls that are values.

Arrow, and so Parquet and the `datasets` library, gives every object all keys that any object of its column has, and
`Dataset.to_json` writes them out: null where an object has no such key. If they stayed, they would be trained as
arguments and declared as parameters. The tool's JSON Schema decides whether a null is a value:

* in a tool, only `default` and `const` may be null, and only where the schema allows null;
* an argument may be null where its schema allows null or requires the argument, but not where it is not declared;
* in a row whose arguments are padded, only where the schema does both.

Arguments are padded if they come from Arrow columns, or if an undeclared argument of the row is null.
"""

from collections.abc import Iterator
from typing import Any

JUDGED = frozenset({"tools", "functions", "arguments"})
"""Keys in whose values the tools' schemas decide about nulls; elsewhere in a row, null is the same as absent."""
_DATA = frozenset({"default", "const", "enum", "examples", "example"})
_VALUES = frozenset({"default", "const"})
_NAMED = frozenset({"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"})
_ELSEWHERE = frozenset({"$ref", "allOf", "anyOf", "oneOf", "if"})
_OPEN = frozenset({"additionalProperties", "unevaluatedProperties", "patternProperties"}) | _ELSEWHERE


def drop_outside_tools(value: Any) -> Any:
    """Returns a row of a union schema without null fields, except in values of `JUDGED`, which the parser cleans."""
    if isinstance(value, dict):
        return {
            key: item if key in JUDGED and isinstance(item, dict | list) else drop_outside_tools(item)
            for key, item in value.items()
            if item is not None
        }
    return [drop_outside_tools(item) for item in value] if isinstance(value, list) else value


def has_columns_of_arguments(value: Any) -> bool:
    """Whether a row from Arrow has the arguments of calls in columns, which are padded, rather than in JSON texts."""
    if isinstance(value, dict):
        if isinstance(value.get("arguments"), dict):
            return True
        return any(map(has_columns_of_arguments, value.values()))
    return isinstance(value, list) and any(map(has_columns_of_arguments, value))


def clean_tools(tools: list[Any], padded: bool, dropped: list[str]) -> list[Any]:
    """Returns tool schemas without padding; `padded` if the row certainly has padding.

    Appends the path of each dropped field to `dropped`.
    """
    if not any(map(_has_null, tools)):
        return tools
    in_schemas: list[str] = []
    cleaned = [_clean_tool(tool, in_schemas, dropped) for tool in tools]
    if padded or in_schemas or _all_have_default(cleaned):
        cleaned = [_clean_tool(tool, in_schemas, dropped, values=True) for tool in cleaned]
    dropped += in_schemas
    return cleaned


def has_padding(arguments: dict[str, Any], parameters: Any) -> bool:
    """Whether an undeclared argument is null, at any depth, in a call of a tool with these parameters."""
    return any(undeclared for undeclared, _ in _nulls(arguments, parameters or {"properties": {}}))


def clean_arguments(
    arguments: dict[str, Any], parameters: Any, padded: bool, dropped: list[str], path: str = "arguments"
) -> dict[str, Any]:
    """Returns a call's arguments without padding; `parameters` is the JSON Schema of its tool, or None.

    Appends the path of each dropped argument to `dropped`.
    """
    if not _has_null(arguments):
        return arguments
    return _clean(arguments, parameters or {"properties": {}}, padded, dropped, path)


def _clean_tool(
    value: Any, in_schemas: list[str], dropped: list[str], values: bool = False, path: str = "tools"
) -> Any:
    """A tool without null fields. With `values`, `default` and `const` count as padding where null is not allowed."""
    if not isinstance(value, dict):
        return value
    kept = {}
    for key, item in value.items():
        inner = f"{path}.{key}"
        if item is None and inner == "tools.type":
            kept[key] = item  # the parser reports that it is missing
        elif item is None:
            dropped.append(inner)
        elif key == "parameters":
            kept[key] = _clean_schema(item, inner, in_schemas, values)
        else:
            kept[key] = _clean_tool(item, in_schemas, dropped, values, inner) if key == "function" else item
    return kept


def _clean_schema(schema: Any, path: str, dropped: list[str], values: bool) -> Any:
    if isinstance(schema, list):
        return [_clean_schema(item, path, dropped, values) for item in schema]
    if not isinstance(schema, dict):
        return schema
    kept = {}
    for key, item in schema.items():
        inner = f"{path}.{key}"
        if item is None and key in _VALUES:
            if values and not allows_null(_without(schema, "const"), unsaid=False):
                dropped.append(inner)
            else:
                kept[key] = item
        elif item is None:
            dropped.append(inner)
        elif key in _NAMED and isinstance(item, dict):
            dropped += [f"{inner}.{name}" for name, subschema in item.items() if subschema is None]
            kept[key] = {
                name: _clean_schema(subschema, f"{inner}.{name}", dropped, values)
                for name, subschema in item.items()
                if subschema is not None
            }
        else:
            kept[key] = item if key in _DATA else _clean_schema(item, inner, dropped, values)
    return kept


def _without(schema: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: item for key, item in schema.items() if key != name}


def _all_have_default(tools: list[Any]) -> bool:
    """Whether there are several properties and all have a default, as in Arrow columns, where all keys are present."""
    declared = [
        schema
        for tool in tools
        if isinstance(tool, dict) and isinstance(function := tool.get("function"), dict)
        for schema in _properties(function.get("parameters")).values()
    ]
    return len(declared) > 1 and all(isinstance(schema, dict) and "default" in schema for schema in declared)


def allows_null(schema: Any, unsaid: bool = True) -> bool:
    """Whether a JSON Schema allows null; `unsaid` is the answer where it has no types, or has them elsewhere."""
    if not isinstance(schema, dict):
        return schema is not False
    if schema.get("nullable") is True:
        return True
    for key in ("anyOf", "oneOf"):
        if isinstance(choices := schema.get(key), list):
            return any(allows_null(choice, unsaid) for choice in choices)
    if isinstance(values := schema.get("enum"), list):
        return None in values
    if "const" in schema:
        return schema["const"] is None
    kind = schema.get("type")
    if isinstance(kind, str | list):
        return bool({"null", "any", "Any"}.intersection([kind] if isinstance(kind, str) else map(str, kind)))
    return unsaid


def _clean(value: Any, schema: Any, padded: bool, dropped: list[str], path: str) -> Any:
    if isinstance(value, list):
        return [_clean(item, _items(schema), padded, dropped, path) for item in value]
    if not isinstance(value, dict):
        return value
    kept = {}
    for key, item in value.items():
        inner = f"{path}.{key}"
        if item is None and not _is_meant(key, schema, padded):
            dropped.append(inner)
        else:
            kept[key] = _clean(item, _properties(schema).get(key), padded, dropped, inner)
    return kept


def _is_meant(key: str, schema: Any, padded: bool) -> bool:
    declared = _properties(schema)
    if key not in declared:
        return not padded and _is_open(schema)
    required = schema.get("required")
    needed, allowed = isinstance(required, list) and key in required, allows_null(declared[key])
    return (needed and allowed) if padded else (needed or allowed)


def _nulls(value: Any, schema: Any) -> Iterator[tuple[bool, str]]:
    """Yields (is undeclared, key) of every null field."""
    if isinstance(value, list):
        for item in value:
            yield from _nulls(item, _items(schema))
    elif isinstance(value, dict):
        declared = _properties(schema)
        for key, item in value.items():
            if item is None:
                yield key not in declared and not _is_open(schema), key
            else:
                yield from _nulls(item, declared.get(key))


def _is_open(schema: Any) -> bool:
    """Whether undeclared properties are allowed, or no properties are declared here."""
    if not isinstance(schema, dict) or not isinstance(schema.get("properties"), dict):
        return True
    return any(schema.get(key) not in (None, False) for key in _OPEN)


def _properties(schema: Any) -> dict[str, Any]:
    declared = schema.get("properties") if isinstance(schema, dict) else None
    return declared if isinstance(declared, dict) else {}


def _items(schema: Any) -> Any:
    return schema.get("items") if isinstance(schema, dict) else None


def _has_null(value: Any) -> bool:
    """Whether a field is null, at any depth; items of lists are not fields."""
    if isinstance(value, dict):
        return any(item is None or _has_null(item) for item in value.values())
    return isinstance(value, list) and any(map(_has_null, value))
