"""Checks a tool's JSON Schema (json-schema.org, draft 2020-12 unless `$schema` names another), and arguments under it.

Unlike plain JSON Schema, an argument that the schema does not declare is wrong unless the schema allows others
(`additionalProperties`, `patternProperties`): the tool would not accept it.
"""

import copy
import json
import re
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Any, NamedTuple

from jsonschema import Draft202012Validator, ValidationError
from jsonschema.exceptions import UnknownType
from jsonschema.validators import extend, validator_for
from referencing.exceptions import Unresolvable
from referencing.jsonschema import DRAFT202012, EMPTY_REGISTRY

from xlam_jax.errors import nearest

TYPES = ("array", "boolean", "integer", "null", "number", "object", "string")
SPELLINGS = {
    "dict": "object",
    "map": "object",
    "hashmap": "object",
    "list": "array",
    "tuple": "array",
    "set": "array",
    "arraylist": "array",
    "str": "string",
    "text": "string",
    "char": "string",
    "int": "integer",
    "long": "integer",
    "float": "number",
    "double": "number",
    "bool": "boolean",
    "none": "null",
}
"""Other spellings of types → types of JSON Schema."""
_HOLDERS = ("properties", "patternProperties", "additionalProperties", "items", "$defs", "definitions", "not")
_IN_PLACE = ("allOf", "anyOf", "oneOf")  # subschemas of the same value
_BROKEN = (RecursionError, ArithmeticError, re.error, UnknownType, Unresolvable)
"""Errors that a schema can cause in its validator: endless or broken references, overflow, an invalid pattern."""


class Problem(NamedTuple):
    """A problem of a call's arguments: a short code to count by, and a sentence."""

    reason: str
    detail: str


@lru_cache(maxsize=2048)
def compiled(parameters: str) -> "Parameters":
    """Returns a tool's parameters from the JSON text of their schema; "null" for a tool without parameters."""
    return Parameters(json.loads(parameters))


class Parameters:
    """A tool's parameters. `problems` lists what is wrong with the schema; its valid rest is used for checks."""

    def __init__(self, schema: Any):
        self.problems: list[str] = []
        if schema is None:
            schema = {"type": "object", "properties": {}}
        elif not isinstance(schema, dict):
            self.problems.append(f"parameters is {_shown(schema)}, a JSON Schema is an object")
            schema = {"additionalProperties": True}
        elif _is_flat(schema):
            self.problems.append(
                f"parameters lists the arguments ({', '.join(list(schema)[:5])}) itself; in JSON Schema they are "
                'under "properties" of {"type": "object"}'
            )
            schema = {"type": "object", "properties": schema}
        dialect = schema.get("$schema")
        kind = validator_for(schema, default=Draft202012Validator) if isinstance(dialect, str) else Draft202012Validator
        self._schema = self._repaired(schema, kind)
        self._validator = _quick(kind)(self._schema, registry=EMPTY_REGISTRY)
        self._references = EMPTY_REGISTRY.with_resource("", DRAFT202012.create_resource(self._schema)).resolver()
        self._check_required()

    def check(self, arguments: dict[str, Any]) -> Iterator[Problem]:
        """Yields everything that is wrong with a call's arguments."""
        try:
            yield from _explained(self._validator.iter_errors(arguments))
            yield from self._undeclared([self._schema], arguments, "", top=True)
        except _BROKEN as error:
            yield Problem("bad-schema", f"the schema can't be applied ({type(error).__name__}: {_cut(str(error))})")

    def _repaired(self, schema: dict[str, Any], kind: Any) -> Any:
        """Notes the malformed parts and returns the schema with those replaced or removed."""
        rules = kind(kind.META_SCHEMA, format_checker=kind.FORMAT_CHECKER)
        repaired = schema
        for _ in range(8):  # an error may hide another one
            try:
                errors = list(rules.iter_errors(repaired))
            except _BROKEN:
                self._note("parameters is nested too deeply")
                return {"additionalProperties": True}
            if not errors:
                return repaired
            if repaired is schema:
                repaired = copy.deepcopy(schema)
            for path, error in sorted({tuple(error.absolute_path): error for error in errors}.items(), key=_order):
                repaired = self._repair(repaired, path, error)
        return {"additionalProperties": True}

    def _repair(self, schema: Any, path: tuple[str | int, ...], error: ValidationError) -> Any:
        """Notes the error at `path`, and returns the schema with the value there replaced or removed."""
        where, value = _path(("parameters", *path)), error.instance
        if not path:
            self._note(f"{where} is not a JSON Schema: {_cut(error.message)}")
            return {"additionalProperties": True}
        parent, key = schema, path[-1]
        try:
            for step in path[:-1]:
                parent = parent[step]
            if parent[key] != value:
                return schema  # another error moved or repaired it; if it is still there, the next round reports it
        except (KeyError, IndexError, TypeError):
            return schema
        replacement: Any = None
        expected: Any = error.validator_value
        if key == "type" and isinstance(value, str | list):
            names = [value] if isinstance(value, str) else value
            meant = [_meant(name) for name in names]
            hint = f"; did you mean {_shown(meant[0] if isinstance(value, str) else meant)}?" if all(meant) else ""
            self._note(f"{where} is {_shown(value)}, not a type of JSON Schema{hint}")
            if all(meant):
                replacement = meant
        elif error.validator == "type" and "object" in expected:
            self._note(
                f"{where} is {_shown(value)}, expected {'an object' if expected == 'object' else 'a JSON Schema'}"
            )
            replacement = {}
        else:
            self._note(f"{where} is {_shown(value)}: {_cut(error.message)}")
        if replacement is None:
            del parent[key]
        else:
            parent[key] = replacement
        return schema

    def _check_required(self) -> None:
        """Notes names that are required but not declared."""
        declared, names = _declared(self._parts([self._schema]))
        if declared is not None:
            for name in names - declared:
                self._note(f"parameters.required names {_shown(name)}, which properties does not declare")

    def _note(self, problem: str) -> None:
        if problem not in self.problems:
            self.problems.append(problem)

    def _parts(self, schemas: Iterable[Any]) -> list[dict[str, Any]]:
        """The schemas and all schemas that apply to the same value, by references and alternatives."""
        parts: list[dict[str, Any]] = []
        waiting = list(schemas)
        while waiting:
            schema = waiting.pop()
            if not isinstance(schema, dict) or any(schema is part for part in parts):
                continue
            parts.append(schema)
            for key in _IN_PLACE:
                waiting += schema.get(key, ())
            waiting += [schema[key] for key in ("if", "then", "else") if key in schema]
            waiting += schema.get("dependentSchemas", {}).values()
            reference = schema.get("$ref", schema.get("$dynamicRef"))
            if reference is not None:
                try:
                    waiting.append(self._references.lookup(reference).contents)
                except Unresolvable:  # reported when a call is checked
                    waiting.append({"additionalProperties": True})
        return parts

    def _undeclared(self, schemas: list[Any], value: Any, where: str, top: bool = False) -> Iterator[Problem]:
        """Yields the properties of `value` that none of its schemas declares, at any depth."""
        if not isinstance(value, dict | list):
            return
        parts = self._parts(schemas)
        if isinstance(value, list):
            for at, item in enumerate(value):
                front = [part["prefixItems"][at] for part in parts if at < len(part.get("prefixItems", ()))]
                yield from self._undeclared(
                    front + [part["items"] for part in parts if "items" in part], item, f"{where}[{at}]"
                )
            return
        declared, required = _declared(parts)
        if declared is not None and (declared or top):
            for name in value.keys() - declared - required:
                yield _extra(name, where, declared)
        for name, inner in value.items():
            schemas_of_name = [part["properties"][name] for part in parts if name in part.get("properties", ())]
            yield from self._undeclared(schemas_of_name, inner, _join(where, name))


def _order(item: tuple[tuple[str | int, ...], ValidationError]) -> tuple[int, list[str]]:
    """Sort key that puts outer errors first."""
    return len(item[0]), list(map(str, item[0]))


@lru_cache
def _quick(kind: Any) -> Any:
    """A validator that checks `uniqueItems` in linear time; jsonschema's own takes quadratic time."""
    return extend(kind, {"uniqueItems": _unique_items})


def _unique_items(validator: Any, wanted: Any, value: Any, _: Any) -> Iterator[ValidationError]:
    if wanted and validator.is_type(value, "array") and len(set(map(hashable, value))) < len(value):
        yield ValidationError("has the same item twice")


def hashable(value: Any) -> Any:
    """Returns a hashable key, equal for values that are equal in JSON Schema: 1 and 1.0, but not 1 and true."""
    if isinstance(value, list):
        return ("array", *map(hashable, value))
    if isinstance(value, dict):
        return frozenset((key, hashable(item)) for key, item in value.items())
    return ("boolean", value) if isinstance(value, bool) else value


def _meant(name: object) -> str | None:
    """The type of JSON Schema for a spelling, None for unknown spellings."""
    lower = str(name).lower()
    return lower if lower in TYPES else SPELLINGS.get(lower)


def _is_flat(schema: dict[str, Any]) -> bool:
    """Whether a schema lists the arguments directly, without "properties"."""
    return (
        bool(schema) and all(isinstance(value, dict) for value in schema.values()) and not schema.keys() & {*_HOLDERS}
    )


def _declared(parts: list[dict[str, Any]]) -> tuple[set[str] | None, set[str]]:
    """Returns (declared names, required names).

    The declared names are None where others are allowed, or where jsonschema itself refuses others.
    """
    declared: set[str] = set()
    required: set[str] = set()
    for part in parts:
        if part.keys() & {"additionalProperties", "unevaluatedProperties", "patternProperties"}:
            return None, set()
        declared.update(part.get("properties", ()))
        names = part.get("required", ())
        if isinstance(names, list):  # a boolean in draft 3
            required.update(names)
    return declared, required


def _explained(errors: Iterable[ValidationError]) -> Iterator[Problem]:
    """Converts jsonschema's errors to problems of a call's arguments."""
    missing: set[tuple[str, object]] = set()
    for error in errors:
        where = _path(error.absolute_path)
        value, rule = error.instance, error.validator
        expected: Any = error.validator_value
        if rule == "required" and isinstance(expected, list):
            names = [name for name in expected if name not in value and (where, name) not in missing]
            for name in names:
                missing.add((where, name))
                yield Problem("missing-argument", f"argument '{_join(where, name)}' is missing")
        elif (
            rule in ("additionalProperties", "unevaluatedProperties") and expected is False and isinstance(value, dict)
        ):
            declared = set(error.schema.get("properties", ())) if isinstance(error.schema, dict) else set()
            patterns = error.schema.get("patternProperties", ()) if isinstance(error.schema, dict) else ()
            names = [name for name in value if name not in declared and not any(re.search(p, name) for p in patterns)]
            for name in names:
                yield _extra(name, where, declared)
        elif rule == "type":
            yield _wrong_type(where, value, [expected] if isinstance(expected, str) else expected)
        elif (
            rule in ("anyOf", "oneOf")
            and error.context
            and all(inner.validator == "type" and not inner.relative_path for inner in error.context)
        ):
            kinds: list[Any] = [inner.validator_value for inner in error.context]
            kinds = [kind for types in kinds for kind in ([types] if isinstance(types, str) else types)]
            yield _wrong_type(where, value, list(dict.fromkeys(kinds)))
        elif rule == "enum":
            yield Problem("wrong-value", f"{_argument(where)} is {_shown(value)}, allowed: {_shown(expected, 200)}")
        else:
            why = _cut(error.message) if rule not in ("anyOf", "oneOf") else "fits none of the schema's alternatives"
            if error.context:
                why += f" ({_cut(min(error.context, key=lambda inner: len(inner.relative_path)).message)})"
            yield Problem("wrong-value", f"{_argument(where)} is {_shown(value)}: {rule}: {why}")


def _wrong_type(where: str, value: Any, kinds: Any) -> Problem:
    wanted = " or ".join(map(str, kinds))
    return Problem("wrong-type", f"{_argument(where)} is {_shown(value)} ({_type(value)}), the schema says {wanted}")


def _extra(name: str, where: str, declared: Iterable[str]) -> Problem:
    names = sorted(declared)
    listed = _cut(", ".join(names), 200) or "none"
    hint = nearest(name, names) if len(name) < 100 else ""
    return Problem("extra-argument", f"argument '{_join(where, name)}' is not declared; declared: {listed}{hint}")


def _argument(where: str) -> str:
    return f"argument '{where}'" if where else "the arguments"


def _join(where: str, name: str) -> str:
    name = _cut(name, 80)
    return f"{where}.{name}" if where else name


def _path(keys: Iterable[str | int]) -> str:
    where = ""
    for key in keys:
        where = f"{where}[{key}]" if isinstance(key, int) else _join(where, key)
    return where


def _type(value: Any) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "boolean"
        case int():
            return "integer"
        case float():
            return "number"
        case str():
            return "string"
        case list():
            return "array"
    return "object"


def _shown(value: Any, length: int = 80) -> str:
    return _cut(json.dumps(value, ensure_ascii=False), length)


def _cut(text: str, length: int = 160) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
