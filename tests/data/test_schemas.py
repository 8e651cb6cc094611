import json
import re

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xlam_jax.data.schemas import Parameters, compiled

CITY = {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}, "required": ["city"]}


def problems_of(schema: object, arguments: dict) -> list[tuple[str, str]]:
    return [(problem.reason, problem.detail) for problem in Parameters(schema).check(arguments)]


@pytest.mark.parametrize(
    ("schema", "arguments", "expected"),
    [
        (CITY, {"city": "Oslo", "days": 3}, []),
        (CITY, {}, [("missing-argument", "argument 'city' is missing")]),
        (
            CITY,
            {"city": 3, "dys": 1},
            [
                ("wrong-type", "argument 'city' is 3 (integer), the schema says string"),
                ("extra-argument", "argument 'dys' is not declared; declared: city, days; did you mean 'days'?"),
            ],
        ),
        (CITY, {"city": "", "days": 3.5}, [("wrong-type", "argument 'days' is 3.5 (number), the schema says integer")]),
        (CITY, {"city": "", "days": 3.0}, []),
        (CITY | {"additionalProperties": True}, {"city": "x", "more": 1}, []),
        (CITY | {"additionalProperties": {"type": "integer"}}, {"city": "x", "more": 1}, []),
        (
            CITY | {"additionalProperties": {"type": "integer"}},
            {"city": "x", "more": "1"},
            [("wrong-type", "argument 'more' is \"1\" (string), the schema says integer")],
        ),
        (
            CITY | {"additionalProperties": False},
            {"city": "x", "more": 1},
            [("extra-argument", "argument 'more' is not declared; declared: city, days")],
        ),
        (CITY | {"patternProperties": {"^x-": {}}}, {"city": "x", "x-more": 1}, []),
        (None, {}, []),
        (None, {"a": 1}, [("extra-argument", "argument 'a' is not declared; declared: none")]),
        (
            {"type": "object", "properties": {"unit": {"enum": ["C", "F"]}}},
            {"unit": "K"},
            [("wrong-value", "argument 'unit' is \"K\", allowed: [\"C\", \"F\"]")],
        ),
        (
            {"type": "object", "properties": {"a": {"anyOf": [{"type": "string"}, {"type": "null"}]}}},
            {"a": 3},
            [("wrong-type", "argument 'a' is 3 (integer), the schema says string or null")],
        ),
        (
            {"type": "object", "properties": {"a": {"type": ["string", "null"]}}},
            {"a": 3},
            [("wrong-type", "argument 'a' is 3 (integer), the schema says string or null")],
        ),
        ({"type": "object", "properties": {"free": {"type": "object"}}}, {"free": {"anything": 1}}, []),
    ],
)  # fmt: skip
def test_arguments_are_checked(schema, arguments, expected):
    assert Parameters(schema).problems == []
    assert problems_of(schema, arguments) == expected


NESTED = {
    "type": "object",
    "properties": {
        "trip": {"allOf": [{"$ref": "#/$defs/Trip"}], "description": "as pydantic writes it"},
        "stops": {"type": "array", "items": {"$ref": "#/$defs/Place"}},
        "back": {"anyOf": [{"$ref": "#/$defs/Trip"}, {"type": "null"}]},
        "tree": {"$ref": "#/$defs/Tree"},
    },
    "$defs": {
        "Place": {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]},
        "Trip": {"type": "object", "properties": {"to": {"$ref": "#/$defs/Place"}}},
        "Tree": {"type": "object", "properties": {"left": {"$ref": "#/$defs/Tree"}}},
    },
}


@pytest.mark.parametrize(
    ("arguments", "reason", "where"),
    [
        ({"trip": {"to": {"name": "x"}}, "stops": [{"name": "y"}], "back": None}, None, None),
        ({"trip": {"to": {"name": "x", "zip": 1}}}, "extra-argument", "'trip.to.zip'"),
        ({"trip": {"to": {}}}, "missing-argument", "'trip.to.name'"),
        ({"stops": [{"name": "x"}, {"name": 3}]}, "wrong-type", "'stops[1].name'"),
        ({"stops": [{"nme": "x", "name": ""}]}, "extra-argument", "'stops[0].nme'"),
        ({"back": {"to": {"name": "x"}, "via": 1}}, "extra-argument", "'back.via'"),
        ({"tree": {"left": {"left": {"right": {}}}}}, "extra-argument", "'tree.left.left.right'"),
    ],
)
def test_undeclared_and_missing_arguments_are_found_at_any_depth(arguments, reason, where):
    problems = problems_of(NESTED, arguments)
    if reason is None:
        assert problems == []
    else:
        assert [problem[0] for problem in problems] == [reason]
        assert where in problems[0][1]


@pytest.mark.parametrize(
    ("schema", "problem"),
    [
        ({"type": "dict", "properties": {}}, 'parameters.type is "dict", not a type of JSON Schema; .* mean "object"'),
        ({"properties": {"a": {"type": "str"}}}, 'parameters.properties.a.type is "str".*did you mean "string"'),
        ({"properties": {"a": {"type": ["int", "None"]}}}, 'did you mean \\["integer", "null"\\]'),
        ({"properties": {"a": {"type": "any"}}}, 'properties.a.type is "any", not a type of JSON Schema$'),
        ({"properties": {"a": {"type": "string", "required": True}}}, "properties.a.required is true"),
        ({"properties": {"a": "string"}}, 'properties.a is "string", expected a JSON Schema'),
        ({"properties": {}, "required": ["a"]}, 'parameters.required names "a", which properties does not declare'),
        ({"properties": {"a": {"pattern": "("}}}, "properties.a.pattern"),
        ({"city": {"type": "string"}}, 'parameters lists the arguments \\(city\\) itself; .* under "properties"'),
        ([1], "parameters is \\[1\\], a JSON Schema is an object"),
    ],
)  # fmt: skip
def test_malformed_schemas_are_reported(schema, problem):
    problems = Parameters(schema).problems
    assert len(problems) == 1
    assert re.search(problem, problems[0]), problems


def test_what_a_malformed_schema_does_say_is_checked_all_the_same():
    schema = {
        "type": "dict",
        "properties": {"a": {"type": "float"}, "b": {"type": "Thing"}, "c": {"minimum": "low", "type": "int"}},
        "required": ["a"],
    }
    assert len(Parameters(schema).problems) == 5
    assert problems_of(schema, {"a": 1.5, "b": [], "c": 2}) == []
    assert [reason for reason, _ in problems_of(schema, {"b": 1, "c": "x", "d": 0})] == [
        "wrong-type",
        "missing-argument",
        "extra-argument",
    ]
    assert schema["type"] == "dict"  # the row itself is not changed
    flat = {"city": {"type": "string"}}
    assert [reason for reason, _ in problems_of(flat, {"city": 3, "cty": ""})] == ["wrong-type", "extra-argument"]


@pytest.mark.parametrize(
    "schema",
    [
        {"properties": {"a": {"$ref": "https://example.org/a.json"}}},
        {"properties": {"a": {"$ref": "#/$defs/none"}}},
        {"properties": {"a": {"$ref": "#/properties/a"}}},
        {"$schema": "http://json-schema.org/draft-03/schema#", "properties": {"a": {"type": "thing"}}},
    ],
)
def test_schemas_that_cannot_be_applied_are_reported_and_nothing_is_fetched(schema, monkeypatch):
    monkeypatch.setattr("urllib.request.urlopen", lambda *_: pytest.fail("a schema made us load something"))
    problems = problems_of(schema, {"a": 1})
    assert [reason for reason, _ in problems] == ["bad-schema"]
    assert "can't be applied" in problems[0][1]


def test_the_dialect_is_that_of_the_schema():
    four = {
        "$schema": "http://json-schema.org/draft-04/schema#",
        "properties": {"n": {"minimum": 0, "exclusiveMinimum": True}},
    }
    assert Parameters(four).problems == []
    assert [reason for reason, _ in problems_of(four, {"n": 0})] == ["wrong-value"]
    now = {key: value for key, value in four.items() if key != "$schema"}
    assert Parameters(now).problems  # exclusiveMinimum is a number today


def test_equal_schemas_are_compiled_once():
    assert compiled(json.dumps(CITY)) is compiled(json.dumps(CITY))


UNIQUE = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}


def test_long_lists_of_unique_items_take_no_longer():
    items: list = [{"at": [at, str(at)]} for at in range(20_000)]
    assert problems_of(UNIQUE, {"a": items}) == []  # compared in pairs it would take an hour
    assert [reason for reason, _ in problems_of(UNIQUE, {"a": [*items, items[0]]})] == ["wrong-value"]


names = st.sampled_from(["a", "b", "c", "d"])
values = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.floats(-2, 2) | st.sampled_from(["", "x", "yy"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(names, inner, max_size=3),
    max_leaves=5,
)
schemas = st.recursive(
    st.fixed_dictionaries({"type": st.sampled_from(["string", "integer", "number", "boolean", "null", "array"])})
    | st.just({})
    | st.fixed_dictionaries({"enum": st.lists(values, min_size=1, max_size=3)}),
    lambda inner: (
        st.fixed_dictionaries(
            {"type": st.just("object"), "properties": st.dictionaries(names, inner, max_size=3)},
            optional={
                "required": st.lists(names, max_size=2, unique=True),
                "additionalProperties": st.booleans() | inner,
                "anyOf": st.lists(inner, min_size=1, max_size=2),
            },
        )
        | st.fixed_dictionaries({"type": st.just("array"), "items": inner})
    ),
    max_leaves=6,
)


@settings(deadline=None, max_examples=150, derandomize=True)
@given(
    st.dictionaries(names, schemas, max_size=3),
    st.lists(names, max_size=2, unique=True),
    st.dictionaries(names, values),
)
def test_agrees_with_plain_json_schema_but_for_undeclared_arguments(properties, required, arguments):
    schema = {"type": "object", "properties": properties, "required": required}
    valid = jsonschema.Draft202012Validator(schema).is_valid(arguments)
    problems = problems_of(schema, arguments)
    assert not [reason for reason, _ in problems if reason == "bad-schema"]
    if not valid:
        assert problems
    elif set(arguments) <= set(properties) | set(required):
        # what plain JSON Schema allows, only an undeclared name deeper down can spoil
        assert {reason for reason, _ in problems} <= {"extra-argument"}
    else:
        assert "extra-argument" in {reason for reason, _ in problems}


@settings(deadline=None, max_examples=150, derandomize=True)
@given(st.lists(values, max_size=4))
def test_items_are_unique_as_json_schema_says(items):
    assert (problems_of(UNIQUE, {"a": items}) == []) == jsonschema.Draft202012Validator(UNIQUE).is_valid({"a": items})


KEYWORDS = (
    *("type", "properties", "items", "required", "enum", "$ref", "anyOf", "allOf", "not", "if", "then", "else", "$id"),
    *("pattern", "patternProperties", "$schema", "additionalProperties", "minimum", "multipleOf", "$defs"),
    *("prefixItems", "dependentSchemas", "uniqueItems"),
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.text(max_size=5) | st.sampled_from(KEYWORDS),
            inner | st.sampled_from(["object", "string", "#", "#/a", "(", "^(a+)$"]),
            max_size=4,
        )
    ),
    max_leaves=12,
)


@settings(deadline=None, max_examples=300, derandomize=True)
@given(json_values, st.dictionaries(st.text(max_size=3), json_values, max_size=3))
def test_no_schema_makes_it_fall_over(schema, arguments):
    parameters = Parameters(schema)
    assert all(isinstance(problem, str) for problem in parameters.problems)
    assert all(reason and detail for reason, detail in parameters.check(arguments))
