"""Small models that memorize sixty rows, for tests of the chain from training to parsed calls."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from chat_templates import TEMPLATES, Template, tokenizer_with
from support import HASTILY, ROOT

from xlam_jax.data.render_sources import is_heldout

STEPS = 1400
COPIES = 4
"""Of each row in the training part; one more is held out, so that all rows are requested, and have been memorized."""
HELDOUT = 0.25
MODEL = {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "sliding_window": None,
    "tie_word_embeddings": False,
    "initializer_range": 0.05,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "float32",
}

CITIES = ("Lima", "Oslo", "Łódź", "Kyōto", "São Paulo", "La Paz")
TIMES = {"tomorrow": 1, "this week": 7, "two days": 2, "all month": 30, "every year": 365, "never ever": 0}
NAMES = ("Ada", "Boris", "Chandra", "Dolores", "Emil", "Farid")
"""Several tokens each: a small model takes long to distinguish single digits behind a template's long system text."""


def tool(name: str, **properties: str) -> dict[str, Any]:
    schema = {"type": "object", "properties": {key: {"type": kind} for key, kind in properties.items()}}
    return {"type": "function", "function": {"name": name, "description": f"The tool {name}.", "parameters": schema}}


TOOLS = [
    tool("weather", city="string", days="integer", metric="boolean"),
    tool("mail", to="string", body="string"),
    tool("time"),
    tool("plot", points="array", style="object"),
]


def rows(template: Template) -> list[dict[str, Any]]:
    """Returns 60 conversations of one request and its calls, as far as a template can write them."""
    answers: list[tuple[str, str, list[tuple[str, dict[str, Any]]]]] = []
    for words, days in TIMES.items():
        answers += [(f"weather {city} {words}", "", [("weather", {"city": city, "days": days})]) for city in CITIES]
    for at, name in enumerate(NAMES):
        text = f'say "{name}" {{}} [{at}]\nand more'
        answers.append((f"mail {name}", "I write it.", [("mail", {"to": f"{name}@b.c", "body": text})]))
        answers.append((f"time {name}", f"Step {at}.", [("time", {})]))
        points = {"points": [[at, 1.5], []], "style": {"dash": None, "on": True}}
        answers.append((f"plot {name}", "", [("plot", points)]))
    for words, days in TIMES.items():
        both = [("time", {}), ("weather", {"city": "Lima", "days": days, "metric": False})]
        answers.append((f"both {words}", "", both if template.parallel else both[1:]))
    assert len(answers) == 60
    return [
        {
            "tools": [tool for tool in TOOLS if tool["function"]["name"] in dict(calls)],
            "conversation": [
                {"role": "user", "content": question},
                {
                    "role": "assistant",
                    "content": thought if template.thoughts else "",
                    "tool_calls": [{"function": {"name": name, "arguments": values}} for name, values in calls],
                },
            ],
        }
        for question, thought, calls in answers
    ]


def copies(row: int) -> list[str]:
    """Returns ids of copies of a row, of which `COPIES` belong to the training part and one is held out."""
    names = [f"{row}-{copy}" for copy in range(100)]
    heldout = [name for name in names if is_heldout("rows", name, HELDOUT)]
    return [name for name in names if name not in heldout][:COPIES] + heldout[:1]


def train(folder: Path, name: str) -> Path:
    """Trains a small model on the rows with a template of `TEMPLATES`. Returns its run folder.

    Raises `AssertionError` if the run fails.
    """
    template = TEMPLATES[name]
    tokenizer = tokenizer_with(template)
    tokenizer.save_pretrained(folder / "tokenizer")
    (folder / "model.json").write_text(json.dumps(MODEL | {"vocab_size": len(tokenizer)}), encoding="utf-8")
    with (folder / "rows.jsonl").open("w", encoding="utf-8") as file:
        for at, row in enumerate(rows(template)):
            for name in copies(at):
                file.write(json.dumps({"unique_trajectory_id": name} | row) + "\n")
    config = {
        "output_dir": str(folder / "run"),
        "model": {"config": str(folder / "model.json"), "compute_dtype": "float32", "remat": "none"},
        "data": {
            "tokenizer": str(folder / "tokenizer"),
            "format": template.format,
            "sequence_length": 1024,
            "heldout": HELDOUT,
            "sources": [{"name": "rows", "files": [str(folder / "rows.jsonl")]}],
            "streams": 1,
        },
        "train": {"steps": STEPS, "batch_size": 2, "learning_rate": 1e-3, "warmup_steps": 10, "log_every": 40},
        "eval": {"every": STEPS, "requests": 60, "max_new_tokens": 160},
        "checkpoint": {"every": STEPS},
    }
    (folder / "config.yaml").write_text(json.dumps(config), encoding="utf-8")
    command = [sys.executable, "-m", "xlam_jax.train", "--config", str(folder / "config.yaml")]
    # The other tests compile hastily, which makes a step twice to three times slower: too slow for so many.
    optimized = {name: value for name, value in os.environ.items() if name not in HASTILY}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=optimized)
    assert done.returncode == 0, done.stderr
    return folder / "run"


def exact(run: Path) -> tuple[float, float]:
    """Returns the shares of held-out requests after the last step whose answers are parsable and exact."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    [last] = [record for record in records if record["kind"] == "requests" and record["step"] == STEPS]
    return last["parsable"], last["exact"]
