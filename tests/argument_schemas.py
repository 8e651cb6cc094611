"""Schemas of tool arguments: supported ones with valid and invalid arguments, and ones that a grammar can't express."""

from typing import Any


def tool(parameters: Any, name: str = "f") -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def properties(**schemas: Any) -> dict[str, Any]:
    return {"type": "object", "properties": schemas, "required": list(schemas)}


TREE: dict[str, Any] = properties(value={"type": "integer"}) | {"additionalProperties": False}
TREE["properties"]["next"] = {"$ref": "#"}
SUPPORTED: list[tuple[Any, list[Any], list[Any]]] = [
    (
        TREE,
        [{"value": 1}, {"value": 1, "next": {"value": 2, "next": {"value": 3}}}],
        [{"value": 1, "next": 2}, {"next": {"value": 1}}],
    ),
    (
        properties(a={"$ref": "#/definitions/x%20y~1z"}) | {"definitions": {"x y/z": {"type": "integer"}}},
        [{"a": 1}],
        [{"a": "1"}],
    ),
    (properties(a={"type": "integer"}, b={"$ref": "#/properties/a"}), [{"a": 1, "b": 2}], [{"a": 1, "b": "2"}]),
    (
        properties(a={"allOf": [{"$ref": "#/$defs/n"}], "description": "n"}) | {"$defs": {"n": {"enum": [1, 2]}}},
        [{"a": 1}],
        [{"a": 3}],
    ),
    (
        properties(a={"allOf": [{"type": "integer"}, {"minimum": 3}, {"type": ["number", "null"], "maximum": 5}]}),
        [{"a": 4}],
        [{"a": 2}, {"a": 6}, {"a": 3.5}],
    ),
    (
        {"allOf": [properties(a={"type": "integer"}), properties(b={"type": "string"})]},
        [{"a": 1, "b": ""}],
        [{"a": 1}, {"b": ""}, {"a": "", "b": ""}],
    ),
    (
        properties(a={"$ref": "#/$defs/p", "required": ["y"]}) | {"$defs": {"p": properties(x={"type": "integer"})}},
        [{"a": {"x": 1, "y": 2}}],
        [{"a": {"x": 1}}],
    ),
    (
        {"type": "object", "properties": {"a": {}, "b": {}}, "anyOf": [{"required": ["a"]}, {"required": ["b"]}]},
        [{"a": 1}, {"b": 1}],
        [{}],
    ),
    (
        properties(a={"type": "dict"}, b={"type": "any"}, c={"type": "list"}, d={"type": "float"}, e={"type": "str"}),
        [{"a": {"x": 1}, "b": None, "c": [1, "x"], "d": 0.5, "e": ""}],
        [{"a": 1, "b": 1, "c": [], "d": 1, "e": ""}, {"a": {}, "b": 1, "c": {}, "d": 1, "e": ""}],
    ),
    (properties(a={"type": ["int", "none"]}), [{"a": 1}, {"a": None}], [{"a": "1"}]),
    (properties(a={"type": "array", "items": {"type": "any"}}), [{"a": [1, {"b": []}]}], [{"a": 1}]),
    (
        properties(a={"type": "integer", "multipleOf": 5, "minimum": 1, "maximum": 20}),
        [{"a": 5}, {"a": 20}],
        [{"a": 0}, {"a": 7}],
    ),
    (
        properties(a={"type": ["integer", "null"], "multipleOf": 2, "minimum": 0, "exclusiveMaximum": 4}),
        [{"a": 0}, {"a": 2}, {"a": None}],
        [{"a": 4}, {"a": 1}],
    ),
    (properties(a={"type": "integer", "multipleOf": 1}), [{"a": 3}], [{"a": "3"}]),
    (properties(a={"type": "array", "uniqueItems": False}), [{"a": [1, 1]}], [{"a": 1}]),
    (properties(a={"type": "string", "enum": ["x", None]}), [{"a": "x"}], [{"a": None}]),
    (properties(a={"type": "string", "format": "float"}), [{"a": "1.5"}], [{"a": 1.5}]),
    (
        properties(a={"type": "array", "items": [{"type": "integer"}], "additionalItems": False}),
        [{"a": [1]}],
        [{"a": [1, 2]}],
    ),
    ({"type": "object", "required": ["a"]}, [{"a": 1}], [{}]),
    (
        {
            "allOf": [
                {"properties": {"a": {}, "b": {}}},
                {"properties": {"a": {"type": "integer"}}, "additionalProperties": False},
            ]
        },
        [{"a": 1}, {}],
        [{"a": ""}, {"b": 1}],
    ),
    (
        properties(title={"type": "string"}, type={"enum": ["x"]}),
        [{"title": "", "type": "x"}],
        [{"title": "", "type": "y"}],
    ),
]


REFUSED: list[tuple[Any, str]] = [
    (properties(a={"type": "integer", "multipleOf": 5}), "multipleOf"),
    (properties(a={"type": "number", "multipleOf": 0.1, "minimum": 0, "maximum": 1}), "multipleOf"),
    (properties(a={"type": "array", "uniqueItems": True}), "uniqueItems"),
    (properties(a={"not": {"type": "string"}}), "'not'"),
    (properties(a={"if": {"minimum": 1}, "then": {"maximum": 2}}), "'if'"),
    (properties(a={"contains": {"type": "string"}}), "'contains'"),
    (properties(a={"type": "datetime"}), 'type "datetime" is unknown'),
    (properties(a={"$ref": "https://example.com/schema"}), "points outside its schema"),
    (properties(a={"$ref": "#/$defs/missing"}), "does not exist"),
    ({"$ref": "#"}, "refers only to itself"),
    ({"type": "object", "anyOf": [{"$ref": "#"}, {"required": ["a"]}]}, "nested too deeply|more than"),
    (properties(a={"type": "string", "pattern": "a", "minLength": 1}), "'pattern' together with a length"),
    (properties(a={"type": "string", "pattern": "^(?!a)"}), "look-around"),
    (properties(a={"allOf": [{"pattern": "a"}, {"pattern": "b"}]}), "two 'pattern'"),
    (properties(a={"allOf": [{"type": "string"}, {"type": "integer"}]}), "no value satisfies"),
    (properties(a={"type": "integer", "minimum": "3"}), "parameters.properties.a.minimum"),
    (properties(a={"type": "integer", "exclusiveMinimum": True}), "exclusiveMinimum"),
    ({"type": "object", "properties": {"a": {}}, "patternProperties": {"^x": {}}}, "patternProperties"),
    ({"type": "array"}, "no arguments satisfy"),
    ({"city": {"type": "string"}}, "contains the arguments directly"),
    ([], "not an object"),
]
