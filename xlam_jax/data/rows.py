"""Reads the rows of a file of any kind: JSON lines or a JSON document, plain or compressed, Parquet, ArrayRecord."""

import io
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from xlam_jax.data import nulls
from xlam_jax.data.files import open_bytes, read_items, read_lines
from xlam_jax.data.row_json import parse_json
from xlam_jax.data.trajectory import InvalidTrajectory
from xlam_jax.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

PACKED = (".gz", ".zst")
LINES = (".jsonl", ".ndjson")
SUFFIXES = (*LINES, ".json", ".parquet", ".array_record")
BATCH = 64
"""Number of rows of a Parquet file or dataset that are in memory at once."""


class Row(NamedTuple):
    """A row of a file, or the reason why it cannot be read.

    `number` counts from 1; in a file of lines it is the line number. `line` is the line on which the row begins, 0 in
    files without lines. `padded` says whether the row has the null fields of a union schema.
    """

    number: int
    line: int
    row: dict[str, Any] | InvalidTrajectory
    padded: bool = False


def suffix(path: Path) -> str:
    """Returns the suffix that identifies a file's kind, without .gz or .zst after .jsonl, .ndjson and .json."""
    inner = Path(path.stem).suffix
    return inner if path.suffix in PACKED and inner in (*LINES, ".json") else path.suffix


def read_rows(path: Path, columns: Callable[[list[str]], Sequence[str]] = list) -> Iterator[Row]:
    """Streams the rows of a file; `columns` selects from the names of the columns of a Parquet file.

    A file of lines may contain a JSON list, and a .json file lines: the beginning of the file decides. Rows that are
    not JSON objects are yielded as `InvalidTrajectory`. Raises `UserError` for an unreadable file.
    """
    kind = suffix(path)
    if kind == ".parquet":
        yield from _parquet(path, columns)
    elif kind == ".array_record":
        yield from _array_record(path)
    elif _has_lines(path, kind in LINES):
        for number, text in read_lines(path):
            yield Row(number, number, _object(text))
    else:
        for number, line, text in read_items(path):
            yield Row(number, line, _object(text))


def place(path: Path, number: int, line: int = 0) -> str:
    """Returns where a row is, for messages: FILE:LINE, with the item's number where it differs from the line's."""
    return f"{path}:{number}" if line in (0, number) else f"{path}:{line} (item {number})"


def _has_lines(path: Path, named_so: bool) -> bool:
    """Whether each line of a file is a row.

    A file named so has no lines if it begins with a list of objects. Another file has lines if its first line is an
    object and further lines follow.
    """
    with open_bytes(path) as file:
        begin = cast(io.BufferedReader, file).peek(1)[:_PEEKED].removeprefix(b"\xef\xbb\xbf").lstrip()
        if named_so:
            return not (begin.startswith(b"[") and begin[1:].lstrip().startswith(b"{"))
        if not begin.startswith(b"{"):
            return False
        first, second = ([*_lines(file), b"", b""])[:2]
    try:
        return bool(second) and isinstance(json.loads(first), dict)
    except (ValueError, RecursionError):
        return False


def _lines(file: Any) -> list[bytes]:
    """The first two lines that are not blank."""
    lines: list[bytes] = []
    while len(lines) < 2 and (line := file.readline(_LONGEST_FIRST)):
        if not line.isspace():
            lines.append(line)
    return lines


_PEEKED = 1 << 16
_LONGEST_FIRST = 4 << 20


def _object(text: bytes) -> dict[str, Any] | InvalidTrajectory:
    try:
        row = parse_json(text)
    except InvalidTrajectory as invalid:
        return invalid
    if not isinstance(row, dict):
        return InvalidTrajectory("not-an-object", f"a row is a JSON object, got a {type(row).__name__}")
    return row


def _array_record(path: Path) -> Iterator[Row]:
    """Yields the records, which are JSON texts."""
    with open_array_record(path) as reader:
        for number in range(reader.num_records()):
            yield Row(number + 1, 0, _object(reader.read([number])[0]))


@contextmanager
def open_array_record(path: Path) -> Iterator[Any]:
    """Opens an ArrayRecord file. Raises `UserError` for an unreadable file, which the reader itself takes for empty."""
    from array_record.python.array_record_module import ArrayRecordReader

    reader = ArrayRecordReader(str(path))
    try:
        yield reader
        reader.close()  # raises the errors of reading
    except RuntimeError as error:
        raise UserError(f"{path}: cannot be read as ArrayRecord ({error}); make it or get it again") from None


def _parquet(path: Path, columns: Callable[[list[str]], Sequence[str]]) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(BATCH, columns=list(columns(file.schema_arrow.names))):
                for row, padded in arrow_rows(batch):
                    number += 1
                    yield Row(number, 0, row, padded)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path}: cannot be read as Parquet ({error}); make it or get it again") from None


def arrow_rows(table: "pa.RecordBatch | pa.Table") -> Iterator[tuple[Any, bool]]:
    """Yields (row, `padded`) of an Arrow table; see `Row`. Nulls are dropped, except those that the parser judges."""
    kinds = {name: table.schema.field(name).type for name in table.schema.names}
    for values in table.to_pylist(maps_as_pydicts="strict"):
        try:
            row = nulls.drop_outside_tools({name: _value(value, kinds[name], name) for name, value in values.items()})
            yield row, nulls.has_columns_of_arguments(row)
        except InvalidTrajectory as invalid:
            yield invalid, False


def _value(value: Any, kind: "pa.DataType", path: str) -> Any:
    """An Arrow value as JSON."""
    import pyarrow.types as pat

    if value is None or isinstance(value, bool | int):
        return value
    if getattr(kind, "extension_name", "") == "arrow.json":
        return parse_json(value)
    if isinstance(value, str):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise InvalidTrajectory("malformed-json", f"{path} is {value}, which JSON does not have")
        return value
    if pat.is_struct(kind):
        fields = [kind.field(at) for at in range(kind.num_fields)]  # pyright: ignore[reportAttributeAccessIssue]
        return {field.name: _value(value[field.name], field.type, f"{path}.{field.name}") for field in fields}
    if isinstance(value, dict):
        return {str(key): _value(item, kind.item_type, path) for key, item in value.items()}  # pyright: ignore
    if isinstance(value, list):
        return [_value(item, kind.value_type, path) for item in value]  # pyright: ignore
    if isinstance(value, bytes):
        return _text(value, path)
    return str(value)  # a date or the like


def _text(value: bytes, path: str) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError:
        raise InvalidTrajectory("bad-value", f"{path} is bytes, not text") from None
