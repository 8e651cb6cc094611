"""Rows of AgentOhana, train-ready rows and xlam-function-calling-60k, and trajectories for these formats."""

import json
from pathlib import Path
from typing import Any

from hypothesis import reject, settings
from hypothesis import strategies as st
from strategies import ARGUMENTS, PLAIN

from xlam_jax.data.parse import parse_trajectory
from xlam_jax.data.trajectory import InvalidTrajectory, Message, ToolCall, Trajectory, to_dict

FIXTURES = Path(__file__).parent / "fixtures"
SETTINGS = settings(max_examples=80, deadline=None, derandomize=True)
TOOLS = [{"type": "function", "function": {"name": name}} for name in ("go", "look")]
TRICKY = st.sampled_from(
    [
        " padded ",
        "[TOOL_CALLS]",
        '[{"name": "go", "arguments": {}}]',
        "a [1]",
        '{"thought": "x", "tool_calls": []}',
        "---",
    ]
)


def rows_of(name: str) -> list[dict[str, Any]]:
    """Returns the rows of a format's fixture."""
    return [json.loads(line) for line in (FIXTURES / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


@st.composite
def trajectories(draw) -> Trajectory:
    """Turns with and without text, calls, results, ids and loss flags, in any order that is allowed."""
    text, flag = PLAIN | TRICKY, st.sampled_from([None, None, True, False])
    turns: list[Message] = []
    number = 0
    for _ in range(draw(st.integers(1, 3))):
        turns.append(Message("user", draw(text)))
        for _ in range(draw(st.integers(0, 2))):
            with_ids = draw(st.booleans())
            calls = []
            for _ in range(draw(st.integers(1, 2))):
                number += 1
                calls.append(
                    ToolCall(
                        f"call_{number}" if with_ids else None, draw(st.sampled_from(["go", "look"])), draw(ARGUMENTS)
                    )
                )
            turns.append(Message("assistant", draw(st.just("") | text), tuple(calls), loss=draw(flag)))
            turns.extend(
                Message("tool", draw(text), (), call.id, call.name)
                for call in calls
                if draw(st.booleans()) or not with_ids
            )
        if draw(st.booleans()):
            turns.append(Message("assistant", draw(text), loss=draw(flag)))
    if all(turn.role != "assistant" for turn in turns):
        turns.append(Message("assistant", draw(text), loss=draw(flag)))
    trajectory = Trajectory(
        draw(PLAIN | TRICKY),
        draw(st.none() | PLAIN),
        draw(st.none() | st.floats(-5, 5)),
        draw(st.just("") | PLAIN),
        TOOLS,
        tuple(turns),
    )
    try:
        return parse_trajectory(to_dict(trajectory))
    except InvalidTrajectory:  # calls in turns that follow each other, with a result for one of them
        reject()
