"""Sources: the same trajectories from every container; errors name key, value and what to do."""

import copy
import gzip
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from strategies import JSON, broken

from xlam_jax.config import Source
from xlam_jax.data import sources
from xlam_jax.data.parse import read_jsonl
from xlam_jax.data.sources import Filtered
from xlam_jax.data.trajectory import InvalidTrajectory, Trajectory, to_dict
from xlam_jax.errors import UserError


@pytest.fixture
def rows(quickstart: Path) -> list[dict]:
    """Trajectories of two bundled sources: with thoughts and scores, and with arguments of all types."""
    lines = [
        line
        for name in ("webshop", "hammer")
        for line in (quickstart / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()[:12]
    ]
    return [json.loads(line) for line in lines]


@pytest.fixture
def plain(rows, write_jsonl) -> list[Trajectory]:
    """What the rows are, read as JSON lines."""
    read_back = [item for _, item in read_jsonl(write_jsonl(*rows, name="plain.jsonl"))]
    assert all(isinstance(item, Trajectory) for item in read_back)
    return read_back  # pyright: ignore[reportReturnType]


@pytest.fixture
def hf_home(tmp_path, monkeypatch):
    """An empty home for the `datasets` library, and no network."""
    from datasets import config

    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path / "hf")
    monkeypatch.setattr(config, "HF_ENDPOINT", "http://127.0.0.1:9")
    return tmp_path / "hf"


def read(**source: object) -> list[sources.Item]:
    return list(sources.read(Source.model_validate({"name": "made", **source})))


def trajectories(**source: object) -> list[Trajectory]:
    items = read(**source)
    assert all(isinstance(item.trajectory, Trajectory) for item in items), items
    return [item.trajectory for item in items]  # pyright: ignore[reportReturnType]


def as_texts(rows: list[dict]) -> list[dict]:
    """Rows with nested columns as JSON texts, as is common for trajectories in columns."""
    return [row | {key: json.dumps(row[key]) for key in ("tools", "conversation")} for row in rows]


def columns(rows: list[dict]) -> pa.Table:
    return pa.Table.from_pylist([{key: row.get(key) for key in sources.UNIFIED} for row in rows])


# ---- files ---------------------------------------------------------------------------------------------------------


def test_packed_lines_are_the_same_lines(rows, plain, write_jsonl, tmp_path):
    text = write_jsonl(*rows).read_bytes()
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(text))
    with pa.output_stream(tmp_path / "rows.jsonl.zst", compression="zstd") as out:
        out.write(text)
    for suffix in ("", ".gz", ".zst"):
        path = f"{tmp_path}/rows.jsonl{suffix}"
        assert trajectories(files=[path]) == plain
        assert [item.where for item in read(files=[path])] == [f"{path}:{at}" for at in range(1, len(rows) + 1)]


def test_a_row_without_an_id_is_named_alike_however_it_is_packed(rows, write_jsonl, tmp_path):
    del rows[0]["unique_trajectory_id"]
    text = write_jsonl(rows[0]).read_bytes()
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(text))
    (expected,) = (item for _, item in read_jsonl(tmp_path / "rows.jsonl"))
    assert (
        trajectories(files=[f"{tmp_path}/rows.jsonl.gz"])
        == trajectories(files=[f"{tmp_path}/rows.jsonl"])
        == [expected]
    )


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_file_that_was_cut_off_is_an_error_not_a_shorter_source(rows, write_jsonl, tmp_path, suffix):
    path = tmp_path / f"rows.jsonl{suffix}"
    with pa.output_stream(path, compression="gzip" if suffix == ".gz" else "zstd") as out:
        out.write(write_jsonl(*rows * 20).read_bytes())
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=rf"rows\.jsonl{suffix}: .*cut off"):
        read(files=[str(path)])


def test_bad_lines_are_items_with_their_place(rows, write_jsonl):
    path = write_jsonl(rows[0], b'{"broken": ', b"[1]", {"conversation": 3}, rows[1])
    items = read(files=[str(path)])
    assert [item.where.rpartition(":")[2] for item in items] == ["1", "2", "3", "4", "5"]
    reasons = [item.trajectory.reason for item in items if isinstance(item.trajectory, InvalidTrajectory)]
    assert reasons == ["malformed-json", "not-an-object", "no-conversation"]


def test_repairs_come_with_the_trajectory(row, write_jsonl):
    row["conversation"][1]["tool_calls"][0]["function"]["arguments"] = '{"city": "Oslo"}'
    (item,) = read(files=[str(write_jsonl(row))])
    assert [repair.reason for repair in item.repairs] == ["string-arguments"]


@pytest.mark.parametrize("group", [1, 7, 1000])
def test_parquet_with_json_texts(rows, plain, tmp_path, group):
    pq.write_table(columns(as_texts(rows)), tmp_path / "rows.parquet", row_group_size=group)
    items = read(files=[f"{tmp_path}/rows.parquet"])
    assert [item.trajectory for item in items] == plain
    assert [item.where for item in items[:2]] == [f"{tmp_path}/rows.parquet:1", f"{tmp_path}/rows.parquet:2"]
    assert not any(item.repairs for item in items)


def test_parquet_with_nested_columns(row, tmp_path):
    """Columns give every call all arguments that any call has; what was not there must not come back as null."""
    other = copy.deepcopy(row)
    other["conversation"][1]["tool_calls"][0]["function"]["arguments"] = {"city": "Oslo", "days": 3}
    for one in (row, other):
        del one["conversation"][1]["tool_calls"][0]["function"]["arguments"]["city"]
        one["conversation"][1]["tool_calls"][0]["function"]["arguments"].pop("a", None)
    other["conversation"][1]["tool_calls"][0]["function"]["arguments"]["days"] = 3
    row["conversation"][1]["tool_calls"][0]["function"]["arguments"]["hours"] = 4.5
    expected = [to_dict(parsed) for parsed in (trajectory(row), trajectory(other))]
    pq.write_table(columns([row, other]), tmp_path / "rows.parquet")
    items = read(files=[f"{tmp_path}/rows.parquet"])
    assert [to_dict(item.trajectory) for item in items] == expected  # pyright: ignore[reportArgumentType]
    assert all([repair.reason for repair in item.repairs] == ["null-fields"] for item in items)
    assert "arguments.hours" in items[1].repairs[0].detail


def trajectory(row: dict) -> Trajectory:
    from xlam_jax.data.parse import parse_trajectory

    return parse_trajectory(copy.deepcopy(row))


def test_columns_that_json_does_not_have_are_not_let_through(row, tmp_path):
    nested = {"role": "user", "content": "x", "n": float("nan")}
    table = pa.Table.from_pylist([{"conversation": [nested, {"role": "assistant", "content": "y", "n": 1.0}]}])
    pq.write_table(table, tmp_path / "rows.parquet")
    (item,) = read(files=[f"{tmp_path}/rows.parquet"])
    assert isinstance(item.trajectory, InvalidTrajectory)
    assert "conversation.n is nan" in item.trajectory.detail


def write_array_record(path: Path, rows: list) -> None:
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for row in rows:
        writer.write(row if isinstance(row, bytes) else json.dumps(row).encode())
    writer.close()


def test_array_record(rows, plain, tmp_path):
    write_array_record(tmp_path / "rows.array_record", [*rows, b"\xff"])
    *items, last = read(files=[f"{tmp_path}/rows.array_record"])
    assert [item.trajectory for item in items] == plain
    assert last.where == f"{tmp_path}/rows.array_record:{len(rows) + 1}"
    assert isinstance(last.trajectory, InvalidTrajectory)


@pytest.mark.parametrize("kind", ["parquet", "array_record"])
def test_a_damaged_container_is_an_error_not_an_empty_source(rows, tmp_path, kind):
    path = tmp_path / f"rows.{kind}"
    if kind == "parquet":
        pq.write_table(columns(as_texts(rows * 20)), path)
    else:
        write_array_record(path, rows * 20)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    with pytest.raises(UserError, match=rf"rows\.{kind}: cannot be read"):
        read(files=[str(path)])


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(drawn=st.data())
def test_every_container_gives_one_item_per_row_for_any_content(row, drawn, tmp_path):
    """No row raises or is lost: it is a trajectory or has a reason, the same in each container."""
    rows = drawn.draw(st.lists(st.just(row) | broken(row) | JSON, min_size=1, max_size=4))
    both = [{key: one.get(key) for key in ("tools", "conversation")} if isinstance(one, dict) else {} for one in rows]
    texts = [{key: None if value is None else as_json(value) for key, value in one.items()} for one in both]
    pq.write_table(pa.Table.from_pylist(texts, TEXTS), tmp_path / "rows.parquet")
    write_array_record(tmp_path / "rows.array_record", [as_json(one).encode() for one in both])
    (tmp_path / "rows.jsonl").write_text("".join(as_json(one) + "\n" for one in both))
    by_container = [read(files=[f"{tmp_path}/rows.{kind}"]) for kind in ("jsonl", "array_record", "parquet")]
    assert [len(items) for items in by_container] == [len(rows)] * 3
    for items in zip(*by_container, strict=True):
        outcomes = {getattr(item.trajectory, "reason", None) or repr(item.trajectory) for item in items}
        assert len(outcomes) == 1, outcomes


TEXTS = pa.schema({"tools": pa.string(), "conversation": pa.string()})


def as_json(value: object) -> str:
    return json.dumps(value, default=repr)


def test_other_formats_are_converted_row_by_row(tmp_path, write_jsonl):
    raw = {
        "query": "Weather in Oslo?",
        "tools": json.dumps([{"name": "weather", "description": "", "parameters": {"city": {"type": "str"}}}]),
        "answers": json.dumps([{"name": "weather", "arguments": {"city": "Oslo"}}]),
    }
    (item,) = read(files=[str(write_jsonl(raw))], format="hammer")
    assert isinstance(item.trajectory, Trajectory)
    assert item.trajectory.conversation[1].tool_calls[0].arguments == {"city": "Oslo"}
    pq.write_table(pa.Table.from_pylist([raw]), tmp_path / "rows.parquet")
    (other,) = trajectories(files=[f"{tmp_path}/rows.parquet"], format="hammer")
    assert other.conversation == item.trajectory.conversation


# ---- filters -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("filters", "reason"),
    [
        ({"min_score": 1.5}, "low-score"),
        ({"min_turns": 9}, "few-turns"),
        ({"max_turns": 7}, "many-turns"),
        ({"min_calls": 4}, "few-calls"),
        ({"tools": ["get_wind"]}, "other-tools"),
        ({"exclude": ["weather_0"]}, "excluded"),
        ({"min_score": 1.0, "min_turns": 8, "max_turns": 8, "min_calls": 3, "tools": ["get_time", "x"]}, None),
    ],
)
def test_filters_say_why(row, write_jsonl, filters, reason):
    (item,) = read(files=[str(write_jsonl(row))], filters=filters)
    assert item.trajectory == Filtered(reason) if reason else isinstance(item.trajectory, Trajectory)


def test_a_required_score_must_be_present(row, write_jsonl):
    del row["score"]
    (item,) = read(files=[str(write_jsonl(row))], filters={"min_score": 0.0})
    assert item.trajectory == Filtered("no-score")


def test_the_limit_counts_what_passes_the_filters(row, write_jsonl):
    many = [row | {"score": float(at % 2), "unique_trajectory_id": f"t{at}"} for at in range(20)]
    items = read(files=[str(write_jsonl(b"broken", *many))], filters={"min_score": 1}, limit=3)
    kinds = Counter(type(item.trajectory).__name__ for item in items)
    assert kinds == {"InvalidTrajectory": 1, "Filtered": 3, "Trajectory": 3}
    assert items[-1].where.endswith(":7")  # and reads no further


# ---- settings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({}, "source made gives no place; give one of files, dataset and tfds"),
        ({"files": ["a.jsonl"], "tfds": "x/y"}, "source made gives files and tfds; give one of"),
        ({"files": ["a.jsonl"], "subset": "x"}, "subset is for a dataset, and the source is files"),
        ({"tfds": "x/y", "streaming": True}, "streaming is for a dataset, and the source is tfds"),
    ],
)
def test_one_place_per_source(source, message):
    with pytest.raises(ValidationError, match=message):
        Source(name="made", **source)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"files": ["FILE"], "split": "test"}, "split is 'test', and files have no splits"),
        ({"files": ["FILE"], "format": "hamer"}, "format 'hamer' is not known.*did you mean 'hammer'"),
        ({"files": ["FILE.txt"]}, r"rows\.jsonl\.txt: .*known: \.jsonl, .*\.parquet, \.array_record"),
        ({"files": ["DIR/raws.jsonl"]}, r"raws\.jsonl: no such file; did you mean 'rows\.jsonl'"),
        ({"files": ["DIR/folder.jsonl"]}, r"folder\.jsonl: is a folder"),
        (
            {"files": ["FILE"], "filters": {"min_turns": 5, "max_turns": 4}},
            r"filters\.max_turns is 4, less than .*min_turns, 5",
        ),
        ({"dataset": "DIR/none"}, "none: no such folder"),
        ({"dataset": "FILE"}, "is a file; name it under files"),
    ],
)
def test_conflicting_settings(row, write_jsonl, tmp_path, source, message):
    file = write_jsonl(row)
    (tmp_path / "folder.jsonl").mkdir()
    text = json.dumps(source).replace("FILE", str(file)).replace("DIR", str(tmp_path))
    with pytest.raises(UserError, match=f"data.sources: made: (.* |.*/)?{message}"):
        read(**json.loads(text))


def test_columns_of_another_format_are_reported(tmp_path):
    pq.write_table(pa.Table.from_pylist([{"messages": "x", "tools": "y"}]), tmp_path / "rows.parquet")
    with pytest.raises(UserError, match=r"'conversation', and this has messages, tools; set the source's format"):
        read(files=[f"{tmp_path}/rows.parquet"])


# ---- datasets ------------------------------------------------------------------------------------------------------


def test_a_saved_dataset(rows, plain, tmp_path, hf_home):
    from datasets import Dataset, DatasetDict

    half = len(rows) // 2
    parts = {"train": rows[:half], "test": rows[half:]}
    saved = DatasetDict({name: Dataset.from_list(as_texts(part)) for name, part in parts.items()})
    saved.save_to_disk(str(tmp_path / "saved"))
    saved["train"].save_to_disk(str(tmp_path / "one"))
    folder = str(tmp_path / "saved")
    assert trajectories(dataset=folder) == plain[:half]
    assert trajectories(dataset=folder, split="test") == plain[half:]
    assert trajectories(dataset=str(tmp_path / "one")) == plain[:half]
    assert read(dataset=folder)[2].where == f"{folder}:train[2]"
    with pytest.raises(UserError, match=r"split is 'tset', and .*saved has train, test; did you mean 'test'"):
        read(dataset=folder, split="tset")
    with pytest.raises(UserError, match="subset is 'x'"):
        read(dataset=folder, subset="x")


def test_nested_rows_survive_the_library_s_columns(rows, plain, tmp_path, hf_home):
    """The library keeps values of mixed types as JSON; nothing may be lost or come up as null on the way."""
    from datasets import Dataset

    Dataset.from_list(rows, on_mixed_types="use_json").save_to_disk(str(tmp_path / "saved"))
    assert trajectories(dataset=str(tmp_path / "saved")) == plain


def test_a_folder_of_data_files(rows, plain, write_jsonl, tmp_path, hf_home):
    (tmp_path / "data").mkdir()
    write_jsonl(*rows, name="data/train.jsonl")
    write_jsonl(rows[0], name="data/test.jsonl")
    folder = str(tmp_path / "data")
    assert trajectories(dataset=folder) == plain
    assert read(dataset=folder, split="test")[0].where == f"{folder}/test.jsonl:1"
    with pytest.raises(UserError, match=r"split is 'valid', and .*data has train, test"):
        read(dataset=folder, split="valid")
    with pytest.raises(UserError, match="subset 'x' cannot be opened"):
        read(dataset=folder, subset="x")


@pytest.mark.parametrize("streaming", [False, True])
def test_files_that_only_the_library_reads(rows, plain, tmp_path, hf_home, streaming):
    import csv

    (tmp_path / "data").mkdir()
    with (tmp_path / "data" / "train.csv").open("w", encoding="utf-8") as file:
        writer = csv.DictWriter(file, sources.UNIFIED)
        writer.writeheader()
        writer.writerows({key: row.get(key) for key in sources.UNIFIED} for row in as_texts(rows))
    assert trajectories(dataset=str(tmp_path / "data"), streaming=streaming) == plain


def hub_cache(rows: list[dict], hf_home: Path, tmp_path: Path) -> None:
    """Makes it look as if org/made had been downloaded."""
    from datasets import load_dataset

    (tmp_path / "repository").mkdir()
    pq.write_table(columns(as_texts(rows)), tmp_path / "repository" / "train.parquet")
    load_dataset(str(tmp_path / "repository"), cache_dir=str(tmp_path / "elsewhere"))
    (cached,) = (path.parent for path in (tmp_path / "elsewhere").rglob("dataset_info.json"))
    (hf_home / "org___made" / "default" / "0.0.0").mkdir(parents=True)
    (cached / "repository-train.arrow").rename(cached / "made-train.arrow")
    cached.rename(hf_home / "org___made" / "default" / "0.0.0" / ("0" * 40))


def test_a_hub_dataset_that_was_downloaded_before_needs_no_network(rows, plain, tmp_path, hf_home):
    hub_cache(rows, hf_home, tmp_path)
    items = read(dataset="org/made")
    assert [item.trajectory for item in items] == plain
    assert items[1].where == "org/made:train[1]"


def test_without_network_an_unknown_hub_dataset_is_reported_at_once(hf_home):
    with pytest.raises(UserError, match=r"dataset org/none: the hub can't be reached, and .*hf does not have it"):
        read(dataset="org/none")


# ---- TFDS ----------------------------------------------------------------------------------------------------------

OUTSIDE = """
import sys
from xlam_jax.config import Source
from xlam_jax.data import sources, tfds_builder
from pathlib import Path
tfds_builder.build(Source(name="made", files=[sys.argv[1]]), Path(sys.argv[2]))
for kind in ({"tfds": "unified_trajectories/made"}, {"files": [sys.argv[3]]}, {"files": [sys.argv[4]]}):
    assert sum(1 for _ in sources.read(Source(name="made", **kind))) == 24, kind
print([name for name in ("tensorflow", "torch", "jax") if name in sys.modules])
"""


def test_no_source_imports_tensorflow(rows, write_jsonl, tmp_path):
    pq.write_table(columns(as_texts(rows)), tmp_path / "rows.parquet")
    write_array_record(tmp_path / "rows.array_record", rows)
    files = [write_jsonl(*rows), tmp_path / "tfds", tmp_path / "rows.parquet", tmp_path / "rows.array_record"]
    command = [sys.executable, "-c", OUTSIDE, *map(str, files)]
    environment = {**os.environ, "TFDS_DATA_DIR": str(tmp_path / "tfds")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr
