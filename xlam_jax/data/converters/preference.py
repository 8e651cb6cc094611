"""Preference pairs in the layouts of other tools, which are read wherever a source's format is `pairs`.

* TRL: {"prompt", "chosen", "rejected", "tools"}, lists of chat messages or texts; without a prompt, or if the sides
  begin with it, each side is a complete conversation.
* OpenAI: {"input": {"messages", "tools"}, "preferred_output", "non_preferred_output"}.
* LLaMA-Factory's ranking rows: {"conversations", "chosen", "rejected", "system", "tools"}, where each side is one
  {"from", "value"}; or {"instruction", "input", "chosen", "rejected"} with texts.
"""

from typing import Any

from xlam_jax.data.converters import alpaca, openai, sharegpt
from xlam_jax.data.converters.common import ConvertRow, Repaired, field
from xlam_jax.data.problems import Report
from xlam_jax.data.trajectory import ROW_KEYS, InvalidTrajectory

SIDES = {"chosen": "preferred_output", "rejected": "non_preferred_output"}
"""Sides of a pair → their names in OpenAI's rows."""


def is_other_layout(keys: Any) -> bool:
    """Whether `keys`, the keys of a row, are those of a pair in a layout of another tool."""
    return "conversation" not in keys and (set(SIDES) <= set(keys) or set(SIDES.values()) <= set(keys))


def pair_row(row: dict[str, Any], name: str, repaired: Report) -> dict[str, Any]:
    """Converts a pair to the form that `xlam_jax.data.pair.parse_pair` reads; other rows stay as they are.

    `repaired` is called once per repair, although both sides contain the prompt. Raises `InvalidTrajectory`.
    """
    if not is_other_layout(row):
        return row
    notes: dict[tuple[str, str], None] = {}
    sides = {side: _converted(row, side, name, notes) for side in SIDES}
    for reason, detail in notes:
        repaired(reason, detail)
    chosen, rejected = sides.values()
    for side in sides.values():
        instruction = side.pop("task_instruction", None)
        if instruction:  # prompts may differ if each side has one; the parser reports that
            side["conversation"] = [{"role": "system", "content": instruction}, *side["conversation"]]
    scores = {f"{side}_score": row.get(f"{side}_score", row.get(f"score_{side}")) for side in SIDES}
    shared = {key: chosen.get(key) for key in ROW_KEYS - {"score", "conversation", "task_instruction"}}
    return (
        shared | scores | {"conversation": [], "chosen": chosen["conversation"], "rejected": rejected["conversation"]}
    )


def _converted(row: dict[str, Any], side: str, name: str, notes: dict[tuple[str, str], None]) -> dict[str, Any]:
    """Converts one side to a unified row."""
    convert_row, whole = _whole(row, side)
    unified: dict[str, Any] = {}
    try:
        for item in convert_row(whole, name):
            if isinstance(item, InvalidTrajectory):
                raise item
            if isinstance(item, Repaired):
                notes[item.reason, item.detail] = None
            elif isinstance(item, dict):
                unified = item
    except InvalidTrajectory as invalid:
        raise InvalidTrajectory(invalid.reason, f"{side}: {invalid.detail}") from None
    for key, value in unified.items():
        if key not in ROW_KEYS and value is not None:
            notes["unknown-key", f"`{key}` of the row is dropped"] = None
    return unified


def _whole(row: dict[str, Any], side: str) -> tuple[ConvertRow, dict[str, Any]]:
    """Returns (converter, row with the complete conversation of one side in the converter's format)."""
    pair_keys = {*SIDES, *SIDES.values(), "prompt", "input"} | {f"{name}_score" for name in SIDES}
    rest = {key: value for key, value in row.items() if key not in pair_keys | {f"score_{name}" for name in SIDES}}
    if SIDES[side] in row:
        prompt = field(row, "input", dict)
        answer = _messages(row[SIDES[side]], "role", "assistant")
        return openai.convert_row, rest | prompt | {"messages": [*field(prompt, "messages", list), *answer]}
    if "conversations" in row:
        answer = _messages(row[side], "from", "gpt")
        return sharegpt.convert_row, rest | {"conversations": [*field(row, "conversations", list), *answer]}
    if "instruction" in row:
        return alpaca.convert_row, rest | {"input": row.get("input"), "output": row[side]}
    answer = _messages(row[side], "role", "assistant")
    prompt = [] if row.get("prompt") is None else _messages(row["prompt"], "role", "user")
    first = answer[0] if answer else None
    if isinstance(first, dict) and first.get("role") in ("system", "developer", "user"):
        prompt = []
    return openai.convert_row, rest | {"messages": [*prompt, *answer]}


def _messages(value: Any, key: str, speaker: str) -> list[Any]:
    """A list of messages, from a list, from one message, or from the text of one."""
    if isinstance(value, str):
        value = {key: speaker, "content" if key == "role" else "value": value}
    return value if isinstance(value, list) else [value]
