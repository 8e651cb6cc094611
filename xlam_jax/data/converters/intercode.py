"""InterCode: tasks solved with bash commands or SQL queries (Yang et al. 2023, arXiv:2306.14898).

Raw: one JSON object of episodes. The benchmark's agents log {"environment": "ic_bash" or "ic_sql", "query",
"turn_history": {"actions", "observations", "rewards", …}, "summary": {"max_reward", …}}; ReAct agents also have
"thoughts" and write "execute[…]" and "submit". The environment itself logs, on "submit", {"environment", "query",
"reward", "trajectory": [{"action", "observation"}, …]}.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

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

TEXT = {"type": "string"}
BASH = tool("bash", "Run a command in the shell.", {"command": TEXT}, ["command"])
SQL = tool("sql", "Run a query, such as SHOW TABLES, DESC table or SELECT.", {"query": TEXT}, ["query"])
SUBMIT = tool("submit", "Submit the output of the last command or query.", {}, [])
ENVIRONMENTS = {
    "ic_bash": (BASH, "command", "Do what is asked with commands in a Bourne shell. Submit when it is done."),
    "ic_sql": (
        SQL,
        "query",
        "Answer the question with queries of a MySQL database. Submit when the output answers it.",
    ),
}
NO_CODE = ("No BASH code was found", "No SQL code was found", "Error executing query: Your last `execute` action")
BLOCKED = "blocked"  # replaces an action that the model's provider refused
OUT_OF_TURNS = "EXCEEDED MAX TURNS"  # the thought of a submission by the benchmark, not by the agent


class Step(NamedTuple):
    """Thought and action of the agent, and the observation of the environment."""

    thought: str
    action: str
    observation: str


def convert(paths: list[Path]) -> Iterator[Converted | Dropped]:
    """Converts commands and queries to calls of `bash` or `sql`, outputs to their results, submissions to `submit`.

    Except for ReAct agents, the benchmark submits after every action and ends the episode at the full reward: then the
    last action is followed by a submission, unless the turns ran out. The environment's own logs exist because the
    agent submitted. The score is the highest reward, like the benchmark's.
    Answers without code are dropped, and so is an output at the end. A "submit;" that was run as a query stays in the
    context with `loss: false`.
    """
    return convert_rows(paths, convert_row)


def convert_row(row: dict[str, Any], name: str) -> Iterator[dict[str, Any] | StepDropped | Repaired]:
    """Converts one episode."""
    environment = field(row, "environment", str)
    if environment not in ENVIRONMENTS:
        raise InvalidTrajectory("unknown-environment", f"'{environment}' is unknown; known: {', '.join(ENVIRONMENTS)}")
    schema, parameter, instruction = ENVIRONMENTS[environment]
    tool_name = schema["function"]["name"]
    steps, score, submission = _own_log(row) if "trajectory" in row else _agent_log(row)
    turns: list[dict[str, Any]] = [{"role": "user", "content": field(row, "query", str)}]
    number = 0
    for i, (thought, action, observation) in enumerate(steps):
        if action == BLOCKED or observation.startswith(NO_CODE):
            yield StepDropped("no-code", f"step {i}: {action[:200]}")
            continue
        number += 1
        turn: dict[str, Any] = {"role": "assistant", "content": thought}
        if action.strip("; \n").lower() == "submit":
            yield Repaired("submit-as-query", f"step {i}: {action!r} was run as a query; kept without loss")
            turn["loss"] = False
        turn["tool_calls"] = [call(number, tool_name, {parameter: action})]
        turns.append(turn)
        turns.append({"role": "tool", "tool_call_id": f"call_{number}", "name": tool_name, "content": observation})
    if number == 0:
        raise InvalidTrajectory("no-assistant-turn", "no step has a command")
    if submission is None:
        turns.pop()
    else:
        turns.append({"role": "assistant", "content": submission, "tool_calls": [call(number + 1, "submit", {})]})
    yield {
        "unique_trajectory_id": f"intercode_{name}",
        "source": "intercode",
        "score": score,
        "task_instruction": instruction,
        "tools": [schema, SUBMIT],
        "conversation": turns,
    }


def _own_log(row: dict[str, Any]) -> tuple[list[Step], Any, str | None]:
    """Returns (steps, score, "" as the thought of the submission, which has none) of the environment's log."""
    steps = [
        Step("", field(step, "action", str), field(step, "observation", str)) for step in field(row, "trajectory", list)
    ]
    return steps, row.get("reward"), ""


def _agent_log(row: dict[str, Any]) -> tuple[list[Step], Any, str | None]:
    """Returns (steps, score, thought of the submission) of an agent's log; the last is None without a submission."""
    history = field(row, "turn_history", dict)
    actions, observations = _texts(history, "actions"), _texts(history, "observations")
    if actions[len(observations) :] == [BLOCKED]:
        observations.append("")
    thoughts = _texts(history, "thoughts") if "thoughts" in history else [""] * len(actions)
    if not len(thoughts) == len(actions) == len(observations):
        counts = f"{len(actions)} actions, {len(observations)} observations, {len(thoughts)} thoughts"
        raise InvalidTrajectory("uneven-lists", counts)
    rewards = [reward for reward in field(history, "rewards", list) if isinstance(reward, int | float)]
    score = max(rewards, default=None)
    steps = [Step(*step) for step in zip(thoughts, actions, observations, strict=True)]
    submission = "" if "thoughts" not in history and rewards and rewards[-1] == 1 else None
    if steps and steps[-1].action == "submit":
        last = steps.pop()
        submission = None if last.thought.startswith(OUT_OF_TURNS) else last.thought
    if "thoughts" in history:
        steps = [step._replace(action=_inside(step.action)) for step in steps]
    return steps, score, submission


def _inside(action: str) -> str:
    """Returns the code in a ReAct agent's "execute[…]"."""
    return action.partition("execute[")[2].rpartition("]")[0] or action


def _texts(history: dict[str, Any], key: str) -> list[str]:
    values = field(history, key, list)
    if not all(isinstance(value, str) for value in values):
        raise InvalidTrajectory("missing-field", f"`{key}` has items that are not text")
    return list(values)
