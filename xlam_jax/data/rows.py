"""Rows of a file of any kind: lines or a JSON document, plain or packed, Parquet, ArrayRecord."""

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
"""Rows of a Parquet file or dataset that are held at once."""


class Row(NamedTuple):
    """A row of a file, or why it is none; `number` counts from 1, and is its line in a file of lines.

    `line` is the line on which it begins, 0 in files without lines. `padded`: it has the null fields of a union schema.
    """

    number: int
    line: int
    row: dict[str, Any] | InvalidTrajectory
    padded: bool = False


def suffix(path: Path) -> str:
    """The ending that says what a file holds; .gz and .zst after .jsonl, .ndjson and .json are left out."""
    inner = Path(path.stem).suffix
    return inner if path.suffix in PACKED and inner in (*LINES, ".json") else path.suffix


def read_rows(path: Path, columns: Callable[[list[str]], Sequence[str]] = list) -> Iterator[Row]:
    """Streams the rows of a file; of an Arrow table the `columns` of those there are.

    A file of lines may hold a JSON list, and a .json file lines: what a file begins with decides. Rows that are no JSON
    objects come as `InvalidTrajectory`. Raises `UserError` on an unreadable file.
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
    """Where a row is, for a message: FILE:LINE; with the item's number where that is another one."""
    return f"{path}:{number}" if line in (0, number) else f"{path}:{line} (item {number})"


def _has_lines(path: Path, named_so: bool) -> bool:
    """Whether a row is a line: not where a list of objects begins; in a .json file where an object ends with its line,
    and another follows."""
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
    found: list[bytes] = []
    while len(found) < 2 and (line := file.readline(_LONGEST_FIRST)):
        if not line.isspace():
            found.append(line)
    return found


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
    """Rows of JSON text."""
    with open_array_record(path) as reader:
        for number in range(reader.num_records()):
            yield Row(number + 1, 0, _object(reader.read([number])[0]))


@contextmanager
def open_array_record(path: Path) -> Iterator[Any]:
    """Gives the file's reader. Raises `UserError` when it can't be read; by itself a reader says it has no records."""
    from array_record.python.array_record_module import ArrayRecordReader

    reader = ArrayRecordReader(str(path))
    try:
        yield reader
        reader.close()  # tells what is wrong with the file, if anything
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
    """The rows of a table without nulls, but for those that the reader judges, and `padded` of each; see `Row`."""
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
