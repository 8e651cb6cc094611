"""HotpotQA: ReAct episodes of FireAct.

Raw, one of: lines {"messages": […]}; or one JSON object of episodes, {"…": {"traj": […] or text, "f1", …}}. Turns are
"Thought: …\\nAction: search[…]" or "finish[…]", answered by "Observation: …".
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from xlam_jax.data.converters.common import (
    Converted,
    Dropped,
    call,
    convert_rows,
    field,
    tool,
)
from xlam_jax.data.trajectory import InvalidTrajectory

INSTRUCTION = "Answer the question. Search as often as needed, then finish with a short answer."
TEXT = {"type": "string"}
TOOLS = [
    tool("search", "Search the web.", {"query": TEXT}, ["query"]),
    tool("finish", "Give the answer.", {"answer": TEXT}, ["answer"]),
]
PARAMETER = {"search": "query", "finish": "answer"}
ACTION = re.compile(r"Action: (search|finish)\[")
REWARD = re.compile(r"Episode finished, reward = (True|False)")


def convert(paths: list[Path]) -> Iterator[Converted | Dropped]:
    """Converts searches and the final answer to tool calls, with their thoughts as text.

    The score is the recorded F1, or else 1 or 0 for the episode's reward; the turn with the reward is dropped.
    """
    return convert_rows(paths, convert_row)


def convert_row(row: dict[str, Any], name: str) -> Iterator[dict[str, Any]]:
    """Converts one episode."""
    raw = row["traj"] if "traj" in row else row.get("messages")
    messages = _split(raw) if isinstance(raw, str) else raw
    if not isinstance(messages, list) or not messages:
        raise InvalidTrajectory("missing-field", "neither `messages` nor `traj` has an episode")
    turns: list[dict[str, Any]] = []
    score, number, tool_name = row.get("f1"), 0, ""
    for i, message in enumerate(messages):
        content = field(message, "content", str)
        if i == 0:
            turns.append({"role": "user", "content": content})
        elif message.get("role") == "assistant":
            action, text = ACTION.search(content), content.rstrip()
            thought = content[: action.start()] if action else ""
            if not action or not text.endswith("]") or (thought and not thought.startswith("Thought: ")):
                raise InvalidTrajectory("unknown-action", f"turn {i}: {content}")
            number, tool_name = number + 1, action[1]
            calls = [call(number, tool_name, {PARAMETER[tool_name]: text[action.end() : -1]})]
            thought = thought.removeprefix("Thought: ").rstrip()
            turns.append({"role": "assistant", "content": thought, "tool_calls": calls})
        elif reward := REWARD.search(content):
            score = float(reward[1] == "True") if score is None else score
        else:
            observation = content.removeprefix("Observation:").strip()
            turns.append({"role": "tool", "tool_call_id": f"call_{number}", "name": tool_name, "content": observation})
    yield {
        "unique_trajectory_id": f"hotpotqa_{name}",
        "source": "hotpotqa",
        "score": score,
        "task_instruction": INSTRUCTION,
        "tools": TOOLS,
        "conversation": turns,
    }


def _split(text: str) -> list[dict[str, Any]]:
    """Splits an Alpaca-style episode, with all steps in one response, into turns."""
    head, marker, response = text.partition("\n\n### Response:\n")
    question = head.partition("### Instruction:\n")[2]
    if not marker or not question:
        raise InvalidTrajectory("missing-field", "`traj` has no instruction and response")
    messages = [{"role": "user", "content": question}]
    for part in re.split(r"^(?=Thought: |Observation: )", response, flags=re.MULTILINE):
        if part.strip():
            role = "user" if part.startswith("Observation:") else "assistant"
            messages.append({"role": role, "content": part.strip()})
    return messages
