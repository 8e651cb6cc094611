"""A model that knows BFCL's answers, and gives them unchanged or with one wrong argument."""

import ast
import inspect
import json
from collections import defaultdict
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from xlam_jax.data.trajectory import ToolCall
from xlam_jax.evaluate.bfcl import rows
from xlam_jax.evaluate.bfcl.calls import tool_name
from xlam_jax.evaluate.bfcl.rows import Row
from xlam_jax.evaluate.endpoint import Answer

Call = tuple[str, dict[str, Any]]
WRONG_VALUE = "quite another value"


class OracleModel:
    """Answers the requests of a single row in turn."""

    def __init__(self, row: Row, mode: str = "fc", *, wrong: bool = False):
        self._mode = mode
        self._row = row
        if row.category in rows.MULTI_TURN:
            steps = [[_parse_turn(row, turn), []] if turn else [[]] for turn in row.expected]
            self._answers: list[list[Call]] = [step for turn in steps for step in turn]
        elif row.category in rows.RELEVANCE:
            self._answers = [[("anything", {})] if (row.category == "live_relevance") != wrong else []]
        else:
            self._answers = [[_make_call(row, expected) for expected in row.expected]]
        if wrong and row.category not in rows.RELEVANCE:
            calls_in_order = [call for calls in self._answers for call in calls]
            first = next(filter(_is_sensitive, calls_in_order), calls_in_order[0])
            self._answers = [
                [_change_argument(call) if call is first else call for call in calls] for calls in self._answers
            ]
        self.requests: list[tuple[list[dict[str, Any]], Any]] = []

    async def chat(self, messages: Sequence[dict[str, Any]], tools: Any = None, **options: Any) -> Answer:
        calls = self._answers[len(self.requests)]
        prompt = [dict(message) for message in messages]
        self.requests.append((prompt, tools))
        if self._mode == "prompt":
            return Answer(prompt, _write_calls(calls, self._row.language) if calls else "That is all.", (), "stop")
        tool_calls = tuple(
            ToolCall(f"call_{at}", tool_name(name), arguments) for at, (name, arguments) in enumerate(calls)
        )
        return Answer(prompt, "" if tool_calls else "That is all.", tool_calls, "tool_calls" if tool_calls else "stop")


def _make_call(row: Row, expected: dict[str, Any]) -> Call:
    ((name, possible),) = expected.items()
    parameters = next(function for function in row.functions if function["name"] == name)["parameters"]
    types, required = parameters["properties"], parameters["required"]
    arguments = {}
    for key, alternatives in possible.items():
        value = "" if alternatives == [""] and key in required else _pick(alternatives)
        if "" in alternatives and (value is None or key not in types):  # some answers contain unknown parameters
            continue
        arguments[key] = value if row.language == "python" else _literal(value, types[key], row.language)
    return name, arguments


def _pick(alternatives: list[Any]) -> Any:
    """Picks one of the possible values, also in nested values; None for a parameter to omit."""
    values = [value for value in alternatives if value != ""]
    if not values:
        return "" if len(alternatives) == 0 else None
    return _pick_nested(values[0])


def _pick_nested(value: Any) -> Any:
    if isinstance(value, dict):
        picked = {key: _pick(nested) if isinstance(nested, list) else nested for key, nested in value.items()}
        return {key: nested for key, nested in picked.items() if nested is not None or "" not in value[key]}
    if isinstance(value, list):
        return [_pick_nested(nested) for nested in value]
    return value


def _literal(value: Any, schema: dict[str, Any], language: str) -> str:
    """Returns a value as a Java or JavaScript literal."""
    kind, items = schema["type"], schema.get("items", {}).get("type")
    if isinstance(value, bool):
        return str(value).lower()
    if language == "javascript":
        return f"{value}n" if kind == "Bigint" else value if isinstance(value, str) else json.dumps(value)
    if isinstance(value, dict):
        puts = " ".join(f"put({json.dumps(key)}, {json.dumps(nested)});" for key, nested in value.items())
        return f"new HashMap<String, Object>() {{{{ {puts} }}}}"
    if isinstance(value, list):
        if kind == "Array":  # also for strings: the checker keeps quotes in an array's elements
            return f"new {items}[]{{{', '.join(map(str, value))}}}"
        written = ", ".join(f"'{nested}'" if items == "char" else _element(nested, items) for nested in value)
        return f"new ArrayList<{items}>(Arrays.asList({written}))"
    return str(value) + {"long": "L", "float": "f"}.get(kind, "")


def _element(value: Any, kind: str | None) -> str:
    return json.dumps(value) if isinstance(value, str) else str(value) + {"long": "L", "float": "f"}.get(kind or "", "")


def _parse_turn(row: Row, calls: list[str]) -> list[Call]:
    """Parses calls in source form into names and keyword arguments."""
    config = import_module("bfcl_eval.constants.executable_backend_config")
    classes = [
        getattr(import_module(config.CLASS_FILE_PATH_MAPPING[name]), name) for name in row.raw["involved_classes"]
    ]
    parsed = []
    for text in calls:
        node = ast.parse(text, mode="eval").body
        assert isinstance(node, ast.Call)
        assert isinstance(node.func, ast.Name)
        name = node.func.id
        method = next(getattr(cls, name) for cls in reversed(classes) if hasattr(cls, name))
        names = list(inspect.signature(method).parameters)[1:]
        arguments = dict(zip(names, map(ast.literal_eval, node.args), strict=False))
        parsed.append((name, arguments | {str(pair.arg): ast.literal_eval(pair.value) for pair in node.keywords}))
    return parsed


def _is_sensitive(call: Call) -> bool:
    """Returns whether the result depends on the first argument. Any text sets a flag, and some methods of the simulated
    classes ignore their argument."""
    name, arguments = call
    ignored = ("add_to_watchlist", "authenticate_travel")
    return name not in ignored and any(not isinstance(value, bool) for value in [*arguments.values()][:1])


def _change_argument(call: Call) -> Call:
    """Returns the call with another value for the first argument; adds an argument if there is none."""
    name, arguments = call
    key = next(iter(arguments), "more")
    return name, {**arguments, key: WRONG_VALUE}


def _write_calls(calls: list[Call], language: str) -> str:
    texts = []
    for name, arguments in calls:
        values = {
            key: value if language != "python" and not _is_string(value) else repr(value)
            for key, value in arguments.items()
        }
        texts.append(f"{name}({', '.join(f'{key}={value}' for key, value in values.items())})")
    return f"[{', '.join(texts)}]"


def _is_string(value: Any) -> bool:
    """Returns whether a Java or JavaScript literal is a string."""
    return not str(value).startswith(("new ", "[", "{", "true", "false")) and not str(value)[:1].isdigit()


def by_category(scores: Sequence[tuple[str, float]]) -> dict[str, tuple[int, int]]:
    """Category → (right, all)."""
    counted: dict[str, list[float]] = defaultdict(list)
    for category, score in scores:
        counted[category].append(score)
    return {category: (int(sum(values)), len(values)) for category, values in counted.items()}
