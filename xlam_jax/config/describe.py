"""What a config contains, for people and editors: listings, differences, help, and the JSON Schema."""

import types
import typing
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from xlam_jax.config.base import Section
from xlam_jax.config.load import Resolved, parents, section_at
from xlam_jax.config.schema import Config

WIDEST = 72
"""Maximum width of a field and its value in a listing, in columns, before the origin."""
LENGTH = ("train.steps", "train.epochs", "train.warmup_steps", "train.warmup_ratio")
"""Fields that are not final until the number of steps is known."""


def describe(resolved: Resolved) -> str:
    """Returns the resolved config, one line per field: name, value, and where the value came from."""
    lines = []
    for name, value in flatten(resolved.config):
        origin = next((resolved.origins[key] for key in (name, *parents(name)) if key in resolved.origins), "default")
        lines.append((f"{name}: {value!r}" if isinstance(value, str) else f"{name}: {value}", origin))
    width = min(WIDEST, max(len(left) for left, _ in lines))
    return "\n".join(f"{left:{width}}  # {origin}" for left, origin in lines)


def flatten(section: BaseModel, prefix: str = "") -> list[tuple[str, Any]]:
    """Returns every field of a config as (path, value)."""
    fields = []
    for key, field in type(section).model_fields.items():
        value, name = getattr(section, key), prefix + (field.alias or key)
        if isinstance(value, BaseModel):
            fields += flatten(value, f"{name}.")
        elif isinstance(value, list) and value and isinstance(value[0], BaseModel):
            for at, item in enumerate(value):
                fields += flatten(item, f"{name}.{at}.")
        else:
            fields.append((name, value))
    return fields


def differences(old: Config, new: Config) -> list[str]:
    """Returns the differences between two configs in the fields that affect the result of a run.

    If `new` sets epochs and its number of steps is not known yet, the length of the run is not compared.
    """
    before, after = dict(flatten(old)), dict(flatten(new))
    compared = (before.keys() | after.keys()) - {"output_dir"} - (set() if new.train.steps else set(LENGTH))
    return [
        f"{name}: {before.get(name)!r} in the run, {after.get(name)!r} now"
        for name in compared
        if before.get(name) != after.get(name) and not _is_changeable(name)
    ]


def _is_changeable(name: str) -> bool:
    *sections, key = name.split(".")
    section = section_at(tuple(part for part in sections if not part.isdigit()))
    field = (
        next((field for at, field in section.model_fields.items() if (field.alias or at) == key), None)
        if (section)
        else None
    )
    return bool(field and _mark(field, "changeable"))


def _mark(field: FieldInfo, name: str) -> Any:
    extra = field.json_schema_extra
    return extra.get(name) if isinstance(extra, dict) else None


def field_help() -> str:
    """Returns every field with its type, default and meaning, for `--help`."""
    return "\n".join(_help(Config, ""))


def _help(section: type[BaseModel], prefix: str) -> Iterator[str]:
    for key, field in section.model_fields.items():
        name = prefix + (field.alias or key)
        inner = _section_of(field.annotation)
        if inner is not None:
            repeated = typing.get_origin(field.annotation) is list
            yield from _help(inner, f"{name}.{'N.' if repeated else ''}")
            continue
        yield f"  {name} ({_type_name(field.annotation)}, {_default(field)})"
        yield f"      {field.description}"


def _default(field: FieldInfo) -> str:
    if computed := _mark(field, "derived"):
        return f"default: {computed}"
    return "required" if field.is_required() else f"default {field.default!r}"


def _section_of(annotation: Any) -> type[Section] | None:
    candidates = (annotation, *typing.get_args(annotation))
    return next((kind for kind in candidates if isinstance(kind, type) and issubclass(kind, Section)), None)


def _type_name(annotation: Any) -> str:
    if typing.get_origin(annotation) is Literal:
        return " | ".join(map(str, typing.get_args(annotation)))
    if typing.get_origin(annotation) is Annotated:
        return _type_name(typing.get_args(annotation)[0])
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        return " | ".join(map(_type_name, typing.get_args(annotation)))
    return "none" if annotation is type(None) else getattr(annotation, "__name__", str(annotation))


def json_schema() -> dict[str, Any]:
    """Returns the JSON Schema (2020-12) of a config file.

    A file that extends another one may omit any field; other files need all fields that have neither a fixed nor a
    computed default. Checks that compare fields are not part of the schema.
    """
    schema = Config.model_json_schema(by_alias=True)
    definitions = schema["$defs"]
    needed: dict[str, Any] = {"required": _required(schema), "properties": {}}
    for name, field in schema["properties"].items():
        definition = definitions.get(str(field.get("$ref", "")).rpartition("/")[2], {})
        if required := _required(definition):
            needed["properties"][name] = {"required": required}
    for definition in (schema, *definitions.values()):
        definition.pop("required", None)
        for field in definition.get("properties", {}).values():
            _replace_marks(field)
    tokens = definitions["Data"]["properties"]["added_tokens"]
    tokens["items"] = {"anyOf": [{"type": "string"}, tokens["items"]]}  # a text alone, as `AddedToken` reads it
    extends = {"type": "string", "description": "A config, relative to this file, whose values this one overrides."}
    schema["properties"] = {"extends": extends} | schema["properties"]
    dialect = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "Config of xlam_jax"}
    return schema | dialect | {"if": {"required": ["extends"]}, "else": needed}


def _required(definition: dict[str, Any]) -> list[str]:
    fields = definition.get("properties", {})
    return [name for name in definition.get("required", []) if "derived" not in fields[name]]


def _replace_marks(field: dict[str, Any]) -> None:
    """Removes this project's marks from a field; a computed default is appended to the description."""
    field.pop("changeable", None)
    if computed := field.pop("derived", None):
        field.pop("default", None)
        field["description"] = f"{field.get('description', '')} Default: {computed}."
        if field.pop("nullable"):
            field["type"] = [field["type"], "null"]
