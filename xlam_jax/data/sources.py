"""Streams the trajectories of a source of a config, for all kinds of storage and all formats of rows.

Sources are files (JSON lines, plain or compressed, Parquet, ArrayRecord), datasets of the `datasets` library and of
TFDS. Each row becomes one or several `Item`s: a trajectory, the reason why it is invalid, or the reason why the
source's filters drop it. Only the current rows are in memory.

Parquet and Arrow give every row of a nested column all keys that any row has, with nulls for absent keys: such nulls
are dropped. In tools and arguments, the tools' schemas decide which nulls are dropped (see `xlam_jax.data.nulls`), and
this counts as the repair `null-fields`. A column of JSON texts has no such padding.
"""

import os
import socket
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn
from urllib.parse import urlsplit

from xlam_jax.config import PAIRS, Filters, Source
from xlam_jax.data import nulls
from xlam_jax.data.converters.common import ConvertRow, Dropped, convert_one, stem
from xlam_jax.data.converters.common import Repaired as Repair
from xlam_jax.data.converters.preference import is_other_layout, pair_row
from xlam_jax.data.pair import PAIR_KEYS, Pair, parse_pair
from xlam_jax.data.row_json import parse_json
from xlam_jax.data.rows import BATCH, PACKED, SUFFIXES, arrow_rows, place, read_rows, suffix
from xlam_jax.data.text_calls import unread_calls
from xlam_jax.data.trajectory import InvalidTrajectory, Trajectory
from xlam_jax.errors import UserError, nearest

_OWN = ("unified", PAIRS)  # the formats that need no converter
UNIFIED = ("unique_trajectory_id", "source", "score", "task_instruction", "tools", "conversation")
_PROBE_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Filtered:
    """Stands for a trajectory that the source's filters drop."""

    reason: str


class Item(NamedTuple):
    """The result of reading a row, or one of several. `where` is FILE:LINE, or DATASET:SPLIT[INDEX]."""

    where: str
    trajectory: Trajectory | Pair | InvalidTrajectory | Filtered
    repairs: tuple[Repair, ...] = ()
    """All repairs. They include `step-REASON` for a step that the converter dropped, and `left-call-in-text` for text
    that is meant as a tool call but cannot be read as one."""


class _Row(NamedTuple):
    where: str
    name: Path
    number: int
    row: dict[str, Any] | InvalidTrajectory
    padded: bool = False
    """Whether the row has the null fields of a union schema."""
    line: int = 0
    """The line on which the row begins, 0 where unknown."""


def read(source: Source, dataset: dict[str, Any] | None = None) -> Iterator[Item]:
    """Streams the rows of a source, in order, up to the row that reaches `source.limit`.

    For a dataset on a hub, `dataset` receives its `revision` and the number of `rows` read so far. Filters apply to the
    chosen side of a pair. Raises `UserError` that names the source when it cannot be read or its settings conflict.
    """
    check(source)
    convert_row = _converter(source)
    kept, dataset = 0, {} if dataset is None else dataset
    for row in _rows(source, dataset):
        if dataset:
            dataset["rows"] += 1
        for item in _pairs(row) if source.format == PAIRS else _items(row, convert_row):
            if isinstance(item.trajectory, Trajectory | Pair):
                judged = item.trajectory.chosen if isinstance(item.trajectory, Pair) else item.trajectory
                reason = _filtered(judged, source.filters)
                item = Item(item.where, Filtered(reason)) if reason else item
                kept += not reason
            yield item
            if kept == source.limit:
                return


def check(source: Source) -> None:
    """Raises `UserError` for conflicting settings, an unknown format, and files that do not exist."""
    origins = {key: value for key in ("files", "dataset", "tfds") if (value := getattr(source, key))}
    if len(origins) != 1:
        values = " and ".join(f"{key} ({value!r})" for key, value in origins.items())
        _fail(source, f"{values} are both given; keep one" if origins else "give one of files, dataset and tfds")
    for key, default in (("subset", None), ("streaming", False)):
        if source.dataset is None and getattr(source, key) != default:
            _fail(source, f"{key} is {getattr(source, key)!r}, which only a dataset has; it has {next(iter(origins))}")
    if source.files and source.split != "train":
        _fail(source, f"split is {source.split!r}, and files have no splits; name the files of that split")
    filters = source.filters
    if filters.max_turns is not None and filters.max_turns < filters.min_turns:
        _fail(source, f"filters.max_turns is {filters.max_turns}, less than filters.min_turns, {filters.min_turns}")
    _converter(source)
    for file in source.files:
        if suffix(Path(file)) not in SUFFIXES:
            suffixes = f"{', '.join(SUFFIXES)}, and the first three also with {' or '.join(PACKED)}"
            _fail(source, f"{file}: unknown file name suffix, which identifies the kind of the file; known: {suffixes}")
        if not Path(file).is_file():
            what = "is a folder; name its files" if Path(file).is_dir() else "no such file"
            _fail(source, f"{file}: {what}{_alike(Path(file))}")


def _fail(source: Source, message: str) -> NoReturn:
    raise UserError(f"data.sources: {source.name}: {message}")


def _alike(path: Path) -> str:
    return nearest(path.name, [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else [])


def _converter(source: Source) -> ConvertRow | None:
    """The converter of the source's format; None for unified rows and for pairs."""
    if source.format in _OWN:
        return None
    from xlam_jax.data.converters import row_converter

    try:
        convert_row = row_converter(source.format)
    except UserError as error:
        _fail(source, str(error))
    if convert_row is None:
        _fail(
            source,
            f"format {source.format!r} can't be converted row by row; convert its files first, with "
            f"python -m converters.trajectories --format {source.format} --in … --out …",
        )
    return convert_row


def _items(row: _Row, convert_row: ConvertRow | None) -> Iterator[Item]:
    repairs: list[Repair] = []
    for result in convert_one(row.name, row.number, row.row, convert_row or partial(_named, row), row.padded):
        if not isinstance(result, Dropped):
            yield Item(row.where, result.trajectory, (*repairs, *result.repairs, *_unread(result.trajectory)))
        elif result.unit == "step":
            repairs.append(Repair(f"step-{result.reason}", result.detail))
            continue
        else:
            yield Item(row.where, InvalidTrajectory(result.reason, result.detail))
        repairs = []


def _pairs(row: _Row) -> Iterator[Item]:
    repairs: list[Repair] = []
    try:
        if isinstance(row.row, InvalidTrajectory):
            raise row.row
        name = f"{stem(row.name)}:{row.number}"
        note = lambda reason, detail: repairs.append(Repair(reason, detail))  # noqa: E731
        pair = parse_pair(pair_row(row.row, name, note), name, note, padded=row.padded)
    except InvalidTrajectory as invalid:
        yield Item(row.where, invalid)
    else:
        yield Item(row.where, pair, tuple(dict.fromkeys((*repairs, *_unread(pair.chosen), *_unread(pair.rejected)))))


def _unread(trajectory: Trajectory) -> Iterator[Repair]:
    """Reports text that is meant as a tool call but was not read as one."""
    declared = {tool["function"]["name"]: None for tool in trajectory.tools}  # an ordered set
    for detail in unread_calls(trajectory.conversation, declared):
        yield Repair("left-call-in-text", detail)


def _named(row: _Row, values: dict[str, Any], _: str) -> Iterable[dict[str, Any]]:
    """A unified row, with an id if it has none."""
    has_id = values.get("unique_trajectory_id") is not None
    return (values if has_id else values | {"unique_trajectory_id": f"{stem(row.name)}:{row.number}"},)


def _filtered(trajectory: Trajectory, filters: Filters) -> str | None:
    """The reason why the filters drop a trajectory, None if they keep it."""
    turns = len(trajectory.conversation)
    called = [call.name for message in trajectory.conversation for call in message.tool_calls]
    if trajectory.id in filters.exclude:
        return "excluded"
    if filters.min_score is not None and trajectory.score is None:
        return "no-score"
    if filters.min_score is not None and (trajectory.score or 0.0) < filters.min_score:
        return "low-score"
    if turns < filters.min_turns:
        return "few-turns"
    if filters.max_turns is not None and turns > filters.max_turns:
        return "many-turns"
    if len(called) < filters.min_calls:
        return "few-calls"
    if filters.tools and not set(filters.tools).intersection(called):
        return "other-tools"
    return None


def _rows(source: Source, dataset: dict[str, Any]) -> Iterator[_Row]:
    if source.dataset is not None:
        return _dataset(source, source.dataset, dataset)
    if source.tfds is not None:
        return _tfds(source, source.tfds)
    return (row for file in source.files for row in file_rows(source, Path(file)))


def file_rows(source: Source, path: Path) -> Iterator["_Row"]:
    """Yields the rows of a file of a source. Raises `UserError` for an unreadable file."""
    for read in read_rows(path, lambda names: _columns(source, str(path), names)):
        yield _Row(
            place(path, read.number, read.line), path, read.number, _parsed(source, read.row), read.padded, read.line
        )


def _columns(source: Source, where: str, names: list[str]) -> list[str]:
    """The names of the columns to read. Raises `UserError` when there is no column of conversations."""
    if source.format not in _OWN or (source.format == PAIRS and is_other_layout(names)):
        return names
    if "conversation" not in names:
        _fail(
            source,
            f"{where}: {source.format} rows have a column 'conversation', and this has {', '.join(names)}; set the "
            "source's format to that of the rows, or convert them first, with python -m converters.trajectories",
        )
    return [name for name in names if name in (PAIR_KEYS if source.format == PAIRS else UNIFIED)]


def _parsed(source: Source, row: dict[str, Any] | InvalidTrajectory) -> dict[str, Any] | InvalidTrajectory:
    """Decodes a row whose lists of tools or turns, or their items, are JSON texts; other layouts stay as they are."""
    if isinstance(row, InvalidTrajectory) or source.format not in _OWN or is_other_layout(row):
        return row
    try:
        return _parsed_texts(row)
    except InvalidTrajectory as invalid:
        return invalid


def _parsed_texts(row: dict[str, Any]) -> dict[str, Any]:
    row = dict(row)
    for key in ("tools", "conversation", "chosen", "rejected"):
        try:
            if isinstance(value := row.get(key), str):
                row[key] = parse_json(value)
            elif isinstance(value, list):
                row[key] = [parse_json(item) if isinstance(item, str) else item for item in value]
        except InvalidTrajectory as invalid:
            raise InvalidTrajectory(invalid.reason, f"`{key}`: {invalid.detail}") from None
    return row


def _dataset(source: Source, name: str, of_hub: dict[str, Any]) -> Iterator[_Row]:
    folder = Path(name).expanduser()
    if folder.is_dir():
        saved = any((folder / file).is_file() for file in ("dataset_dict.json", "state.json"))
        if not saved:
            files = _split_files(source, folder)
            if all(suffix(file) in SUFFIXES for file in files):  # keeps JSON as it is; `datasets` makes columns of it
                return (row for file in files for row in file_rows(source, file))
        elif source.subset is not None:
            _fail(source, f"subset is {source.subset!r}, and {folder} is one saved dataset; remove subset")
        open_ = partial(_load_saved, source, folder) if saved else partial(_load, source)
    elif folder.exists() or name.startswith((".", "/", "~")):
        what = "is a file; name it under files" if folder.exists() else f"no such folder{_alike(folder)}"
        _fail(source, f"dataset {name}: {what}")
    else:
        open_ = partial(_load, source, of_hub)
    return _dataset_rows(source, open_)


def _dataset_rows(source: Source, open_: Callable[[], Any]) -> Iterator[_Row]:
    from datasets.exceptions import DatasetGenerationError, DatasetsError

    name = f"{source.dataset}:{source.split}"
    index = 0
    try:
        for table in open_().with_format("arrow").iter(BATCH):
            columns = _columns(source, name, table.column_names)
            for row, padded in arrow_rows(table.select(columns)):
                where = Path(Path(str(source.dataset)).name)
                yield _Row(f"{name}[{index}]", where, index, _parsed(source, row), padded)
                index += 1
    except DatasetGenerationError as error:
        why = _first_line(error.__cause__ or error)
        _fail(
            source,
            f"dataset {source.dataset}: the `datasets` library can't make columns of its rows ({why}); "
            "download its files and name them under files",
        )
    except (OSError, ValueError, DatasetsError) as error:
        _fail(source, f"dataset {source.dataset}: cannot be read ({_first_line(error)})")


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _split_files(source: Source, folder: Path) -> list[Path]:
    """The data files of a folder's split, which `datasets` determines from their names or the folder's README."""
    from datasets import load_dataset_builder
    from datasets.exceptions import DatasetsError

    try:
        builder = load_dataset_builder(str(folder), source.subset)
    except (OSError, ValueError, DatasetsError) as error:
        _fail(source, f"dataset {folder}: subset {source.subset!r} cannot be opened ({_first_line(error)})")
    files = builder.config.data_files or {}
    split = _split(source, [str(name) for name in files])
    return [Path(file) for file in files[split]]


def _split(source: Source, splits: list[str]) -> str:
    if source.split not in splits:
        hint = nearest(source.split, splits)
        _fail(source, f"split is {source.split!r}, and {source.dataset} has {', '.join(splits) or 'none'}{hint}")
    return source.split


def _load_saved(source: Source, folder: Path) -> Any:
    from datasets import DatasetDict, load_from_disk

    dataset = load_from_disk(str(folder))
    if isinstance(dataset, DatasetDict):
        return dataset[_split(source, [str(name) for name in dataset])]
    if dataset.split is not None:
        _split(source, [str(dataset.split)])
    return dataset


def _load(source: Source, of_hub: dict[str, Any] | None = None) -> Any:
    """Loads a folder of files, or a dataset of the hub; from the local cache if the hub does not answer within seconds.

    `of_hub` receives the revision of a hub dataset.
    """
    from datasets import config, load_dataset, load_dataset_builder

    name = str(source.dataset)
    folder = Path(name).expanduser()
    offline = config.HF_HUB_OFFLINE
    config.HF_HUB_OFFLINE = offline or not (folder.is_dir() or _listens(config.HF_ENDPOINT))
    try:
        where = str(folder) if folder.is_dir() else name
        if of_hub is not None:
            of_hub |= {"revision": load_dataset_builder(where, source.subset).hash, "rows": 0}
        return load_dataset(where, source.subset, split=source.split, streaming=source.streaming)
    except ConnectionError as error:
        _fail(
            source,
            f"dataset {name}: the hub can't be reached, and {config.HF_DATASETS_CACHE} does not have it "
            f"({_first_line(error)}); check the network, or download it elsewhere and name its files or its folder",
        )
    finally:
        config.HF_HUB_OFFLINE = offline


def _listens(url: str) -> bool:
    """Whether a server listens at an address; true without a test if requests go through a proxy."""
    address = urlsplit(url)
    if address.scheme in urllib.request.getproxies() or address.hostname is None:
        return True
    try:
        port = address.port or (80 if address.scheme == "http" else 443)
        socket.create_connection((address.hostname, port), timeout=_PROBE_SECONDS).close()
    except OSError:
        return False
    return True


def _tfds(source: Source, name: str) -> Iterator[_Row]:
    import tensorflow_datasets as tfds

    from xlam_jax.data import tfds_dataset  # registers the dataset

    try:
        splits = list(tfds.builder(name).info.splits)
        if source.split not in splits and splits:
            hint = nearest(source.split, splits)
            _fail(source, f"split is {source.split!r}, and {name} has {', '.join(splits)}{hint}")
        rows: Any = tfds.data_source(name, split=source.split, download=False)
    except (ValueError, KeyError, NotImplementedError, AssertionError, OSError) as error:
        folder = Path(os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()
        versions = folder.glob("*/*/[0-9]*.*")
        built = sorted(f"{version.parent.parent.name}/{version.parent.name}" for version in versions)
        _fail(
            source,
            f"tfds {name}: cannot be opened as ArrayRecord ({_first_line(error)}); TFDS_DATA_DIR is {folder}, which "
            f"contains {', '.join(built) or 'nothing'}; trajectories are built there with "
            "python -m xlam_jax.data.tfds_builder",
        )
    for start in range(0, len(rows), BATCH):
        indices = range(start, min(start + BATCH, len(rows)))
        for number, values in zip(indices, rows.__getitems__(indices), strict=True):
            try:
                row = nulls.drop_outside_tools(tfds_dataset.plain(values))
                padded = nulls.has_columns_of_arguments(row)
                row = _parsed(source, row)
            except InvalidTrajectory as invalid:
                row, padded = invalid, False
            yield _Row(f"{name}:{source.split}[{number}]", Path(name.partition("/")[0]), number, row, padded)
