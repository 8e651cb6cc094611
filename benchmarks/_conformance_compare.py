"""Compares the sequences of a peer with the expected ones, turn by turn.

A trained turn is a context (all tokens before it) and an answer (the trained tokens). It does not matter in how many
sequences a peer puts the turns of a row, nor what follows the last trained token.
"""

import json
import re
from collections.abc import Callable, Iterable, Sequence
from difflib import SequenceMatcher
from itertools import groupby
from typing import Any, NamedTuple

_SHOWN = 48
"""Longest excerpt of tokens in a table, in characters."""
PAST_END = "trained past the end"
"""The kind of defect of tokens after the end token, where a server has stopped; it does little harm."""
_CALL = re.compile(r"<tool_call>\s*(.*?)\s*</tool_call>", re.DOTALL)

Ids = list[int]
Decode = Callable[[Ids], str]


class Defect(NamedTuple):
    """One difference from what is right."""

    kind: str
    turn: int
    """The number of the trained turn in the row, from 1; 0 for the row as a whole."""
    expected: str
    actual: str
    expected_ids: Ids = []  # noqa: RUF012 - never changed
    actual_ids: Ids = []  # noqa: RUF012 - never changed


class Turn(NamedTuple):
    """A trained turn."""

    context: Ids
    answer: Ids


def turns(sequences: Iterable[tuple[Sequence[int], Sequence[bool]]]) -> list[Turn]:
    """Returns the trained turns of sequences, which are (token ids, whether each is trained)."""
    result: list[Turn] = []
    for ids, trained in sequences:
        position = 0
        for flag, group in groupby(trained):
            size = len(list(group))
            if flag:
                result.append(Turn(list(ids[:position]), list(ids[position : position + size])))
            position += size
    return result


def compare(expected: Sequence[Turn], actual: Sequence[Turn], decode: Decode) -> list[Defect]:
    """Returns the defects of the turns of a row."""
    defects: list[Defect] = []
    rest = list(actual)
    in_order = len(expected) == len(actual)
    for number, turn in enumerate(expected, start=1):
        match = rest[0] if in_order else _closest(turn, rest)
        if match is None:
            defects.append(_defect("not trained", number, turn.answer, [], decode))
            continue
        rest.remove(match)
        defects += _differences(turn, match, number, decode)
    return [*defects, *(_defect("also trained", 0, [], turn.answer, decode) for turn in rest)]


def _closest(turn: Turn, actual: Sequence[Turn]) -> Turn | None:
    """Returns the turn whose answer is most like that of `turn`, the earlier one of two equals; None if none is."""
    best, score = None, 0.3
    for other in actual:
        ratio = SequenceMatcher(None, turn.answer, other.answer, autojunk=False).ratio()
        ratio += 0.01 * (other.context == turn.context)
        if ratio > score:
            best, score = other, ratio
    return best


def _differences(expected: Turn, actual: Turn, number: int, decode: Decode) -> list[Defect]:
    defects: list[Defect] = []
    context = actual.context
    if (at := _place(expected.answer, actual.answer)) is not None:
        context = context + actual.answer[:at]
        after = actual.answer[at + len(expected.answer) :]
        for kind, extra in (("also trained", actual.answer[:at]), (PAST_END, after)):
            if extra:
                defects.append(_defect(kind, number, [], extra, decode))
        wanted = expected.context
    elif (at := _place(actual.answer, expected.answer)) is not None:
        for missing in (expected.answer[:at], expected.answer[at + len(actual.answer) :]):
            if missing:
                defects.append(_defect("not trained", number, missing, [], decode))
        wanted = expected.context + expected.answer[:at]
    else:
        before, after = (_CALL.findall(decode(turn.answer)) for turn in (expected, actual))
        changed = next((pair for pair in zip(before, after, strict=False) if _value(pair[0]) != _value(pair[1])), None)
        if changed:
            texts = [_excerpt(text[text.find('"arguments"') :]) for text in changed]
            defects.append(Defect("arguments changed", number, texts[0], texts[1], expected.answer, actual.answer))
        else:
            defects.append(_first_difference("other answer", number, expected.answer, actual.answer, decode))
        wanted = expected.context
        if expected.context[: len(context)] == context or context[: len(wanted)] == wanted:
            return defects  # the answer begins earlier or later, which is said already
    if context != wanted:
        defects.append(_first_difference("other prompt", number, wanted, context, decode))
    return defects


def _place(part: Ids, whole: Ids) -> int | None:
    """Returns the index at which `whole` contains `part`."""
    return next((at for at in range(len(whole) - len(part) + 1) if whole[at : at + len(part)] == part), None)


def _value(call: str) -> Any:
    """Returns a call as a JSON value, or as text if it is not JSON."""
    try:
        return json.loads(call)
    except ValueError:
        return call


def _first_difference(kind: str, number: int, expected: Ids, actual: Ids, decode: Decode) -> Defect:
    pairs = zip(expected, actual, strict=False)
    at = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(expected), len(actual)))
    return _defect(kind, number, expected[at:], actual[at:], decode)


def _defect(kind: str, number: int, expected: Ids, actual: Ids, decode: Decode) -> Defect:
    texts = [_excerpt(decode(expected)), _excerpt(decode(actual))]
    if texts[0] == texts[1]:  # other tokens of the same text
        texts = [f"{ids[:3]} {text}" for ids, text in zip((expected, actual), texts, strict=True)]
    return Defect(kind, number, texts[0], texts[1], expected, actual)


def _excerpt(text: str) -> str:
    return text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"
