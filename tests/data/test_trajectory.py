import copy
import json

import pytest

from xlam_jax.data.trajectory import (
    InvalidTrajectory,
    Trajectory,
    parse_messages,
    parse_trajectory,
    read_jsonl,
    to_dict,
)
from xlam_jax.errors import UserError


def test_round_trip_is_exact(row, quickstart):
    row["conversation"][1]["loss"] = False
    again = to_dict(parse_trajectory(copy.deepcopy(row)))
    assert again == row
    assert parse_trajectory(again) == parse_trajectory(row)
    for source in ("webshop", "hotpotqa", "seal_tools", "hammer"):
        for line in (quickstart / f"{source}.jsonl").read_text(encoding="utf-8").splitlines():
            assert json.dumps(to_dict(parse_trajectory(json.loads(line))), ensure_ascii=False) == line


def test_variants_are_repaired(row):
    plain = parse_trajectory(copy.deepcopy(row))
    for call in row["conversation"][1]["tool_calls"]:
        call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
    row["conversation"][7]["content"] = None
    row["score"] = "1.0"
    assert parse_trajectory(row) == plain
    row["conversation"][2]["content"] = [{"name": "get_weather", "results": {"t": "3 °C"}}]
    tool = parse_trajectory(row).conversation[2]
    assert tool.content == '[{"name": "get_weather", "results": {"t": "3 °C"}}]'


def set_(path: str, value: object):
    """Returns a change of the row at `path`, its keys and indices joined with dots."""

    def change(row: dict) -> None:
        *front, last = [int(key) if key.isdigit() else key for key in path.split(".")]
        for key in front:
            row = row[key]
        row[last] = value

    return change


CALL = "conversation.1.tool_calls.0"
INVALID = [
    (set_("conversation", []), "no-conversation", "nothing|list"),
    (set_("conversation", None), "no-conversation", "nothing"),
    (set_("conversation.0.role", "usr"), "unknown-role", "turn 0 has role 'usr'.*did you mean 'user'"),
    (set_("conversation", [{"role": "user", "content": "x"}]), "no-assistant-turn", "none of the 1 turns"),
    (set_(f"{CALL}.function.name", "get_wether"), "undeclared-tool", "'get_wether'.*get_time.*mean 'get_weather'"),
    (set_("tools", []), "undeclared-tool", "declared tools: none"),
    (set_("conversation.4.content", ""), "empty-assistant-turn", "turn 4"),
    (set_("conversation.4.content", ["x"]), "bad-content", "turn 4"),
    (set_("conversation.0.role", "assistant"), "bad-role-order", "turn 0 is by the assistant"),
    (set_("conversation.1", {"role": "assistant", "content": "x"}), "bad-role-order", "turn 2 is a tool result"),
    (set_("conversation.6.role", "tool"), "bad-role-order", "turn 6 is a tool result after a user turn"),
    (set_("conversation.5.role", "system"), "bad-role-order", "turn 5 is a system turn after a assistant"),
    (set_("conversation.5.tool_calls", [{}]), "bad-role-order", "turn 5 .user. has tool calls"),
    (set_("conversation.2.tool_call_id", "call_9"), "orphan-tool-call-id", "'call_9', calls before it: call_0, call_1"),
    (set_(f"{CALL}.id", "call_1"), "duplicate-call-id", "turn 1"),
    (set_(f"{CALL}.function.arguments", [1]), "bad-arguments", "'get_weather' with a list"),
    (set_(f"{CALL}.function.arguments", '{"a": NaN}'), "bad-arguments", "NaN"),
    (set_(CALL, {"name": "get_weather", "arguments": {}}), "bad-call", "turn 1"),
    (set_("tools.0", {"name": "get_weather"}), "tool-without-name", "tool 0"),
    (set_("tools.0.function.name", "get_time"), "duplicate-tool", "tool 1 is named 'get_time'"),
    (set_("conversation.1.loss", 1), "bad-loss", "turn 1"),
    (set_("score", "high"), "bad-score", "'high'"),
]


@pytest.mark.parametrize(("change", "reason", "detail"), INVALID)
def test_invalid_rows_say_why(row, change, reason, detail):
    change(row)
    with pytest.raises(InvalidTrajectory, match=detail) as caught:
        parse_trajectory(row)
    assert caught.value.reason == reason


def test_call_ids_may_repeat_in_later_turns(row):
    turns = row["conversation"]
    assert len(parse_messages(turns + turns[5:6] + turns[1:4])) == 12


def test_reading_streams_and_counts_lines(row, write_jsonl):
    del row["unique_trajectory_id"]
    path = write_jsonl(
        row,
        b"",
        b"  ",
        b'{"broken": ',
        b'{"a": "\xff"}',
        b"[1]",
        b'{"score": NaN}',
        b'{"score": 1e999}',
        b'"\\ud83e"',
        row,
    )
    read = list(read_jsonl(path))
    assert [number for number, _ in read] == [1, 4, 5, 6, 7, 8, 9, 10]
    assert [getattr(item, "reason", "") for _, item in read] == [
        "",
        "malformed-json",
        "malformed-json",
        "not-an-object",
        "malformed-json",
        "malformed-json",
        "malformed-json",
        "",
    ]
    assert isinstance(read[0][1], Trajectory)
    assert read[0][1].id == "rows:1"
    assert "0xff at position 7" in str(read[2][1])


def test_a_missing_file_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match=r"none\.jsonl: cannot be read"):
        next(read_jsonl(tmp_path / "none.jsonl"))
