"""Hammer, in the layout of xlam-function-calling-60k (see `xlam60k`).

Raw: {"query", "tools", "answers"}; tools are flat with Python type spellings, tools and answers may be JSON in strings.
The query may be a list of turns: text by the "agent", calls by the "assistant" (a JSON array in a code fence), results
by the "tool"; the last turn ends with "Generate API Request:".
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from xlam_jax.data.converters.common import Converted, Dropped, Repaired, convert_rows, field
from xlam_jax.data.converters.xlam60k import json_list, tool_calls, tool_schemas
from xlam_jax.data.row_json import parse_json
from xlam_jax.data.trajectory import InvalidTrajectory

REQUEST = "Generate API Request:"


def convert(paths: list[Path]) -> Iterator[Converted | Dropped]:
    """Converts the answers to one assistant turn, whose text is that of the agent directly before them.

    Earlier assistant turns of a dialogue have `loss: false`, because each is the answer of a separate row.
    """
    return convert_rows(paths, convert_row)


def convert_row(row: dict[str, Any], name: str) -> Iterator[dict[str, Any] | Repaired]:
    """Converts one row."""
    tools, answers = tool_schemas(json_list(row, "tools")), json_list(row, "answers")
    query = row.get("query")
    dialogue = [{"role": "user", "content": query}] if isinstance(query, str) else query
    if not isinstance(dialogue, list) or not dialogue:
        raise InvalidTrajectory("missing-field", f"`query` is a {type(query).__name__}, not text or a list of turns")
    turns: list[dict[str, Any]] = []
    repairs: list[Repaired] = []
    number = 0

    def add_calls(items: list[Any]) -> None:
        nonlocal number
        calls, changed = tool_calls(items, tools, number)
        number += len(calls)
        repairs.extend(changed)
        if not (turns and turns[-1]["role"] == "assistant" and "tool_calls" not in turns[-1]):
            turns.append({"role": "assistant", "content": ""})
        turns[-1]["tool_calls"] = calls

    for i, message in enumerate(dialogue):
        role, content = field(message, "role", str), field(message, "content", str)
        content = content.removesuffix(REQUEST).rstrip() if i == len(dialogue) - 1 else content
        if role == "assistant":
            calls = parse_json(content.strip("`"))
            if not isinstance(calls, list):
                raise InvalidTrajectory("bad-call", f"turn {i}: {content}")
            add_calls(calls)
        elif role == "agent" and turns and turns[-1]["role"] == "assistant" and "tool_calls" not in turns[-1]:
            turns[-1]["content"] += "\n" + content
        else:
            turns.append({"role": "assistant" if role == "agent" else role, "content": content})
    if answers:
        add_calls(answers)
    for turn in turns[:-1]:
        if turn["role"] == "assistant":
            turn["loss"] = False
    yield from repairs
    yield {
        "unique_trajectory_id": f"hammer_{row.get('id', name)}",
        "source": "hammer",
        "tools": tools,
        "conversation": turns,
    }
