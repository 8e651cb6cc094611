"""Prepared caches: rendered trajectories on disk, and the key that names what they were made from.

A cache is a folder: `meta.json`, and for each source the examples to train on and the held-out ones as ArrayRecord,
with the lengths of each (.npy), the trajectories' ids, and those held-out trajectories that stay readable. A record is
the n + 1 ids of an example, int32, the n weights of its labels, float32, and their kinds, int8. The record of a pair is
the length of the chosen side's record, uint32, and both sides' records. Opening reads no example; each is read by its
index when it is drawn.

`meta.json` also has the digests of each source's examples (`identity`), so that a run may change between a cache and
the sources that it was made from.

The key keeps its parts, so that a stale cache is refused with the names of those that changed: the content of every
source file, how the source is read, tokenizer, template, format and loss, the held-out share, `RENDER_VERSION`, and the
row length where a trajectory was too long for it. Settings that only affect mixing or packing (weights, epochs,
streams) are not a part of it, and a config may omit sources of a cache. A source that is not on this machine cannot
be compared: its content in the cache is then trusted, and a line of output says which source that is.
"""

import json
import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import numpy as np

from xlam_jax.config import PAIRS, Data, Source
from xlam_jax.data import identity
from xlam_jax.data.examples import Example, LazyExamples, Loaded, join_sides, lengths, summary, trained
from xlam_jax.data.parse import read_jsonl
from xlam_jax.data.render import RENDER_VERSION
from xlam_jax.data.render_sources import Progress, ignore_progress
from xlam_jax.data.rows import open_array_record
from xlam_jax.data.tokenizer import text_to_ids_digest
from xlam_jax.data.trajectory import Trajectory, to_dict
from xlam_jax.digest import file_digest, parts_digest
from xlam_jax.errors import UserError

LAYOUT = 4
"""Of the folder. A cache with another layout is refused."""
META = "meta.json"
PARTS = ("train", "heldout")
_OPTIONS = "group_size:1,zstd:1"  # one record per chunk, for random access
_APART_FIELDS = {"name", "files", "dataset", "tfds", "streaming", "weight", "epochs", "size"}
"""Fields of a source that change no example, or that the names and digests of its content cover."""
_ABSENT = "absent"
_COMMAND = "python -m xlam_jax.data prepare --config CONFIG.yaml --out"


def write(folder: Path, key: dict[str, Any], loaded: Sequence[Loaded]) -> None:
    """Writes rendered sources as a cache into a folder, which is created. `key` is what `make_key` returned."""
    from array_record.python.array_record_module import ArrayRecordWriter

    folder.mkdir()
    for at, source in enumerate(loaded):
        for name, examples in zip(PARTS, (source.train, source.heldout), strict=True):
            writer = ArrayRecordWriter(str(folder / f"{at}.{name}.array_record"), _OPTIONS)
            for example in examples:
                writer.write(_record(example))
            writer.close()
            counts = np.stack([lengths(examples), trained(examples)]).astype(np.int64)
            np.save(folder / f"{at}.{name}.npy", counts)
        (folder / f"{at}.ids.json").write_text(json.dumps(list(source.ids)), encoding="utf-8")
        samples = (json.dumps(to_dict(sample), ensure_ascii=False) + "\n" for sample in source.samples)
        (folder / f"{at}.samples.jsonl").write_text("".join(samples), encoding="utf-8")
    meta = {"key": key, "sources": {source.source.name: _about(at, source) for at, source in enumerate(loaded)}}
    (folder / META).write_text(json.dumps(meta, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def open(folder: str | Path, data: Data, tokenizer: Any, progress: Progress = ignore_progress) -> list[Loaded]:
    """Opens a cache in place of the sources. Raises `UserError` as `verify` does."""
    meta = verify(folder, data, tokenizer, progress)
    loaded = []
    for source in data.sources:
        about = meta["sources"][source.name]
        stem, pairs = Path(folder) / str(about["at"]), source.format == PAIRS
        train, heldout = (CachedExamples(Path(f"{stem}.{name}"), pairs) for name in PARTS)
        opened = Loaded(
            source=source,
            train=train,
            heldout=heldout,
            ids=_Ids(Path(f"{stem}.ids.json")),
            samples=[row for _, row in read_jsonl(f"{stem}.samples.jsonl") if isinstance(row, Trajectory)],
            trajectories=None,
            dropped=Counter(about["dropped"]),
            repaired=Counter(about["repaired"]),
            changed=Counter(about["changed"]),
            digests=about["digests"],
            dataset=about["dataset"],
        )
        progress(summary(opened))
        loaded.append(opened)
    return loaded


def verify(folder: str | Path, data: Data, tokenizer: Any, progress: Progress = ignore_progress) -> dict[str, Any]:
    """Compares a cache with the config, the current sources and the renderer, and returns its `meta.json`.

    Raises `UserError` where there is no cache, for a cache of an older version, and naming every part that changed.
    """
    folder = Path(folder)
    meta = _read_meta(folder)
    rebuild = _rebuild(folder)
    before, about = meta["key"], meta["sources"]
    now = make_key(data, tokenizer)
    if all(_fits(about.get(source.name), data) for source in data.sources):
        for key in (before, now):  # no trajectory was too long, and none is now
            key["settings"] = {
                name: value
                for name, value in key["settings"].items()
                if name not in ("data.sequence_length", "data.on_long")
            }
    changed = list(_changes(before, now))
    if changed:
        raise UserError(f"data.cache: {folder} is stale:\n  " + "\n  ".join(changed) + f"\n{rebuild}")
    absent = [name for name, source in now["sources"].items() if _ABSENT in source["content"].values()]
    if absent:
        progress(f"{folder}: content not compared, as not on this machine: {', '.join(absent)}")
    return meta


def _read_meta(folder: Path) -> dict[str, Any]:
    """The `meta.json` of a cache that this version reads. Raises `UserError`."""
    rebuild = _rebuild(folder)
    try:
        meta = json.loads((folder / META).read_text(encoding="utf-8"))
        layout, version, _ = meta["key"]["layout"], meta["key"].get("render_version"), meta["sources"]
    except FileNotFoundError:
        raise UserError(
            f"data.cache: {folder} is not a cache, it has no {META}; make one: {_COMMAND} {folder}"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"data.cache: {folder / META} cannot be read ({error!r}); {rebuild}") from None
    if layout != LAYOUT:
        raise UserError(
            f"data.cache: {folder} was written by another version of xlam_jax (it has layout {layout}, this version "
            f"reads {LAYOUT}); {rebuild}"
        )
    if version != RENDER_VERSION:
        raise UserError(
            f"data.cache: {folder} was written by another version of xlam_jax (it has render version {version}, this "
            f"version is {RENDER_VERSION}); {rebuild}"
        )
    return meta


def _rebuild(folder: Path) -> str:
    return f"build it again in another folder: {_COMMAND} {folder}.new"


class _Ids(Sequence[str]):
    """The ids of a source's trajectories, read from disk when the first is indexed."""

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


class CachedExamples(LazyExamples):
    """The examples of one file of a cache, each read from disk when it is indexed."""

    def __init__(self, stem: Path, pairs: bool = False):
        self._stem, self._pairs = stem, pairs
        self._lengths, self._trained = np.load(f"{stem}.npy", mmap_mode="r")
        with open_array_record(self._path) as reader:
            records = reader.num_records() if reader.ok() else len(self)
        if records != len(self):
            raise UserError(
                f"{self._path}: has {records} examples, and {stem}.npy lists {len(self)}; build the cache again"
            )

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

    def example(self, index: int) -> Example:
        record = memoryview(self._reader.read([index])[0])
        if not self._pairs:
            return _read_record(record)
        end = 4 + int.from_bytes(record[:4], "little")
        return join_sides(_read_record(record[4:end]), _read_record(record[end:]))

    @property
    def lengths(self) -> np.ndarray:
        """Positions of each example, int64 [len]."""
        return self._lengths

    @property
    def trained(self) -> np.ndarray:
        """Trained tokens of each example, int64 [len]."""
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


def _read_record(record: memoryview) -> Example:
    count = (len(record) - 4) // 9
    ids = np.frombuffer(record, np.int32, count + 1)
    weights = np.frombuffer(record, np.float32, count, offset=4 * (count + 1))
    kinds = np.frombuffer(record, np.int8, count, offset=4 * (2 * count + 1))
    return Example(tokens=ids[:-1], labels=ids[1:], weights=weights, kinds=kinds)


def _about(at: int, loaded: Loaded) -> dict[str, Any]:
    longest = max((int(lengths(part).max()) for part in (loaded.train, loaded.heldout) if len(part)), default=0)
    return {
        "at": at,
        "dropped": loaded.dropped,
        "repaired": loaded.repaired,
        "changed": loaded.changed,
        "longest": longest,
        "digests": identity.source_digests(loaded),
        "dataset": loaded.dataset,
        "all_fit": not loaded.changed.keys() & {"cut", "split"} and not loaded.dropped["too-long"],
    }


def _fits(about: dict[str, Any] | None, data: Data) -> bool:
    """Whether the cache has every trajectory of a source whole, and they fit into rows of the config's length."""
    return about is not None and about["all_fit"] and about["longest"] <= data.sequence_length


_SETTINGS = {"format", "reasoning", "loss", "heldout", "on_invalid", "on_long", "sequence_length", "unreadable_calls"}
"""Fields of the section `data` that a cache depends on."""


def make_key(data: Data, tokenizer: Any) -> dict[str, Any]:
    """Returns everything that a cache of this config depends on."""
    settings = data.model_dump(include=_SETTINGS)
    return {
        "layout": LAYOUT,
        "render_version": RENDER_VERSION,
        "settings": dict(_flat(settings, "data.")),
        "tokenizer": {"name": data.tokenizer, "content": text_to_ids_digest(tokenizer)},
        "template": parts_digest([json.dumps(tokenizer.chat_template)]) if data.format == "native" else "",
        "sources": {
            source.name: {
                "settings": dict(_flat(source.model_dump(exclude=_APART_FIELDS), f"data.sources.{source.name}.")),
                "content": dict(_content(source)),
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
    """Describes each difference. A source that only the cache has is not a difference."""
    yield from _changed_settings(was["settings"], now["settings"])
    if was["tokenizer"]["content"] != now["tokenizer"]["content"]:
        names = f"{was['tokenizer']['name']} in the cache, {now['tokenizer']['name']} now"
        yield f"data.tokenizer: another vocabulary, merges or special tokens ({names})"
    if was["template"] != now["template"]:
        yield "data.tokenizer or data.chat_template: another template, which data.format native writes"
    for name, source in now["sources"].items():
        if name not in was["sources"]:
            yield f"data.sources.{name}: not in the cache, which has {', '.join(was['sources'])}"
            continue
        before = was["sources"][name]
        yield from _changed_settings(before["settings"], source["settings"])
        if list(before["content"]) != list(source["content"]):
            cached, current = (", ".join(entry["content"]) for entry in (before, source))
            yield f"data.sources.{name}: made of {cached}; now it is {current}"
            continue
        for part, digest in source["content"].items():
            if _ABSENT not in (digest, before["content"][part]) and digest != before["content"][part]:
                yield f"data.sources.{name}: the content of {part} changed"


def _changed_settings(was: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    for name in sorted(was.keys() | now.keys()):
        if was.get(name) != now.get(name):
            values = (textwrap.shorten(repr(entry.get(name)), 80) for entry in (was, now))
            yield f"{name}: {' in the cache, '.join(values)} now"


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
        unique = name if [Path(file).name for file in source.files].count(name) == 1 else f"{name} (file {at + 1})"
        yield unique, file_digest(Path(file)) if Path(file).is_file() else _ABSENT


def _folder_digest(folder: Path) -> str:
    inside = sorted(path for path in folder.rglob("*") if path.is_file() and ".cache" not in path.parts)
    return parts_digest(f"{path.relative_to(folder)} {file_digest(path)}" for path in inside)


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
    return parts_digest(f"{path.name} {file_digest(path)}" for path in inside) if inside else _ABSENT
