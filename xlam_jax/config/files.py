"""YAML files of a config and overrides on a command line, merged into plain values with the origin of each."""

import re
from pathlib import Path
from typing import Any

import yaml

from xlam_jax import documents
from xlam_jax.config.migrations import migrate
from xlam_jax.errors import UserError, nearest

COMMAND_LINE = "command line"
DEFAULT = "default"


class Yaml(yaml.SafeLoader):
    """YAML in which 1e-4 is a number (YAML 1.1 reads a string) and 2026-01-31 is a string (YAML 1.1 reads a date)."""


class Dumper(yaml.SafeDumper):
    """Quotes strings that `Yaml` would read as numbers."""


for _class in (Yaml, Dumper):
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
    )
Yaml.yaml_implicit_resolvers = {
    first: [pair for pair in pairs if pair[0] != "tag:yaml.org,2002:timestamp"]
    for first, pairs in Yaml.yaml_implicit_resolvers.items()
}


class Draft:
    """The values of a config before they are validated, in today's schema, and the origin of each.

    `origins` maps the path of a field to the file or override that set it, or to the reason of a computed default.
    `missing` maps the path of a field without a value to advice on how to set it.
    """

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self.origins: dict[str, str] = {}
        self.missing: dict[str, str] = {}

    def merge(self, values: dict[str, Any], origin: str) -> None:
        """Merges the values of a file over the present ones; lists are replaced as a whole."""
        self._merge(self.values, values, origin, "")

    def _merge(self, into: dict[str, Any], values: dict[str, Any], origin: str, prefix: str) -> None:
        for key, value in values.items():
            name = f"{prefix}{key}"
            if isinstance(value, dict) and isinstance(into.get(key, {}), dict):
                self._merge(into.setdefault(key, {}), value, origin, f"{name}.")
            else:
                into[key] = value
                self._set_origin(name, origin)

    def get(self, name: str, default: Any = None) -> Any:
        """Returns the value of a field, or `default` if it, or a section that contains it, is absent or null."""
        node: Any = self.values
        for key in name.split("."):
            node = node.get(key) if isinstance(node, dict) else None
        return default if node is None else node

    def set_default(self, name: str, value: Any, reason: str = "") -> None:
        """Sets a field that has no value, unless its section is not a mapping (validation reports that)."""
        *sections, key = name.split(".")
        node: Any = self.values
        for section in sections:
            node = node.setdefault(section, {}) if isinstance(node, dict) else None
        if not isinstance(node, dict) or key in node:
            return
        node[key] = value
        self._set_origin(name, f"{DEFAULT}: {reason}" if reason else DEFAULT)

    def remove_null(self, name: str) -> None:
        """Removes a field that is null, so that its default applies."""
        *sections, key = name.split(".")
        node: Any = self.values
        for section in sections:
            node = node.get(section) if isinstance(node, dict) else None
        if isinstance(node, dict) and key in node and node[key] is None:
            del node[key]
            self.origins.pop(name, None)

    def override(self, text: str) -> None:
        """Applies an override, `section.key=value` or `section.list.0.key=value`. Raises `UserError`."""
        name, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"override {text!r}: expected section.key=value, such as train.steps=100")
        keys = name.split(".")
        node: Any = self.values
        for depth, key in enumerate(keys[:-1]):
            path = ".".join(keys[: depth + 1])
            at: Any = _index(node, key, keys[:depth], text)
            child = node.setdefault(at, {}) if isinstance(node, dict) else node[at]
            if not isinstance(child, dict | list):
                raise UserError(f"override {text!r}: {path} is a value, not a section")
            child = child.copy()  # YAML aliases may share it
            node[at] = child
            node = child
        node[_index(node, keys[-1], keys[:-1], text)] = documents.parse_yaml(value, f"override {text!r}", Yaml)
        self._set_origin(name, COMMAND_LINE)

    def _set_origin(self, name: str, origin: str) -> None:
        for inner in [key for key in self.origins if key.startswith(f"{name}.")]:
            del self.origins[inner]
        self.origins[name] = origin


def _index(node: Any, key: str, path: list[str], text: str) -> Any:
    """Returns the key of a section unchanged, or the index of a list element as a number. Raises `UserError`."""
    if isinstance(node, dict):
        return key
    if key.isascii() and key.isdigit() and int(key) < len(node):
        return int(key)
    items = f"it has {len(node)}, numbered from 0" if node else "it is empty"
    raise UserError(f"override {text!r}: {'.'.join(path)} is a list, and {key!r} is not one of its elements ({items})")


def read_draft(path: Path, overrides: list[str]) -> Draft:
    """Reads a config file and those that it extends, each migrated to today's schema, and applies overrides.

    Raises `UserError` that names the file or the override.
    """
    draft = Draft()
    _read(draft, path, ())
    for override in overrides:
        draft.override(override)
    return draft


def _read(draft: Draft, path: Path, extending: tuple[Path, ...]) -> None:
    if path.resolve() in extending:
        raise UserError(f"{path}: extends itself, by way of {' → '.join(map(str, extending))}")
    hint = "" if path.exists() else _similar_names(path)
    values = documents.read_yaml(path, f"a YAML config is expected{hint}", Yaml)
    if not isinstance(values, dict):
        raise UserError(f"{path}: contains {type(values).__name__}; a mapping of sections is expected")
    base = values.pop("extends", None)
    if base is not None:
        if not isinstance(base, str):
            raise UserError(
                f"{path}: extends is {base!r}; the path of a YAML config, relative to this file, is expected"
            )
        _read(draft, path.parent / base, (*extending, path.resolve()))
    draft.merge(migrate(values, str(path)), str(path))


def _similar_names(path: Path) -> str:
    siblings = [entry.name for entry in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
    return nearest(path.name, siblings)
