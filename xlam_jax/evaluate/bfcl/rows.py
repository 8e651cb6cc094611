"""Reads the tasks of BFCL like its own generator: questions, functions, expected answers."""

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
"""Categories in which calls are compared with the expected ones; nothing is executed."""
RELEVANCE = ("irrelevance", "live_irrelevance", "live_relevance")
"""Categories that only check whether there is a call."""
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
_UNSUPPORTED = ("memory", "web_search", "format_sensitivity")

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
"""Class of a multi-turn task → name of the file with its functions."""


class Row(NamedTuple):
    """A task."""

    id: str
    category: str
    turns: list[list[dict[str, Any]]]
    """The messages of each user turn; more than one turn only in multi-turn categories. An empty turn adds functions
    that were held back."""
    functions: list[dict[str, Any]]
    """In the form that the checker expects."""
    held_back: dict[int, list[dict[str, Any]]]
    """Turn → functions that are added in that turn."""
    expected: list[Any]
    """Possible answers, or the calls of each turn as source text; empty in the `RELEVANCE` categories."""
    raw: dict[str, Any]
    """The entry of BFCL's file."""

    @property
    def language(self) -> str:
        """python, java or javascript."""
        return (
            self.category.removeprefix("simple_") if self.category in ("simple_java", "simple_javascript") else "python"
        )


def parse_categories(text: str) -> tuple[str, ...]:
    """Parses a comma-separated list of categories and groups into categories. Raises `UserError`."""
    names: list[str] = []
    for name in filter(None, (part.strip() for part in text.split(","))):
        if name in _UNSUPPORTED or name.startswith(("memory_", "web_search_")):
            raise UserError(f"categories: '{name}' needs external services; run it with bfcl-eval's own command")
        if name not in CATEGORIES and name not in GROUPS:
            supported = ", ".join([*GROUPS, *CATEGORIES])
            raise UserError(
                f"categories: there is no '{name}'; known: {supported}{nearest(name, [*GROUPS, *CATEGORIES])}"
            )
        names.extend(GROUPS.get(name, (name,)))
    if not names:
        raise UserError(f"categories: is empty; known: {', '.join([*GROUPS, *CATEGORIES])}")
    return tuple(dict.fromkeys(names))


def read_rows(folder: Path, category: str) -> list[Row]:
    """Returns all rows of a category, in the order of the file. Raises `UserError`."""
    entries = _read_lines(folder / f"BFCL_v4_{category}.json")
    if category in RELEVANCE:
        truths: Sequence[Any] = [[]] * len(entries)
    else:  # matched by position, as some ids differ between the two files
        truths = [
            answer["ground_truth"] for answer in _read_lines(folder / "possible_answer" / f"BFCL_v4_{category}.json")
        ]
    if len(truths) != len(entries):
        raise UserError(f"{folder}: {category} has {len(entries)} tasks and {len(truths)} answers; reinstall bfcl-eval")
    return [_make_row(folder, category, *pair) for pair in zip(entries, truths, strict=True)]


def _make_row(folder: Path, category: str, entry: dict[str, Any], expected: list[Any]) -> Row:
    if category not in MULTI_TURN:
        return Row(entry["id"], category, entry["question"], entry["function"], {}, expected, entry)
    functions = [
        function for name in entry["involved_classes"] for function in _read_document(folder, _DOCUMENTS[name])
    ]
    missed = {int(turn): names for turn, names in entry.get("missed_function", {}).items()}
    held_back = {
        turn: [function for name in names for function in functions if function["name"] == name]
        for turn, names in missed.items()
    }
    missed_names = {name for names in missed.values() for name in names}
    functions = [function for function in functions if function["name"] not in missed_names]
    return Row(entry["id"], category, entry["question"], functions, held_back, expected, entry)


@cache
def _read_document(folder: Path, name: str) -> list[dict[str, Any]]:
    return _read_lines(folder / "multi_turn_func_doc" / f"{name}.json")


def _read_lines(path: Path) -> list[dict[str, Any]]:
    try:
        with path.open(encoding="utf-8") as lines:
            return [json.loads(line) for line in lines if line.strip()]
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise UserError(f"{path}: is not a file of JSON lines ({error})") from None


def describe(functions: Sequence[Mapping[str, Any]], language: str) -> list[dict[str, Any]]:
    """Returns the functions for a request: the description names the language, and arguments of Java and JavaScript are
    strings with the source text of their literals."""
    described = copy.deepcopy([dict(function) for function in functions])
    for function in described:
        function["description"] += f" Note that the provided function is in {_SYNTAX[language]} syntax."
        if language != "python":
            for parameter in function["parameters"]["properties"].values():
                _convert_to_text(parameter, _NAMES[language])
    return described


_SYNTAX = {"python": "Python 3", "java": "Java 8 SDK", "javascript": "JavaScript"}
_NAMES = {"java": "Java", "javascript": "JavaScript"}


def _convert_to_text(parameter: dict[str, Any], language: str) -> None:
    """Converts a parameter to a string that contains a literal. The texts are BFCL's."""
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
