"""Null fields of a union schema, written by the `datasets` library, against nulls that were meant."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xlam_jax.config import Source
from xlam_jax.data import nulls, sources
from xlam_jax.data.pair import Pair
from xlam_jax.data.parse import parse_tools, parse_trajectory
from xlam_jax.data.trajectory import Trajectory, to_dict
from xlam_jax.data.validate import check_row

CITY: dict[str, Any] = {"type": "string"}


def tool(name: str, properties: dict[str, Any], required: list[str]) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties, "required": required}
    return {"type": "function", "function": {"name": name, "description": f"{name}s.", "parameters": parameters}}


def calling(name: str, arguments: dict[str, Any], tools: list[dict[str, Any]]) -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    return {
        "unique_trajectory_id": name,
        "tools": tools,
        "conversation": [
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "id": "c", "function": function}]},
        ],
    }


FIND = tool("find", {"city": CITY, "limit": {"type": "integer", "default": 3}}, ["city"])
BOOK = tool("book", {"hotel": {"type": "object", "properties": {"id": {"type": "integer"}, "pet": CITY}}}, ["hotel"])
PING = {"type": "function", "function": {"name": "ping"}}
ROWS = [
    calling("find", {"city": "Oslo"}, [FIND, PING]),
    calling("find", {"city": "Bodø", "limit": 2}, [FIND]),
    calling("book", {"hotel": {"id": 7}}, [BOOK, FIND]),
    calling("book", {"hotel": {"id": 8, "pet": "cat"}}, [BOOK]),
    calling("ping", {}, [PING]),
]


def trajectories(path: Path, **source: Any) -> list[Any]:
    return [item.trajectory for item in sources.read(Source(name="s", files=[str(path)], **source))]


@pytest.fixture
def written(tmp_path):
    """Writes rows by the `datasets` library; gives the files, which it has padded with nulls."""
    from datasets import Dataset

    def write(rows: list[dict[str, Any]]) -> dict[str, Path]:
        dataset = Dataset.from_list(copy.deepcopy(rows))
        dataset.to_json(str(tmp_path / "rows.jsonl"))
        dataset.to_parquet(str(tmp_path / "rows.parquet"))
        return {kind: tmp_path / f"rows.{kind}" for kind in ("jsonl", "parquet")}

    return write


def sorted_keys(trajectory: Any) -> str:
    assert isinstance(trajectory, Trajectory), trajectory
    return json.dumps(to_dict(trajectory), sort_keys=True)  # columns have one order of keys for all rows


def test_what_datasets_writes_is_read_without_its_padding(written):
    expected = [sorted_keys(parse_trajectory(copy.deepcopy(row))) for row in ROWS]
    files = written(ROWS)
    assert '"limit":null' in files["jsonl"].read_text(encoding="utf-8")
    for path in files.values():
        assert [sorted_keys(trajectory) for trajectory in trajectories(path)] == expected
        items = list(sources.read(Source(name="s", files=[str(path)])))
        assert all([repair.reason for repair in item.repairs][-1] == "null-fields" for item in items)


def test_chat_messages_that_datasets_wrote(written):
    """With the older form's keys in other rows, and padded keys in every message."""
    rows = [
        {"messages": row["conversation"], "tools": row["tools"]}
        for row in copy.deepcopy(ROWS)
        for row["unique_trajectory_id"] in [None]
    ]
    call = rows[0]["messages"][1].pop("tool_calls")[0]["function"]
    rows[0]["messages"][1]["function_call"] = call
    rows[1]["messages"][1]["reasoning_content"] = "I look."
    rows[1]["messages"].append({"role": "tool", "tool_call_id": "c", "name": "find", "content": "ok"})
    read = {kind: trajectories(path, format="openai") for kind, path in written(rows).items()}
    for results in read.values():
        arguments = [trajectory.conversation[1].tool_calls[0].arguments for trajectory in results]
        assert arguments == [row["conversation"][1]["tool_calls"][0]["function"]["arguments"] for row in ROWS]
        assert [turn.reasoning for turn in results[1].conversation] == ["", "I look.", ""]
        assert "null" not in json.dumps([trajectory.tools for trajectory in results])
    assert [sorted_keys(one) for one in read["jsonl"]] == [sorted_keys(one) for one in read["parquet"]]


def test_flat_tools_that_datasets_wrote(written):
    rows = [
        {"query": "q", "tools": [{"name": name, "parameters": {key: {"type": "str"}}}], "answers": [answer]}
        for name, key, answer in (
            ("a", "x", {"name": "a", "arguments": {"x": "1"}}),
            ("b", "y", {"name": "b", "arguments": {"y": "2"}}),
        )
    ]
    for path in written(rows).values():
        results = trajectories(path, format="xlam60k")
        assert [one.conversation[1].tool_calls[0].arguments for one in results] == [{"x": "1"}, {"y": "2"}]
        assert [list(one.tools[0]["function"]["parameters"]["properties"]) for one in results] == [["x"], ["y"]]


def test_both_sides_of_a_pair(written):
    rows = [
        {
            "conversation": row["conversation"][:1],
            "tools": row["tools"],
            "chosen": row["conversation"][1:],
            "rejected": [{"role": "assistant", "content": "No."}],
        }
        for row in ROWS
    ]
    for path in written(rows).values():
        results = trajectories(path, format="pairs")
        assert all(isinstance(pair, Pair) for pair in results), results
        arguments = [pair.chosen.conversation[1].tool_calls[0].arguments for pair in results]
        assert arguments == [row["conversation"][1]["tool_calls"][0]["function"]["arguments"] for row in ROWS]


values = st.sampled_from([1, 2.5, "x", True])


@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.lists(st.dictionaries(st.sampled_from("abcd"), st.just("x"), min_size=1), min_size=1, max_size=4))
def test_arguments_come_back_as_they_were_whatever_the_others_have(tmp_path_factory, drawn):
    from datasets import Dataset

    rows = [
        calling("f", arguments, [tool("f", dict.fromkeys(sorted(arguments), CITY), sorted(arguments))])
        for arguments in drawn
    ]
    path = tmp_path_factory.mktemp("drawn") / "rows.jsonl"
    Dataset.from_list(copy.deepcopy(rows)).to_json(str(path))
    results = trajectories(path)
    assert [trajectory.conversation[1].tool_calls[0].arguments for trajectory in results] == drawn
    assert [trajectory.tools for trajectory in results] == [row["tools"] for row in rows]


NULLABLE = {"anyOf": [{"type": "string"}, {"type": "null"}], "default": None}


@pytest.mark.parametrize(
    ("schema", "required", "meant", "meant_in_columns"),
    [
        ({"type": ["string", "null"]}, True, True, True),
        ({"type": ["string", "null"]}, False, True, False),
        (NULLABLE, False, True, False),
        ({"type": "string", "nullable": True}, False, True, False),
        ({"enum": ["a", None]}, True, True, True),
        ({}, False, True, False),
        ({"type": "string"}, False, False, False),
        ({"type": "string"}, True, True, False),  # a mistake of the source, not padding: `validate` reports it
        (None, False, False, False),  # not declared
    ],
)
def test_whether_a_null_was_meant(schema, required, meant, meant_in_columns):
    properties = {"b": CITY} | ({} if schema is None else {"a": schema})
    row = calling("f", {"a": None, "b": "x"}, [tool("f", properties, ["a"] if required else [])])
    for padded, stays in ((False, meant), (True, meant_in_columns)):
        notes: list[tuple[str, str]] = []
        parsed = parse_trajectory(copy.deepcopy(row), repaired=lambda *note, to=notes: to.append(note), padded=padded)
        expected = {"a": None, "b": "x"} if stays else {"b": "x"}
        assert parsed.conversation[1].tool_calls[0].arguments == expected
        assert notes == ([] if stays else [("null-fields", "dropped, as null: arguments.a")])
        assert parsed.tools == row["tools"]  # the null default of a nullable property is one


def test_a_null_that_the_schema_forbids_is_a_finding():
    row = calling("f", {"a": None}, [tool("f", {"a": CITY}, ["a"])])
    assert [problem.reason for problem in check_row(row)] == ["wrong-type"]
    row = calling("f", {"a": None}, [tool("f", {"a": CITY}, [])])
    assert [problem.reason for problem in check_row(row)] == ["null-fields"]


def test_nulls_within_arguments_follow_the_schemas_within():
    inner = {"type": "array", "items": {"type": "object", "properties": {"id": CITY, "tag": {"type": ["null"]}}}}
    row = calling("f", {"list": [{"id": None, "tag": None, "new": None}]}, [tool("f", {"list": inner}, [])])
    (call,) = parse_trajectory(copy.deepcopy(row)).conversation[1].tool_calls
    assert call.arguments == {"list": [{}]}  # `new` shows that the row is padded
    del row["conversation"][1]["tool_calls"][0]["function"]["arguments"]["list"][0]["new"]
    (call,) = parse_trajectory(copy.deepcopy(row)).conversation[1].tool_calls
    assert call.arguments == {"list": [{"tag": None}]}
    free = calling("f", {"any": {"x": None}}, [tool("f", {"any": {"type": "object"}}, [])])
    (call,) = parse_trajectory(copy.deepcopy(free)).conversation[1].tool_calls
    assert call.arguments == {"any": {"x": None}}


def test_null_defaults_stay_unless_they_are_padding():
    alone = tool("f", {"a": {"type": "string", "default": None}, "b": CITY}, [])
    assert parse_tools([alone]) == [alone]
    padded = tool("f", {"a": CITY | {"default": None}, "b": CITY | {"default": "x"}}, [])
    assert parse_tools([padded])[0]["function"]["parameters"]["properties"] == {
        "a": CITY,
        "b": CITY | {"default": "x"},
    }
    bare = tool("f", {"a": CITY | {"enum": None, "default": None}, "default": None}, [])
    assert parse_tools([bare])[0]["function"]["parameters"]["properties"] == {"a": CITY}
    data = tool("f", {"a": {"type": "object", "default": {"x": None}, "enum": [{"y": None}, None]}}, [])
    assert parse_tools([data]) == [data]


def test_arguments_in_json_texts_have_no_padding(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    row = calling("f", {"a": None}, [tool("f", {"a": NULLABLE}, [])])
    texts = {key: json.dumps(row[key]) for key in ("tools", "conversation")}
    pq.write_table(pa.Table.from_pylist([texts]), tmp_path / "rows.parquet")
    (trajectory,) = trajectories(tmp_path / "rows.parquet")
    assert trajectory.conversation[1].tool_calls[0].arguments == {"a": None}


def test_features_of_tfds_that_are_absent_are_padding_too():
    """As `tfds.data_source` gives a dataset with nested features."""
    from xlam_jax.data.tfds_dataset import plain

    values = calling("find", {"city": b"Oslo", "limit": None}, [FIND])
    row = nulls.drop_outside_tools(plain(values | {"source": None}))
    assert "source" not in row
    assert nulls.has_columns_of_arguments(row)
    trajectory = parse_trajectory(row, padded=True)
    assert trajectory.conversation[1].tool_calls[0].arguments == {"city": "Oslo"}
