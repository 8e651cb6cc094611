"""Alpaca: one instruction and its answer, after earlier questions and answers.

Raw: {"instruction", "input", "output", "system", "history": [["question", "answer"], …]}; only `instruction` and
`output` are required.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from xlam_jax.data.converters.common import Converted, Dropped, Repaired, convert_rows, field, take_tools
from xlam_jax.data.trajectory import InvalidTrajectory

KEYS = ("instruction", "input", "output", "system", "history", "id")


def convert(paths: list[Path]) -> Iterator[Converted | Dropped]:
    """Converts rows; the input is on the line after the instruction, `system` becomes the task instruction."""
    return convert_rows(paths, convert_row)


def convert_row(row: dict[str, Any], name: str) -> Iterator[dict[str, Any] | Repaired]:
    """Converts one row. `source` and `score`, which some files add, are kept."""
    repairs: list[Repaired] = []
    rest = {key: value for key, value in row.items() if key not in KEYS}
    system = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    if system and not rest.get("tools"):
        rest["tools"] = take_tools(system, [], repairs)
    turns: list[dict[str, Any]] = []
    for i, pair in enumerate(field(row, "history", list) if row.get("history") is not None else []):
        match pair:
            case [str(question), str(answer)]:
                turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            case _:
                raise InvalidTrajectory("bad-turn", f"round {i} of `history` is not a pair of texts")
    parts = [field(row, "instruction", str), field(row, "input", str) if row.get("input") is not None else ""]
    turns.append({"role": "user", "content": "\n".join(part for part in parts if part)})
    turns.append({"role": "assistant", "content": field(row, "output", str)})
    identity = row.get("id")
    yield from repairs
    yield {
        **rest,
        "unique_trajectory_id": name if identity is None else identity,
        "task_instruction": system[0]["content"] if system else "",
        "conversation": turns,
    }
