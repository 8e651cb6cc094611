"""The cache: batches are identical bit for bit; a change of any input is refused with its name."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from xlam_jax.config import Data
from xlam_jax.data import cache, corpus, examples
from xlam_jax.data.tokenizer import load_tokenizer
from xlam_jax.errors import UserError

NAMES = ("webshop", "hammer")


@pytest.fixture(scope="module")
def codec(quickstart: Path):
    return load_tokenizer(str(quickstart / "tokenizer"))


@pytest.fixture
def files(quickstart: Path, tmp_path: Path) -> Path:
    """Copies of two bundled sources, to change."""
    (tmp_path / "files").mkdir()
    for name in NAMES:
        lines = (quickstart / f"{name}.jsonl").read_bytes().splitlines(keepends=True)
        (tmp_path / "files" / f"{name}.jsonl").write_bytes(b"".join(lines[:25]))
    return tmp_path / "files"


def data(files: Path, **changes: object) -> Data:
    listed = [{"name": name, "files": [str(files / f"{name}.jsonl")]} for name in NAMES]
    defaults = {"sources": listed, "tokenizer": "t", "sequence_length": 1024, "heldout": 0.2, "streams": 2}
    return Data.model_validate({**defaults, **changes})


@pytest.fixture
def written(files: Path, tmp_path: Path, codec) -> Path:
    corpus.prepare(tmp_path / "cache", data(files), codec)
    return tmp_path / "cache"


def test_batches_are_those_of_the_files(files, written, codec):
    from xlam_jax.data import pipeline

    plain, cached = data(files), data(files, cache=str(written))
    first, second = (corpus.load(config, codec) for config in (plain, cached))
    assert not isinstance(first[0].train, cache.CachedExamples)
    assert isinstance(second[0].train, cache.CachedExamples)
    one, other = (pipeline.Loader(loaded, plain, batch_size=4, seed=3) for loaded in (first, second))
    for _ in range(10):
        for direct, from_cache in zip(next(one)[:6], next(other)[:6], strict=True):
            assert direct.dtype == from_cache.dtype
            assert direct.tobytes() == from_cache.tobytes()
    held = [list(pipeline.heldout_batches(loaded, plain, rows=2, limit=None)) for loaded in (first, second)]
    assert len(held[0]) == len(held[1]) > 0
    for direct, from_cache in zip(*held, strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(direct, from_cache, strict=True))


def test_messages_of_loading_are_stored(files, written, codec):
    said: list[list[str]] = [[], []]
    first = corpus.load(data(files), codec, said[0].append)
    second = cache.open(written, data(files), codec, said[1].append)
    assert said[0] == said[1]
    for one, other in zip(first, second, strict=True):
        assert (one.dropped, one.repaired, one.changed) == (other.dropped, other.repaired, other.changed)
        for direct, from_cache in ((one.train, other.train), (one.heldout, other.heldout)):
            assert np.array_equal(examples.lengths(direct), examples.lengths(from_cache))
            assert np.array_equal(examples.trained(direct), examples.trained(from_cache))


def test_examples_are_read_by_index_and_travel_to_other_processes(files, written, codec):
    one = cache.open(written, data(files), codec)[1]
    listed = list(one.train)
    assert len(listed) == len(one.train) > 10
    other = pickle.loads(pickle.dumps(one.train))
    for at in (7, 3, -1, 0):
        assert all(np.array_equal(other[at][key], listed[at][key]) for key in ("tokens", "labels", "weights"))
    assert [len(example["tokens"]) for example in one.train[2:5]] == examples.lengths(one.train)[2:5].tolist()
    with pytest.raises(IndexError):
        one.train[len(listed)]


def stale(written: Path, config: Data, codec: object) -> str:
    with pytest.raises(UserError, match=r"is stale") as caught:
        cache.open(written, config, codec)
    *parts, again = str(caught.value).splitlines()[1:]
    assert again.startswith("build it again in another folder: python -m xlam_jax.data prepare --config")
    assert len(parts) == 1, parts  # and nothing else
    return parts[0].strip()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": {"thought": 0.5}}, "data.loss.thought: 1.0 in the cache, 0.5 now"),
        ({"loss": {"turns": "last"}}, "data.loss.turns: 'all' in the cache, 'last' now"),
        ({"heldout": 0.3}, "data.heldout: 0.2 in the cache, 0.3 now"),
        ({"format": "xlam_v1"}, "data.format: 'xlam' in the cache, 'xlam_v1' now"),
        ({"on_invalid": "drop"}, "data.on_invalid: 'error' in the cache, 'drop' now"),
    ],
)
def test_other_settings_are_refused(files, written, codec, changes, message):
    assert stale(written, data(files, **changes), codec) == message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"filters": {"min_calls": 2}}, "data.sources.hammer.filters.min_calls: 0 in the cache, 2 now"),
        ({"limit": 3}, "data.sources.hammer.limit: None in the cache, 3 now"),
        ({"format": "hammer"}, "data.sources.hammer.format: 'unified' in the cache, 'hammer' now"),
        ({"name": "hammer2"}, "data.sources.hammer2: not in the cache, which has webshop, hammer"),
    ],
)
def test_a_source_read_in_another_way_is_refused(files, written, codec, changes, message):
    webshop, hammer = data(files).sources
    changed = hammer.model_validate({**hammer.model_dump(), **changes})
    assert stale(written, data(files).model_copy(update={"sources": [webshop, changed]}), codec) == message


def test_one_changed_byte_is_refused(files, written, codec):
    path = files / "hammer.jsonl"
    path.write_bytes(path.read_bytes().replace(b"a", b"e", 1))
    assert stale(written, data(files), codec) == "data.sources.hammer: the content of hammer.jsonl changed"


def test_other_files_are_refused(files, written, codec):
    shutil.copy(files / "hammer.jsonl", files / "more.jsonl")
    webshop, hammer = data(files).sources
    more = hammer.model_copy(update={"files": [*hammer.files, str(files / "more.jsonl")]})
    config = data(files).model_copy(update={"sources": [webshop, more]})
    reason = stale(written, config, codec)
    assert reason == "data.sources.hammer: made of hammer.jsonl; now it is hammer.jsonl, more.jsonl"


def test_another_tokenizer_is_refused(files, written, quickstart):
    assert stale(written, data(files), load_tokenizer("mistral:v1")).startswith("data.tokenizer: another vocabulary")
    one = load_tokenizer(str(quickstart / "tokenizer"))
    one.add_special_tokens({"additional_special_tokens": ["<extra>"]})
    assert stale(written, data(files), one).startswith("data.tokenizer: another vocabulary")


def test_another_render_version_is_refused_with_the_command_that_rebuilds(files, written, codec, monkeypatch):
    monkeypatch.setattr(cache, "RENDER_VERSION", cache.RENDER_VERSION + 1)
    with pytest.raises(UserError, match="was written by another version of xlam_jax") as caught:
        cache.open(written, data(files), codec)
    assert f"python -m xlam_jax.data prepare --config CONFIG.yaml --out {written}.new" in str(caught.value)


def test_the_chat_template_counts_where_it_is_the_format(files, written, codec):
    changed = pickle.loads(pickle.dumps(codec))
    changed.chat_template = "{{ messages }}"
    cache.open(written, data(files), changed)  # the format xlam writes its own
    assert cache.make_key(data(files, format="native"), changed) != cache.make_key(data(files, format="native"), codec)


def moved(files: Path) -> Data:
    shutil.copytree(files, files.with_name("elsewhere"))
    shutil.rmtree(files)
    return data(files.with_name("elsewhere"))


def weighted(files: Path) -> Data:
    listed = [source.model_copy(update={"weight": 3.0}) for source in data(files).sources]
    return data(files, streams=4, packing_bins=3, share="tokens").model_copy(update={"sources": listed})


def without_first(files: Path) -> Data:
    return data(files).model_copy(update={"sources": data(files).sources[1:]})


@pytest.mark.parametrize("change", [moved, weighted, without_first, lambda files: data(files, sequence_length=4096)])
def test_changes_that_affect_no_example_are_accepted(files, written, codec, change: Callable[[Path], Data]):
    expected = {one.source.name: [*one.train] for one in cache.open(written, data(files), codec)}
    config = change(files)
    for one in cache.open(written, config, codec):
        assert one.source in config.sources
        for example, reference in zip(one.train, expected[one.source.name], strict=True):
            assert np.array_equal(example["tokens"], reference["tokens"])


def test_the_row_length_counts_once_a_trajectory_is_too_long(files, codec, tmp_path):
    longest = max(int(examples.lengths(one.train).max()) for one in corpus.load(data(files), codec))
    short = data(files, sequence_length=longest - 1)
    corpus.prepare(tmp_path / "short", short, codec)
    cache.open(tmp_path / "short", short, codec)
    reason = stale(tmp_path / "short", data(files, sequence_length=longest), codec)
    assert reason == f"data.sequence_length: {longest - 1} in the cache, {longest} now"
    reason = stale(tmp_path / "short", data(files, sequence_length=longest - 1, on_long="cut"), codec)
    assert reason == "data.on_long: 'drop' in the cache, 'cut' now"


def test_a_row_that_no_longer_fits_is_refused(files, written, codec):
    assert stale(written, data(files, sequence_length=256), codec).startswith("data.sequence_length: 1024 in the cache")


def test_sources_that_are_not_here_are_trusted_and_named(files, written, codec):
    (files / "webshop.jsonl").unlink()
    lines: list[str] = []
    assert len(cache.open(written, data(files), codec, lines.append)) == 2
    assert lines[0] == f"{written}: content not compared, as not on this machine: webshop"
    (files / "hammer.jsonl").write_text("{}\n")
    assert stale(written, data(files), codec).endswith("the content of hammer.jsonl changed")


def test_a_changed_dataset_is_refused(files, codec, tmp_path):
    from datasets import Dataset

    def config() -> Data:
        return data(files, sources=[{"name": "saved", "dataset": str(tmp_path / "saved")}])

    rows = [json.loads(line) for line in (files / "hammer.jsonl").read_text().splitlines()]
    texts = [row | {key: json.dumps(row[key]) for key in ("tools", "conversation")} for row in rows]
    Dataset.from_list(texts).save_to_disk(str(tmp_path / "saved"))
    corpus.prepare(tmp_path / "cache", config(), codec)
    cache.open(tmp_path / "cache", config(), codec)
    shutil.rmtree(tmp_path / "saved")
    Dataset.from_list(texts[1:]).save_to_disk(str(tmp_path / "saved"))
    assert stale(tmp_path / "cache", config(), codec) == "data.sources.saved: the content of saved changed"


def test_annotated_loads_read_the_sources_of_a_cache_that_is_not_stale(files, written, codec):
    config = data(files, cache=str(written))
    assert corpus.load(config, codec, annotate=True)[0].trajectories is not None
    with pytest.raises(UserError, match="is stale"):
        corpus.load(data(files, cache=str(written), heldout=0.5), codec, annotate=True)


def test_what_is_there_is_not_overwritten_and_a_failure_leaves_nothing(files, written, codec, tmp_path):
    with pytest.raises(UserError, match="exists already and is not overwritten"):
        corpus.prepare(written, data(files), codec)
    with (files / "hammer.jsonl").open("ab") as file:
        file.write(b"broken\n")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match=r"hammer\.jsonl:26: malformed-json"):
        corpus.prepare(tmp_path / "other", data(files), codec)
    assert sorted(tmp_path.iterdir()) == before
    with pytest.raises(UserError, match="augment"):
        corpus.prepare(tmp_path / "other", data(files, augment={"tools": True}), codec)


def test_a_damaged_cache_is_reported(files, written, codec, tmp_path):
    records = written / "1.train.array_record"
    records.write_bytes(records.read_bytes()[:-5000])
    with pytest.raises(UserError, match=r"1\.train\.array_record: cannot be read as ArrayRecord"):
        cache.open(written, data(files), codec)
    shutil.copy(written / "1.heldout.array_record", records)
    with pytest.raises(UserError, match=r"1\.train\.array_record: has \d+ examples, and .*npy lists"):
        cache.open(written, data(files), codec)
    with pytest.raises(
        UserError, match=r"is not a cache, it has no meta\.json; make one: python -m xlam_jax\.data prepare"
    ):
        cache.open(tmp_path / "none", data(files), codec)
    for text, message in (
        ("{", "cannot be read"),
        ("[]", "cannot be read"),
        ('{"key": {"layout": 3, "code": "0f"}, "sources": {}}', r"has layout 3.*xlam_jax\.data prepare --config"),
    ):
        (written / "meta.json").write_text(text)
        with pytest.raises(UserError, match=message):
            cache.open(written, data(files), codec)
