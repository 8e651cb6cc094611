"""WebShop: logs of ReAct agents, one episode per row.

Raw: {"idx", "instruction", "score", "steps": [{"action", "observation"}, …]}; actions are "reset", "search[…]",
"click[…]" or "think[…]".
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from xlam_jax.data.converters.common import (
    Converted,
    Dropped,
    Repaired,
    StepDropped,
    call,
    convert_rows,
    field,
    tool,
)
from xlam_jax.data.trajectory import InvalidTrajectory

INSTRUCTION = "Buy the product that fits the request. Search the shop, open a product, choose its options, then buy it."
TEXT = {"type": "string"}
TOOLS = [
    tool("search", "Search the shop for products.", {"query": TEXT}, ["query"]),
    tool(
        "click", "Click a button, product or option of the page, named in [brackets].", {"element": TEXT}, ["element"]
    ),
]
PARAMETER = {"search": "query", "click": "element"}


def convert(paths: list[Path]) -> Iterator[Converted | Dropped]:
    """Converts searches and clicks to calls; thoughts are the text of the next call.

    Steps that the shop answered with "Invalid" are dropped with their thoughts. The last observation (the score) and
    thoughts without an action after them are dropped. Long actions are truncated in the log, without the closing
    bracket; they are kept.
    """
    return convert_rows(paths, convert_row)


def convert_row(row: dict[str, Any], name: str) -> Iterator[dict[str, Any] | StepDropped | Repaired]:
    """Converts one episode."""
    turns: list[dict[str, Any]] = [{"role": "user", "content": field(row, "instruction", str)}]
    thoughts: list[str] = []
    number = 0
    for i, step in enumerate(field(row, "steps", list)):
        action, observation = field(step, "action", str), field(step, "observation", str)
        kind, _, argument = action.strip().partition("[")
        if action == "reset":
            continue
        if "[" in action and kind in ("think", *PARAMETER) and not argument.endswith("]"):
            yield Repaired("unclosed-action", f"step {i}: {action}")
        argument = argument.removesuffix("]")
        if "[" in action and kind == "think":
            thoughts.append(argument.strip())
            continue
        thought = "\n".join(thoughts)
        thoughts = []
        if "Invalid" in observation:
            yield StepDropped("invalid-action", f"step {i}: {action}")
        elif "[" not in action or kind not in PARAMETER:
            yield StepDropped("unknown-action", f"step {i}: {action}")
        else:
            number += 1
            calls = [call(number, kind, {PARAMETER[kind]: argument})]
            turns.append({"role": "assistant", "content": thought, "tool_calls": calls})
            turns.append(
                {"role": "tool", "tool_call_id": f"call_{number}", "name": kind, "content": observation.rstrip()}
            )
    if thoughts:
        yield StepDropped("thought-without-action", thoughts[0])
    if number == 0:
        raise InvalidTrajectory("no-assistant-turn", "no step has a valid search or click")
    yield {
        "unique_trajectory_id": f"webshop_{row.get('idx', name)}",
        "source": "webshop",
        "score": row.get("score"),
        "task_instruction": INSTRUCTION,
        "tools": TOOLS,
        "conversation": turns[:-1],
    }
