"""The tasks of BFCL as its own generator reads them: questions, functions, expected answers."""

import copy
import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from xlam_jax.errors import UserError, nearest

PYTHON = ("simple_python", "multiple", "parallel", "parallel_multiple")
LIVE = ("live_simple", "live_multiple", "live_parallel", "live_parallel_multiple")
MULTI_TURN = ("multi_turn_base", "multi_turn_miss_func", "multi_turn_miss_param", "multi_turn_long_context")
AST = (*PYTHON, "simple_java", "simple_javascript", *LIVE)
"""Calls are compared with those expected; nothing is executed."""
RELEVANCE = ("irrelevance", "live_irrelevance", "live_relevance")
"""Whether anything is called at all."""
CATEGORIES = (*AST, *RELEVANCE, *MULTI_TURN)
GROUPS: Mapping[str, tuple[str, ...]] = {
    "all": CATEGORIES,
    "ast": AST,
    "python": PYTHON,
    "non_live": (*PYTHON, "simple_java", "simple_javascript", "irrelevance"),
    "live": (*LIVE, "live_irrelevance", "live_relevance"),
    "relevance": RELEVANCE,
    "single_turn": (*AST, *RELEVANCE),
    "multi_turn": MULTI_TURN,
}
_ELSEWHERE = ("memory", "web_search", "format_sensitivity")

_DOCUMENTS = {
    "GorillaFileSystem": "gorilla_file_system",
    "MathAPI": "math_api",
    "MessageAPI": "message_api",
    "TwitterAPI": "posting_api",
    "TicketAPI": "ticket_api",
    "TradingBot": "trading_bot",
    "TravelAPI": "travel_booking",
    "VehicleControlAPI": "vehicle_control",
}
"""Class of a multi-turn task → the file that describes its functions."""


class Row(NamedTuple):
    """A task."""

    id: str
    category: str
    turns: list[list[dict[str, Any]]]
    """The messages of each of the user's turns; one turn but in multi-turn categories. An empty one hands out functions
    that were held back."""
    functions: list[dict[str, Any]]
    """As the checker takes them."""
    held_back: dict[int, list[dict[str, Any]]]
    """Turn → functions that the model has from then on."""
    expected: list[Any]
    """Possible answers, or each turn's calls as source text; nothing in categories of relevance."""
    raw: dict[str, Any]
    """The entry of BFCL's file."""

    @property
    def language(self) -> str:
        """python, java or javascript."""
        return (
            self.category.removeprefix("simple_") if self.category in ("simple_java", "simple_javascript") else "python"
        )


def chosen(text: str) -> tuple[str, ...]:
    """Categories from a list of names of them, and of groups, with commas. Raises `UserError`."""
    names: list[str] = []
    for name in filter(None, (part.strip() for part in text.split(","))):
        if name in _ELSEWHERE or name.startswith(("memory_", "web_search_")):
            raise UserError(f"categories: '{name}' needs services of others; run it with bfcl-eval's own command")
        if name not in CATEGORIES and name not in GROUPS:
            known = ", ".join([*GROUPS, *CATEGORIES])
            raise UserError(f"categories: no '{name}'; known: {known}{nearest(name, [*GROUPS, *CATEGORIES])}")
        names.extend(GROUPS.get(name, (name,)))
    if not names:
        raise UserError(f"categories: names none; known: {', '.join([*GROUPS, *CATEGORIES])}")
    return tuple(dict.fromkeys(names))


def read(folder: Path, category: str) -> list[Row]:
    """All rows of a category, in the file's order. Raises `UserError`."""
    entries = _lines(folder / f"BFCL_v4_{category}.json")
    if category in RELEVANCE:
        truths: Sequence[Any] = [[]] * len(entries)
    else:  # by position: some ids differ between the two files
        truths = [one["ground_truth"] for one in _lines(folder / "possible_answer" / f"BFCL_v4_{category}.json")]
    if len(truths) != len(entries):
        raise UserError(f"{folder}: {category} has {len(entries)} tasks and {len(truths)} answers; install it anew")
    return [_row(folder, category, *pair) for pair in zip(entries, truths, strict=True)]


def _row(folder: Path, category: str, entry: dict[str, Any], expected: list[Any]) -> Row:
    if category not in MULTI_TURN:
        return Row(entry["id"], category, entry["question"], entry["function"], {}, expected, entry)
    functions = [one for name in entry["involved_classes"] for one in _lines_once(folder, _DOCUMENTS[name])]
    missed = {int(turn): names for turn, names in entry.get("missed_function", {}).items()}
    held_back = {
        turn: [one for name in names for one in functions if one["name"] == name] for turn, names in missed.items()
    }
    away = {name for names in missed.values() for name in names}
    functions = [one for one in functions if one["name"] not in away]
    return Row(entry["id"], category, entry["question"], functions, held_back, expected, entry)


@cache
def _lines_once(folder: Path, name: str) -> list[dict[str, Any]]:
    return _lines(folder / "multi_turn_func_doc" / f"{name}.json")


def _lines(path: Path) -> list[dict[str, Any]]:
    try:
        with path.open(encoding="utf-8") as lines:
            return [json.loads(line) for line in lines if line.strip()]
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise UserError(f"{path}: is no file of JSON lines ({error})") from None


def described(functions: Sequence[Mapping[str, Any]], language: str) -> list[dict[str, Any]]:
    """Functions as a model is told them: with the language in the description, and arguments of Java and JavaScript as
    text, in which their literals are written."""
    told = copy.deepcopy([dict(one) for one in functions])
    for one in told:
        one["description"] += f" Note that the provided function is in {_SYNTAX[language]} syntax."
        if language != "python":
            for parameter in one["parameters"]["properties"].values():
                _as_text(parameter, _NAMES[language])
    return told


_SYNTAX = {"python": "Python 3", "java": "Java 8 SDK", "javascript": "JavaScript"}
_NAMES = {"java": "Java", "javascript": "JavaScript"}


def _as_text(parameter: dict[str, Any], language: str) -> None:
    """Makes a parameter a text that holds a literal, as BFCL words it."""
    kind = parameter["type"]
    if kind == "any":
        words = f" This parameter can be of any type of {language} object in string representation."
    else:
        words = f" This is {language} {kind} type parameter in string representation."
    if kind in (("ArrayList", "Array") if language == "Java" else ("array",)):
        items = parameter.pop("items")
        words += f" The list elements are of type {items['type']}; they are not in string representation."
    if kind == "dict" and language == "JavaScript" and "properties" in parameter:
        schema = json.dumps(parameter.pop("properties"))
        words += f" The dictionary entries have the following schema; they are not in string representation. {schema}"
    parameter["description"] += words
    parameter["type"] = "string"
