"""Sends ten training requests to the trained model, and prints its tool calls next to the recorded ones.

python -m examples.quickstart.show --model runs/quickstart/hf --config configs/quickstart.yaml
"""

import argparse
import json
from pathlib import Path
from typing import Any

from xlam_jax import config as configs
from xlam_jax.cli import run
from xlam_jax.data.parse import read_jsonl
from xlam_jax.data.render import render_prompt
from xlam_jax.data.render_sources import is_heldout
from xlam_jax.data.trajectory import Trajectory, to_messages
from xlam_jax.generate import complete, find_model


def requests(resolved: configs.Resolved, count: int) -> list[Trajectory]:
    """Returns the first training trajectories whose first answer calls a tool, from the sources in turn."""
    data = resolved.config.data
    by_source = []
    for source in data.sources:
        trajectories = (trajectory for file in source.files for _, trajectory in read_jsonl(file))
        by_source.append(
            trajectory
            for trajectory in trajectories
            if isinstance(trajectory, Trajectory)
            and not is_heldout(source.name, trajectory.id, data.heldout)
            and trajectory.conversation[first_answer(trajectory)].tool_calls
        )
    chosen: list[Trajectory] = []
    while len(chosen) < count:
        chosen += [next(source) for source in by_source]
    return chosen[:count]


def first_answer(trajectory: Trajectory) -> int:
    """The index of the first assistant turn."""
    return next(at for at, message in enumerate(trajectory.conversation) if message.role == "assistant")


def question(trajectory: Trajectory) -> list[dict[str, Any]]:
    """The messages before the first assistant turn."""
    messages = to_messages(trajectory)  # may begin with an additional system message
    return messages[: next(at for at, message in enumerate(messages) if message["role"] == "assistant")]


def format_calls(calls: list[dict[str, Any]]) -> str:
    """Formats calls on one line."""
    return "; ".join(f"{call['name']}({json.dumps(call['arguments'], ensure_ascii=False)})" for call in calls) or "-"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Prints the answers of a quickstart model to training requests.")
    parser.add_argument("--model", required=True, type=Path, help="Hugging Face folder or run")
    parser.add_argument("--config", required=True, type=Path, help="config of the run, which names the data")
    parser.add_argument("--count", type=int, default=10, help="number of requests (default: 10)")
    arguments = parser.parse_args()
    trajectories = requests(configs.load(arguments.config), arguments.count)
    model = find_model(arguments.model)
    prompts = [render_prompt(question(trajectory), trajectory.tools, model.tokenizer) for trajectory in trajectories]
    answers = complete(model.load(), model.tokenizer, prompts, stops=model.stops, max_new_tokens=160)
    equal = 0
    for trajectory, answer in zip(trajectories, answers, strict=True):
        recorded = [
            {"name": call.name, "arguments": call.arguments}
            for call in trajectory.conversation[first_answer(trajectory)].tool_calls
        ]
        same = answer["tool_calls"] == recorded
        equal += same
        print(f"\n{trajectory.source}: {' '.join(question(trajectory)[-1]['content'].split())[:110]}")
        print(f"  recorded   {format_calls(recorded)}")
        print(f"  generated  {format_calls(answer['tool_calls'])}  {'✓' if same else '✗ ' + answer['content'][:60]}")
    print(f"\n{equal} of {len(trajectories)} answers have exactly the recorded tool calls.")


if __name__ == "__main__":
    run(main)
