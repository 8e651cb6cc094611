"""`calls_schema` accepts the same arguments as the tools' own schemas, and refuses what it cannot express."""

from typing import Any

import pytest
from argument_schemas import REFUSED, SUPPORTED, properties, tool
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from serving.constraint import calls_schema


def accepts(parameters: Any, arguments: Any) -> bool:
    schema = calls_schema([tool(parameters)])
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema).is_valid([{"name": "f", "arguments": arguments}])


def test_only_calls_of_the_tools_are_valid():
    city = properties(city={"$ref": "#/$defs/city"}) | {"$defs": {"city": {"enum": ["Oslo"]}}}
    tools = [tool(city), {"type": "function", "function": {"name": "g"}}]
    is_valid = Draft202012Validator(calls_schema(tools)).is_valid
    assert is_valid([{"name": "f", "arguments": {"city": "Oslo"}}, {"name": "g", "arguments": {}}])
    for calls in ([], [{"name": "f", "arguments": {"city": "Rome"}}], [{"name": "g", "arguments": {}, "id": 1}], [{}]):
        assert not is_valid(calls)
    assert not is_valid([{"name": "h", "arguments": {}}])
    assert not Draft202012Validator(calls_schema(tools, at_most=1)).is_valid([{"name": "g", "arguments": {}}] * 2)


def test_two_tools_may_define_a_name_differently():
    oslo, rome = (
        properties(city={"$ref": "#/definitions/city"}) | {"definitions": {"city": {"enum": [city]}}}
        for city in ("Oslo", "Rome")
    )
    is_valid = Draft202012Validator(calls_schema([tool(oslo, "f"), tool(rome, "g")])).is_valid
    assert is_valid([{"name": "f", "arguments": {"city": "Oslo"}}, {"name": "g", "arguments": {"city": "Rome"}}])
    assert not is_valid([{"name": "f", "arguments": {"city": "Rome"}}])
    assert not is_valid([{"name": "g", "arguments": {"city": "Oslo"}}])


@pytest.mark.parametrize(("parameters", "good", "bad"), SUPPORTED)
def test_supported_schemas_are_enforced(parameters: Any, good: list[Any], bad: list[Any]):
    assert [accepts(parameters, arguments) for arguments in good] == [True] * len(good)
    assert [accepts(parameters, arguments) for arguments in bad] == [False] * len(bad)


@pytest.mark.parametrize(("parameters", "words"), REFUSED)
def test_unsupported_schemas_are_refused_with_the_tool_s_name(parameters: Any, words: str):
    with pytest.raises(ValueError, match=f"tool 'get_b' cannot be enforced by a grammar: .*({words})"):
        calls_schema([tool({"type": "object"}, "get_a"), tool(parameters, "get_b")])


SCALARS = st.none() | st.booleans() | st.integers(-3, 3) | st.sampled_from([0.5, "", "a", "ab"])
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
    max_leaves=6,
)
LEAVES = st.one_of(
    st.sampled_from(["string", "integer", "number", "boolean", "null", "object", "array"]).map(
        lambda kind: {"type": kind}
    ),
    st.fixed_dictionaries(
        {"type": st.just("integer"), "minimum": st.integers(-3, 1)}, optional={"maximum": st.integers(-1, 3)}
    ),
    st.fixed_dictionaries(
        {"type": st.just("integer"), "multipleOf": st.just(2), "minimum": st.just(-2), "maximum": st.just(3)}
    ),
    st.fixed_dictionaries(
        {"type": st.just("string"), "minLength": st.integers(0, 2)}, optional={"maxLength": st.integers(1, 2)}
    ),
    st.lists(SCALARS, min_size=1, max_size=3).map(lambda values: {"enum": values}),
    st.sampled_from(
        [{}, {"$ref": "#"}, {"$ref": "#/$defs/d"}, {"$ref": "#/definitions/e"}, {"type": ["string", "null"]}]
    ),
)


def composed(inner: Any) -> Any:
    typed = st.fixed_dictionaries(
        {"type": st.just("object"), "properties": st.dictionaries(st.sampled_from("abc"), inner, max_size=3)},
        optional={
            "required": st.lists(st.sampled_from("abc"), max_size=2, unique=True),
            "additionalProperties": st.booleans() | inner,
        },
    )
    lists = st.fixed_dictionaries(
        {"type": st.just("array"), "items": inner}, optional={"minItems": st.integers(0, 2), "maxItems": st.just(2)}
    )
    both = st.lists(inner, min_size=1, max_size=2)
    return (
        typed
        | lists
        | both.map(lambda parts: {"allOf": parts})
        | both.map(lambda parts: {"anyOf": parts})
        | st.builds(lambda schema, parts: {**schema, "anyOf": parts}, typed, both)
    )


SCHEMAS = st.recursive(LEAVES, composed, max_leaves=5)


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(st.sampled_from("abc"), SCHEMAS, max_size=3), SCHEMAS, SCHEMAS, st.lists(VALUES, max_size=8))
def test_it_accepts_the_same_arguments_as_the_tool_s_own_schema(schemas: Any, d: Any, e: Any, values: list[Any]):
    parameters = {"type": "object", "properties": schemas, "$defs": {"d": d}, "definitions": {"e": e}}
    try:
        schema = calls_schema([tool(parameters)])
    except ValueError:
        return
    Draft202012Validator.check_schema(schema)
    rewritten, original = Draft202012Validator(schema), Draft202012Validator(parameters)
    # if a declared property can have no value, additional properties are forbidden too
    exact = str(schema).count("'additionalProperties': False") == 1
    for value in values:
        arguments = dict(zip("abc", [value, *values], strict=False))
        accepted = rewritten.is_valid([{"name": "f", "arguments": arguments}])
        assert original.is_valid(arguments) or not accepted, schema
        assert accepted or not original.is_valid(arguments) or not exact, schema
