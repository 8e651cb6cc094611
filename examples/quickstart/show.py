"""Asks the trained model ten requests that it was trained on, and shows its tool call beside the recorded one.

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
    """The first training trajectories of each source in turn that open with a tool call."""
    data = resolved.config.data
    by_source = []
    for source in data.sources:
        trajectories = (found for file in source.files for _, found in read_jsonl(file))
        by_source.append(
            found
            for found in trajectories
            if isinstance(found, Trajectory)
            and not is_heldout(source.name, found.id, data.heldout)
            and found.conversation[first_answer(found)].tool_calls
        )
    chosen: list[Trajectory] = []
    while len(chosen) < count:
        chosen += [next(source) for source in by_source]
    return chosen[:count]


def first_answer(trajectory: Trajectory) -> int:
    """The place of the first assistant turn."""
    return next(at for at, message in enumerate(trajectory.conversation) if message.role == "assistant")


def question(trajectory: Trajectory) -> list[dict[str, Any]]:
    """The messages before the first assistant turn."""
    messages = to_messages(trajectory)  # a system message may stand in front here
    return messages[: next(at for at, message in enumerate(messages) if message["role"] == "assistant")]


def shown(calls: list[dict[str, Any]]) -> str:
    """Calls on one line."""
    return "; ".join(f"{call['name']}({json.dumps(call['arguments'], ensure_ascii=False)})" for call in calls) or "-"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Shows what a quickstart model answers to ten training requests.")
    parser.add_argument("--model", required=True, type=Path)
    parser.add_argument("--config", required=True, type=Path)
    parser.add_argument("--count", type=int, default=10)
    arguments = parser.parse_args()
    chosen = requests(configs.load(arguments.config), arguments.count)
    found = find_model(arguments.model)
    prompts = [render_prompt(question(one), one.tools, found.tokenizer) for one in chosen]
    answers = complete(found.load(), found.tokenizer, prompts, stops=found.stops, max_new_tokens=160)
    equal = 0
    for one, answer in zip(chosen, answers, strict=True):
        recorded = [
            {"name": call.name, "arguments": call.arguments} for call in one.conversation[first_answer(one)].tool_calls
        ]
        same = answer["tool_calls"] == recorded
        equal += same
        print(f"\n{one.source}: {' '.join(question(one)[-1]['content'].split())[:110]}")
        print(f"  recorded   {shown(recorded)}")
        print(f"  generated  {shown(answer['tool_calls'])}  {'✓' if same else '✗ ' + answer['content'][:60]}")
    print(f"\n{equal} of {len(chosen)} tool calls are exactly the recorded ones.")


if __name__ == "__main__":
    run(main)
