"""Pairs from file to batch: trained tokens, refused pairs, and their layout in a row."""

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from xlam_jax.config import Data
from xlam_jax.data import cache, corpus, examples, lengths, pipeline, render_sources
from xlam_jax.data.formats import Layout
from xlam_jax.data.mixture import shares
from xlam_jax.data.pair import parse_pair
from xlam_jax.data.tokenizer import load_tokenizer
from xlam_jax.data.trajectory import InvalidTrajectory
from xlam_jax.errors import UserError

QUICKSTART = Path(__file__).parents[2] / "examples/quickstart"
PARAMETERS = {"type": "object", "properties": {"thing": {"type": "integer"}}}
TOOLS = [{"type": "function", "function": {"name": name, "parameters": PARAMETERS}} for name in ("look", "take")]


SORRY = {"role": "assistant", "content": "Sorry."}


def call(name: str, **arguments: Any) -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    return {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "id": "c", "function": function}]}


def result(text: str) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": "c", "content": text}


def pair(number: int, **changes: Any) -> dict[str, Any]:
    """Both sides look first, then one takes the right thing."""
    return {
        "unique_trajectory_id": f"pair {number}",
        "tools": TOOLS,
        "conversation": [{"role": "user", "content": f"Take thing {number}."}],
        "chosen": [call("look"), result("a, b"), call("take", thing=number)],
        "rejected": [call("look"), result("a, b"), call("take", thing=-1), result("no"), SORRY],
        "chosen_score": 1.0,
        "rejected_score": 0.0,
    } | changes  # fmt: skip


def data(path: Path, **changes: Any) -> Data:
    values = {
        "sources": [{"name": "pairs", "files": [str(path)], "format": "pairs"}],
        "tokenizer": str(QUICKSTART / "tokenizer"),
        "sequence_length": 768,
        "streams": 2,
        "heldout": 0.3,
        "max_pairs": 3,
    }
    return Data.model_validate(values | changes)


@pytest.fixture(scope="module")
def codec() -> Any:
    return load_tokenizer(str(QUICKSTART / "tokenizer"))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(pair(number)) + "\n" for number in range(40)), encoding="utf-8")
    return file


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def text_of(codec: Any, example: examples.Example, side: int) -> str:
    counts = (example.get("sides", np.zeros(0)) == side) & (example["weights"] > 0)
    return codec.decode(example["labels"][counts])


def test_only_what_differs_counts(path, codec):
    (one,) = corpus.load(data(path, heldout=0.0), codec)
    assert one.ids[7] == "pair 7"
    example = one.train[7]
    assert text_of(codec, example, 1) == '[TOOL_CALLS][{"name": "take", "arguments": {"thing": 7}}]</s>'
    assert text_of(codec, example, 2) == '[TOOL_CALLS][{"name": "take", "arguments": {"thing": -1}}]</s>Sorry.</s>'
    assert examples.lengths(one.train)[7] == len(example["tokens"])
    assert examples.trained(one.train)[7] == (example["weights"] > 0).sum()


def test_both_sides_are_separate_segments_of_one_row(path, codec):
    loaded = corpus.load(data(path), codec)
    loader = pipeline.Loader(loaded, data(path), batch_size=4, seed=0)
    seen = 0
    for _ in range(6):
        rows = next(loader)
        assert rows.reference is None
        drawn = loader.origins()
        for tokens, _, weights, positions, segments, groups in zip(*rows[:6], strict=True):
            assert segments.max() % 2 == 0
            assert segments.max() <= 2 * 3
            assert not weights[segments == 0].any()
            for number in range(1, segments.max() // 2 + 1):
                source, row = drawn.pop(0)
                whole = loaded[source].train[row]
                for side, segment in ((1, 2 * number - 1), (2, 2 * number)):
                    in_row, in_pair = segments == segment, whole.get("sides") == side
                    assert tokens[in_row].tolist() == whole["tokens"][in_pair].tolist()
                    assert weights[in_row].tolist() == whole["weights"][in_pair].tolist()
                    assert groups[in_row].tolist() == whole["kinds"][in_pair].tolist()
                    assert positions[in_row].tolist() == list(range(in_row.sum()))
                seen += 1
        assert not drawn
    assert seen > 24  # several pairs per row


def test_no_task_is_trained_and_held_out(tmp_path, codec):
    """Pairs of one task differ in their ids and answers; where one is held out, all are."""
    rows = [pair(number, unique_trajectory_id=f"{number}-{again}", chosen=[call("take", thing=again)])
            for number in range(30) for again in (1, 2, 3)]  # fmt: skip
    (one,) = corpus.load(data(write(tmp_path / "p.jsonl", *rows)), codec)
    assert len(one.train) + len(one.heldout) == 90
    assert 0 < len(one.heldout) < 90
    trained = {name.split("-")[0] for name in one.ids}
    held = {sample.id.split("-")[0] for sample in one.samples}
    assert not trained & held
    assert len(trained) + len(held) == 30


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rejected": pair(1)["chosen"]}, "equal-sides: chosen equals rejected"),
        (
            {"rejected": pair(1)["chosen"][:1]},
            "one-is-the-others-beginning: chosen has 4 turns and rejected 2, and all common turns are equal",
        ),
        (
            {"rejected": [call("look"), result("other"), SORRY]},
            "first-differs-at-a-user-or-tool-turn: chosen and rejected first differ at turn 2 (tool)",
        ),
        (
            {"rejected": [call("look"), {"role": "user", "content": "No."}, SORRY]},
            "first-differs-at-a-user-or-tool-turn: chosen and rejected first differ at turn 2 (tool and user)",
        ),
        (
            {"rejected": None},
            "no-pair: a pair has conversation, chosen and rejected, lists of turns; rejected is not a list",
        ),
        ({"rejected": [call("fly")]}, "undeclared-tool: rejected: turn 1 calls 'fly'"),
    ],
)
def test_invalid_pairs_are_reported_with_their_line(tmp_path, codec, changes, message):
    rows = [pair(number) for number in range(12)] + [pair(1, **changes)]
    path = write(tmp_path / "p.jsonl", *rows)
    with pytest.raises(UserError) as error:
        corpus.load(data(path), codec)
    assert f"{path}:13: {message}" in str(error.value)
    (one,) = corpus.load(data(path, on_invalid="drop"), codec)
    assert one.dropped == {message.partition(":")[0]: 1}


def test_a_pair_that_does_not_fit_is_dropped_or_an_error(path, codec):
    whole = corpus.load(data(path, heldout=0.0), codec)[0]
    longest = int(examples.lengths(whole.train).max())
    (one,) = corpus.load(data(path, heldout=0.0, sequence_length=longest), codec)
    assert len(one.train) == 40
    (one,) = corpus.load(data(path, heldout=0.0, sequence_length=longest - 1), codec)
    assert one.dropped["too-long"] > 0
    with pytest.raises(UserError, match=r"both sides have .* drop such pairs with data.on_long=drop"):
        corpus.load(data(path, sequence_length=longest - 1, on_long="error"), codec)


def test_a_side_far_too_long_is_not_tokenized(tmp_path, codec, monkeypatch):
    def encode(layout: Layout, *rest: Any) -> Any:
        assert sum(len(segment.text) for segment in layout.segments) < 10**5
        return whole(layout, *rest)

    whole = lengths.encode
    monkeypatch.setattr(lengths, "encode", encode)
    long, short = [call("take", thing=-1), result("no " * 10**6), SORRY], [call("take", thing=1)]
    for sides in ({"chosen": short, "rejected": long}, {"chosen": long, "rejected": short}):
        one = parse_pair(pair(1, **sides), "x", lambda reason, detail: None)
        fitted = lengths.fit_pair(one, codec, data(tmp_path))
        (side,) = (name for name, turns in sides.items() if turns is long)
        assert (fitted.reasons, fitted.detail) == (["too-long"], f"{side} alone does not fit into a row of 768")


def test_a_side_is_one_sequence(tmp_path, codec):
    """xlam_v1 writes a sequence for every answer, so that a side has one answer that differs."""
    one = {"chosen": [call("take", thing=1)], "rejected": [SORRY]}
    path = write(tmp_path / "p.jsonl", *(pair(number, **one) for number in range(5)), pair(6))
    v1 = data(path, format="xlam_v1", sequence_length=2048, heldout=0.0)
    with pytest.raises(UserError, match=r"p\.jsonl:6: not-one-sequence: rejected: the format xlam_v1 .* 2 sequences"):
        corpus.load(v1, codec)
    (loaded,) = corpus.load(v1.model_copy(update={"on_invalid": "drop"}), codec)
    assert (len(loaded.train), loaded.dropped) == (5, {"not-one-sequence": 1})
    assert text_of(codec, loaded.train[0], 2).endswith("</s>")


def test_a_pair_needs_trained_tokens_on_both_sides(tmp_path, codec):
    path = write(tmp_path / "p.jsonl", *(pair(number) for number in range(5)),
                 pair(6, chosen=[call("take", thing=6) | {"loss": False}]))  # fmt: skip
    (one,) = corpus.load(data(path, heldout=0.0), codec)
    assert one.dropped == {"no-loss": 1}


def test_columns_and_texts_of_json(tmp_path, codec):
    """Parquet with turns as JSON texts equals JSON lines; a repair is reported once, not once per side."""
    bare = [{"function": tool["function"]} for tool in TOOLS]
    rows = [pair(number, source="made", tag="x", tools=bare) for number in range(12)]
    lines = write(tmp_path / "p.jsonl", *rows)
    texts = {key: [json.dumps(row[key]) if isinstance(row[key], list) else row[key] for row in rows] for key in rows[0]}
    pyarrow.parquet.write_table(pyarrow.table(texts), tmp_path / "p.parquet")
    notes = []
    (one,), (other,) = (
        corpus.load(data(file, sources=[{"name": "p", "files": [str(file)], "format": "pairs"}]), codec, notes.append)
        for file in (lines, tmp_path / "p.parquet")
    )
    assert one.repaired == {"unknown-key": 12, "missing-tool-type": 24}
    assert other.repaired == {"missing-tool-type": 24}  # of Parquet only the columns of use are read
    assert other.ids == one.ids
    assert [example["tokens"].tolist() for example in other.train] == [
        example["tokens"].tolist() for example in one.train
    ]
    assert one.samples[0].source == "made"
    assert notes[0].startswith(f"p: {len(one.train)} pairs to train on (")


def test_tokens_of_both_sides_are_shared_out(tmp_path, codec):
    long = [call("look"), result("a, b"), *[call("take", thing=-1), result("no")] * 5, SORRY]
    files = {
        "short": write(tmp_path / "short.jsonl", *map(pair, range(20))),
        "long": write(tmp_path / "long.jsonl", *(pair(number, rejected=long) for number in range(30))),
    }
    sources = [{"name": name, "files": [str(file)], "format": "pairs"} for name, file in files.items()]
    config = data(tmp_path, sources=sources, share="tokens", heldout=0.0)
    loaded = corpus.load(config, codec)
    trained = [sum(int((pair["weights"] > 0).sum()) for pair in one.train) / len(one.train) for one in loaded]
    assert trained[1] > 1.5 * trained[0]
    by_tokens = shares(loaded, config)
    assert float(by_tokens[0]) * trained[0] == pytest.approx(float(by_tokens[1]) * trained[1])
    assert shares(loaded, config.model_copy(update={"share": "examples"})) == [Fraction(1, 2)] * 2


def test_the_samples_are_the_same_in_any_order(tmp_path, codec, monkeypatch):
    monkeypatch.setattr(render_sources, "SAMPLES", 4)
    rows = [pair(number) for number in range(60)]
    (one,) = corpus.load(data(write(tmp_path / "p.jsonl", *rows)), codec)
    (other,) = corpus.load(data(write(tmp_path / "q.jsonl", *rows[::-1])), codec)
    assert len(one.samples) == 4 < len(one.heldout)
    assert one.samples == other.samples
    assert all(sample.conversation[-1].tool_calls[0].arguments["thing"] >= 0 for sample in one.samples)  # chosen


def test_filters_judge_the_chosen_side(path, codec):
    source = {
        "name": "pairs",
        "files": [str(path)],
        "format": "pairs",
        "filters": {"min_score": 0.5, "exclude": ["pair 3"]},
    }
    (one,) = corpus.load(data(path, sources=[source]), codec)
    assert one.dropped == {"excluded": 1}


def test_a_cache_gives_the_same_pairs(path, codec, tmp_path):
    corpus.prepare(tmp_path / "cache", data(path), codec)
    (one,), (other,) = corpus.load(data(path), codec), cache.open(tmp_path / "cache", data(path), codec)
    for part in ("train", "heldout"):
        first, second = getattr(one, part), getattr(other, part)
        assert len(first) == len(second) > 0
        for example, other_example in zip(first, second, strict=True):
            assert example.keys() == other_example.keys()
            assert all(np.array_equal(example[key], other_example[key]) for key in example)
    assert list(other.ids) == one.ids
    assert other.samples == one.samples


def test_a_reference_is_at_the_first_trained_position(path, codec):
    (one,) = corpus.load(data(path), codec)
    log_p_P2 = -np.arange(1, 2 * len(one.train) + 1, dtype=np.float32).reshape(-1, 2)
    with_reference = one._replace(train=examples.Referenced(one.train, log_p_P2))
    loader = pipeline.Loader([with_reference], data(path), batch_size=4, seed=0)
    rows = next(loader)
    assert rows.reference is not None
    drawn = loader.origins()
    for weights, segments, reference in zip(rows.weights, rows.segments, rows.reference, strict=True):
        for number in range(1, segments.max() // 2 + 1):
            _, row = drawn.pop(0)
            for side in (0, 1):
                counted = (segments == 2 * number - 1 + side) & (weights > 0)
                assert reference[counted].tolist() == [log_p_P2[row, side]] + [0.0] * (counted.sum() - 1)
    with pytest.raises(ValueError, match="shape"):
        examples.Referenced(one.train, log_p_P2[1:])


def test_rows_that_are_not_objects_are_refused():
    with pytest.raises(InvalidTrajectory, match="not-an-object"):
        parse_pair([], "x", lambda reason, detail: None)


def test_validate_knows_pairs(tmp_path):
    from xlam_jax.data.validate import validate

    rows = [pair(0), pair(1, rejected=pair(1)["chosen"]), pair(2, chosen=[call("fly")]), pair(3, rejected="none")]
    findings = [finding for of_row in validate(write(tmp_path / "p.jsonl", *rows)) for finding in of_row]
    summaries = {(finding.line, finding.reason, finding.detail.partition(" ")[0]) for finding in findings}
    assert summaries == {
        (2, "equal-sides", "chosen"),
        (3, "undeclared-tool", "chosen:"),
        (4, "malformed-json", "`rejected`:"),
    }
