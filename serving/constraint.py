"""Builds the JSON Schema that constrains a model's output to calls of the given tools.

Servers compile a JSON Schema to a grammar. Keywords that the grammar cannot express are ignored, or refused without
naming the tool. This module therefore rewrites the schemas of tools into a subset that xgrammar 0.2 (in vLLM 0.32)
enforces exactly: it resolves references, merges `allOf`, moves keywords next to `anyOf` into its branches, and replaces
other spellings of types. A tool whose schema has no such form is refused by name.
"""

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple
from urllib.parse import unquote

from jsonschema import Draft202012Validator
from jsonschema.exceptions import best_match

from xlam_jax.data.schemas import SPELLINGS, TYPES

MOST_SUBSCHEMAS = 2000
"""Maximum number of subschemas of a tool, after `allOf` and references are resolved."""
MOST_MULTIPLES = 1000
"""Maximum number of values of a bounded integer with `multipleOf`, which become an enum."""

_OBJECT = (
    *("properties", "required", "additionalProperties", "patternProperties", "propertyNames"),
    *("minProperties", "maxProperties"),
)
_ARRAY = ("items", "prefixItems", "minItems", "maxItems", "uniqueItems")
_STRING = ("minLength", "maxLength", "pattern", "format")
_NUMBER = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
_KEYWORDS = {"object": _OBJECT, "array": _ARRAY, "string": _STRING, "number": _NUMBER, "integer": _NUMBER}
"""Type → its keywords."""
_ANY_TYPE = ("type", "enum", "const", "anyOf")
_SUPPORTED = {*_ANY_TYPE, *_OBJECT, *_ARRAY, *_STRING, *_NUMBER}
_REFUSED = (
    *("not", "if", "then", "else", "contains", "minContains", "maxContains", "dependentRequired", "dependentSchemas"),
    *("dependencies", "unevaluatedItems", "$dynamicRef", "$recursiveRef", "$id", "id", "$anchor"),
)
"""Keywords that a grammar cannot express, or that change the meaning of references."""
_LOWER_BOUNDS = ("minimum", "exclusiveMinimum", "minLength", "minItems", "minProperties")
_UPPER_BOUNDS = ("maximum", "exclusiveMaximum", "maxLength", "maxItems", "maxProperties")
_FORMATS = (
    *("email", "date", "time", "date-time", "duration", "ipv4", "ipv6", "hostname", "uuid", "uri", "uri-reference"),
    *("uri-template", "json-pointer", "relative-json-pointer"),
)
"""Formats that the grammar enforces. In JSON Schema itself, any format may be a mere annotation."""
_UNSUPPORTED_PATTERN = re.compile(r"\(\?(?!:)|\\[bB1-9]")
"""Matches look-around, flags, word boundaries and back-references in a pattern."""
_SCHEMA_MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
"""Keywords whose value maps names to subschemas."""
_SCHEMA_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems")
_SUBSCHEMAS = ("items", "additionalProperties", "propertyNames", "not", "if", "then", "else", "contains")


class _Unsatisfiable(ValueError):  # noqa: N818 - drops one alternative; not yet an error
    """No value satisfies a schema."""


def calls_schema(tools: Iterable[dict[str, Any]], at_most: int | None = None) -> dict[str, Any]:
    """Returns the JSON Schema of an array of calls to the tools, which are in OpenAI's format.

    `at_most`: maximum number of calls. References in a tool's schema, including `#`, are relative to that schema, so
    different tools may use the same definition names. `oneOf` is treated as `anyOf`, and objects have only declared
    properties unless their schema allows others. Raises `ValueError` with the tool's name for an unsupported schema.
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


class Written(NamedTuple):
    """How a wire format writes a call around its arguments."""

    begin: str
    """With {name} for the name, and {quoted} for the name as JSON."""
    end: str
    separator: str = ""
    front: str = ""
    """In front of the first call."""
    back: str = ""
    """After the last call."""
    style: str = "json"
    """xgrammar's name for how the arguments are written."""


WRITTEN = {
    "hermes": Written('<tool_call>\n{{"name": {quoted}, "arguments": ', "}}\n</tool_call>", "\n"),
    "mistral": Written("[TOOL_CALLS]{name}[ARGS]", ""),
    "llama3_json": Written('{{"name": {quoted}, "parameters": ', "}}", "; "),
    "qwen3_coder": Written("<tool_call>\n<function={name}>\n", "\n</function>\n</tool_call>", "\n", style="qwen_xml"),
    "deepseek_v31": Written(
        "<｜tool▁call▁begin｜>{name}<｜tool▁sep｜>",
        "<｜tool▁call▁end｜>",
        front="<｜tool▁calls▁begin｜>",
        back="<｜tool▁calls▁end｜>",
    ),
}
"""Wire format → how a call is written, for those whose arguments a grammar can express."""


def calls_tag(wire: str, tools: Iterable[dict[str, Any]], at_most: int | None = None) -> dict[str, Any]:
    """Returns xgrammar's structural tag for calls to the tools in a wire format other than the array.

    `at_most`: maximum number of calls, 1 or None. The arguments are constrained as in `calls_schema`. Raises
    `ValueError` for a wire format that a grammar cannot express, and with the tool's name for an unsupported schema.
    """
    if wire not in WRITTEN:
        raise ValueError(f"calls in the wire format {wire} cannot be enforced by a grammar; use tool_choice auto")
    written = WRITTEN[wire]
    tags = []
    for tool in tools:
        function, definitions = tool["function"], dict[str, Any]()
        name = function["name"]
        try:
            schema = _Arguments(function.get("parameters"), "", definitions).schema()
        except ValueError as error:
            raise ValueError(f"tool '{name}' cannot be enforced by a grammar: {error}") from None
        if definitions:
            schema |= {"$defs": definitions}
        content = {"type": "json_schema", "json_schema": schema, "style": written.style, "max_whitespace_cnt": 1}
        begin = written.begin.format(name=name, quoted=json.dumps(name, ensure_ascii=False))
        tags.append({"type": "tag", "begin": begin, "content": content, "end": written.end.format()})
    calls = {
        "type": "tags_with_separator",
        "tags": tags,
        "separator": written.separator,
        "at_least_one": True,
        "stop_after_first": at_most == 1,
    }
    front, back = ({"type": "const_string", "value": text} for text in (written.front, written.back))
    elements = [front, calls, back] if written.front else [calls]
    return {"type": "structural_tag", "format": {"type": "sequence", "elements": elements}}


class _Arguments:
    """Rewrites the schema of one tool's arguments."""

    def __init__(self, parameters: Any, prefix: str, definitions: dict[str, Any]):
        """`definitions`: receives the definitions of this schema, each name with `prefix`. Raises `ValueError`."""
        self._root = _normalize({"type": "object", "properties": {}} if parameters in (None, {}) else parameters)
        self._prefix, self._definitions = prefix, definitions
        self._names: dict[str, str] = {}
        self._count = 0
        if not isinstance(self._root, dict):
            raise ValueError(f"parameters is {_quote(self._root)}, not an object")
        if not self._root.keys() & {*_SUPPORTED, *_REFUSED, *_SCHEMA_LISTS, "$ref", "title", "description"}:
            raise ValueError('parameters contains the arguments directly; put them under "properties"')
        error = best_match(Draft202012Validator(Draft202012Validator.META_SCHEMA).iter_errors(self._root))
        if error is not None:
            where = ".".join(map(str, ("parameters", *error.absolute_path)))
            raise ValueError(f"{where} is {_quote(error.instance)}: {error.message[:200]}")

    def schema(self) -> Any:
        """Returns the rewritten schema. Raises `ValueError` if it is unsupported."""
        try:
            return self._rewrite({"allOf": [self._root, {"type": "object"}]}, inline=True)
        except _Unsatisfiable as error:
            raise ValueError(f"no arguments satisfy its schema ({error})") from None
        except RecursionError:
            raise ValueError("its schema is nested too deeply") from None

    def _rewrite(self, schema: Any, inline: bool = False) -> Any:
        """Rewrites a subschema. One with `$ref` or `allOf` becomes a definition, so that it may contain itself."""
        self._count += 1
        if self._count > MOST_SUBSCHEMAS:
            raise ValueError(f"its schema has more than {MOST_SUBSCHEMAS} parts once references are resolved")
        if inline or not isinstance(schema, dict) or not schema.keys() & {"$ref", "allOf"}:
            return self._to_grammar(self._merge(schema, ()))
        key = json.dumps(schema, sort_keys=True)
        if key not in self._names:
            name = self._names[key] = f"{self._prefix}{len(self._names)}"
            try:
                self._definitions[name] = self._to_grammar(self._merge(schema, ()))
            except _Unsatisfiable as error:
                raise ValueError(f"no value satisfies {_quote(schema)} ({error})") from None
        return {"$ref": f"#/$defs/{self._names[key]}"}

    def _merge(self, schema: Any, references: Sequence[str]) -> dict[str, Any]:
        """Merges a schema with its `$ref`, `allOf` and `oneOf`, and drops annotations.

        `references`: those already followed on this path, to detect cycles.
        """
        if schema is False:
            raise _Unsatisfiable("false")
        if schema is True:
            return {}
        for key in _REFUSED:
            if key in schema:
                raise ValueError(f"it uses '{key}'; remove that, or let the model choose (tool_choice auto)")
        merged = {key: value for key, value in schema.items() if key in _SUPPORTED}
        if schema.get("unevaluatedProperties", True) not in (True, False):
            raise ValueError("it uses 'unevaluatedProperties' with a schema")
        if isinstance(merged.get("type"), str):
            merged["type"] = [merged["type"]]
        if not merged.get("uniqueItems", True):
            del merged["uniqueItems"]
        if (reference := schema.get("$ref")) is not None:
            if reference in references:
                raise ValueError(f"its $ref '{reference}' refers only to itself")
            merged = _intersect(merged, self._merge(self._resolve(reference), (*references, reference)))
        for part in schema.get("allOf", ()):
            merged = _intersect(merged, self._merge(part, references))
        return _intersect(merged, {"anyOf": schema["oneOf"]}) if "oneOf" in schema else merged

    def _resolve(self, reference: str) -> Any:
        """Returns the target of a `$ref` within the tool's schema."""
        if reference != "#" and not reference.startswith("#/"):
            raise ValueError(f"its $ref '{reference}' points outside its schema")
        value: Any = self._root
        for part in unquote(reference).split("/")[1:]:
            part = part.replace("~1", "/").replace("~0", "~")
            try:
                value = value[int(part) if isinstance(value, list) else part]
            except (KeyError, IndexError, ValueError, TypeError):
                raise ValueError(f"the target of its $ref '{reference}' does not exist") from None
        if not isinstance(value, dict | bool):
            raise ValueError(f"the target of its $ref '{reference}' is {_quote(value)}, which is not a schema")
        return value

    def _to_grammar(self, merged: dict[str, Any]) -> Any:
        """Converts a merged schema to the form that the grammar enforces."""
        if "anyOf" in merged:
            rest = {key: value for key, value in merged.items() if key != "anyOf"}
            branches = []
            for branch in merged["anyOf"]:
                try:
                    branches.append(self._rewrite({"allOf": [rest, branch]} if rest else branch, inline=bool(rest)))
                except _Unsatisfiable:
                    continue
            if not branches:
                raise _Unsatisfiable("no alternative is possible")
            return {"anyOf": branches} if len(branches) > 1 else branches[0]
        if "const" in merged or "enum" in merged:
            return {"enum": _enum_values(merged)}
        types = merged.get("type") or [kind for kind in TYPES if merged.keys() & {*_KEYWORDS.get(kind, ())}]
        if "number" in types and "integer" in types:
            types = [kind for kind in types if kind != "integer"]
        result: dict[str, Any] = {"type": types if len(types) > 1 else types[0]} if types else {}
        if "object" in types:
            result |= self._object(merged)
        if "array" in types:
            result |= self._array(merged)
        if "string" in types:
            result |= _string(merged)
        if "number" in types or "integer" in types:
            numbers = _number(merged, "integer" in types)
            if "enum" in numbers and len(types) > 1:
                others = self._to_grammar({**merged, "type": [kind for kind in types if kind != "integer"]})
                return {"anyOf": [numbers, others]}
            if "enum" in numbers:
                return numbers
            result |= numbers
        return result

    def _object(self, merged: dict[str, Any]) -> dict[str, Any]:
        keywords = {key: merged[key] for key in ("minProperties", "maxProperties") if key in merged}
        additional = merged.get("additionalProperties")
        properties = dict(merged.get("properties", {}))
        required = merged.get("required", [])
        if patterns := merged.get("patternProperties"):
            if properties or required or len(patterns) > 1 or additional not in (None, False):
                raise ValueError("it uses 'patternProperties' together with other properties")
            return keywords | {"patternProperties": {key: self._rewrite(value) for key, value in patterns.items()}}
        if "propertyNames" in merged:
            names = self._rewrite(merged["propertyNames"])
            if properties or required or additional is not None or not names.keys() <= {"type", "enum", "pattern"}:
                raise ValueError("it uses 'propertyNames' together with other properties")
            return keywords | {"propertyNames": names}
        for name in required:
            if name not in properties:
                if additional is False:
                    raise _Unsatisfiable(f"'{name}' is required and not allowed")
                properties[name] = True if additional is None else additional
        if "properties" not in merged and not properties and additional is None:
            additional = True
        kept = {}
        for name, value in properties.items():
            try:
                kept[name] = self._rewrite(value)
            except _Unsatisfiable as error:
                if name in required:
                    raise
                if additional not in (None, False):
                    raise ValueError(
                        f"its property '{name}' can have no value ({error}), and it allows additional properties"
                    ) from None
                additional = False
        if "properties" in merged or kept:
            keywords["properties"] = kept
        if required:
            keywords["required"] = required
        if additional is not None:
            keywords["additionalProperties"] = additional if isinstance(additional, bool) else self._rewrite(additional)
        return keywords

    def _array(self, merged: dict[str, Any]) -> dict[str, Any]:
        if merged.get("uniqueItems") and merged.get("maxItems", 2) > 1:
            raise ValueError("it uses 'uniqueItems'; a grammar cannot compare items")
        keywords = {key: merged[key] for key in ("minItems", "maxItems") if key in merged}
        if "prefixItems" in merged:
            keywords["prefixItems"] = [self._rewrite(item) for item in merged["prefixItems"]]
        items = merged.get("items", True)
        return keywords | {"items": False if items is False else self._rewrite(items)}


def _intersect(left: dict[str, Any], right: dict[str, Any]) -> dict[str, Any]:
    """Returns the keywords of a schema that accepts the values that two merged schemas both accept."""
    left, right = _restrict_properties(left, right), _restrict_properties(right, left)
    merged = dict(left)
    for key, value in right.items():
        previous: Any = merged.get(key)
        if key not in merged or json.dumps(previous, sort_keys=True) == json.dumps(value, sort_keys=True):
            merged[key] = value
        elif key == "type":
            merged[key] = _common_types(previous, value)
        elif key == "required":
            merged[key] = list(dict.fromkeys([*previous, *value]))
        elif key == "properties":
            merged[key] = previous | {
                name: {"allOf": [previous[name], schema]} if name in previous else schema
                for name, schema in value.items()
            }
        elif key in ("items", "propertyNames", "additionalProperties"):
            merged[key] = False if previous is False or value is False else {"allOf": [previous, value]}
        elif key == "enum":
            allowed = {_canonical(choice) for choice in value}
            merged[key] = [choice for choice in previous if _canonical(choice) in allowed]
        elif key == "const":
            raise _Unsatisfiable("two constants")
        elif key in _LOWER_BOUNDS:
            merged[key] = max(previous, value)
        elif key in _UPPER_BOUNDS:
            merged[key] = min(previous, value)
        elif key == "format":  # an annotation
            continue
        elif key == "anyOf":
            merged[key] = [{"allOf": [branch, {"anyOf": value}]} for branch in previous]
        else:
            raise ValueError(f"it combines two '{key}' in allOf, or next to $ref or anyOf")
    for_items = [part for part in (left, right) if part.keys() & {"prefixItems", "items"}]
    if len(for_items) == 2 and left.get("prefixItems") != right.get("prefixItems"):
        raise ValueError("it combines 'prefixItems' with other items in allOf")
    return merged


def _restrict_properties(schema: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Applies the `additionalProperties` of the merged schema `other` to the properties that `schema` declares."""
    additional = other.get("additionalProperties", True)
    if additional is True or "properties" not in schema:
        return schema
    if "patternProperties" in other:
        raise ValueError("it combines 'patternProperties' with other properties in allOf")
    declared = other.get("properties", {})
    return schema | {
        "properties": {
            name: value if name in declared else False if additional is False else {"allOf": [value, additional]}
            for name, value in schema["properties"].items()
        }
    }


def _common_types(left: Sequence[str], right: Sequence[str]) -> list[str]:
    common = [kind for kind in left if kind in right or (kind == "integer" and "number" in right)]
    common += [kind for kind in right if kind == "integer" and "number" in left and kind not in common]
    if not common:
        raise _Unsatisfiable(f"both {' or '.join(left)} and {' or '.join(right)}")
    return common


def _enum_values(merged: dict[str, Any]) -> list[Any]:
    """Returns the values of `enum` and `const` that the other keywords allow."""
    values = merged.get("enum", [merged.get("const")])
    if "const" in merged:
        values = [value for value in values if _canonical(value) == _canonical(merged["const"])]
    rest = {key: value for key, value in merged.items() if key not in ("enum", "const")}
    if any(isinstance(value, dict | list) for value in values) and rest.keys() & {*_OBJECT, *_ARRAY}:
        raise ValueError("it has an enum of objects or lists together with keywords for them")
    validator = Draft202012Validator(rest)
    kept = {_canonical(value): value for value in values if validator.is_valid(value)}
    if not kept:
        raise _Unsatisfiable("an enum without a value")
    return list(kept.values())


def _string(merged: dict[str, Any]) -> dict[str, Any]:
    keywords = {key: merged[key] for key in ("minLength", "maxLength", "pattern") if key in merged}
    if "pattern" in keywords:
        if len(keywords) > 1:
            raise ValueError("it uses 'pattern' together with a length; include the length in the pattern")
        if _UNSUPPORTED_PATTERN.search(keywords["pattern"]):
            raise ValueError(
                f"its pattern {_quote(keywords['pattern'])} uses look-around, flags, word boundaries or "
                "back-references, which a grammar cannot express"
            )
    if not keywords and merged.get("format") in _FORMATS:
        keywords["format"] = merged["format"]
    return keywords


def _number(merged: dict[str, Any], whole: bool) -> dict[str, Any]:
    keywords = {key: merged[key] for key in _NUMBER if key in merged}
    multiple = keywords.pop("multipleOf", None)
    if multiple is None or (whole and 1 % multiple == 0):
        return keywords
    lowest = max(merged.get("minimum", -1e300), merged.get("exclusiveMinimum", -1e300))
    highest = min(merged.get("maximum", 1e300), merged.get("exclusiveMaximum", 1e300))
    if not whole or highest - lowest > MOST_MULTIPLES * multiple or multiple != int(multiple):
        raise ValueError(
            "it uses 'multipleOf', which is supported only for an integer with a minimum and a maximum, and at most "
            f"{MOST_MULTIPLES} values"
        )
    validator = Draft202012Validator(keywords | {"multipleOf": multiple})
    first = int(lowest // multiple)
    values = [factor * int(multiple) for factor in range(first, int(highest // multiple) + 1)]
    if not (values := [value for value in values if validator.is_valid(value)]):
        raise _Unsatisfiable("no multiple between its bounds")
    return {"enum": values}


def _normalize(schema: Any) -> Any:
    """Rewrites other spellings of types to JSON Schema's, drops `any`, and moves lists of `items` to `prefixItems`."""
    if not isinstance(schema, dict):
        return schema
    normalized = dict(schema)
    if "type" in normalized:
        names = normalized["type"] if isinstance(normalized["type"], list) else [normalized["type"]]
        types = [_type(name) for name in names]
        del normalized["type"]
        if "any" not in types:
            normalized["type"] = list(dict.fromkeys(types)) if len(types) > 1 else types[0]
    if isinstance(normalized.get("items"), list):  # before draft 2020-12
        normalized["prefixItems"] = normalized.pop("items")
        if "additionalItems" in normalized:
            normalized["items"] = normalized.pop("additionalItems")
    for key, value in normalized.items():
        if key in _SCHEMA_MAPS and isinstance(value, dict):
            normalized[key] = {name: _normalize(subschema) for name, subschema in value.items()}
        elif key in _SCHEMA_LISTS and isinstance(value, list):
            normalized[key] = [_normalize(subschema) for subschema in value]
        elif key in _SUBSCHEMAS:
            normalized[key] = _normalize(value)
    return normalized


def _type(name: Any) -> str:
    lower = str(name).lower()
    if lower in TYPES or lower == "any":
        return lower
    if lower not in SPELLINGS:
        raise ValueError(f"type {_quote(name)} is unknown; known are {', '.join(TYPES)} and any")
    return SPELLINGS[lower]


def _canonical(value: Any) -> str:
    """Returns a text that is the same for all values that JSON Schema considers equal."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return json.dumps(value, sort_keys=True)


def _quote(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 100 else f"{text[:99]}…"
