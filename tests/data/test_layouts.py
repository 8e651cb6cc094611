"""Layouts that files have in practice: packed as they are, flat or as JSON texts, rows that end with nothing."""

import json
from pathlib import Path
from typing import Any

import pytest
from support import Commands

from converters.trajectories.__main__ import convert
from xlam_jax.config import Source
from xlam_jax.data import sources
from xlam_jax.data.parse import parse_trajectory
from xlam_jax.data.trajectory import InvalidTrajectory, Trajectory
from xlam_jax.data.validate import validate

TOOL = {"name": "weather", "description": "d", "parameters": {"type": "object", "properties": {"city": {}}}}
CALL = {"name": "weather", "arguments": {"city": "Oslo"}}
TURNS: list[dict[str, Any]] = [
    {"role": "system", "content": "Help."},
    {"role": "user", "content": "Weather in Oslo?"},
    {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "id": "1", "function": CALL}]},
    {"role": "tool", "tool_call_id": "1", "content": "3"},
    {"role": "assistant", "content": "3 degrees."},
]
WRAPPED = [{"type": "function", "function": TOOL}]


def row(turns: Any = TURNS, tools: Any = WRAPPED, key: str = "messages") -> dict[str, Any]:
    return {key: turns, "tools": tools}


def with_call(calls: Any) -> list[dict[str, Any]]:
    return [turn | {"tool_calls": calls} if turn.get("tool_calls") else turn for turn in TURNS]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def trajectories(path: Path, format: str) -> list[Trajectory]:
    results = []
    for item in sources.read(Source(name="s", files=[str(path)], format=format)):
        assert isinstance(item.trajectory, Trajectory), item.trajectory
        results.append(item.trajectory)
    return results


@pytest.mark.parametrize("format", ["openai", "sharegpt", "unified"])
@pytest.mark.parametrize(
    "changed",
    [
        {"tools": [TOOL]},
        {"tools": [{"type": "function", **TOOL}]},
        {"tools": TOOL},
        {"tools": json.dumps([TOOL])},
        {"turns": json.dumps(TURNS)},
        {"turns": with_call([{"id": "1", **CALL}])},
        {"turns": with_call([{"id": "1", "name": "weather", "arguments": '{"city": "Oslo"}'}])},
        {"turns": with_call({"type": "function", "id": "1", "function": CALL})},
        {"turns": with_call(json.dumps([{"type": "function", "id": "1", "function": CALL}]))},
    ],
)
def test_flat_and_packed_rows_are_read(format: str, changed: dict[str, Any], tmp_path: Path):
    key = {"openai": "messages", "sharegpt": "conversations", "unified": "conversation"}[format]
    plain, other = (
        trajectories(write(tmp_path / f"{name}.jsonl", [row(**values, key=key)]), format)[0]
        for name, values in (("plain", {}), ("other", changed))
    )
    assert (other.tools, other.conversation, other.task_instruction) == (
        plain.tools,
        plain.conversation,
        plain.task_instruction,
    )
    assert [call.arguments for turn in other.conversation for call in turn.tool_calls] == [{"city": "Oslo"}]


def test_every_container_is_read_alike(tmp_path: Path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [row(), row([*TURNS[:2], {"role": "assistant", "content": "Where?"}])]
    plain = write(tmp_path / "rows.jsonl", rows)
    (tmp_path / "list.jsonl").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    write(tmp_path / "lines.json", rows)
    texts = {key: [json.dumps(row[key]) for row in rows] for key in ("messages", "tools")}
    pq.write_table(pa.table(texts), tmp_path / "rows.parquet")
    read = [trajectories(plain, "openai")]
    for name in ("list.jsonl", "lines.json", "rows.parquet"):
        out = tmp_path / f"{name}.out.jsonl"
        convert("openai", [tmp_path / name], out)
        read += [trajectories(tmp_path / name, "openai"), trajectories(out, "unified")]
    for other in read:
        assert [(t.tools, t.conversation) for t in other] == [(t.tools, t.conversation) for t in read[0]]


def test_messages_name_the_file_s_line_and_the_user_s_turn(tmp_path: Path):
    bad = [*TURNS[:4], {"role": "assistant", "content": ["?"]}]
    file = tmp_path / "rows.json"
    file.write_text(json.dumps([row(), row(bad)], indent=1), encoding="utf-8")
    line = 1 + file.read_text(encoding="utf-8")[: file.read_text(encoding="utf-8").rindex('"messages"')].count("\n")
    (_, item) = sources.read(Source(name="s", files=[str(file)], format="openai"))
    assert item.where == f"{file}:{line - 1} (item 2)"
    assert "turn 4 (assistant) has content" in str(item.trajectory)
    undeclared = with_call([{"type": "function", "id": "1", "function": CALL | {"name": "forecast"}}])
    for format, key in (("openai", "messages"), ("sharegpt", "conversations")):
        lines = write(tmp_path / "rows.jsonl", [row(undeclared, key=key)])
        lines.write_text("\n\n" + lines.read_text(encoding="utf-8"), encoding="utf-8")
        (item,) = sources.read(Source(name="s", files=[str(lines)], format=format))
        assert item.where == f"{lines}:3"
        assert "turn 2 calls 'forecast'" in str(item.trajectory)


@pytest.mark.parametrize(
    ("end", "reason"),
    [
        ({"content": ""}, "empty-last-turn"),
        ({"content": None}, "empty-last-turn"),
        ({"content": None, "refusal": "I can't."}, "refused-last-turn"),
        ({"content": [{"type": "refusal", "refusal": "I can't."}]}, "refused-last-turn"),
    ],
)
def test_a_row_loses_an_empty_end_and_nothing_else(end: dict[str, Any], reason: str):
    turns = [*TURNS, {"role": "user", "content": "And now?"}, {"role": "assistant", **end}]
    repairs: list[str] = []
    read = parse_trajectory({"conversation": turns, "tools": WRAPPED}, "x", lambda why, _: repairs.append(why))
    assert len(read.conversation) == len(turns) - 1
    assert reason in repairs
    alone = {"conversation": [TURNS[1], {"role": "assistant", **end}]}
    with pytest.raises(InvalidTrajectory, match=r"empty-assistant-turn|bad-content"):  # nothing is left to learn from
        parse_trajectory(alone, "x")


def test_another_format_that_reads_the_rows_is_named(tmp_path: Path, commands: Commands):
    file = write(tmp_path / "rows.jsonl", [row()])
    said = commands.fails("converters.trajectories", "--format", "alpaca", "--in", file, "--out", tmp_path / "o.jsonl")
    assert "--format openai reads them" in said
    mixed = write(tmp_path / "mixed.jsonl", [{"instruction": "a", "output": "b"}, row(), row()])
    done = commands.call("converters.trajectories", "--format", "alpaca", "--in", mixed, "--out", tmp_path / "o.jsonl")
    assert "most rows were dropped: --format openai reads them" in done.stdout


def test_findings_name_the_line_of_an_item(tmp_path: Path):
    file = tmp_path / "rows.json"
    file.write_text(json.dumps([{"conversation": TURNS, "tools": []}], indent=1), encoding="utf-8")
    [findings] = validate(file)
    assert {finding.line for finding in findings} == {2}
