"""Loading: each row is kept or counted, tokens are what `render` gives, and processes change nothing."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from xlam_jax.config import Data
from xlam_jax.data import corpus, examples, render_sources
from xlam_jax.data.parse import read_jsonl
from xlam_jax.data.render import render
from xlam_jax.data.tokenizer import load_tokenizer
from xlam_jax.data.trajectory import Trajectory
from xlam_jax.enums import SPAN_KINDS
from xlam_jax.errors import UserError


@pytest.fixture(scope="module")
def codec(quickstart: Path):
    return load_tokenizer(str(quickstart / "tokenizer"))


def data(*sources: object, **changes: object) -> Data:
    """A config of sources: a path, or the fields of one."""
    listed = [
        source if isinstance(source, dict) else {"name": Path(str(source)).stem, "files": [str(source)]}
        for source in sources
    ]
    return Data.model_validate(
        {"sources": listed, "tokenizer": "t", "sequence_length": 1024, "heldout": 0.1, **changes}
    )


def same(first: list[examples.Loaded], second: list[examples.Loaded]) -> bool:
    """Whether two loads are identical, bit for bit."""

    def alike(one: examples.Example, other: examples.Example) -> bool:
        return one.keys() == other.keys() and all(np.array_equal(one[key], other[key]) for key in one)

    return all(
        one[3:] == other[3:] and all(alike(a, b) for a, b in zip(part, other_part, strict=True))
        for one, other in zip(first, second, strict=True)
        for part, other_part in ((one.train, other.train), (one.heldout, other.heldout))
    )


def test_examples_are_what_render_gives(quickstart, codec):
    files = [item for _, item in read_jsonl(quickstart / "hammer.jsonl")]
    (one,) = corpus.load(data(quickstart / "hammer.jsonl", heldout=0.0), codec)
    assert len(one.train) == len(files) == 180
    for example, trajectory in zip(one.train, files, strict=True):
        assert isinstance(trajectory, Trajectory)
        rendered = render(trajectory, codec)
        assert np.array_equal(example["tokens"], rendered.input_ids[:-1])
        assert np.array_equal(example["labels"], rendered.input_ids[1:])
        assert np.array_equal(example["weights"], rendered.weights[1:])
        kinds = [SPAN_KINDS[kind] for kind in example["kinds"]]
        assert kinds == [span.kind for span in rendered.spans for _ in range(span.start, span.end)][1:]
        assert [value.dtype for value in example.values()] == [np.int32, np.int32, np.float32, np.int8]  # pyright: ignore
    assert [len(part) for part in (one.train[10:20:3], one.train[-1:], one.train[180:])] == [4, 1, 0]
    with pytest.raises(IndexError):
        one.train[180]
    assert np.array_equal(one.train[-1]["tokens"], one.train[179]["tokens"])


def test_what_is_known_without_reading_is_what_reading_gives(quickstart, codec):
    (one,) = corpus.load(data(quickstart / "webshop.jsonl"), codec)
    for part in (one.train, one.heldout):
        listed = list(part)
        for count in (examples.lengths, examples.trained):
            assert count(part).tolist() == count(listed).tolist()
    assert 0 < examples.trained(one.train).sum() < examples.lengths(one.train).sum()
    assert examples.trained(examples.Examples()).tolist() == examples.lengths(examples.Examples()).tolist() == []


def test_a_token_takes_eight_bytes(quickstart, codec):
    (one,) = corpus.load(data(quickstart / "webshop.jsonl"), codec)
    assert isinstance(one.train, examples.Examples)
    size = sum(len(flat) for flat, _ in one.train._flat)
    assert size == 9 * (examples.lengths(one.train).sum() + len(one.train))
    with pytest.raises(ValueError, match="read-only"):
        one.train[0]["tokens"][0] = 1


def test_annotations_point_back_to_where_each_label_is_from(quickstart, codec):
    config = data(quickstart / "hammer.jsonl", quickstart / "webshop.jsonl")
    loaded = corpus.load(config, codec, annotate=True)
    for one, plain in zip(loaded, corpus.load(config, codec), strict=True):
        assert one.trajectories is not None
        assert plain.trajectories is None
        assert len(one.trajectories) == len(one.train) == len(plain.train)
        for row, example in enumerate(one.train):
            assert "turns" in example
            arrays: Any = example
            assert all(np.array_equal(value, arrays[key]) for key, value in dict[str, Any](plain.train[row]).items())
            trajectory = one.trajectories[row]
            assert isinstance(trajectory, Trajectory)
            assert plain.ids[row] == trajectory.id
            for span in render(trajectory, codec).spans:
                labels = slice(max(0, span.start - 1), span.end - 1)
                assert set(example["kinds"][labels].tolist()) <= {SPAN_KINDS.index(span.kind)}
                assert set(example["turns"][labels].tolist()) <= {span.turn}
            assert len(example["kinds"]) == len(example["turns"]) == len(example["tokens"])


@pytest.fixture
def mixed(row, write_jsonl) -> Path:
    """Rows of every fate: kept, repaired, broken, too long, without loss, filtered."""
    silent = json.loads(json.dumps(row))
    for turn in silent["conversation"]:
        if turn["role"] == "assistant":
            turn["loss"] = False
    text = json.loads(json.dumps(row))
    text["conversation"][1]["tool_calls"][0]["function"]["arguments"] = "{}"
    long = json.loads(json.dumps(row))
    long["conversation"][0]["content"] = "weather " * 2000
    rows = []
    for at in range(20):
        some = [row, text, b'{"broken": ', long, silent, row | {"score": 0.0}][at % 6]
        rows.append(some if isinstance(some, bytes) else some | {"unique_trajectory_id": f"t{at}"})
    return write_jsonl(*rows, name="mixed.jsonl")


def mixture(mixed: Path, **changes: object) -> Data:
    source = {"name": "mixed", "files": [str(mixed)], "filters": {"min_score": 0.5}}
    return data(source, on_invalid="drop", **changes)


def test_every_row_is_kept_or_counted(mixed, codec):
    lines: list[str] = []
    (one,) = corpus.load(mixture(mixed), codec, lines.append)
    assert one.dropped == {"malformed-json": 3, "too-long": 3, "no-loss": 3, "low-score": 3}
    assert one.repaired == {"string-arguments": 4}
    assert len(one.train) + len(one.heldout) + one.dropped.total() == 20
    tokens = sum(len(example["tokens"]) for example in one.train)
    assert lines == [
        f"mixed: {len(one.train)} trajectories to train on ({tokens:,} tokens), {len(one.heldout)} held out, "
        "dropped: 3 low-score, 3 malformed-json, 3 no-loss, 3 too-long; repaired: 4 string-arguments"
    ]


def test_what_is_cut_is_counted(mixed, codec):
    (one,) = corpus.load(mixture(mixed, on_long="cut"), codec)
    assert one.changed["cut"] + one.dropped["too-long"] == 3
    assert one.changed["cut"] > 0
    assert examples.lengths(one.train).max() <= 1024


def test_processes_change_nothing(mixed, quickstart, codec, monkeypatch):
    pairs = {"name": "pairs", "files": [str(quickstart.parent / "dpo" / "hotpotqa.jsonl")], "format": "pairs"}
    bundled = data(quickstart / "hammer.jsonl", pairs, quickstart / "webshop.jsonl").sources
    config = mixture(mixed).model_copy(update={"sources": [*mixture(mixed).sources, *bundled]})
    alone = corpus.load(config, codec, annotate=True)
    monkeypatch.setattr(render_sources, "ALONE", 5)
    monkeypatch.setattr(render_sources, "PROCESSES", 2)
    started: list[object] = []
    pool = render_sources.ProcessPoolExecutor
    monkeypatch.setattr(render_sources, "ProcessPoolExecutor", lambda *of: started.append(of) or pool(*of))
    assert same(alone, corpus.load(config, codec, annotate=True))
    assert len(started) == 1


def test_errors_name_file_and_line(mixed, codec):
    with pytest.raises(UserError, match=r"mixed\.jsonl:3: malformed-json: .*data\.on_invalid=drop"):
        corpus.load(data(mixed), codec)
    with pytest.raises(UserError, match=r"mixed\.jsonl:4: too-long: \d+ tokens .*sequence_length is 2000.*on_long"):
        corpus.load(data(mixed, on_invalid="drop", on_long="error", sequence_length=2000), codec)


def test_a_source_with_nothing_to_train_on_is_an_error(row, write_jsonl, codec):
    path = write_jsonl(row)
    with pytest.raises(UserError, match=r"rows has nothing to train on \(dropped: 1 too-long; held out: 0\)"):
        corpus.load(data(path, sequence_length=4), codec)
    with pytest.raises(UserError, match="rows has nothing to train on"):
        corpus.load(data({"name": "rows", "files": [str(path)], "filters": {"min_turns": 99}}), codec)


def test_settings_are_checked_before_anything_is_rendered(quickstart, codec):
    lines: list[str] = []
    with pytest.raises(UserError, match=r"none\.jsonl: no such file"):
        corpus.load(data(quickstart / "hammer.jsonl", quickstart / "none.jsonl"), codec, lines.append)
    assert lines == []


def test_heldout_is_a_matter_of_the_id():
    ids = [f"trajectory {number}" for number in range(4000)]
    held = [one for one in ids if render_sources.is_heldout("a", one, 0.1)]
    assert 0.08 < len(held) / len(ids) < 0.12
    assert set(held) <= {one for one in ids if render_sources.is_heldout("a", one, 0.2)}
    assert held != [one for one in ids if render_sources.is_heldout("b", one, 0.1)]


def test_what_is_held_out_stays_so_in_any_order_and_number_of_files(quickstart, codec, tmp_path):
    lines = (quickstart / "hammer.jsonl").read_bytes().splitlines(keepends=True)
    for name, part in (("one", lines[::-2]), ("two", lines[-2::-2])):
        (tmp_path / f"{name}.jsonl").write_bytes(b"".join(part))
    files = [str(tmp_path / f"{name}.jsonl") for name in ("one", "two")]
    (whole,) = corpus.load(data(quickstart / "hammer.jsonl"), codec)
    (parts,) = corpus.load(data({"name": "hammer", "files": files}), codec)

    def contents(examples) -> Counter[bytes]:
        return Counter(example["tokens"].tobytes() for example in examples)

    assert contents(whole.heldout) == contents(parts.heldout)
    assert contents(whole.train) == contents(parts.train)
    assert len(whole.heldout) > 5


def test_long_loads_say_how_they_go(mixed, codec, monkeypatch):
    monkeypatch.setattr("xlam_jax.progress.EVERY", 0.0)
    lines: list[str] = []
    corpus.load(mixture(mixed), codec, lines.append)
    assert len(lines) == 21
    assert lines[0].startswith("mixed: 1 rows  ")
