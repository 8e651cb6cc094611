"""Converters between trajectory formats and the unified trajectory, one module per format.

Each module has `convert(paths)`. Those that convert row by row also have `convert_row(row, name)`, and those in
`EXPORTERS` have `export_row(trajectory)`, which yields the trajectory's rows in that format. `common` has the types.
"""

from collections.abc import Iterator
from functools import partial
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any

from xlam_jax.data.converters.common import Convert, Converted, ConvertRow, Dropped, ExportRow
from xlam_jax.data.trajectory import InvalidTrajectory
from xlam_jax.errors import UserError, nearest

FORMATS = (
    "webshop",
    "hotpotqa",
    "alfworld",
    "intercode",
    "tau_bench",
    "toolalpaca",
    "api_bank",
    "toolbench",
    "seal_tools",
    "hammer",
    "apibench",
    "unified",
    "agentohana",
    "train_ready",
    "xlam60k",
    "openai",
    "sharegpt",
    "alpaca",
)
GUESSED = 20
"""Number of rows that are read to guess a format."""
EXPORTERS = ("openai", "sharegpt", "xlam60k", "train_ready")


def _convert(name: str, paths: list[Path]) -> Iterator[Converted | Dropped]:
    return _module(name).convert(paths)


CONVERTERS: dict[str, Convert] = {name: partial(_convert, name) for name in FORMATS}
"""Format → its `convert`; the first call imports the module."""


def converter(name: str) -> Convert:
    """Returns the `convert` of a format. Raises `UserError` for an unknown name."""
    _check_name(name, FORMATS, "format")
    return CONVERTERS[name]


def row_converter(name: str) -> ConvertRow | None:
    """Returns the `convert_row` of a format, None if rows depend on others. Raises `UserError` for an unknown name."""
    _check_name(name, FORMATS, "format")
    return getattr(_module(name), "convert_row", None)


def exporter(name: str) -> ExportRow:
    """Returns the `export_row` of a format. Raises `UserError` for a name that is not in `EXPORTERS`."""
    _check_name(name, EXPORTERS, "format to write")
    return _module(name).export_row


def guess(paths: list[Path], besides: str) -> str:
    """Returns a hint at the format, other than `besides`, that reads most of the first `GUESSED` rows.

    The hint is empty if no format reads half of the rows.
    """
    best, most = "", 0
    for name in FORMATS:
        if name == besides:
            continue
        try:
            items = list(islice(converter(name)(paths), GUESSED))
        except (UserError, InvalidTrajectory):
            continue
        read = sum(isinstance(item, Converted) for item in items)
        if read > most and 2 * read >= len(items):
            best, most = name, read
    return f"; --format {best} reads them" if best else ""


def _check_name(name: str, names: tuple[str, ...], what: str) -> None:
    """Raises `UserError` for a name that is not in `names`."""
    if name not in names:
        raise UserError(f"{what} '{name}' is not known; known are {', '.join(names)}{nearest(name, names)}")


def _module(name: str) -> Any:
    return import_module(f"xlam_jax.data.converters.{name}")
