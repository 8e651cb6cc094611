"""AgentOhana, train-ready rows and xlam-function-calling-60k: import, and for the last two export and import."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st
from strategies import JSON, broken

from converters.trajectories.__main__ import main
from xlam_jax.data.converters import converter, exporter, row_converter
from xlam_jax.data.converters import webshop as shop
from xlam_jax.data.converters.common import Converted, Dropped, Lost, convert_one, json_schema
from xlam_jax.data.converters.train_ready import convert as convert_train_ready
from xlam_jax.data.converters.xlam60k import SPELLINGS, spelling, tool_schemas
from xlam_jax.data.parse import parse_trajectory
from xlam_jax.data.rows import Row
from xlam_jax.data.trajectory import InvalidTrajectory, Message, ToolCall, Trajectory, to_dict

FIXTURES = Path(__file__).parent / "fixtures"
FORMATS = ("agentohana", "train_ready", "xlam60k")
SETTINGS = settings(max_examples=80, deadline=None, derandomize=True)


def rows_of(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (FIXTURES / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def convert(tmp_path_factory):
    """Converts rows of a format; returns (trajectories, (row, unit, reason) of dropped ones, repairs)."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"

    def run(name: str, *rows: object) -> tuple[list[Trajectory], list[tuple[int, str, str]], list[str]]:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        items = list(converter(name)([path]))
        kept = [item for item in items if isinstance(item, Converted)]
        dropped = [(item.row, item.unit, item.reason) for item in items if isinstance(item, Dropped)]
        return [item.trajectory for item in kept], dropped, [note.reason for item in kept for note in item.repairs]

    return run


def export(name: str, trajectory: Trajectory) -> tuple[list[dict[str, Any]], set[str]]:
    """Returns (rows as read from a file, reasons of losses)."""
    exported = list(exporter(name)(trajectory))
    text = json.dumps([item for item in exported if isinstance(item, dict)], ensure_ascii=False, allow_nan=False)
    return json.loads(text), {item.reason for item in exported if isinstance(item, Lost)}


# Strategies for trajectories

PLAIN = st.text(alphabet="abc 1\n.é🥶", min_size=1, max_size=12).filter(str.strip)
TRICKY = st.sampled_from(
    [
        " padded ",
        "[TOOL_CALLS]",
        '[{"name": "go", "arguments": {}}]',
        "a [1]",
        '{"thought": "x", "tool_calls": []}',
        "---",
    ]
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)
ARGUMENTS = st.dictionaries(st.text(max_size=3), VALUES, max_size=3)
TOOLS = [{"type": "function", "function": {"name": name}} for name in ("go", "look")]


@st.composite
def trajectories(draw) -> Trajectory:
    """Turns with and without text, calls, results, ids and loss flags, in any order that is allowed."""
    text, flag = PLAIN | TRICKY, st.sampled_from([None, None, True, False])
    turns: list[Message] = []
    number = 0
    for _ in range(draw(st.integers(1, 3))):
        turns.append(Message("user", draw(text)))
        for _ in range(draw(st.integers(0, 2))):
            with_ids = draw(st.booleans())
            calls = []
            for _ in range(draw(st.integers(1, 2))):
                number += 1
                calls.append(
                    ToolCall(
                        f"call_{number}" if with_ids else None, draw(st.sampled_from(["go", "look"])), draw(ARGUMENTS)
                    )
                )
            turns.append(Message("assistant", draw(st.just("") | text), tuple(calls), loss=draw(flag)))
            turns.extend(
                Message("tool", draw(text), (), call.id, call.name)
                for call in calls
                if draw(st.booleans()) or not with_ids
            )
        if draw(st.booleans()):
            turns.append(Message("assistant", draw(text), loss=draw(flag)))
    if all(turn.role != "assistant" for turn in turns):
        turns.append(Message("assistant", draw(text), loss=draw(flag)))
    trajectory = Trajectory(
        draw(PLAIN | TRICKY),
        draw(st.none() | PLAIN),
        draw(st.none() | st.floats(-5, 5)),
        draw(st.just("") | PLAIN),
        TOOLS,
        tuple(turns),
    )
    try:
        return parse_trajectory(to_dict(trajectory))
    except InvalidTrajectory:  # calls in turns that follow each other, with a result for one of them
        reject()


# Train-ready rows


@SETTINGS
@given(trajectories())
def test_train_ready_holds_all_up_to_the_last_trained_turn(convert, trajectory):
    rows, lost = export("train_ready", trajectory)
    turns = trajectory.conversation
    trained = [i for i, turn in enumerate(turns) if turn.role == "assistant" and turn.loss is not False]
    if not trained:
        assert (rows, lost) == ([], {"no-trained-turn"})
        return
    held = turns[: trained[-1] + 1]
    assert [len(row["messages"]) for row in rows] == [i + bool(trajectory.task_instruction) for i in trained]
    kept, dropped, repairs = convert("train_ready", *rows)
    assert kept == [replace(trajectory, source=None, score=None, conversation=held)]
    assert dropped == [(i, "step", "repeated-context") for i in range(1, len(rows))]
    assert repairs == []
    expected = {f"{key}-not-held" for key in ("source", "score") if getattr(trajectory, key) is not None}
    assert lost == expected | ({"turns-not-held"} if held != turns else set())


def test_bundled_trajectories_come_back_from_train_ready(convert, bundled):
    rows = [row for trajectory in bundled for row in export("train_ready", trajectory)[0]]
    kept, dropped, repairs = convert("train_ready", *rows)
    assert kept == [replace(trajectory, source=None, score=None) for trajectory in bundled]
    assert Counter(reason for _, _, reason in dropped) == {"repeated-context": len(rows) - len(bundled)}
    assert repairs == []


def test_text_of_a_turn_with_calls_is_in_both_outputs(row):
    rows, _ = export("train_ready", parse_trajectory(row))
    assert [each["id"] for each in rows] == ["weather_0---1", "weather_0---2", "weather_0---3"]
    first = row["conversation"][1]
    assert rows[0]["chosen"].startswith(first["content"] + '[TOOL_CALLS][{"name": "get_weather", "arguments": {"city"')
    assert rows[0]["output_message"] == first
    assert rows[1]["chosen"] == "-3 °C 🥶, 12:00."


def test_train_ready_fixture(convert):
    kept, dropped, repairs = convert("train_ready", *rows_of("train_ready"))
    rejected, chosen, alone = kept
    assert (rejected.id, rejected.score, chosen.id, chosen.score) == ("weather_0---1---rejected", 0.0, "weather_0", 1.0)
    assert rejected.conversation[0] == chosen.conversation[0]
    assert [len(each.conversation[1].tool_calls) for each in (rejected, chosen)] == [1, 2]
    assert chosen.task_instruction == "Help with the weather."
    assert [turn.loss for turn in chosen.conversation] == [None] * 5
    assert (alone.id, [turn.loss for turn in alone.conversation]) == ("weather_1", [None, False, None, None])
    assert len(alone.conversation[-1].tool_calls) == 2
    assert (dropped, repairs) == ([(1, "step", "repeated-context")], [])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"chosen": "Oslo."}, "ambiguous-output"),
        ({"output_message": None, "chosen": None}, "missing-field"),
        ({"output_message": None, "chosen": '[TOOL_CALLS][{"name": '}, "bad-call"),
        ({"messages": None}, "missing-field"),
        ({"messages": "{}"}, "missing-field"),
        ({"id": ["x"]}, "bad-value"),
        ({"tools": []}, "undeclared-tool"),
    ],
)
def test_train_ready_defects_are_named(convert, change, reason):
    row = rows_of("train_ready")[0] | {"reject": None} | change
    kept, dropped, _ = convert("train_ready", row)
    assert (kept, dropped) == ([], [(1, "trajectory", reason)])


def test_train_ready_variants(convert):
    first, second, _ = rows_of("train_ready")
    # upstream does not train the text of turns with calls; the next row's context has it
    with_text = json.loads(json.dumps(second))
    with_text["messages"][2]["content"] = "I look."
    del first["output_message"], first["reject"]
    kept, _, repairs = convert("train_ready", first, with_text)
    assert (kept[0].conversation[1].content, repairs) == ("I look.", ["thought-left-out"])
    # a text of messages, calls without the marker, malformed and equal rejects
    plain = first | {"messages": json.dumps(first["messages"]), "chosen": first["chosen"].removeprefix("[TOOL_CALLS]")}
    kept, dropped, repairs = convert(
        "train_ready", plain | {"rejected": '[TOOL_CALLS][{"name": '}, plain | {"reject": plain["chosen"]}
    )
    assert [each.conversation[-1].content for each in kept[:1]] == ['[TOOL_CALLS][{"name": ']
    assert [each.score for each in kept] == [0.0, 1.0, 1.0]
    assert dropped == [(2, "step", "rejected-equals-chosen")]
    assert set(repairs) == {"string-messages"}
    # an invalid reject is dropped alone
    kept, dropped, _ = convert("train_ready", first | {"reject": '[TOOL_CALLS][{"name": "lok", "arguments": {}}]'})
    assert (len(kept), dropped) == (1, [(1, "trajectory", "undeclared-tool")])


def test_rows_that_do_not_continue_stay_separate(convert):
    first, second, _ = rows_of("train_ready")
    del first["reject"]
    kept, dropped, _ = convert("train_ready", second, first)
    assert [[turn.loss for turn in each.conversation if turn.role == "assistant"] for each in kept] == [
        [False, None],
        [None],
    ]
    assert dropped == []
    for key, value in (("tools", []), ("id", "other---2")):
        kept, _, _ = convert("train_ready", first, second | {key: value})
        assert len(kept) == (1 if key == "tools" else 2)
    second["messages"][1]["content"] = "Another question."
    assert len(convert("train_ready", first, second)[0]) == 2


# xlam-function-calling-60k

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


# AgentOhana


def test_agentohana_fixture(convert):
    kept, dropped, repairs = convert("agentohana", *rows_of("agentohana"))
    bought, answered, text = kept
    assert dropped == [(1, "step", "invalid-action")]
    assert repairs == []
    assert [each.score for each in kept] == [1.0, 4.5, 0.0]
    assert [each.source for each in kept] == ["webshop", "hotpotqa", None]
    assert (bought.tools, bought.task_instruction) == (shop.TOOLS, shop.INSTRUCTION)
    assert bought.conversation == (
        Message("user", "perfume under $40"),
        Message("assistant", "", (ToolCall("call_1", "search", {"query": "perfume"}),)),
        Message("tool", "[Back to Search] [B08X] Rose 30 ml [B09Y] Oud 50 ml", (), "call_1", "search"),
        Message("assistant", "The rose one is cheap.", (ToolCall("call_2", "click", {"element": "B08X"}),)),
        Message("tool", "Rose 30 ml, $19.00 [Buy Now]", (), "call_2", "click"),
        Message("assistant", "", (ToolCall("call_3", "click", {"element": "Buy Now"}),)),
    )
    assert answered.conversation[1::2] == (
        Message("assistant", "I search the city.", (ToolCall("call_1", "search", {"query": "Graz"}),)),
        Message("assistant", "That is it.", (ToolCall("call_2", "finish", {"answer": "Mur"}),)),
    )
    assert text.tools == []
    assert [(turn.role, turn.content) for turn in text.conversation] == [
        ("user", "Put a clean mug on the desk."),
        ("assistant", "go to desk 1"),
        ("user", "On the desk 1, you see a mug 2."),
        ("assistant", "take mug 2 from desk 1"),
    ]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("Action: search[perfume]\n", "Action: search[soap]\n", "lacks the output of step 0: 'search[perfume]'"),
        ("Oud 50 ml", "Oud 60 ml", "lacks the observation of step 0"),
        (
            "\nAction: search[perfume]\n",
            "\nHurry! Action: search[perfume]\n",
            "has text before the output of step 0: 'Hurry!",
        ),
        ("Oud 50 ml", "Oud 50 ml Well?", "ends in 'Well?'"),
    ],
)
def test_inputs_that_differ_are_named(old, new, message):
    row = rows_of("agentohana")[0]
    convert_row = row_converter("agentohana")
    assert convert_row
    row["steps"][1]["input"] = row["steps"][1]["input"].replace(old, new)
    *_, item = convert_one(Path("x.jsonl"), 1, row, convert_row)
    assert isinstance(item, Converted)
    (repair,) = item.repairs
    assert repair.reason == "history-differs"
    assert repair.detail.startswith(f"the input of step 1 {message}")


def test_agentohana_variants(convert):
    row = rows_of("agentohana")[0]
    steps = row["steps"]
    expected = convert("agentohana", row)[0][0].conversation
    kept, _, repairs = convert("agentohana", row | {"steps": steps[::-1]})
    assert (kept[0].conversation, repairs) == (expected, ["steps-out-of-order"])
    underscored = json.loads(json.dumps(row).replace("next observation", "next_observation"))
    assert convert("agentohana", underscored)[0][0].conversation == expected
    # another task in a later input
    other = [steps[0], steps[1] | {"input": "Another task."}]
    assert convert("agentohana", row | {"steps": other})[1] == [(1, "trajectory", "inconsistent-input")]
    # an action of an unknown environment: everything stays text, also without inputs
    bare = [{"output": "Action: search[a]", "next observation": "x"}, {"output": "Action: fly[b]"}]
    (kept,), dropped, _ = convert("agentohana", {"user query": "q", "steps": bare, "score": None})
    assert [turn.content for turn in kept.conversation] == ["q", "Action: search[a]", "x", "Action: fly[b]"]
    assert (kept.tools, dropped) == ([], [])
    # searches alone fit two environments; the prompt or the source decides
    alone = {"user query": "q", "steps": [{"output": "search[a]"}]}
    assert convert("agentohana", alone)[0][0].tools == []
    assert convert("agentohana", alone | {"source": "hotpotqa"})[0][0].conversation[1].tool_calls
    alone["steps"][0]["input"] = "q; use search[x] or click[x]"
    assert convert("agentohana", alone)[0][0].source == "webshop"
    # thoughts as steps of their own
    thinking = [{"output": "Action: think[Soap.]", "next observation": "OK."}, {"output": "Action: click[a]"}]
    (kept,), _, _ = convert("agentohana", {"user query": "q", "steps": [*thinking, thinking[0]]})
    assert kept.conversation[1].content == "Soap."
    for change, reason in (
        ({"steps": []}, "no-assistant-turn"),
        ({"steps": [3]}, "missing-field"),
        ({"steps": [{"output": 3}]}, "missing-field"),
        ({"user query": 3}, "missing-field"),
        ({"user query": None, "steps": [{"output": "a"}]}, "missing-field"),
        ({"score": "good"}, "bad-score"),
    ):
        assert convert("agentohana", row | change)[1][-1] == (1, "trajectory", reason), change
    # a source that is named after the shop, with steps that are not actions
    shop_row = {
        "user query": "q",
        "source": "webshop",
        "steps": [{"output": "buy", "next observation": "Invalid action!"}],
    }
    assert [reason for *_, reason in convert("agentohana", shop_row)[1]] == ["no-assistant-turn"]
    shop_row["steps"].append({"input": "p", "output": "look around"})
    (kept,), dropped, _ = convert("agentohana", shop_row)
    assert [turn.content for turn in kept.conversation] == ["q", "look around"]
    assert dropped == [(1, "step", "invalid-action")]
    assert convert("agentohana", {"user query": "q", "steps": [{"input": "p", "output": "a"}]})[2] == [
        "query-not-in-input"
    ]


# All of them


@pytest.mark.parametrize("name", FORMATS)
def test_whatever_the_row_nothing_else_is_raised(name, monkeypatch):
    start = rows_of(name)[0]

    def rows(candidates):
        return (Row(number, number, row) for number, row in enumerate(candidates, start=1))

    @settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.nested_given])
    @given(st.lists(broken(start) | st.dictionaries(st.sampled_from(sorted(start)), JSON), min_size=1, max_size=2))
    def check(candidates):
        monkeypatch.setattr("xlam_jax.data.converters.train_ready.read_rows", lambda path: rows(candidates))
        monkeypatch.setattr("xlam_jax.data.converters.common.read_rows", lambda path: rows(candidates))
        items = list(converter(name)([Path("rows.jsonl")]))
        assert {item.row for item in items} == set(range(1, len(candidates) + 1))
        for item in items:
            if isinstance(item, Converted):
                for target in ("train_ready", "xlam60k"):
                    export(target, item.trajectory)

    check()


@pytest.mark.parametrize("target", ["unified", "openai", "sharegpt", "train_ready", "xlam60k"])
@pytest.mark.parametrize("name", FORMATS)
def test_command_line(name, target, tmp_path, capsys):
    source, out = FIXTURES / f"{name}.jsonl", tmp_path / "out.jsonl"
    main(["--format", name, "--to", target, "--in", str(source), "--out", str(out)])
    assert out.read_text(encoding="utf-8").endswith("}\n")
    assert f"{len(rows_of(name))} rows read" in capsys.readouterr().out


def test_train_ready_streams(tmp_path):
    """One trajectory is out before the file is read to its end."""
    path = tmp_path / "rows.jsonl"
    row = rows_of("train_ready")[2]
    path.write_text(json.dumps(row) + "\n" + json.dumps(row | {"id": "y"}) + "\n" + '{"id": 1', encoding="utf-8")
    items = convert_train_ready([path])
    assert isinstance(next(items), Converted)
    assert [type(item) for item in items] == [Dropped, Converted]


def test_long_turns_take_linear_time():
    agent = row_converter("agentohana")
    assert agent
    for text in (" " * 2_000_000, "Thought:" * 200_000, "Action: search[" * 200_000, "Action " * 300_000):
        steps = [{"input": text + "q", "output": text + "x", "next observation": text}] * 2
        assert list(convert_one(Path("x.jsonl"), 1, {"user query": "q", "steps": steps}, agent))
