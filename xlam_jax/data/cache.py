"""Rendered trajectories on disk, and the key that says what they were made of.

A cache is a folder: `meta.json`, and for each source the examples to train on and the held-out ones as ArrayRecord,
with the lengths of each (.npy), the trajectories' ids, and those held-out trajectories that stay readable. A record has
the n+1 ids of an example, int32, the n weights of its labels, float32, and their kinds, int8. That of a pair has the
length of the chosen side's record, uint32, and both sides' records. Opening reads no example; each is read when it is
drawn, by its index.

`meta.json` also has the digests of each source's examples (`identity`), so that a run may change between a cache and
the sources it was made of.

The key keeps its parts, so that a stale cache is refused with the names of those that changed: the content of every
source file, how the source is read, tokenizer, template, format and loss, the held-out share, the code that renders,
and the row length where a trajectory was too long for it. What only mixes or packs (weights, epochs, streams) is no
part of it, and a config may leave sources of a cache out. A source that is not on this machine can't be compared: the
cache is then trusted for its content, and a line says so.
"""

import hashlib
import json
import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any, overload

import numpy as np

from converters import trajectories
from converters.folders import new_folder
from xlam_jax.config import PAIRS, Data, Source
from xlam_jax.data import corpus, identity
from xlam_jax.data.corpus import Example, Loaded, Progress
from xlam_jax.data.parse import read_jsonl
from xlam_jax.data.rows import open_array_record
from xlam_jax.data.tokenizer import text_to_ids_digest
from xlam_jax.data.trajectory import Trajectory, to_dict
from xlam_jax.errors import UserError

LAYOUT = 3
"""Of the folder. A cache of another layout is refused."""
META = "meta.json"
PARTS = ("train", "heldout")
_OPTIONS = "group_size:1,zstd:1"  # a record alone, for random access
# fields of a source that change no example, or whose part in it is told by the content's names and digests
_APART_FIELDS = {"name", "files", "dataset", "tfds", "streaming", "weight", "epochs", "size"}
# modules of xlam_jax.data that have no part in an example
_APART_MODULES = (
    "__main__",
    "augment",
    "cache",
    "html",
    "mixture",
    "pairs",
    "pipeline",
    "preview",
    "schemas",
    "stats",
    "validate",
)
_CONVERTERS = Path(trajectories.__file__).parent
_ABSENT = "absent"


def write(folder: str | Path, data: Data, tokenizer: Any, progress: Progress = lambda line: None) -> None:
    """Renders the sources of a config into a new folder, which appears when it is whole.

    Raises `UserError` as `corpus.load` does, when the folder exists, and when augmentation is on.
    """
    from array_record.python.array_record_module import ArrayRecordWriter

    if data.augment.active:
        raise UserError("data.augment draws another variant each time, and a cache holds one; turn it off to use one")
    data = data.model_copy(update={"cache": None})
    with new_folder(Path(folder)) as part:
        key = _key(data, tokenizer)  # before the sources are read: one that changes meanwhile makes the cache stale
        part.mkdir()
        loaded = corpus.load(data, tokenizer, progress)
        for at, one in enumerate(loaded):
            for name, examples in zip(PARTS, (one.train, one.heldout), strict=True):
                writer = ArrayRecordWriter(str(part / f"{at}.{name}.array_record"), _OPTIONS)
                for example in examples:
                    writer.write(_record(example))
                writer.close()
                counts = np.stack([corpus.lengths(examples), corpus.trained(examples)]).astype(np.int64)
                np.save(part / f"{at}.{name}.npy", counts)
            (part / f"{at}.ids.json").write_text(json.dumps(list(one.ids)), encoding="utf-8")
            samples = (json.dumps(to_dict(sample), ensure_ascii=False) + "\n" for sample in one.samples)
            (part / f"{at}.samples.jsonl").write_text("".join(samples), encoding="utf-8")
        meta = {"key": key, "sources": {one.source.name: _about(at, one) for at, one in enumerate(loaded)}}
        (part / META).write_text(json.dumps(meta, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def open(folder: str | Path, data: Data, tokenizer: Any, progress: Progress = lambda line: None) -> list[Loaded]:
    """Opens a cache in place of the sources. Raises `UserError` that names what changed since it was written."""
    meta = verify(folder, data, tokenizer, progress)
    loaded = []
    for source in data.sources:
        about = meta["sources"][source.name]
        at, pairs = Path(folder) / str(about["at"]), source.format == PAIRS
        train, heldout = (CachedExamples(Path(f"{at}.{name}"), pairs) for name in PARTS)
        samples = [one for _, one in read_jsonl(f"{at}.samples.jsonl") if isinstance(one, Trajectory)]
        counters = (Counter(about[name]) for name in ("dropped", "repaired", "changed"))
        digests, dataset = about["digests"], about["dataset"]
        ids = _Ids(Path(f"{at}.ids.json"))
        loaded.append(Loaded(source, train, heldout, ids, samples, None, *counters, digests=digests, dataset=dataset))
        progress(corpus.summary(loaded[-1]))
    return loaded


def verify(folder: str | Path, data: Data, tokenizer: Any, progress: Progress = lambda line: None) -> dict[str, Any]:
    """Compares a cache with what it would be made of now, and returns its `meta.json`.

    Raises `UserError` when there is none, or that names every part that changed.
    """
    folder = Path(folder)
    command = "python -m xlam_jax.data prepare --config CONFIG.yaml --out"
    again = f"make it anew in another folder: {command} {folder}.new"
    try:
        meta = json.loads((folder / META).read_text(encoding="utf-8"))
        was, about = meta["key"], meta["sources"]
        layout = was["layout"]
    except FileNotFoundError:
        raise UserError(f"data.cache: {folder} is no cache, it has no {META}; make one: {command} {folder}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"data.cache: {folder / META} cannot be read ({error!r}); {again}") from None
    if layout != LAYOUT:
        raise UserError(f"data.cache: {folder} has layout {layout}, this version reads {LAYOUT}; {again}")
    now = _key(data, tokenizer)
    if all(_as_long(about.get(source.name), data) for source in data.sources):
        for key in (was, now):  # nothing was too long and nothing is now
            key["settings"] = {
                name: value
                for name, value in key["settings"].items()
                if name not in ("data.sequence_length", "data.on_long")
            }
    changed = list(_changes(was, now))
    if changed:
        raise UserError(f"data.cache: {folder} is stale:\n  " + "\n  ".join(changed) + f"\n{again}")
    absent = [name for name, source in now["sources"].items() if _ABSENT in source["content"].values()]
    if absent:
        progress(f"{folder}: content not compared, as not on this machine: {', '.join(absent)}")
    return meta


class _Ids(Sequence[str]):
    """The ids of a source's trajectories, read when the first is asked for."""

    def __init__(self, path: Path):
        self._path = path

    @cached_property
    def _ids(self) -> list[str]:
        return json.loads(self._path.read_text(encoding="utf-8"))

    def __len__(self) -> int:
        return len(self._ids)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        return self._ids[index]


class CachedExamples(Sequence[Example]):
    """The examples of one file of a cache, each read from disk when it is asked for."""

    def __init__(self, stem: Path, pairs: bool = False):
        self._stem, self._pairs = stem, pairs
        self._lengths, self._trained = np.load(f"{stem}.npy", mmap_mode="r")
        with open_array_record(self._path) as reader:
            records = reader.num_records() if reader.ok() else len(self)
        if records != len(self):
            raise UserError(f"{self._path}: has {records} examples, and {stem}.npy tells of {len(self)}; make it anew")

    @property
    def _path(self) -> Path:
        return Path(f"{self._stem}.array_record")

    @cached_property
    def _reader(self) -> Any:
        from array_record.python.array_record_module import ArrayRecordReader

        return ArrayRecordReader(str(self._path), "readahead_buffer_size:0")

    def __reduce__(self) -> tuple[Any, ...]:
        return CachedExamples, (self._stem, self._pairs)

    def __len__(self) -> int:
        return len(self._lengths)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[at] for at in range(*index.indices(len(self)))]
        record = memoryview(self._reader.read([range(len(self))[index]])[0])
        if not self._pairs:
            return _of_record(record)
        end = 4 + int.from_bytes(record[:4], "little")
        return corpus.both(_of_record(record[4:end]), _of_record(record[end:]))

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each example, int64 (len,)."""
        return self._lengths

    @property
    def trained(self) -> np.ndarray:
        """Tokens that carry loss of each example, int64 (len,)."""
        return self._trained


def _record(example: Example) -> bytes:
    sides = example.get("sides")
    if sides is not None:
        chosen, rejected = (
            _record(Example(**{name: values[sides == side] for name, values in example.items() if name != "sides"}))  # pyright: ignore
            for side in (1, 2)
        )
        return len(chosen).to_bytes(4, "little") + chosen + rejected
    parts = (example["tokens"][:1], example["labels"], example["weights"], example["kinds"])
    return b"".join(part.tobytes() for part in parts)


def _of_record(record: memoryview) -> Example:
    count = (len(record) - 4) // 9
    ids = np.frombuffer(record, np.int32, count + 1)
    weights = np.frombuffer(record, np.float32, count, offset=4 * (count + 1))
    kinds = np.frombuffer(record, np.int8, count, offset=4 * (2 * count + 1))
    return Example(tokens=ids[:-1], labels=ids[1:], weights=weights, kinds=kinds)


def _about(at: int, one: Loaded) -> dict[str, Any]:
    longest = max((int(corpus.lengths(part).max()) for part in (one.train, one.heldout) if len(part)), default=0)
    return {
        "at": at,
        "dropped": one.dropped,
        "repaired": one.repaired,
        "changed": one.changed,
        "longest": longest,
        "digests": identity.source_digests(one),
        "dataset": one.dataset,
        "all_fit": not one.changed.keys() & {"cut", "split"} and not one.dropped["too-long"],
    }


def _as_long(about: dict[str, Any] | None, data: Data) -> bool:
    """Whether each trajectory of a source is in the cache whole, and fits into rows of the config's length."""
    return about is not None and about["all_fit"] and about["longest"] <= data.sequence_length


def _key(data: Data, tokenizer: Any) -> dict[str, Any]:
    settings = data.model_dump(include={"format", "loss", "heldout", "on_invalid", "on_long", "sequence_length"})
    return {
        "layout": LAYOUT,
        "settings": dict(_flat(settings, "data.")),
        "tokenizer": {"name": data.tokenizer, "content": text_to_ids_digest(tokenizer)},
        "template": _digest(json.dumps(tokenizer.chat_template)) if data.format == "native" else "",
        "code": _code(),
        "sources": {
            source.name: {
                "settings": dict(_flat(source.model_dump(exclude=_APART_FIELDS), f"data.sources.{source.name}.")),
                "content": dict(_content(source)),
                "converter": _converter(source),
            }
            for source in data.sources
        },
    }


def _flat(values: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _changes(was: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    """What differs, in words. Sources that the config has no more are no difference."""
    yield from _changed_settings(was["settings"], now["settings"])
    if was["tokenizer"]["content"] != now["tokenizer"]["content"]:
        names = f"{was['tokenizer']['name']} in the cache, {now['tokenizer']['name']} now"
        yield f"data.tokenizer: another vocabulary, merges or special tokens ({names})"
    if was["template"] != now["template"]:
        yield "data.tokenizer: another chat template, which data.format native writes"
    if was["code"] != now["code"]:
        yield "xlam_jax: another version of the code that reads and renders"
    for name, source in now["sources"].items():
        if name not in was["sources"]:
            yield f"data.sources.{name}: not in the cache, which has {', '.join(was['sources'])}"
            continue
        before = was["sources"][name]
        other = list(_changed_settings(before["settings"], source["settings"]))
        yield from other
        if before["converter"] != source["converter"] and not any(".format: " in one for one in other):
            yield f"data.sources.{name}: another version of the code that converts its format"
        if list(before["content"]) != list(source["content"]):
            cached, current = (", ".join(one["content"]) for one in (before, source))
            yield f"data.sources.{name}: made of {cached}; now it is {current}"
            continue
        for part, digest in source["content"].items():
            if _ABSENT not in (digest, before["content"][part]) and digest != before["content"][part]:
                yield f"data.sources.{name}: the content of {part} changed"


def _changed_settings(was: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    for name in sorted(was.keys() | now.keys()):
        if was.get(name) != now.get(name):
            values = (textwrap.shorten(repr(one.get(name)), 80) for one in (was, now))
            yield f"{name}: {' in the cache, '.join(values)} now"


def _digest(*parts: str | bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        part = part.encode() if isinstance(part, str) else part
        digest.update(len(part).to_bytes(8, "big") + part)
    return digest.hexdigest()


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _code() -> str:
    """A digest of the code that has a part in every example: reading, rendering, cutting."""
    package = Path(__file__).parent
    modules = [path for path in sorted(package.rglob("*.py")) if path.stem not in _APART_MODULES]
    modules.append(_CONVERTERS / "common.py")
    templates = (path for path in (files("serving") / "templates").iterdir() if path.name.endswith(".jinja"))
    return _digest(*(path.read_bytes() for path in (*modules, *sorted(templates, key=lambda path: path.name))))


def _converter(source: Source) -> str:
    """A digest of the code that converts a source's rows: of all converters, as they use one another."""
    if source.format == "unified":
        return ""
    return _digest(*(path.read_bytes() for path in sorted(_CONVERTERS.glob("*.py"))))


def _content(source: Source) -> Iterator[tuple[str, str]]:
    """What a source is made of: names, and digests of their content, or `absent` for what is not on this machine."""
    if source.tfds is not None:
        yield source.tfds, _tfds_digest(source.tfds, source.split)
        return
    if source.dataset is not None:
        folder = Path(source.dataset).expanduser()
        yield folder.name, _folder_digest(folder) if folder.is_dir() else _hub_commit(source.dataset)
        return
    for at, file in enumerate(source.files):
        name = Path(file).name
        unique = name if [Path(one).name for one in source.files].count(name) == 1 else f"{name} (file {at + 1})"
        yield unique, _file_digest(Path(file)) if Path(file).is_file() else _ABSENT


def _folder_digest(folder: Path) -> str:
    inside = sorted(path for path in folder.rglob("*") if path.is_file() and ".cache" not in path.parts)
    return _digest(*(f"{path.relative_to(folder)} {_file_digest(path)}" for path in inside))


def _hub_commit(name: str) -> str:
    """The commit of a hub dataset that was downloaded last."""
    from huggingface_hub import constants

    ref = Path(constants.HF_HUB_CACHE) / f"datasets--{name.replace('/', '--')}" / "refs" / "main"
    return ref.read_text(encoding="utf-8").strip() if ref.is_file() else _ABSENT


def _tfds_digest(name: str, split: str) -> str:
    import tensorflow_datasets as tfds

    try:
        folder = Path(tfds.builder(name).data_path)
    except (ValueError, OSError):
        return _ABSENT
    inside = sorted(folder.glob(f"*-{split}.*"))
    return _digest(*(f"{path.name} {_file_digest(path)}" for path in inside)) if inside else _ABSENT
