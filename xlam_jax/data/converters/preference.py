"""Preference pairs as other tools write them, read wherever a source's format is `pairs`.

* TRL: {"prompt", "chosen", "rejected", "tools"}, lists of chat messages or texts; without a prompt, or where the sides
  begin with it, each side is a whole conversation.
* OpenAI: {"input": {"messages", "tools"}, "preferred_output", "non_preferred_output"}.
* LLaMA-Factory's ranking rows: {"conversations", "chosen", "rejected", "system", "tools"}, the sides one
  {"from", "value"} each; or {"instruction", "input", "chosen", "rejected"} with texts.
"""

from typing import Any

from xlam_jax.data.converters import alpaca, openai, sharegpt
from xlam_jax.data.converters.common import ConvertRow, Repaired, field
from xlam_jax.data.problems import Report
from xlam_jax.data.trajectory import ROW_KEYS, InvalidTrajectory

SIDES = {"chosen": "preferred_output", "rejected": "non_preferred_output"}
"""The sides of a pair, and their names in OpenAI's rows."""


def is_other_layout(keys: Any) -> bool:
    """Whether the keys of a row are those of a pair in another layout than the project's own."""
    return "conversation" not in keys and (set(SIDES) <= set(keys) or set(SIDES.values()) <= set(keys))


def pair_row(row: dict[str, Any], name: str, repaired: Report) -> dict[str, Any]:
    """Returns a pair as `xlam_jax.data.pair.parse_pair` reads it; a row in no known layout stays as it is.

    `repaired` is called once for each repair, though both sides hold the prompt. Raises `InvalidTrajectory`.
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
        if instruction:  # prompts may differ where each side has its own; the reader reports that
            side["conversation"] = [{"role": "system", "content": instruction}, *side["conversation"]]
    scores = {f"{side}_score": row.get(f"{side}_score", row.get(f"score_{side}")) for side in SIDES}
    shared = {key: chosen.get(key) for key in ROW_KEYS - {"score", "conversation", "task_instruction"}}
    return (
        shared | scores | {"conversation": [], "chosen": chosen["conversation"], "rejected": rejected["conversation"]}
    )


def _converted(row: dict[str, Any], side: str, name: str, notes: dict[tuple[str, str], None]) -> dict[str, Any]:
    """One side as a unified row."""
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
            notes["unknown-key", f"`{key}` of the row is left out"] = None
    return unified


def _whole(row: dict[str, Any], side: str) -> tuple[ConvertRow, dict[str, Any]]:
    """The row of one side's whole conversation in a chat format, and what converts it."""
    known = {*SIDES, *SIDES.values(), "prompt", "input"} | {f"{name}_score" for name in SIDES}
    rest = {key: value for key, value in row.items() if key not in known | {f"score_{name}" for name in SIDES}}
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
    """Messages given as a list, as one message, or as the text of one."""
    if isinstance(value, str):
        value = {key: speaker, "content" if key == "role" else "value": value}
    return value if isinstance(value, list) else [value]
