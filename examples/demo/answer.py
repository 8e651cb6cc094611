"""Asks the model before and after the demo's training for calls of held-out requests, and compares their answers.

python -m examples.demo.answer --run runs/demo/chatml --model runs/demo/chatml/hf
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from time import monotonic

from examples.quickstart.show import format_calls
from xlam_jax import config as configs
from xlam_jax.cli import positive, run
from xlam_jax.config import Config
from xlam_jax.data.completion import named
from xlam_jax.data.parse import read_jsonl
from xlam_jax.data.render import end_tokens
from xlam_jax.data.render_sources import is_heldout
from xlam_jax.data.trajectory import Trajectory
from xlam_jax.errors import UserError
from xlam_jax.evaluate import next_call
from xlam_jax.generate import OpenedModel, find_model
from xlam_jax.models.generation import generate

LONGEST = 1024
"""Maximum length of a prompt in tokens; longer requests are skipped."""
NEW_TOKENS = 128
"""Maximum length of an answer in tokens."""
ROWS = 24
"""Requests that are answered together: a step takes about as long for all of them as for a few."""


def heldout(config: Config) -> Iterator[tuple[str, Trajectory]]:
    """Yields (source, trajectory) of what the run did not train on."""
    for source in config.data.sources:
        for file in source.files:
            for _, trajectory in read_jsonl(file):
                if isinstance(trajectory, Trajectory) and is_heldout(source.name, trajectory.id, config.data.heldout):
                    yield source.name, trajectory


def answers(
    model: OpenedModel, prompted: Sequence[next_call.Prompted], trained: OpenedModel, format: str
) -> list[next_call.ScoredAnswer]:
    """Returns a model's answers to prompts. `trained`: the model whose tokenizer rendered them."""
    stops = sorted({*model.stops, *end_tokens(trained.tokenizer, format)})
    by_length = sorted(prompted, key=lambda item: len(item.prompt))  # so that a batch has little padding
    loaded = model.load()

    def complete(prompts: list[list[int]]) -> list[list[int]]:
        return generate(loaded, prompts, rows=ROWS, max_new_tokens=NEW_TOKENS, eos_id=stops)

    scored = dict(
        zip(map(id, by_length), next_call.answer(by_length, complete, trained.tokenizer, format), strict=True)
    )
    return [scored[id(item)] for item in prompted]


def show(before: next_call.ScoredAnswer, after: next_call.ScoredAnswer) -> None:
    """Prints a request, its recorded calls, and both answers."""
    request = before.request
    print(f"\n{request.source}: {' '.join(request.messages[-1]['content'].split())[:110]}")
    print(f"  recorded  {format_calls(named(request.expected))}")
    for name, answer in (("before", before), ("after", after)):
        calls = format_calls(named(answer.completion.calls))
        text = calls if answer.completion.calls else " ".join(answer.completion.text.split())[:100]
        print(f"  {name:8}  {'✓' if answer.score.exact else '✗'} {text}")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Compares a model's answers to held-out requests before and after.")
    parser.add_argument("--run", required=True, type=Path, help="run folder, whose config names data and base")
    parser.add_argument("--model", required=True, type=Path, help="the trained model: Hugging Face folder or run")
    parser.add_argument("--requests", type=positive, default=12, help="number of requests (default: 12)")
    parser.add_argument("--shown", type=positive, default=10, help="number of them to print (default: 10)")
    arguments = parser.parse_args()
    config = configs.read_saved(arguments.run / "config.yaml")
    if config.model.init_from is None:
        raise UserError(
            f"{arguments.run}: model.init_from is null, so there are no weights from before the training to compare "
            "with; use a run that started from a model"
        )
    after = find_model(arguments.model)
    prompts = next_call.prompts(
        next_call.requests(heldout(config)),
        after.tokenizer,
        config.data.format,
        longest=LONGEST,
        count=arguments.requests,
    )
    results = {}
    for name, model in (("before", find_model(Path(config.model.init_from))), ("after", after)):
        start = monotonic()
        results[name] = answers(model, prompts.prompted, after, config.data.format)
        print(f"{name}: {len(results[name])} answers in {monotonic() - start:.0f} s", flush=True)
    for pair in list(zip(results["before"], results["after"], strict=True))[: arguments.shown]:
        show(*pair)
    print(
        f"\n{'held-out requests':18}" + "".join(f"{field.replace('_', ' '):>16}" for field in next_call.Score._fields)
    )
    for name, scored in results.items():
        marks = next_call.summarize([answer.score for answer in scored])
        shares = "".join(f"{marks[field]:16.0%}" for field in next_call.Score._fields)
        print(f"{name + f', {len(scored)}':18}{shares}")


if __name__ == "__main__":
    run(main)
