import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from conversions import turns
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import JSON, broken

from xlam_jax.data.converters import CONVERTERS, row_converter
from xlam_jax.data.converters.common import (
    Converted,
    Dropped,
    Repaired,
    StepDropped,
    as_declared,
    convert_one,
    json_schema,
)
from xlam_jax.data.rows import read_rows
from xlam_jax.data.trajectory import InvalidTrajectory, Trajectory
from xlam_jax.errors import UserError

FIXTURES = Path(__file__).parent / "fixtures"


def run(name: str, *paths: Path) -> tuple[list[Trajectory], list[Dropped]]:
    items = list(CONVERTERS[name](list(paths)))
    kept = [item.trajectory for item in items if isinstance(item, Converted)]
    return kept, [item for item in items if isinstance(item, Dropped)]


def convert_row(name: str, row: dict[str, Any]) -> list[Converted | Dropped]:
    convert = row_converter(name)
    assert convert
    return list(convert_one(Path("x.jsonl"), 1, row, convert))


def test_webshop():
    kept, dropped = run("webshop", FIXTURES / "webshop.jsonl")
    bought, refined, gave_up = kept
    assert [(t.id, t.score, t.source) for t in kept] == [(f"webshop_{i}", 0.0, "webshop") for i in (0, 3, 132)]
    assert turns(bought)[1] == ("assistant", "", ("search", {"query": "long clip-in hair extension natural looking"}))
    assert turns(bought)[3][1].startswith("B08H5DCD65 is long clip-in hair extension")
    assert turns(bought)[3][2] == ("click", {"element": "B08H5DCD65"})
    assert turns(bought)[5][1].endswith("'natural black to auburn #1bt30',")  # the log cut it there
    assert turns(bought)[-1] == ("assistant", "", ("click", {"element": "Buy Now"}))
    elements = [turn[2][1].get("element") for turn in turns(refined) if turn[0] == "assistant"]
    assert "Next >" not in elements
    assert "Back to Search" in elements
    assert "refine my search" not in str(turns(refined))  # the thought of a dropped step
    assert len(gave_up.conversation) == 2
    assert Counter((item.unit, item.reason, item.row) for item in dropped) == {
        ("step", "invalid-action", 2): 2,
        ("step", "thought-without-action", 2): 1,
        ("step", "invalid-action", 3): 4,
    }


def test_hotpotqa():
    kept, dropped = run("hotpotqa", FIXTURES / "hotpotqa.jsonl", FIXTURES / "hotpotqa_scored.json")
    assert dropped == []
    assert [t.score for t in kept] == [1.0, 1.0, 1.0, 0.0, 1.0, pytest.approx(1 / 3)]
    assert [m.role for m in kept[0].conversation] == ["user", "assistant", "tool", "assistant"]
    assert turns(kept[0])[3] == (
        "assistant",
        "Badr Hari is the person who fits the description.",
        ("finish", {"answer": "Badr Hari"}),
    )
    question, search, result, finish = turns(kept[4])  # one text in Alpaca style
    assert question == ("user", "Who created the show with Wendy Schaal doing the voice of Francine?")
    assert search[2] == ("search", {"query": "who created the show with Wendy Schaal doing the voice of Francine"})
    assert result[1].startswith("It was finally in '05")
    assert finish[1:] == ("The show was created by Seth MacFarlane.", ("finish", {"answer": "Seth MacFarlane"}))
    assert "reward" not in str(kept)


def test_hotpotqa_drops_what_it_does_not_know(write_jsonl):
    def episode(text: str) -> dict:
        return {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": text}]}

    path = write_jsonl(episode("Thought: a\nAction: search[b]"), episode("Action: lookup[b]"), {"x": 1}, b"{", [])
    kept, dropped = run("hotpotqa", path)
    assert len(kept) == 1
    assert [(item.row, item.reason) for item in dropped] == [
        (2, "unknown-action"),
        (3, "missing-field"),
        (4, "malformed-json"),
        (5, "not-an-object"),
    ]


def test_seal_tools():
    rows, pool = FIXTURES / "seal_tools" / "dev.jsonl", FIXTURES / "seal_tools" / "tool.jsonl"
    kept, dropped = run("seal_tools", rows)
    assert [(item.row, item.reason) for item in dropped] == [(2, "refers-to-earlier-result")]
    single, parallel = kept
    assert single.conversation[1].tool_calls[0].arguments["age"] == 63  # written "63", declared int
    assert [call.name for call in parallel.conversation[1].tool_calls] == ["checkMembership", "getLibraryDataInventory"]
    for trajectory in kept:
        names = [tool["function"]["name"] for tool in trajectory.tools]
        assert len(names) == len({call.name for call in trajectory.conversation[1].tool_calls}) + 2
    tool = next(tool for tool in single.tools if tool["function"]["name"] == "enrollYouthParticipant")
    assert tool["function"]["parameters"]["properties"]["age"]["type"] == "integer"
    assert (kept, dropped) == run("seal_tools", pool, rows)


def test_seal_tools_needs_its_tools(write_jsonl):
    with pytest.raises(UserError, match=r"tool\.jsonl: not found"):
        run("seal_tools", write_jsonl({"id": "x", "query": "q", "calling": []}))


def test_hammer():
    kept, dropped = run("hammer", FIXTURES / "hammer.json")
    dialogue, last_by_user, after_tool, timed, *_ = kept
    assert [(item.row, item.reason) for item in dropped] == [(6, "undeclared-tool")]
    assert [m.role for m in dialogue.conversation] == [
        "user", "assistant", "user", "assistant", "tool", "assistant", "user", "assistant", "user", "assistant",
    ]  # fmt: skip
    history = dialogue.conversation[3]  # the agent's text and the call after it are one turn
    assert (history.content, history.loss) == ("Alright. I'll modify your appointment now.", False)
    assert history.tool_calls[0].arguments["new_appointment_date"] == "2023-03-26"
    assert turns(dialogue)[-1][:2] == ("assistant", "Got it.")
    assert dialogue.conversation[-1].loss is None
    assert turns(last_by_user)[-2:] == [
        ("user", "Morning Routine"),
        ("assistant", "", ("QueryScene", {"name": "Morning Routine"})),
    ]
    assert turns(after_tool)[-2] == ("tool", "{'token': 'a9s8d7f6g5h4j3k2l1'}")
    assert timed.conversation[-1].tool_calls[0].arguments["on"] is False  # written "False", declared bool
    assert "Generate API Request" not in str(kept)
    tool = kept[4].tools[0]["function"]  # ToolAlpaca flags what is required
    assert tool["parameters"]["required"] == ["countryCode"]


def test_hammer_reads_the_60k_format(write_jsonl):
    parameters = {
        "city": {"type": "str", "description": "Where."},
        "days": {"type": "int, optional", "description": "How long.", "default": "3"},
        "tags": {"type": "List[str], optional", "description": ""},
        "unit": {"type": "str", "default": "C"},
    }
    tools = json.dumps([{"name": "forecast", "description": "Weather.", "parameters": parameters}])
    answers = json.dumps([{"name": "forecast", "arguments": {"city": "Oslo", "days": "2"}}] * 2)
    kept, dropped = run("hammer", write_jsonl({"id": 7, "query": "q", "tools": tools, "answers": answers}))
    assert (dropped, kept[0].id) == ([], "hammer_7")
    assert kept[0].tools[0]["function"]["parameters"] == {
        "type": "object",
        "properties": {
            "city": {"type": "string", "description": "Where."},
            "days": {"type": "integer", "description": "How long.", "default": 3},
            "tags": {"type": "array", "items": {"type": "string"}},
            "unit": {"type": "string", "default": "C"},
        },
        "required": ["city"],
    }
    assert turns(kept[0])[1] == ("assistant", "", *[("forecast", {"city": "Oslo", "days": 2})] * 2)


@pytest.mark.parametrize(
    ("spelling", "schema", "optional"),
    [
        ("str", {"type": "string"}, False),
        ("number", {"type": "number"}, False),
        ("list(str)", {"type": "array", "items": {"type": "string"}}, False),
        ("List[List[int]]", {"type": "array", "items": {"type": "array", "items": {"type": "integer"}}}, False),
        ("Optional[float], optional", {"type": "number"}, True),
        ("Dict[str, Any]", {"type": "object"}, False),
        ("Tuple[int, int]", {"type": "array"}, False),
        ("Union[str, int]", {}, False),
        ("", {}, False),
    ],
)
def test_json_schema_of_spellings(spelling, schema, optional):
    assert json_schema(spelling) == (schema, optional)


@pytest.mark.parametrize(
    ("value", "kind", "expected"),
    [
        ("63", "integer", 63),
        ("-2.50", "number", -2.5),
        ("7", "number", 7),
        ("True", "boolean", True),
        ("007", "integer", "007"),
        ("63", "string", "63"),
        ("high", "integer", "high"),
        (2.0, "integer", 2.0),
    ],
)
def test_text_becomes_the_declared_type_where_clear(value, kind, expected):
    got = as_declared(value, {"type": kind})
    assert (got, type(got)) == (expected, type(expected))


def repairs(name: str, *paths: Path) -> Counter:
    """Number of repairs of each defect in each row."""
    return Counter(
        (item.path.name, item.row, repair.reason)
        for item in CONVERTERS[name](list(paths))
        if isinstance(item, Converted)
        for repair in item.repairs
    )


def test_repairs_are_reported():
    assert repairs("webshop", FIXTURES / "webshop.jsonl") == {("webshop.jsonl", 1, "unclosed-action"): 1}
    assert repairs("hotpotqa", FIXTURES / "hotpotqa.jsonl", FIXTURES / "hotpotqa_scored.json") == {}
    assert repairs("seal_tools", FIXTURES / "seal_tools" / "dev.jsonl") == {
        ("dev.jsonl", 1, "text-for-declared-type"): 1
    }
    hammer_repairs = repairs("hammer", FIXTURES / "hammer.json")
    assert {reason for _, _, reason in hammer_repairs} == {"missing-call-id", "text-for-declared-type"}
    for item in CONVERTERS["hammer"]([FIXTURES / "hammer.json"]):
        if isinstance(item, Converted):
            assert all(turn.tool_call_id for turn in item.trajectory.conversation if turn.role == "tool")


def test_a_broken_tool_of_the_pool_is_a_user_error(write_jsonl):
    rows = write_jsonl({"id": "x", "query": "q", "calling": []})
    good = {
        "api_name": "a",
        "api_description": "d",
        "parameters": {"p": {"type": "str", "description": "d"}},
        "required": [],
    }
    for tool, message in (
        ({"api_name": 1}, r"tool\.jsonl:2: not a tool"),
        ({**good, "required": None}, r"tool\.jsonl:2: missing-field: `required`"),
        ({**good, "parameters": {"p": "str"}}, r"tool\.jsonl:2: missing-field: `type`"),
    ):
        pool = write_jsonl(good, tool, name="tool.jsonl")
        with pytest.raises(UserError, match=message):
            run("seal_tools", rows, pool)


def test_a_row_may_hold_several_trajectories():
    good = {
        "unique_trajectory_id": "g",
        "conversation": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}],
    }

    def convert_row(row: dict, name: str):
        if row["ends"] == "silent":
            return
        yield Repaired("of-good", "1")
        yield StepDropped("of-good", "2")
        yield good
        yield Repaired("of-bad", "3")
        yield StepDropped("of-bad", "4")
        yield {**good, "score": "high"}
        yield InvalidTrajectory("of-itself", "5")
        yield {**good, "score": "1"}
        yield StepDropped("at-the-end", "6")
        if row["ends"] == "badly":
            raise InvalidTrajectory("at-last", "7")

    def outcomes(ends: str) -> list[tuple]:
        return [
            (item.reason, item.unit)
            if isinstance(item, Dropped)
            else (item.trajectory.id, [r.reason for r in item.repairs])
            for item in convert_one(Path("x.jsonl"), 3, {"ends": ends}, convert_row)
        ]

    first = [
        ("of-good", "step"),
        ("g", ["of-good"]),
        ("bad-score", "trajectory"),
        ("of-itself", "trajectory"),
        ("g", ["text-score"]),
    ]
    assert outcomes("well") == [*first, ("at-the-end", "step")]
    assert outcomes("badly") == [*first, ("at-last", "trajectory")]
    assert outcomes("silent") == [("no-trajectory", "trajectory")]


def first_row(path: Path) -> dict:
    return next(read.row for read in read_rows(path) if isinstance(read.row, dict))


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("webshop", "webshop.jsonl"),
        ("hotpotqa", "hotpotqa.jsonl"),
        ("hotpotqa", "hotpotqa_scored.json"),
        ("hammer", "hammer.json"),
        ("seal_tools", "seal_tools/dev.jsonl"),
    ],
)
def test_whatever_the_row_nothing_else_is_raised(name, file, tmp_path):
    start = first_row(FIXTURES / file)
    path = tmp_path / "rows.jsonl"
    convert_row = row_converter(name)
    tools = FIXTURES / "seal_tools" / "tool.jsonl"

    @settings(max_examples=100, deadline=None, derandomize=True)
    @given(broken(start) | st.dictionaries(st.sampled_from(sorted(start)), JSON))
    def check(row):
        if convert_row is not None:
            assert list(convert_one(path, 1, row, convert_row))
        else:
            path.write_text(json.dumps(row, default=str), encoding="utf-8")  # as far as JSON can hold it
            assert list(CONVERTERS[name]([path, tools]))

    check()


def test_long_turns_take_linear_time():
    for name, text in (("hotpotqa", "Thought: " + " " * 3_000_000), ("hotpotqa", "Thought: Action: search[" * 200_000)):
        row = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": text}]}
        (item,) = convert_row(name, row)
        assert isinstance(item, Dropped)
    steps = [{"action": "search[" * 500_000, "observation": "x"}]
    items = convert_row("webshop", {"instruction": "i", "steps": steps})
    assert isinstance(items[0], Converted)


def test_nested_type_spellings_end():
    schema, _ = json_schema("List[" * 10_000 + "int" + "]" * 10_000)
    assert str(schema).count("array") == 9
