"""Versions of the config schema, and migrations from each version to the next.

To rename or remove a key, or to change what a value means: raise `SCHEMA` by one, add a `Migration` from the number
before it, and add a saved config of that number to tests/saved.
"""

from dataclasses import dataclass, field
from typing import Any

from xlam_jax.errors import UserError

SCHEMA = 2
"""Number of today's schema. Saved configs store it as `schema`."""
KEY = "schema"
_OLD_KEY = "schema_version"


@dataclass(frozen=True)
class Migration:
    """Changes that convert values of one schema into the next. Keys are dotted paths."""

    renamed: dict[str, str] = field(default_factory=dict)
    """Old key → new key. A key outside the config, such as `schema_version`, is removed by the loader."""
    replaced: dict[str, dict[Any, Any]] = field(default_factory=dict)
    """Key → {old value: new value}."""


MIGRATIONS: dict[int, Migration] = {
    # 0: runs saved before schemas had numbers; some of them wrote null for "no moving average"
    0: Migration(replaced={"train.ema": {None: 0.0}}),
    # 1: the number of the schema was called schema_version
    1: Migration(renamed={_OLD_KEY: KEY}),
}
"""Number of a schema → the migration to the next one."""


def migrate(values: dict[str, Any], origin: str, unnumbered: int = SCHEMA) -> dict[str, Any]:
    """Returns the values of a config in today's schema, without their number.

    `unnumbered`: the schema of values that state none. Raises `UserError`, which names `origin`, for a number that this
    version does not know.
    """
    key = KEY if KEY in values else _OLD_KEY
    version = values.get(key, unnumbered)
    if type(version) is not int or version < 0:
        raise UserError(f"{origin}: {key} is {version!r}; a number up to {SCHEMA} is expected")
    if version > SCHEMA:
        raise UserError(
            f"{origin}: {key} is {version}, and this version of xlam_jax reads schemas up to {SCHEMA}; "
            "use the version that wrote it, or a later one"
        )
    for number in range(version, SCHEMA):
        values = apply(MIGRATIONS[number], values)
    return {name: value for name, value in values.items() if name != KEY}


def apply(migration: Migration, values: dict[str, Any]) -> dict[str, Any]:
    """Returns a copy of `values` with the changes of a migration; unchanged values are the same objects."""
    for old, new in migration.renamed.items():
        values, value = _without(values, old.split("."))
        if value is not _ABSENT:
            values = _with(values, new.split("."), value)
    for key, replacements in migration.replaced.items():
        _, value = _without(values, key.split("."))
        if (value is None or isinstance(value, str | int | float)) and value in replacements:
            values = _with(values, key.split("."), replacements[value])
    return values


_ABSENT = object()


def _without(values: dict[str, Any], path: list[str]) -> tuple[dict[str, Any], Any]:
    """Returns a copy without the value at a path, and that value."""
    name, *rest = path
    if not isinstance(values, dict) or name not in values:
        return values, _ABSENT
    if not rest:
        return {key: value for key, value in values.items() if key != name}, values[name]
    inner, value = _without(values[name], rest)
    return values | {name: inner}, value


def _with(values: dict[str, Any], path: list[str], value: Any) -> dict[str, Any]:
    """Returns a copy with a value at a path; missing sections are created."""
    name, *rest = path
    inner = values.get(name)
    return values | {name: _with(inner if isinstance(inner, dict) else {}, rest, value) if rest else value}
