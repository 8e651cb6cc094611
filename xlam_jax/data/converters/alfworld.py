"""ALFWorld: household tasks played by MINT's agents (Wang et al. 2023, arXiv:2309.10691), one episode per line.

Raw: {"state": {"history": [{"role", "content"}, …], "success"}, "task": {"task_id", "prompt"}}. The first turn has
MINT's rules, the functions of the environment, an example and the task. The agent thinks in <thought>, and either runs
Python that calls the functions in <execute>, or proposes a <solution>; the environment answers "Observation: …".
"""

import re
from collections.abc import Iterator
from itertools import pairwise
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

INSTRUCTION = (
    "Solve the household task: run Python code that calls the functions of the environment, and propose a solution "
    "when the task is done."
)
TEXT = {"type": "string"}
PARAMETER = {"execute": "code", "solution": "answer"}
LIMITS = re.compile(r"You have \d+ chances? to interact[^\n]*")
OPENING = re.compile(r"<(execute|solution)>")
SPEAKER = re.compile(r"Assistant\s*(?::|：|<\|im_sep\|>)")


def convert(paths: list[Path]) -> Iterator[Converted | Dropped]:
    """Converts the two actions of a MINT agent to calls of `execute` and `solution`, with their thoughts as text.

    The functions of the environment (goto, take_from, …) are called from Python, often in loops over what they return.
    So the description of `execute` has them, and they are not tools themselves. The example and the rules for tags are
    dropped. A turn becomes the call that the environment ran: its solution if it has one, else its code, with several
    blocks joined. Where code was ignored in favor of a solution, the agent had imagined its results: that turn has
    `loss: false`. Steps without code and solution are dropped, and so is an observation at the end. The score is 1 or 0
    for the episode's success.
    """
    return convert_rows(paths, convert_row)


def convert_row(row: dict[str, Any], name: str) -> Iterator[dict[str, Any] | StepDropped | Repaired]:
    """Converts one episode."""
    state, task = field(row, "state", dict), field(row, "task", dict)
    history = field(state, "history", list)
    rules = field(history[0], "content", str) if history else ""
    functions, end, _ = rules.partition("Tool function available")[2].partition("\n")[2].partition("\n---\n")
    if not end:
        raise InvalidTrajectory("missing-field", "the first turn does not list the functions of the environment")
    limits = LIMITS.search(rules)
    turns: list[dict[str, Any]] = [{"role": "user", "content": field(task, "prompt", str)}]
    number, action = 0, ""
    for i, message in enumerate(history[1:], start=1):
        role, content = field(message, "role", str), field(message, "content", str)
        if role == "assistant":
            action, turn, notes = _turn(content, f"turn {i}", number + 1)
            yield from notes
            if turn:
                number += 1
                turns.append(turn)
        elif role == "user" and action:
            observation = content.removeprefix("Observation:").strip()
            turns.append({"role": "tool", "tool_call_id": f"call_{number}", "name": action, "content": observation})
        elif role != "user":
            raise InvalidTrajectory("unknown-role", f"turn {i} has role '{role}', known roles: user, assistant")
    if turns[-1]["role"] == "tool":
        turns.pop()  # no answer follows it
    if number == 0:
        raise InvalidTrajectory("no-assistant-turn", "no turn has code or a solution")
    identity = "_".join(str(part) for part in ("alfworld", task.get("task_id"), name) if part)
    code = "Run Python code in a notebook, which keeps its variables. These functions are imported:\n"
    yield {
        "unique_trajectory_id": identity,
        "source": "alfworld",
        "score": float(field(state, "success", bool)),
        "task_instruction": f"{INSTRUCTION} {limits[0]}" if limits else INSTRUCTION,
        "tools": [
            tool("execute", code + functions.strip(), {"code": TEXT}, ["code"]),
            tool("solution", "Propose a solution.", {"answer": TEXT}, ["answer"]),
        ],
        "conversation": turns,
    }


def _turn(content: str, where: str, number: int) -> tuple[str, dict[str, Any] | None, list[Repaired | StepDropped]]:
    """Returns (name of the tool that the environment ran, "" for none; assistant turn or None; repairs)."""
    action = "solution" if "<solution>" in content else "execute"
    blocks = [content[start:end].strip() for start, end in _blocks(content, action)]
    argument = "\n".join(blocks)
    if not argument:
        return "", None, [StepDropped("invalid-action", f"{where}: {content.strip()[:200]}")]
    edges = [(0, 0), *_blocks(content, "execute", "solution"), (len(content), len(content))]
    prose = [content[end:start] for (_, end), (start, _) in pairwise(edges)]
    turn: dict[str, Any] = {"role": "assistant", "content": _plain(prose[0])}
    notes: list[Repaired | StepDropped] = []
    if len(blocks) > 1:
        notes.append(Repaired("joined-blocks", f"{where} has {len(blocks)} <{action}>, which are joined"))
    if action == "solution" and "<execute>" in content:
        notes.append(Repaired("ignored-code", f"{where} has code and a solution; kept without loss"))
        turn["loss"] = False
    elif after := _plain(" ".join(prose[1:])):
        notes.append(Repaired("text-after-action", f"{where}: {after[:200]}"))
    turn["tool_calls"] = [call(number, action, {PARAMETER[action]: argument})]
    return action, turn, notes


def _blocks(content: str, *tags: str) -> list[tuple[int, int]]:
    """Returns the span of the text between each pair of outermost tags, in linear time."""
    blocks: list[tuple[int, int]] = []
    closed, at = set(tags), 0
    while opening := OPENING.search(content, at):
        tag, at = opening[1], opening.end()
        if tag in closed:
            end = content.find(f"</{tag}>", at)
            if end < 0:
                closed.remove(tag)
            else:
                blocks.append((at, end))
                at = end
    return blocks


def _plain(text: str) -> str:
    return SPEAKER.sub("", re.sub(r"</?(thought|execute|solution)>", "", text)).strip()
