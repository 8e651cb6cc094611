"""A model that knows BFCL's answers: what it would say to each task, right or with one argument changed."""

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
OTHER = "quite another value"


class Knowing:
    """Answers a row's requests one after another. One model serves one row."""

    def __init__(self, row: Row, mode: str = "fc", *, wrong: bool = False):
        self._mode = mode
        self._row = row
        if row.category in rows.MULTI_TURN:
            steps = [[_turn(row, turn), []] if turn else [[]] for turn in row.expected]
            self._answers: list[list[Call]] = [step for turn in steps for step in turn]
        elif row.category in rows.RELEVANCE:
            self._answers = [[("anything", {})] if (row.category == "live_relevance") != wrong else []]
        else:
            self._answers = [[_single(row, expected) for expected in row.expected]]
        if wrong and row.category not in rows.RELEVANCE:
            made = [call for calls in self._answers for call in calls]
            first = next(filter(_matters, made), made[0])
            self._answers = [[_changed(one) if one is first else one for one in calls] for calls in self._answers]
        self.requests: list[tuple[list[dict[str, Any]], Any]] = []

    async def chat(self, messages: Sequence[dict[str, Any]], tools: Any = None, **options: Any) -> Answer:
        calls = self._answers[len(self.requests)]
        asked = [dict(message) for message in messages]
        self.requests.append((asked, tools))
        if self._mode == "prompt":
            return Answer(asked, _written(calls, self._row.language) if calls else "That is all.", (), "stop")
        made = tuple(ToolCall(f"call_{at}", tool_name(name), given) for at, (name, given) in enumerate(calls))
        return Answer(asked, "" if made else "That is all.", made, "tool_calls" if made else "stop")


def _single(row: Row, expected: dict[str, Any]) -> Call:
    ((name, possible),) = expected.items()
    parameters = next(one for one in row.functions if one["name"] == name)["parameters"]
    types, required = parameters["properties"], parameters["required"]
    arguments = {}
    for key, alternatives in possible.items():
        value = "" if alternatives == [""] and key in required else _pick(alternatives)
        if "" in alternatives and (
            value is None or key not in types
        ):  # some answers name parameters that are not there
            continue
        arguments[key] = value if row.language == "python" else _literal(value, types[key], row.language)
    return name, arguments


def _pick(alternatives: list[Any]) -> Any:
    """One of the possible values, with its own alternatives picked; None where it is best left out."""
    given = [one for one in alternatives if one != ""]
    if not given:
        return "" if len(alternatives) == 0 else None
    return _inner(given[0])


def _inner(value: Any) -> Any:
    if isinstance(value, dict):
        picked = {key: _pick(one) if isinstance(one, list) else one for key, one in value.items()}
        return {key: one for key, one in picked.items() if one is not None or "" not in value[key]}
    if isinstance(value, list):
        return [_inner(one) for one in value]
    return value


def _literal(value: Any, schema: dict[str, Any], language: str) -> str:
    """A value as Java or JavaScript write it."""
    kind, items = schema["type"], schema.get("items", {}).get("type")
    if isinstance(value, bool):
        return str(value).lower()
    if language == "javascript":
        return f"{value}n" if kind == "Bigint" else value if isinstance(value, str) else json.dumps(value)
    if isinstance(value, dict):
        puts = " ".join(f"put({json.dumps(key)}, {json.dumps(one)});" for key, one in value.items())
        return f"new HashMap<String, Object>() {{{{ {puts} }}}}"
    if isinstance(value, list):
        if kind == "Array":  # of strings as well: the checker leaves quotes in an array's elements
            return f"new {items}[]{{{', '.join(map(str, value))}}}"
        written = ", ".join(f"'{one}'" if items == "char" else _element(one, items) for one in value)
        return f"new ArrayList<{items}>(Arrays.asList({written}))"
    return str(value) + {"long": "L", "float": "f"}.get(kind, "")


def _element(value: Any, kind: str | None) -> str:
    return json.dumps(value) if isinstance(value, str) else str(value) + {"long": "L", "float": "f"}.get(kind or "", "")


def _turn(row: Row, calls: list[str]) -> list[Call]:
    """Calls in source form, as names with arguments by keyword."""
    config = import_module("bfcl_eval.constants.executable_backend_config")
    classes = [getattr(import_module(config.CLASS_FILE_PATH_MAPPING[one]), one) for one in row.raw["involved_classes"]]
    made = []
    for text in calls:
        node = ast.parse(text, mode="eval").body
        assert isinstance(node, ast.Call)
        assert isinstance(node.func, ast.Name)
        name = node.func.id
        method = next(getattr(one, name) for one in reversed(classes) if hasattr(one, name))
        names = list(inspect.signature(method).parameters)[1:]
        arguments = dict(zip(names, map(ast.literal_eval, node.args), strict=False))
        made.append((name, arguments | {str(one.arg): ast.literal_eval(one.value) for one in node.keywords}))
    return made


def _matters(call: Call) -> bool:
    """Whether another first argument makes a difference: not to a flag that any text sets, nor where the simulated
    class does not look at it."""
    name, arguments = call
    ignored = ("add_to_watchlist", "authenticate_travel")
    return name not in ignored and any(not isinstance(value, bool) for value in [*arguments.values()][:1])


def _changed(call: Call) -> Call:
    """With one argument of another value; where there is none, with one too many."""
    name, arguments = call
    key = next(iter(arguments), "more")
    return name, {**arguments, key: OTHER}


def _written(calls: list[Call], language: str) -> str:
    texts = []
    for name, arguments in calls:
        values = {
            key: one if language != "python" and not _quoted(one) else repr(one) for key, one in arguments.items()
        }
        texts.append(f"{name}({', '.join(f'{key}={value}' for key, value in values.items())})")
    return f"[{', '.join(texts)}]"


def _quoted(value: Any) -> bool:
    """Whether a literal of Java or JavaScript that came as text is a string."""
    return not str(value).startswith(("new ", "[", "{", "true", "false")) and not str(value)[:1].isdigit()


def by_category(scores: Sequence[tuple[str, float]]) -> dict[str, tuple[int, int]]:
    """Category → (right, all)."""
    counted: dict[str, list[float]] = defaultdict(list)
    for category, score in scores:
        counted[category].append(score)
    return {category: (int(sum(one)), len(one)) for category, one in counted.items()}
