import contextlib
import copy
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from strategies import JSON, broken

from xlam_jax.data.parse import parse_messages, parse_tools, parse_trajectory, read_jsonl
from xlam_jax.data.row_json import parse_json
from xlam_jax.data.trajectory import InvalidTrajectory, Trajectory, to_dict
from xlam_jax.errors import UserError


def test_round_trip_is_exact(row, quickstart):
    row["conversation"][1]["loss"] = False
    again = to_dict(parse_trajectory(copy.deepcopy(row)))
    assert again == row
    assert parse_trajectory(again) == parse_trajectory(row)
    for source in ("webshop", "hotpotqa", "seal_tools", "hammer"):
        for line in (quickstart / f"{source}.jsonl").read_text(encoding="utf-8").splitlines():
            assert json.dumps(to_dict(parse_trajectory(json.loads(line))), ensure_ascii=False) == line


def parse(row: object) -> tuple[Trajectory, list[str]]:
    """Returns (trajectory, reasons of repairs); checks that the canonical form needs no repair."""
    reasons = []
    trajectory = parse_trajectory(row, repaired=lambda reason, detail: reasons.append(reason))
    again = []
    text = json.dumps(to_dict(trajectory), ensure_ascii=False, allow_nan=False)
    assert parse_trajectory(parse_json(text.encode()), repaired=lambda *note: again.append(note)) == trajectory
    assert again == []
    return trajectory, reasons


def set_(path: str, value: object):
    """Returns a change of the row at `path`, its keys and indices joined with dots."""

    def change(row: dict) -> None:
        *front, last = [int(key) if key.isdigit() else key for key in path.split(".")]
        for key in front:
            row = row[key]
        row[last] = value

    return change


def drop(path: str):
    """Returns a change that removes the value at `path`."""

    def change(row: dict) -> None:
        *front, last = [int(key) if key.isdigit() else key for key in path.split(".")]
        for key in front:
            row = row[key]
        del row[last]

    return change


CALL = "conversation.1.tool_calls.0"
RESULT = "conversation.2"
SAME = [  # the row stays as it was
    (
        set_(f"{CALL}.function.arguments", '{"city": "Tromsø", "a": [1, 2.5, null, {"z": "\'\\"\\\\\\n"}]}'),
        ["string-arguments"],
    ),
    (
        set_(
            f"{CALL}.function.arguments",
            json.dumps(json.dumps({"city": "Tromsø", "a": [1, 2.5, None, {"z": "'\"\\\n"}]})),
        ),
        ["string-arguments", "string-arguments"],
    ),
    (set_("conversation.1.tool_calls.1.function.arguments", ""), ["string-arguments", "missing-arguments"]),
    (set_("conversation.1.tool_calls.1.function.arguments", None), ["missing-arguments"]),
    (drop("conversation.1.tool_calls.1.function.arguments"), ["missing-arguments"]),
    (
        set_("conversation.1.tool_calls.1.function.arguments", " {} \nThis gives the time."),
        ["string-arguments", "trailing-text-after-json"],
    ),
    (set_("conversation.7.content", None), ["null-content"]),
    (drop("conversation.7.content"), ["null-content"]),
    (set_("conversation.0.content", [{"type": "text", "text": "Weather and time in Tromsø?"}]), ["text-parts"]),
    (set_("score", "1.0"), ["text-score"]),
    (drop(f"{RESULT}.tool_call_id"), ["missing-call-id"]),
    (set_(f"{RESULT}.tool_call_id", "call_9"), ["mismatched-call-id"]),
    (drop(f"{CALL}.id"), ["missing-call-id"]),
    (set_("tools.0.type", None), ["missing-tool-type"]),
    (drop("tools.0.type"), ["missing-tool-type"]),
    (set_("split", "train"), ["unknown-key"]),
    (set_("split", None), []),
    (set_("conversation.1.refusal", "no"), ["unknown-key"]),
    (set_(f"{CALL}.index", 0), ["unknown-key"]),
]


@pytest.mark.parametrize(("change", "reasons"), SAME)
def test_defects_are_repaired_and_reported(row, change, reasons):
    plain = parse_trajectory(copy.deepcopy(row))
    change(row)
    assert parse(row) == (plain, reasons)


def test_tools_in_a_text_are_read(row):
    plain = parse_trajectory(copy.deepcopy(row))
    row["tools"] = json.dumps(row["tools"])
    assert parse(row) == (plain, ["string-tools"])


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ([{"name": "get_weather", "results": {"t": "3 °C"}}], '[{"name": "get_weather", "results": {"t": "3 °C"}}]'),
        ({"t": 1.0, "a": None}, '{"t": 1.0, "a": null}'),
        (3, "3"),
        (False, "false"),
        ([], "[]"),
        (
            [{"type": "text", "text": "a"}, {"type": "image", "url": "b"}],
            '[{"type": "text", "text": "a"}, {"type": "image", "url": "b"}]',
        ),
    ],
)
def test_results_that_are_not_text_become_json(row, content, text):
    row["conversation"][2]["content"] = content
    trajectory, reasons = parse(row)
    assert (trajectory.conversation[2].content, reasons) == (text, ["structured-content"])


def test_text_parts_are_lines(row):
    row["conversation"][2]["content"] = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    trajectory, reasons = parse(row)
    assert (trajectory.conversation[2].content, reasons) == ("a\nb", ["text-parts"])


def test_ids_that_are_numbers_become_text(row):
    row["unique_trajectory_id"] = 7
    for i in range(2):
        row["conversation"][1]["tool_calls"][i]["id"] = i
        row["conversation"][2 + i]["tool_call_id"] = i
    trajectory, reasons = parse(row)
    assert trajectory.id == "7"
    assert [turn.tool_call_id for turn in trajectory.conversation[2:4]] == ["0", "1"]
    assert reasons == ["number-as-id"] * 5


def linked(calls: str, results: str) -> tuple[list[str | None], list[str | None]] | str:
    """Reads calls and results written `name:id`, each part may be missing; returns their ids, or why they are none."""

    def pairs(text: str) -> list[tuple[str, str | None]]:
        return [(name, identity or None) for name, _, identity in (part.partition(":") for part in text.split())]

    turns = [
        {"role": "user", "content": "q"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [
                {"id": identity, "function": {"name": name, "arguments": {}}} for name, identity in pairs(calls)
            ],
        },
        *(
            {"role": "tool", "name": None if name == "-" else name, "tool_call_id": identity, "content": "r"}
            for name, identity in pairs(results)
        ),
    ]
    tools = [{"type": "function", "function": {"name": name}} for name in {name for name, _ in pairs(calls)}]
    try:
        trajectory, reasons = parse({"tools": tools, "conversation": turns})
    except InvalidTrajectory as invalid:
        return invalid.reason
    before = sum(identity is not None for _, identity in pairs(calls) + pairs(results))
    ids = [call.id for call in trajectory.conversation[1].tool_calls]
    others = [turn.tool_call_id for turn in trajectory.conversation[2:]]
    assert bool(reasons) == ((ids, others) != ([i for _, i in pairs(calls)], [i for _, i in pairs(results)])), before
    return ids, others


@pytest.mark.parametrize(
    ("calls", "results", "expected"),
    [
        ("a:1 b:2", "-:1 -:2", (["1", "2"], ["1", "2"])),
        ("a:1 b:2", "-:2 -:1", (["1", "2"], ["1", "2"])),  # results come in the order of their calls
        ("a:1 b:2", "-:2", (["1", "2"], ["2"])),
        ("a b", "- -", ([None, None], [None, None])),
        ("a b", "b", ([None, None], [None])),
        ("a:1 b:2", "- -", (["1", "2"], ["1", "2"])),  # as many as calls: in their order
        ("a:1 b:2", "b a", (["1", "2"], ["1", "2"])),  # unless their names determine another order
        ("a:1 a:2", "a a", (["1", "2"], ["1", "2"])),
        ("a:1 b:2", "-:x -:y", (["1", "2"], ["1", "2"])),
        ("a:1 b:2", "-:2 -:x", (["1", "2"], ["1", "2"])),  # one call is open
        ("a:1 b:2", "-:2 -", (["1", "2"], ["1", "2"])),
        ("a b", "-:x -:y", (["x", "y"], ["x", "y"])),
        ("a b:2", "-:x -:2", (["x", "2"], ["x", "2"])),
        ("a:1", "-:x", (["1"], ["1"])),
        ("a:1", "- -", (["1"], ["1", "1"])),  # whose else
        ("a:1 b:2", "b", (["1", "2"], ["2"])),  # by its name
        ("a:1 b:2", "a:x", (["1", "2"], ["1"])),
        ("a:1 b:2", "-", "orphan-tool-result"),
        ("a:1 b:2", "-:x", "orphan-tool-call-id"),
        ("a:1 a:2", "a", "orphan-tool-result"),
        ("a:1 b:2", "c -", "orphan-tool-result"),
        ("a:1", "b:x", "orphan-tool-call-id"),  # neither id nor name
        ("a:1 b:2", "-:1 -:2 -:3", "orphan-tool-call-id"),
        ("a:1 b:2", "- - -", "orphan-tool-result"),
        ("a b", "- - -", "orphan-tool-result"),
        ("a b", "-:x -:x", "orphan-tool-call-id"),
        ("a:1", "-:x -:y", "orphan-tool-call-id"),
        ("a:1 b:1", "-:1 -:1", "duplicate-call-id"),
    ],
)
def test_ids_are_repaired_where_they_are_unambiguous(calls, results, expected):
    assert linked(calls, results) == expected


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
    (
        lambda row: row["conversation"][2].update(tool_call_id="call_9", name="other"),
        "orphan-tool-call-id",
        "'call_9', calls before it: call_0, call_1",
    ),
    (set_(f"{CALL}.id", "call_1"), "duplicate-call-id", "turn 1"),
    (set_(f"{CALL}.function.arguments", [1]), "bad-arguments", "'get_weather' with a list"),
    (set_(f"{CALL}.function.arguments", '{"a": NaN}'), "bad-arguments", "NaN"),
    (set_(CALL, {"arguments": {}}), "bad-call", "turn 1"),
    (set_("tools.0", {"description": "get_weather"}), "tool-without-name", "tool 0"),
    (set_("tools.0.function.name", "get_time"), "duplicate-tool", "tool 1 is named 'get_time'"),
    (set_("conversation.1.loss", 1), "bad-loss", "turn 1"),
    (set_(f"{CALL}.function.arguments", '{"a": 1}, "b": 2}'), "bad-arguments", "Extra data"),
    (set_(f"{CALL}.function.arguments", '{"a": 1} and {"b": 2}'), "bad-arguments", "Extra data"),
    (set_(f"{CALL}.function.arguments", '{"a": 1} as {"a": 2'), "bad-arguments", "Extra data"),
    (set_(f"{CALL}.function.arguments", "[1] is it"), "bad-arguments", "Extra data"),
    (set_(f"{CALL}.function.arguments", '{"a": 1, "a": 2}'), "bad-arguments", "key 'a' occurs twice"),
    (set_(f"{CALL}.function.arguments", "Oslo"), "bad-arguments", "not valid JSON"),
    (set_(f"{CALL}.function.arguments", "[" * 49 + "]" * 49), "bad-arguments", "nested too deeply"),
    (set_(f"{CALL}.function.arguments", "[" * 100_000), "bad-arguments", "nested too deeply"),
    (set_("tools.0.function.parameters", []), "bad-tools", "`parameters` of tool 'get_weather' is a list"),
    (set_("tools.0.function.parameters.properties", "x"), "bad-tools", "`properties` of tool 'get_weather' is a str"),
    (set_("tools", "[{"), "bad-tools", "not valid JSON"),
    (set_("score", "high"), "bad-score", "'high'"),
    (set_("score", True), "bad-score", "True"),
    (set_("score", 10**400), "bad-score", "1000"),
    (set_("score", 10**5000), "malformed-json", "limit"),
    (set_("score", float("nan")), "malformed-json", "not JSON compliant"),
    (set_("unique_trajectory_id", {}), "bad-value", "unique_trajectory_id"),
    (set_("unique_trajectory_id", True), "bad-value", "unique_trajectory_id"),
    (set_("source", b"x"), "malformed-json", "bytes"),
    (set_("source", "\ud83e"), "malformed-json", "surrogate"),
    (set_("conversation.0.content", "\ud83e"), "malformed-json", "surrogate"),
    (set_("conversation.0.role", []), "unknown-role", "\\[\\]"),
    (set_("conversation.0.role", True), "unknown-role", "True"),
    (set_("conversation.0.role", "u" * 10_000_000), "unknown-role", "uuu"),
    (set_("conversation.2.name", {}), "bad-value", "name"),
    (set_("conversation.0.tool_calls", 0), "bad-call", "int"),
]


@pytest.mark.parametrize(("change", "reason", "detail"), INVALID)
def test_invalid_rows_say_why(row, change, reason, detail):
    change(row)
    with pytest.raises(InvalidTrajectory, match=detail) as caught:
        parse_trajectory(row)
    assert caught.value.reason == reason
    assert len(caught.value.detail) <= 1002


def nested(levels: int) -> list:
    inner: list = []
    for _ in range(levels - 1):
        inner = [inner]
    return inner


def test_depth_has_one_bound_however_it_is_written(row):
    arguments = row["conversation"][1]["tool_calls"][0]["function"]
    arguments["arguments"] = {"a": nested(48 - 1)}
    plain, _ = parse(row)
    arguments["arguments"] = json.dumps({"a": nested(48 - 1), "[[{{": "]"})
    assert (
        parse(row)[0].conversation[1].tool_calls[0].arguments["a"] == plain.conversation[1].tool_calls[0].arguments["a"]
    )
    row["conversation"][2]["content"] = nested(64)
    with pytest.raises(InvalidTrajectory, match="more than 64 levels"):
        parse_trajectory(row)
    row["conversation"][2]["content"] = nested(100_000)
    with pytest.raises(InvalidTrajectory, match="nested too deeply"):
        parse_trajectory(row)
    del row["conversation"][2]["content"]  # or pytest would try to print it
    assert parse_json(json.dumps(nested(400))) == nested(400)
    for levels in (401, 1_000_000):
        with pytest.raises(InvalidTrajectory, match="nested too deeply"):
            parse_json("[" * levels + "]" * levels)


@settings(
    max_examples=400, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_whatever_the_row_it_is_a_trajectory_or_says_why(row, data):
    candidate = data.draw(broken(row) | JSON)
    with contextlib.suppress(InvalidTrajectory):
        parse(candidate)
    with contextlib.suppress(InvalidTrajectory):
        parse_messages(candidate)
    with contextlib.suppress(InvalidTrajectory):
        parse_tools(candidate)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.binary(max_size=20) | st.text(alphabet='{}[]":,\\u1aNI ', max_size=20).map(str.encode))
def test_any_bytes_are_strict_json_or_invalid(data):
    with contextlib.suppress(InvalidTrajectory):
        value = parse_json(data)
        text = json.dumps(value, allow_nan=False, ensure_ascii=False)
        assert parse_json(text.encode()) == value


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
        b'{"a": 1, "a": 1}',
        row,
    )
    read = list(read_jsonl(path))
    assert [number for number, _ in read] == [1, 4, 5, 6, 7, 8, 9, 10, 11]
    assert [getattr(item, "reason", "") for _, item in read] == [
        "",
        "malformed-json",
        "malformed-json",
        "not-an-object",
        "malformed-json",
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
