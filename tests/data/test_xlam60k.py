"""xlam-function-calling-60k: spellings of types, layouts of tools and answers, export and import."""

import json
from dataclasses import replace
from typing import Any

import pytest
from conversions import export
from hypothesis import given
from hypothesis import strategies as st
from strategies import PLAIN
from xlam_formats import SETTINGS, rows_of, trajectories

from xlam_jax.data.converters.common import json_schema
from xlam_jax.data.converters.xlam60k import SPELLINGS, spelling, tool_schemas
from xlam_jax.data.trajectory import Message, ToolCall, Trajectory

KINDS = st.sampled_from([kind for kind in SPELLINGS if kind not in ("array", "null")])
TYPES = st.recursive(
    st.builds(lambda kind: {"type": kind}, KINDS) | st.just({"type": "array"}),
    lambda items: st.builds(lambda schema: {"type": "array", "items": schema}, items),
    max_leaves=4,
)
DEFAULTS = {
    "string": st.text(max_size=3),
    "integer": st.integers(),
    "number": st.floats(-5, 5),
    "boolean": st.booleans(),
}


@SETTINGS
@given(TYPES)
def test_type_spellings_come_back(schema):
    assert json.dumps(json_schema(spelling(schema))[0]) == json.dumps(schema)


@pytest.mark.parametrize(
    ("schema", "spelled"),
    [
        ({"type": "string", "enum": ["C", "F"]}, "str"),
        ({"type": "array", "items": {"type": "array", "items": {"type": "integer"}}}, "List[List[int]]"),
        ({"type": "array", "items": {"type": "string", "enum": ["a"]}}, "list"),
        ({"type": ["string", "null"]}, "Union[str, None]"),
        ({"type": "null"}, "None"),
        ({"type": {}}, "Any"),
        ({}, "Any"),
        (True, "Any"),
    ],
)
def test_spelling(schema, spelled):
    assert spelling(schema) == spelled


@st.composite
def tools(draw) -> list[dict[str, Any]]:
    """Tools as 60k rows have them: typed parameters, descriptions, defaults, in any combination of required ones."""
    schemas = []
    for name in ("look", "go"):
        properties: dict[str, Any] = {}
        for key in draw(st.lists(st.sampled_from(["city", "days", "type", "required", "名"]), max_size=4, unique=True)):
            properties[key] = dict(draw(TYPES))
            if draw(st.booleans()):
                properties[key]["description"] = draw(PLAIN)
            if draw(st.booleans()) and properties[key]["type"] == "string":
                properties[key]["enum"] = draw(st.lists(PLAIN, min_size=1, max_size=2))
            if draw(st.booleans()) and properties[key]["type"] in DEFAULTS:
                properties[key]["default"] = draw(DEFAULTS[properties[key]["type"]])
        required = [key for key in properties if draw(st.booleans())]
        parameters = {"type": "object", "properties": properties, "required": required}
        schemas.append(
            {"type": "function", "function": {"name": name, "description": draw(PLAIN), "parameters": parameters}}
        )
    return schemas


@SETTINGS
@given(
    tools(),
    PLAIN,
    PLAIN | st.integers(0).map("xlam60k_{}".format),
    st.lists(st.sampled_from(["go", "look"]), min_size=1, max_size=3),
)
def test_xlam60k_holds_one_query_and_its_calls(convert, tools, query, identity, names):
    calls = tuple(ToolCall(f"call_{i}", name, {"x": i, "名": [None, "é"]}) for i, name in enumerate(names, start=1))
    turns = (Message("user", query), Message("assistant", "", calls))
    trajectory = Trajectory(identity, "xlam60k", None, "", tools, turns)
    (row,), lost = export("xlam60k", trajectory)
    assert lost == set()
    assert list(row) == ["id", "query", "tools", "answers"]
    (back,), dropped, repairs = convert("xlam60k", row)
    assert back == trajectory
    assert json.dumps(back.tools) == json.dumps(tools)
    assert (dropped, repairs) == ([], [])


@SETTINGS
@given(trajectories())
def test_xlam60k_reports_its_losses(convert, trajectory):
    rows, lost = export("xlam60k", trajectory)
    first = next(turn for turn in trajectory.conversation if turn.role == "assistant")
    if not first.tool_calls:
        assert (rows, lost) == ([], {"no-calls"})
        return
    (back,), _, _ = convert("xlam60k", *rows)
    assert [(call.name, call.arguments) for call in back.conversation[1].tool_calls] == [
        (call.name, call.arguments) for call in first.tool_calls
    ]
    assert ("system-text-not-held" in lost) == bool(trajectory.task_instruction)
    assert ("score-not-held" in lost) == (trajectory.score is not None)
    assert ("turns-not-held" in lost) == (len(trajectory.conversation) != 2)
    assert "tools-not-held" not in lost  # a description and parameters that were not there are no loss
    if len(trajectory.conversation) == 2:
        assert ("text-not-held" in lost) == bool(first.content)
        assert ("loss-flag-not-held" in lost) == (first.loss is not None)


def test_bundled_trajectories_come_back_from_xlam60k(convert, bundled):
    held = 0
    for trajectory in bundled:
        rows, lost = export("xlam60k", trajectory)
        if lost == {"source-not-held"}:
            held += 1
            (back,), _, repairs = convert("xlam60k", *rows)
            assert (replace(back, source=trajectory.source), repairs) == (trajectory, [])
    assert held == 141  # 80 of Seal-Tools, 61 of Hammer


@pytest.mark.parametrize(
    "schema",
    [
        {"type": ["string", "null"]},
        {"description": "", "type": "string"},
        {"type": "string", "default": None},
        {"items": {}, "anyOf": []},
    ],
)
def test_schemas_that_xlam60k_cannot_represent_are_reported(schema):
    function = {"name": "go", "parameters": {"type": "object", "properties": {"a": schema}}}
    calls = (ToolCall("call_1", "go", {}),)
    tools = [{"type": "function", "function": function}]
    trajectory = Trajectory("t", None, None, "", tools, (Message("user", "q"), Message("assistant", "", calls)))
    _, lost = export("xlam60k", trajectory)
    assert lost == (set() if "anyOf" in schema else {"tools-not-held"})


def test_xlam60k_fixture(convert):
    (kept,), dropped, repairs = convert("xlam60k", *rows_of("xlam60k"))
    assert (kept.id, kept.source, repairs) == ("xlam60k_0", "xlam60k", ["text-for-declared-type"])
    assert dropped == [(2, "trajectory", "no-assistant-turn")]
    assert [call.arguments for call in kept.conversation[1].tool_calls] == [
        {"city": "Oslo", "days": 2},
        {"city": "Bergen", "days": 2},
    ]
    assert kept.tools[0]["function"]["parameters"] == {
        "type": "object",
        "properties": {
            "city": {"type": "string", "description": "Where."},
            "days": {"type": "integer", "description": "How long.", "default": 3},
            "hours": {"type": "array", "items": {"type": "integer"}, "description": "At which hours."},
            "unit": {"type": "string", "description": "C or F.", "default": ""},
            "options": {"type": "object", "description": "More."},
        },
        "required": ["city"],
    }
    rows, lost = export("xlam60k", kept)
    assert (rows[0]["id"], lost) == (0, set())
    assert json.loads(rows[0]["tools"])[0]["parameters"]["hours"]["type"] == "List[int], optional"


ANSWER = {"name": "go", "arguments": {"days": 2}}
PARAMETERS = {"type": "object", "properties": {"days": {"type": "integer"}}, "required": ["days"]}
OPENAI_TOOL = {"type": "function", "function": {"name": "go", "description": "", "parameters": PARAMETERS}}


@pytest.mark.parametrize("format", ["xlam60k", "hammer"])
@pytest.mark.parametrize(
    ("changes", "repairs"),
    [
        ({"answers": [ANSWER | {"arguments": '{"days": 2}'}]}, ["string-arguments"]),
        ({"answers": json.dumps([ANSWER | {"arguments": json.dumps({"days": "2"})}])}, None),
        ({"answers": ANSWER}, []),
        ({"answers": json.dumps(ANSWER)}, []),
        ({"answers": [{"type": "function", "id": "x", "function": ANSWER}]}, []),
        ({"tools": [OPENAI_TOOL]}, []),
        ({"tools": json.dumps([OPENAI_TOOL])}, []),
        ({"tools": OPENAI_TOOL["function"]}, []),
        ({"tools": [{"name": "go", "parameters": json.dumps(PARAMETERS)}]}, []),
        ({"tools": [{"name": "go", "description": None, "parameters": {"days": {"type": "int"}, "x": None}}]}, []),
    ],
)
def test_further_layouts_of_tools_and_answers(convert, format, changes, repairs):
    row = {"query": "q", "tools": [{"name": "go", "parameters": {"days": {"type": "int"}}}], "answers": [ANSWER]}
    (kept,), dropped, mended = convert(format, row | changes)
    assert dropped == []
    assert mended == (["string-arguments", "text-for-declared-type"] if repairs is None else repairs)
    assert kept.tools == [OPENAI_TOOL]
    assert [(call.name, call.arguments) for call in kept.conversation[1].tool_calls] == [("go", {"days": 2})]


@pytest.mark.parametrize(("arguments", "reason"), [("days", "bad-arguments"), ([1], "bad-arguments")])
def test_answers_whose_arguments_cannot_be_read_say_why(convert, arguments, reason):
    row = {"query": "q", "tools": [OPENAI_TOOL], "answers": [ANSWER | {"arguments": arguments}]}
    assert convert("xlam60k", row)[1] == [(1, "trajectory", reason)]


def test_parameters_that_are_json_schema_already_stay():
    schema = {"type": "object", "properties": {"type": {"type": "string"}}}
    (tool,) = tool_schemas([{"name": "go", "description": "Goes.", "parameters": schema}])
    assert tool["function"]["parameters"] == schema
    (tool,) = tool_schemas(
        [{"name": "go", "parameters": {"type": {"type": "str"}, "o": {"type": "dict", "required": ["x"]}}}]
    )
    assert tool["function"]["parameters"]["properties"] == {
        "type": {"type": "string"},
        "o": {"type": "object", "required": ["x"]},
    }
    assert tool["function"]["parameters"]["required"] == ["type", "o"]


def test_an_empty_default_is_kept_for_texts_alone():
    parameters = {"days": {"type": "int", "default": ""}, "unit": {"type": "str", "default": ""}}
    (tool,) = tool_schemas([{"name": "go", "parameters": parameters}])
    assert tool["function"]["parameters"] == {
        "type": "object",
        "properties": {"days": {"type": "integer"}, "unit": {"type": "string", "default": ""}},
        "required": [],
    }
