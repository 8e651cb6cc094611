"""The JSON Schema that makes a model write calls of the given tools and nothing else.

Servers compile a JSON Schema to a grammar, and what the grammar cannot express they ignore or refuse without naming the
tool. So the schemas of tools are rewritten here into a subset that xgrammar 0.2 (in vLLM 0.32) follows exactly:
references are resolved, `allOf` is merged, keywords beside `anyOf` move into its branches, other spellings of types are
replaced. What remains is followed, or the tool is refused by name.
"""

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any
from urllib.parse import unquote

from jsonschema import Draft202012Validator
from jsonschema.exceptions import best_match

from xlam_jax.data.schemas import SPELLINGS, TYPES

LARGEST = 2000
"""Subschemas of a tool, after `allOf` and references are resolved."""
LONGEST_LIST = 1000
"""Values of a bounded integer that is a multiple of a number: they are listed."""

_OBJECT = (
    *("properties", "required", "additionalProperties", "patternProperties", "propertyNames"),
    *("minProperties", "maxProperties"),
)
_ARRAY = ("items", "prefixItems", "minItems", "maxItems", "uniqueItems")
_STRING = ("minLength", "maxLength", "pattern", "format")
_NUMBER = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
_APPLIES = {"object": _OBJECT, "array": _ARRAY, "string": _STRING, "number": _NUMBER, "integer": _NUMBER}
"""Type → the keywords that apply to it."""
_ANY_TYPE = ("type", "enum", "const", "anyOf")
_FOLLOWED = {*_ANY_TYPE, *_OBJECT, *_ARRAY, *_STRING, *_NUMBER}
_REFUSED = (
    *("not", "if", "then", "else", "contains", "minContains", "maxContains", "dependentRequired", "dependentSchemas"),
    *("dependencies", "unevaluatedItems", "$dynamicRef", "$recursiveRef", "$id", "id", "$anchor"),
)
"""Keywords that no grammar follows, or that change what references mean."""
_LOWEST = ("minimum", "exclusiveMinimum", "minLength", "minItems", "minProperties")
_HIGHEST = ("maximum", "exclusiveMaximum", "maxLength", "maxItems", "maxProperties")
_FORMATS = (
    *("email", "date", "time", "date-time", "duration", "ipv4", "ipv6", "hostname", "uuid", "uri", "uri-reference"),
    *("uri-template", "json-pointer", "relative-json-pointer"),
)
"""Those that the grammar follows; JSON Schema itself lets any format be an annotation."""
_NOT_A_GRAMMAR = re.compile(r"\(\?(?!:)|\\[bB1-9]")
"""Look-around, flags, word boundaries and back-references in a pattern."""
_HOLDS_SCHEMAS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_LISTS_SCHEMAS = ("allOf", "anyOf", "oneOf", "prefixItems")
_IS_SCHEMA = ("items", "additionalProperties", "propertyNames", "not", "if", "then", "else", "contains")


class _Impossible(ValueError):  # noqa: N818 - an alternative that drops out, not yet an error
    """No value satisfies a schema."""


def calls_schema(tools: Iterable[dict[str, Any]], at_most: int | None = None) -> dict[str, Any]:
    """The JSON Schema of an array of calls of tools in OpenAI form.

    References in a tool's schema, `#` included, are relative to that schema. Tools may define the same names
    differently. `oneOf` is read as `anyOf`, and objects have no properties beyond those declared unless their schema
    allows some. Raises `ValueError`, with the tool's name, for a schema that cannot be followed.
    """
    choices: list[Any] = []
    definitions: dict[str, Any] = {}
    for number, tool in enumerate(tools):
        function = tool["function"]
        try:
            arguments = _Arguments(function.get("parameters"), f"tool{number}_", definitions).schema()
        except ValueError as error:
            raise ValueError(f"tool '{function['name']}' cannot be enforced by a grammar: {error}") from None
        choices.append(
            {
                "type": "object",
                "properties": {"name": {"type": "string", "enum": [function["name"]]}, "arguments": arguments},
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
        )
    schema: dict[str, Any] = {"type": "array", "minItems": 1, "items": {"anyOf": choices}}
    if at_most is not None:
        schema["maxItems"] = at_most
    if definitions:
        schema["$defs"] = definitions
    return schema


class _Arguments:
    """Rewrites the schema of one tool's arguments."""

    def __init__(self, parameters: Any, prefix: str, definitions: dict[str, Any]):
        """Adds to `definitions`, with `prefix` before each name."""
        self._root = _spelled({"type": "object", "properties": {}} if parameters in (None, {}) else parameters)
        self._prefix, self._definitions = prefix, definitions
        self._names: dict[str, str] = {}
        self._count = 0
        if not isinstance(self._root, dict):
            raise ValueError(f"parameters is {_shown(self._root)}, not an object")
        if not self._root.keys() & {*_FOLLOWED, *_REFUSED, *_LISTS_SCHEMAS, "$ref", "title", "description"}:
            raise ValueError('parameters lists the arguments itself; put them under "properties"')
        error = best_match(Draft202012Validator(Draft202012Validator.META_SCHEMA).iter_errors(self._root))
        if error is not None:
            where = ".".join(map(str, ("parameters", *error.absolute_path)))
            raise ValueError(f"{where} is {_shown(error.instance)}: {error.message[:200]}")

    def schema(self) -> Any:
        """The rewritten schema. Raises `ValueError` for what cannot be followed."""
        try:
            return self._rewritten({"allOf": [self._root, {"type": "object"}]}, inline=True)
        except _Impossible as error:
            raise ValueError(f"no arguments satisfy its schema ({error})") from None
        except RecursionError:
            raise ValueError("its schema is nested too deeply") from None

    def _rewritten(self, schema: Any, inline: bool = False) -> Any:
        """A subschema; one with references or `allOf` becomes a definition, so that it may contain itself."""
        self._count += 1
        if self._count > LARGEST:
            raise ValueError(f"its schema has more than {LARGEST} parts once references are resolved")
        if inline or not isinstance(schema, dict) or not schema.keys() & {"$ref", "allOf"}:
            return self._written(self._merged(schema, ()))
        key = json.dumps(schema, sort_keys=True)
        if key not in self._names:
            name = self._names[key] = f"{self._prefix}{len(self._names)}"
            try:
                self._definitions[name] = self._written(self._merged(schema, ()))
            except _Impossible as error:
                raise ValueError(f"nothing satisfies {_shown(schema)} ({error})") from None
        return {"$ref": f"#/$defs/{self._names[key]}"}

    def _merged(self, schema: Any, references: Sequence[str]) -> dict[str, Any]:
        """A schema's keywords together with those of its `$ref`, `allOf` and `oneOf`, without annotations."""
        if schema is False:
            raise _Impossible("false")
        if schema is True:
            return {}
        for key in _REFUSED:
            if key in schema:
                raise ValueError(f"it uses '{key}'; rewrite it without, or let the model choose (tool_choice auto)")
        merged = {key: value for key, value in schema.items() if key in _FOLLOWED}
        if schema.get("unevaluatedProperties", True) not in (True, False):
            raise ValueError("it uses 'unevaluatedProperties' with a schema")
        if isinstance(merged.get("type"), str):
            merged["type"] = [merged["type"]]
        if not merged.get("uniqueItems", True):
            del merged["uniqueItems"]
        if (reference := schema.get("$ref")) is not None:
            if reference in references:
                raise ValueError(f"its $ref '{reference}' refers only to itself")
            merged = _both(merged, self._merged(self._resolved(reference), (*references, reference)))
        for part in schema.get("allOf", ()):
            merged = _both(merged, self._merged(part, references))
        return _both(merged, {"anyOf": schema["oneOf"]}) if "oneOf" in schema else merged

    def _resolved(self, reference: str) -> Any:
        """What a `$ref` refers to, within the tool's own schema."""
        if reference != "#" and not reference.startswith("#/"):
            raise ValueError(f"its $ref '{reference}' leads out of its schema")
        value: Any = self._root
        for part in unquote(reference).split("/")[1:]:
            part = part.replace("~1", "/").replace("~0", "~")
            try:
                value = value[int(part) if isinstance(value, list) else part]
            except (KeyError, IndexError, ValueError, TypeError):
                raise ValueError(f"its $ref '{reference}' leads nowhere") from None
        if not isinstance(value, dict | bool):
            raise ValueError(f"its $ref '{reference}' leads to {_shown(value)}, which is not a schema")
        return value

    def _written(self, merged: dict[str, Any]) -> Any:
        """A merged schema in the form that the grammar follows."""
        if "anyOf" in merged:
            rest = {key: value for key, value in merged.items() if key != "anyOf"}
            branches = []
            for branch in merged["anyOf"]:
                try:
                    branches.append(self._rewritten({"allOf": [rest, branch]} if rest else branch, inline=bool(rest)))
                except _Impossible:
                    continue
            if not branches:
                raise _Impossible("no alternative is possible")
            return {"anyOf": branches} if len(branches) > 1 else branches[0]
        if "const" in merged or "enum" in merged:
            return {"enum": _listed(merged)}
        types = merged.get("type") or [kind for kind in TYPES if merged.keys() & {*_APPLIES.get(kind, ())}]
        if "number" in types and "integer" in types:
            types = [kind for kind in types if kind != "integer"]
        written: dict[str, Any] = {"type": types if len(types) > 1 else types[0]} if types else {}
        if "object" in types:
            written |= self._object(merged)
        if "array" in types:
            written |= self._array(merged)
        if "string" in types:
            written |= _string(merged)
        if "number" in types or "integer" in types:
            numbers = _number(merged, "integer" in types)
            if "enum" in numbers and len(types) > 1:
                others = self._written({**merged, "type": [kind for kind in types if kind != "integer"]})
                return {"anyOf": [numbers, others]}
            if "enum" in numbers:
                return numbers
            written |= numbers
        return written

    def _object(self, merged: dict[str, Any]) -> dict[str, Any]:
        written = {key: merged[key] for key in ("minProperties", "maxProperties") if key in merged}
        others = merged.get("additionalProperties")
        properties = dict(merged.get("properties", {}))
        required = merged.get("required", [])
        if patterns := merged.get("patternProperties"):
            if properties or required or len(patterns) > 1 or others not in (None, False):
                raise ValueError("it uses 'patternProperties' beside other properties")
            return written | {"patternProperties": {key: self._rewritten(value) for key, value in patterns.items()}}
        if "propertyNames" in merged:
            names = self._rewritten(merged["propertyNames"])
            if properties or required or others is not None or not names.keys() <= {"type", "enum", "pattern"}:
                raise ValueError("it uses 'propertyNames' beside other properties")
            return written | {"propertyNames": names}
        for name in required:
            if name not in properties:
                if others is False:
                    raise _Impossible(f"'{name}' is required and not allowed")
                properties[name] = True if others is None else others
        if "properties" not in merged and not properties and others is None:
            others = True
        kept = {}
        for name, value in properties.items():
            try:
                kept[name] = self._rewritten(value)
            except _Impossible as error:
                if name in required:
                    raise
                if others not in (None, False):
                    raise ValueError(
                        f"its property '{name}' can have no value ({error}), and others are allowed"
                    ) from None
                others = False
        if "properties" in merged or kept:
            written["properties"] = kept
        if required:
            written["required"] = required
        if others is not None:
            written["additionalProperties"] = others if isinstance(others, bool) else self._rewritten(others)
        return written

    def _array(self, merged: dict[str, Any]) -> dict[str, Any]:
        if merged.get("uniqueItems") and merged.get("maxItems", 2) > 1:
            raise ValueError("it uses 'uniqueItems'; a grammar cannot compare items")
        written = {key: merged[key] for key in ("minItems", "maxItems") if key in merged}
        if "prefixItems" in merged:
            written["prefixItems"] = [self._rewritten(item) for item in merged["prefixItems"]]
        items = merged.get("items", True)
        return written | {"items": False if items is False else self._rewritten(items)}


def _both(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """The keywords of a schema that values satisfy which satisfy two merged schemas."""
    one, other = _allowed(one, other), _allowed(other, one)
    merged = dict(one)
    for key, value in other.items():
        before: Any = merged.get(key)
        if key not in merged or json.dumps(before, sort_keys=True) == json.dumps(value, sort_keys=True):
            merged[key] = value
        elif key == "type":
            merged[key] = _common_types(before, value)
        elif key == "required":
            merged[key] = list(dict.fromkeys([*before, *value]))
        elif key == "properties":
            merged[key] = before | {
                name: {"allOf": [before[name], one]} if name in before else one for name, one in value.items()
            }
        elif key in ("items", "propertyNames", "additionalProperties"):
            merged[key] = False if before is False or value is False else {"allOf": [before, value]}
        elif key == "enum":
            known = {_canonical(one) for one in value}
            merged[key] = [one for one in before if _canonical(one) in known]
        elif key == "const":
            raise _Impossible("two constants")
        elif key in _LOWEST:
            merged[key] = max(before, value)
        elif key in _HIGHEST:
            merged[key] = min(before, value)
        elif key == "format":  # an annotation
            continue
        elif key == "anyOf":
            merged[key] = [{"allOf": [branch, {"anyOf": value}]} for branch in before]
        else:
            raise ValueError(f"it combines two '{key}' in allOf, or beside $ref or anyOf")
    for_items = [part for part in (one, other) if part.keys() & {"prefixItems", "items"}]
    if len(for_items) == 2 and one.get("prefixItems") != other.get("prefixItems"):
        raise ValueError("it combines 'prefixItems' with other items in allOf")
    return merged


def _allowed(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """A merged schema whose properties also satisfy the other one's `additionalProperties`."""
    others = other.get("additionalProperties", True)
    if others is True or "properties" not in one:
        return one
    if "patternProperties" in other:
        raise ValueError("it combines 'patternProperties' with other properties in allOf")
    declared = other.get("properties", {})
    return one | {
        "properties": {
            name: value if name in declared else False if others is False else {"allOf": [value, others]}
            for name, value in one["properties"].items()
        }
    }


def _common_types(one: Sequence[str], other: Sequence[str]) -> list[str]:
    common = [kind for kind in one if kind in other or (kind == "integer" and "number" in other)]
    common += [kind for kind in other if kind == "integer" and "number" in one and kind not in common]
    if not common:
        raise _Impossible(f"both {' or '.join(one)} and {' or '.join(other)}")
    return common


def _listed(merged: dict[str, Any]) -> list[Any]:
    """The values of `enum` and `const` that the other keywords allow."""
    values = merged.get("enum", [merged.get("const")])
    if "const" in merged:
        values = [one for one in values if _canonical(one) == _canonical(merged["const"])]
    rest = {key: value for key, value in merged.items() if key not in ("enum", "const")}
    if any(isinstance(one, dict | list) for one in values) and rest.keys() & {*_OBJECT, *_ARRAY}:
        raise ValueError("it has an enum of objects or lists beside keywords for them")
    fits = Draft202012Validator(rest)
    kept = {_canonical(one): one for one in values if fits.is_valid(one)}
    if not kept:
        raise _Impossible("an enum without a value")
    return list(kept.values())


def _string(merged: dict[str, Any]) -> dict[str, Any]:
    written = {key: merged[key] for key in ("minLength", "maxLength", "pattern") if key in merged}
    if "pattern" in written:
        if len(written) > 1:
            raise ValueError("it uses 'pattern' beside a length; write the length into the pattern")
        if _NOT_A_GRAMMAR.search(written["pattern"]):
            raise ValueError(f"its pattern {_shown(written['pattern'])} looks around or back, which no grammar can")
    if not written and merged.get("format") in _FORMATS:
        written["format"] = merged["format"]
    return written


def _number(merged: dict[str, Any], whole: bool) -> dict[str, Any]:
    written = {key: merged[key] for key in _NUMBER if key in merged}
    multiple = written.pop("multipleOf", None)
    if multiple is None or (whole and 1 % multiple == 0):
        return written
    lowest = max(merged.get("minimum", -1e300), merged.get("exclusiveMinimum", -1e300))
    highest = min(merged.get("maximum", 1e300), merged.get("exclusiveMaximum", 1e300))
    if not whole or highest - lowest > LONGEST_LIST * multiple or multiple != int(multiple):
        raise ValueError(
            "it uses 'multipleOf', which only an integer with minimum and maximum can have, of at most "
            f"{LONGEST_LIST} values"
        )
    fits = Draft202012Validator(written | {"multipleOf": multiple})
    first = int(lowest // multiple)
    values = [at * int(multiple) for at in range(first, int(highest // multiple) + 1)]
    if not (values := [one for one in values if fits.is_valid(one)]):
        raise _Impossible("no multiple between its bounds")
    return {"enum": values}


def _spelled(schema: Any) -> Any:
    """A schema whose types are those of JSON Schema; `any` is no restriction. Lists of items become `prefixItems`."""
    if not isinstance(schema, dict):
        return schema
    spelled = dict(schema)
    if "type" in spelled:
        names = spelled["type"] if isinstance(spelled["type"], list) else [spelled["type"]]
        types = [_type(name) for name in names]
        del spelled["type"]
        if "any" not in types:
            spelled["type"] = list(dict.fromkeys(types)) if len(types) > 1 else types[0]
    if isinstance(spelled.get("items"), list):  # before draft 2020-12
        spelled["prefixItems"] = spelled.pop("items")
        if "additionalItems" in spelled:
            spelled["items"] = spelled.pop("additionalItems")
    for key, value in spelled.items():
        if key in _HOLDS_SCHEMAS and isinstance(value, dict):
            spelled[key] = {name: _spelled(one) for name, one in value.items()}
        elif key in _LISTS_SCHEMAS and isinstance(value, list):
            spelled[key] = [_spelled(one) for one in value]
        elif key in _IS_SCHEMA:
            spelled[key] = _spelled(value)
    return spelled


def _type(name: Any) -> str:
    lower = str(name).lower()
    if lower in TYPES or lower == "any":
        return lower
    if lower not in SPELLINGS:
        raise ValueError(f"type {_shown(name)} is unknown; known are {', '.join(TYPES)} and any")
    return SPELLINGS[lower]


def _canonical(value: Any) -> str:
    """The same text for values that are equal in JSON Schema."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return json.dumps(value, sort_keys=True)


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 100 else f"{text[:99]}…"
