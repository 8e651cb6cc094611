import copy
import gzip
import io
import json
import re
import tracemalloc
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xlam_jax.data import schemas, validate
from xlam_jax.data.parse import parse_trajectory, read_jsonl
from xlam_jax.data.trajectory import InvalidTrajectory
from xlam_jax.data.validate import check_row
from xlam_jax.errors import UserError

PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
GOOD = {
    "unique_trajectory_id": "good_0",
    "tools": [
        {"type": "function", "function": {"name": name, "parameters": PARAMETERS}}
        for name in ("get_weather", "get_time")
    ],
    "conversation": [
        {"role": "system", "content": "Help."},
        {"role": "user", "content": "Oslo?"},
        {
            "role": "assistant",
            "content": "Both.",
            "tool_calls": [
                {"type": "function", "id": f"call_{i}", "function": {"name": name, "arguments": {"city": "Oslo"}}}
                for i, name in enumerate(("get_weather", "get_time"))
            ],
        },
        {"role": "tool", "tool_call_id": "call_0", "content": "3"},
        {"role": "tool", "tool_call_id": "call_1", "content": ""},
        {"role": "assistant", "content": "3 °C."},
    ],
}
CALL = "conversation.2.tool_calls.0"


def changed(*changes: tuple[str, object]) -> dict:
    """A good row with values set at paths."""
    row = json.loads(json.dumps(GOOD))
    for path, value in changes:
        *front, last = [int(key) if key.isdigit() else key for key in path.split(".")]
        node = row
        for key in front:
            node = node[key]
        node[last] = copy.deepcopy(value)
    return row


def reasons(row: object) -> list[str]:
    return [problem.reason for problem in check_row(row)]


def run(*paths, **options) -> tuple[list[str], str, int]:
    out = io.StringIO()
    summary, count = validate.run(list(paths), out, **options)
    return out.getvalue().splitlines(), summary, count


def test_the_bundled_data_is_without_fault(quickstart):
    for file in sorted(quickstart.glob("*.jsonl")):
        lines, summary, count = run(file)
        assert (lines, count) == ([], 0)
        assert "no finding" in summary
    assert reasons(GOOD) == []


@pytest.mark.parametrize(
    ("path", "value", "reason", "detail"),
    [
        (f"{CALL}.function.name", "get_wether", "undeclared-tool", "turn 2 calls 'get_wether'.*mean 'get_weather'"),
        (f"{CALL}.function.arguments", {}, "missing-argument", "turn 2 calls 'get_weather': argument 'city'"),
        (f"{CALL}.function.arguments.zip", 1, "extra-argument", "argument 'zip' is not declared; declared: city"),
        (f"{CALL}.function.arguments.city", 1, "wrong-type", "'city' is 1 .integer., the schema says string"),
        (f"{CALL}.function.arguments", '{"city": "Oslo"}', "string-arguments", "turn 2"),
        (f"{CALL}.id", "call_1", "duplicate-call-id", "turn 2"),
        ("conversation.3.tool_call_id", None, "missing-call-id", "turn 3"),
        ("conversation.3.tool_call_id", "call_7", "mismatched-call-id", "turn 3 answers 'call_7'"),
        ("conversation.3.tool_call_id", "call_1", "unanswered-call", "turn 2 calls 'get_weather'"),
        ("conversation.3", {"role": "user", "content": "Well?"}, "unanswered-call", "turn 2 calls 'get_time'"),
        ("conversation.3.content", {"t": 3}, "structured-content", "turn 3"),
        ("conversation.2.content", None, "null-content", "turn 2"),
        ("conversation.1.content", "", "empty-turn", "turn 1 .user. has no text"),
        ("conversation.0.content", " \n", "empty-turn", "turn 0 .system."),
        ("conversation.5.content", "\t", "empty-last-turn", "turn 5 is empty"),
        ("conversation.5.content", "", "empty-last-turn", "turn 5"),
        ("conversation.1.role", "assistant", "bad-role-order", "turn 1 is by the assistant"),
        ("conversation.5.role", "system", "bad-role-order", "turn 5 is a system turn after a tool turn"),
        ("conversation.2.tool_calls", [], "bad-role-order", "turn 3 is a tool result"),
        ("conversation.1.role", "human", "unknown-role", "human"),
        ("conversation", [], "no-conversation", ""),
        ("tools.0.function.parameters.type", "dict", "bad-schema", "tool 'get_weather': parameters.type is \"dict\""),
        ("tools.0.function.parameters", {"city": {"type": "string"}}, "bad-schema", "lists the arguments"),
        ("tools.1.function.name", "get_weather", "duplicate-tool", "tool 1"),
        ("tools.1.function", {}, "tool-without-name", "tool 1"),
        ("unique_trajectory_id", None, "missing-trajectory-id", ""),
        ("score", "good", "bad-score", "'good'"),
        ("conversation.1.contnt", "x", "unknown-key", "contnt"),
    ],
)
def test_each_fault_has_its_reason(path, value, reason, detail):
    details = [problem.detail for problem in check_row(changed((path, value))) if problem.reason == reason]
    assert any(re.search(detail, one) for one in details), details


def test_all_faults_of_a_row_are_found_not_only_the_first():
    row = changed(
        ("unique_trajectory_id", None),
        ("score", "x"),
        ("source", 3),
        ("conversation.0.role", "boss"),
        ("conversation.1.content", ""),
        (f"{CALL}.function.arguments", {"cty": 1}),
        ("conversation.2.tool_calls.1", {"id": "call_0", "function": {"name": "get_time", "arguments": [1]}}),
        ("conversation.3.tool_call_id", "call_8"),
        ("conversation.4.tool_call_id", "call_9"),
        ("conversation.5.content", None),
        ("tools.1.function.parameters.required", "city"),
    )
    row["conversation"] += [{"role": "tool", "content": "late"}, 5, {"role": "system", "content": "x", "loss": 1}]
    row["tools"].append({"function": {"name": 3}})
    row["conversation"].append(
        {"role": "assistant", "tool_calls": [{"id": "z", "function": {"name": "get_tim", "arguments": {}}}]}
    )
    once = [
        *("missing-trajectory-id", "bad-score", "bad-value", "unknown-role", "empty-turn", "missing-argument"),
        *("extra-argument", "bad-arguments", "duplicate-call-id", "empty-assistant-turn", "bad-schema"),
        *("bad-turn", "bad-loss", "tool-without-name", "undeclared-tool"),
    ]
    assert sorted(reasons(row)) == sorted([*once, *("orphan-tool-call-id", "null-content", "bad-role-order") * 2])


def test_the_last_calls_need_no_results():
    row = changed()
    del row["conversation"][3:]
    assert reasons(row) == []
    row["conversation"].append({"role": "tool", "tool_call_id": "call_1", "content": ""})
    assert reasons(row) == []


def test_every_tool_is_compiled_once(tmp_path, monkeypatch):
    schemas_compiled = []
    monkeypatch.setattr(schemas, "Parameters", lambda schema: schemas_compiled.append(schema) or real(schema))
    real = validate.Parameters
    schemas.compiled.cache_clear()
    validate._compiled.cache_clear()
    path = tmp_path / "rows.jsonl"
    rows = [changed(("unique_trajectory_id", f"r{i}"), ("tools.0.function.description", f"{i}")) for i in range(50)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run(path)[2] == 0
    assert len(schemas_compiled) == 1  # both tools have the same parameters


def test_lines_are_counted_and_ids_compared_within_a_file(tmp_path):
    rows = [
        json.dumps(GOOD),
        "",
        '{"broken": ',
        json.dumps(changed(("unique_trajectory_id", "other"))),
        json.dumps(GOOD),
    ]
    plain, packed = tmp_path / "rows.jsonl", tmp_path / "rows.jsonl.gz"
    plain.write_text("\n".join(rows) + "\n")
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    for path in (plain, packed):
        lines, summary, count = run(path)
        assert count == 2
        assert lines[0].startswith(f"{path}:3: malformed-json: ")
        assert lines[1] == f"{path}:5: duplicate-trajectory-id: 'good_0' is line 1's too"
        assert "4 rows, 2 with 2 findings" in summary
    assert run(plain, packed)[2] == 4  # the same id in another file is allowed


def test_parquet_and_arrays_of_json_are_read_too(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    bad = changed((f"{CALL}.function.arguments", {"city": 3}))
    texts = {key: bad[key] if isinstance(bad[key], str) else json.dumps(bad[key]) for key in bad}
    pq.write_table(pa.Table.from_pylist([texts]), tmp_path / "rows.parquet")
    (tmp_path / "rows.json").write_text(json.dumps([bad]))
    for name in ("rows.parquet", "rows.json"):
        lines, _, count = run(tmp_path / name)
        assert count == 1
        assert lines[0].startswith(f"{tmp_path / name}:1: wrong-type: ")


def test_one_finding_is_one_line_for_any_data(tmp_path):
    path = tmp_path / "rows.jsonl"
    name = "x\n\x1b[2J\r\u2028" + "y" * 5000
    row = changed((f"{CALL}.function.name", name), ("unique_trajectory_id", "a\nb"), ("conversation.1.role", "\n"))
    path.write_text(json.dumps(row) + "\n")
    lines, _, count = run(path)
    assert len(lines) == count > 1
    assert max(map(len, lines)) < 600
    assert all(line.isprintable() for line in lines)
    parsed = [json.loads(line) for line in run(path, as_json=True)[0]]
    assert [(one["file"], one["line"], one["id"]) for one in parsed] == [(str(path), 1, "a\nb")] * count
    assert [f"{one['file']}:{one['line']}: {one['reason']}: {one['detail']}" for one in parsed] == lines


def test_it_stops_after_the_maximum_number_of_findings(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("[1]\n" * 10 + json.dumps(GOOD) + "\n")
    lines, summary, count = run(path, path, most=4)
    assert (len(lines), count) == (4, 4)
    assert "4 rows" in summary
    assert "--max-errors 4" in summary
    assert run(path, most=10)[2] == 10


def test_files_without_rows_are_mistakes(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n \n")
    with pytest.raises(UserError, match=r"rows\.jsonl: has no rows"):
        run(path)
    with pytest.raises(UserError, match=r"none\.jsonl: no such file; did you mean"):
        run(tmp_path / "none.jsonl")


def test_over_length_is_what_training_drops(tmp_path, quickstart):
    from xlam_jax import config as configs
    from xlam_jax.data import corpus
    from xlam_jax.data.tokenizer import load_tokenizer

    source = quickstart / "webshop.jsonl"
    config = tmp_path / "c.yaml"
    config.write_text(
        f"extends: {quickstart.parents[1]}/configs/quickstart.yaml\n"
        f"model: {{config: {quickstart.parents[1]}/configs/models/tiny_mixtral.json}}\n"
        f"data: {{tokenizer: {quickstart}/tokenizer, sequence_length: 640, "
        f"sources: [{{name: w, files: [{source}]}}]}}\n"
    )
    lines, _, count = run(source, limit=validate.length_limit(config))
    data = configs.load(config).config.data
    [loaded] = corpus.load(data, load_tokenizer(data.tokenizer))
    assert 0 < count < 30
    assert loaded.dropped == {"too-long": count}
    assert all(": too-long: " in line and "640" in line for line in lines)


def test_memory_does_not_grow_with_the_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    with path.open("w") as file:
        for i in range(400):
            file.write(json.dumps(changed(("unique_trajectory_id", str(i)), ("conversation.1.content", "x" * 50_000))))
            file.write("\n")
    run(path)
    tracemalloc.start()
    try:
        assert run(path)[2] == 0
        assert tracemalloc.get_traced_memory()[1] < path.stat().st_size / 4
    finally:
        tracemalloc.stop()


READERS = {  # reasons that only `validate` reports
    *(
        "missing-trajectory-id",
        "empty-turn",
        "unanswered-call",
        "bad-schema",
        "missing-argument",
        "extra-argument",
        "wrong-type",
    ),
    "wrong-value",
}
scalars = st.none() | st.booleans() | st.integers(-2, 2) | st.floats(-1, 1) | st.text("ab\n\ud7ff", max_size=3)
anything = st.recursive(
    scalars | st.sampled_from(["user", "assistant", "tool", "system", "call_0", "call_1", "get_time"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content", "id", "name", "function", "arguments", "tool_calls", "type"])
            | st.text("ab"),
            inner,
            max_size=4,
        )
    ),
    max_leaves=8,
)


def paths(value: object, prefix: tuple = ()) -> list[tuple]:
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [prefix, *(path for key, inner in inside for path in paths(inner, (*prefix, key)))]


@settings(deadline=None, max_examples=400, derandomize=True)
@given(st.data())
def test_finds_a_fault_exactly_where_the_reader_refuses_mends_or_leaves_out(data):
    row: Any = changed()
    for _ in range(data.draw(st.integers(1, 3))):
        path = data.draw(st.sampled_from(paths(row)))
        value = data.draw(anything)
        if not path:
            row = value
            continue
        node = row
        for key in path[:-1]:
            node = node[key]
        if data.draw(st.booleans()):
            node[path[-1]] = value
        elif isinstance(node, list):
            node.insert(path[-1], value)
        else:
            del node[path[-1]]
    repaired: list[str] = []
    refused = None
    try:
        parse_trajectory(copy.deepcopy(row), repaired=lambda reason, detail: repaired.append(reason))
    except InvalidTrajectory as invalid:
        refused = invalid.reason
    before = copy.deepcopy(row)
    findings = [problem.reason for problem in check_row(row)]
    assert row == before
    unexplained = [reason for reason in findings if reason not in READERS]
    if refused is None:
        assert sorted(unexplained) == sorted(repaired)
    else:
        assert refused in unexplained
        assert set(repaired) <= set(unexplained)


@settings(deadline=None, max_examples=100, derandomize=True)
@given(
    st.lists(st.binary(max_size=30) | anything.map(lambda value: json.dumps(value).encode()), min_size=1, max_size=4)
)
def test_any_content_of_a_file_is_reported_line_by_line(tmp_path_factory, lines):
    path = tmp_path_factory.mktemp("fuzz") / "rows.jsonl"
    path.write_bytes(b"\n".join(line.replace(b"\n", b"") for line in lines))
    if path.read_bytes().lstrip().startswith(b"["):  # read as a JSON list, which may be cut off
        with suppress(UserError):
            run(path)
        return
    read = dict(read_jsonl(path)) if path.read_bytes().strip() else {}
    if not read:
        with pytest.raises(UserError, match="has no rows"):
            run(path)
        return
    lines_found = [json.loads(line)["line"] for line in run(path, as_json=True)[0]]
    refused = {number for number, row in read.items() if isinstance(row, InvalidTrajectory)}
    assert refused <= set(lines_found) <= set(read)
