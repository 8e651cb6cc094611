"""Run folders like those of a training run, with invented numbers, for tests of readers."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from xlam_jax import config as configs
from xlam_jax.config import Config

Record = dict[str, Any]
SOURCES = ("webshop", "hotpotqa", "toolbench", "api_bank")
KINDS = ("thought", "tool_call", "arguments", "answer", "eos", "reasoning")
SHARES = (0.4, 0.3, 0.2, 0.1)
TRAINED = (120.0, 300.0, 80.0, 200.0)
"""Mean trained tokens of a trajectory of each source."""


def write_run(
    folder: Path,
    *,
    steps: int = 300,
    done: int | None = None,
    seed: int = 0,
    pairs: bool = False,
    peak: float | None = 989e12,
    sources: tuple[str, ...] = SOURCES,
    requests: int = 6,
    every: int = 50,
    started: int = 1,
    changes: dict[str, Any] | None = None,
) -> Path:
    """Writes a run of `steps` steps of which `done` are taken; `changes`: fields of its config by path."""
    rng = np.random.default_rng(seed)
    done = steps if done is None else done
    folder.mkdir(parents=True)
    config = make_config(folder, steps, pairs, sources, changes or {})
    (folder / "config.yaml").write_text(configs.to_yaml(config), encoding="utf-8")
    about = {
        "parameters": 7_248_023_552,
        "trainable_parameters": 41_943_040,
        "devices": 8,
        "device_kind": "NVIDIA H100 80GB HBM3" if peak else "cpu",
        "flops_per_token": 4.4e10,
        "peak_flops_per_device": peak,
        "batch_places": 262_144,
        "sources": {
            name: {"target_share": SHARES[at % 4], "trajectories": 1000, "trained_tokens": int(1000 * TRAINED[at % 4])}
            for at, name in enumerate(sources)
        },
        "started": [f"2026-11-{20 + at}T08:00:00+00:00" for at in range(started)],
    }  # fmt: skip
    (folder / "run.json").write_text(json.dumps(about, indent=1), encoding="utf-8")
    with (folder / "metrics.jsonl").open("w", encoding="utf-8") as file:
        for step in range(done + 1):
            if step:
                file.write(json.dumps(train_record(rng, step, steps, pairs, sources)) + "\n")
            if step % every == 0 or step == done:
                file.write(json.dumps(heldout_record(rng, step, steps, pairs, sources)) + "\n")
                if requests:
                    share = step / steps
                    shares = {"parsable": 0.3 + 0.69 * share, "schema_valid": 0.2 + 0.7 * share,
                              "right_function": 0.1 + 0.75 * share, "exact": 0.6 * share}  # fmt: skip
                    file.write(json.dumps({"step": step, "kind": "requests", "requests": requests, **shares}) + "\n")
    if requests:
        with (folder / "samples.jsonl").open("w", encoding="utf-8") as file:
            for step in [*range(0, done + 1, every)]:
                file.writelines(json.dumps(sample(at, step / steps, step)) + "\n" for at in range(requests))
    return folder


def make_config(folder: Path, steps: int, pairs: bool, sources: tuple[str, ...], changes: dict[str, Any]) -> Config:
    """Returns a config whose sources do not exist."""
    form = "pairs" if pairs else "unified"
    values: dict[str, Any] = {
        "output_dir": str(folder),
        "model": {"config": "configs/models/mistral_7b_v03.json"},
        "data": {
            "sources": [
                {"name": name, "files": [f"{at}.jsonl"], "format": form, "weight": SHARES[at % 4]}
                for at, name in enumerate(sources)
            ],
            "tokenizer": "mistral:v3",
            "sequence_length": 8192,
        },
        "train": {"steps": steps, "batch_size": 32, "learning_rate": 5e-5, "warmup_steps": 1, "trainable": "lora"},
        "objective": {"kind": "sigmoid" if pairs else "sft"},
    }  # fmt: skip
    for path, value in changes.items():
        section, field = path.split(".")
        values[section][field] = value
    return Config.model_validate(values)


def _level(step: float, steps: int, at: int) -> float:
    """Returns the loss of a source after a step."""
    return 0.25 + 0.08 * at + (1.9 - 0.2 * at) * np.exp(-8 * step / steps)


def train_record(
    rng: np.random.Generator, step: int, steps: int, pairs: bool, sources: tuple[str, ...]
) -> dict[str, Any]:
    """Returns the record of a step."""
    counts = [max(0, int(rng.normal(SHARES[at % 4] * TRAINED[at % 4] * 100, 900))) for at in range(len(sources))]
    if pairs:
        counts = [int(rng.poisson(SHARES[at % 4] * 24)) for at in range(len(sources))]
    losses = [_level(step, steps, at) * rng.lognormal(0, 0.12) for at in range(len(sources))]
    total = max(1, sum(counts))
    tokens = float(rng.integers(240_000, 262_000))
    record = {
        "step": step,
        "kind": "train",
        "loss": sum(a * b for a, b in zip(losses, counts, strict=True)) / total,
        "aux_loss": 0.0,
        "grad_norm": float(rng.lognormal(-0.5, 0.3) * (1 + 3 * np.exp(-20 * step / steps))),
        "tokens": tokens,
        "trained_tokens": float(total),
        "learning_rate": 5e-5 * min(1.0, 20 * step / steps) * (0.55 + 0.45 * np.cos(np.pi * step / steps)),
        "tokens_per_second": 62_000 + float(rng.normal(0, 1500)),
        "trained_share": total / 262_144,
        "memory": 61.3e9,
        "sources": {
            name: {"loss": loss, "tokens": count}
            for name, loss, count in zip(sources, losses, counts, strict=True)
            if count
        },
    }
    return record | (_preference(rng, step, steps) if pairs else {})


def heldout_record(
    rng: np.random.Generator, step: int, steps: int, pairs: bool, sources: tuple[str, ...]
) -> dict[str, Any]:
    """Returns the record of an evaluation."""
    levels = [1.06 * _level(step, steps, at) for at in range(len(sources))]
    record: dict[str, Any] = {
        "step": step,
        "kind": "heldout",
        "loss": float(np.mean(levels)),
        "trained_tokens": 50_000.0,
        "sources": {name: {"loss": level, "tokens": 12_000} for name, level in zip(sources, levels, strict=True)},
    }
    if pairs:
        return record | _preference(rng, step, steps)

    def kinds(level: float) -> dict[str, Any]:
        scales = {"thought": 1.5, "tool_call": 0.5, "arguments": 0.8, "answer": 1.2, "eos": 0.1, "reasoning": 1.4}
        return {
            kind: {"loss": level * scale * (1 + 0.02 * rng.normal()), "tokens": 3000} for kind, scale in scales.items()
        }

    for name, level in zip(sources, levels, strict=True):
        record["sources"][name]["kinds"] = kinds(level)
    return record | {"kinds": kinds(record["loss"])}


def _preference(rng: np.random.Generator, step: int, steps: int) -> dict[str, float]:
    grown = 1 - np.exp(-5 * step / steps)
    chosen, rejected = 0.6 * grown + 0.08 * rng.normal(), -1.4 * grown + 0.1 * rng.normal()
    return {
        "rewards_chosen": chosen,
        "rewards_rejected": rejected,
        "margin": chosen - rejected,
        "accuracy": float(np.clip(0.5 + 0.4 * grown + 0.04 * rng.normal(), 0, 1)),
        "log_p_chosen": -60 + 5 * chosen,
        "log_p_rejected": -75 + 8 * rejected,
        "kl": 3 * grown + 0.05 * abs(rng.normal()),
    }


CITIES = ("Oslo", "Quito", "Tromsø", "Bogotá", "Kyoto", "Tunis")


def sample(at: int, share: float, step: int) -> dict[str, Any]:
    """Returns the answer to the `at`-th request; it is better for larger `share`."""
    city = CITIES[at % len(CITIES)]
    expected = [{"name": "get_weather", "arguments": {"city": city, "unit": "celsius", "days": at % 3 + 1}}]
    if at % 3 == 0:
        expected.append({"name": "get_time", "arguments": {"city": city}})
    quality = share * 3.2 - at % 4
    calls: list[dict[str, Any]] = []
    parsable = quality > -2
    if quality > 1:
        calls = expected
    elif quality > 0:
        calls = [{"name": "get_weather", "arguments": {"city": city, "unit": "fahrenheit", "hours": 24}}]
    elif parsable:
        calls = [{"name": "get_forecast", "arguments": {"place": city}}]
    return {
        "step": step,
        "source": SOURCES[at % 4],
        "id": f"{SOURCES[at % 4]}_{1000 + at}",
        "turn": 2,
        "messages": [
            {"role": "system", "content": "You call tools. Answer with calls alone, or in words where no tool fits."},
            {"role": "user", "content": f"I'm off to {city} for {at % 3 + 1} days. What should I pack?"},
            {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "id": "call_1",
             "function": {"name": "find_trip", "arguments": "{\"city\": \"" + city + "\"}"}}]},
            {"role": "tool", "tool_call_id": "call_1", "content": "{\"leaves\": \"tomorrow\", \"hotel\": \"Astoria\"}"},
            {"role": "user", "content": f"And how will the weather in {city} be, in degrees Celsius?"},
        ],
        "expected": expected,
        "content": "I look up the weather first." if quality > 0 else "",
        "calls": calls,
        "text": "[TOOL_CALLS]" + json.dumps(calls) if parsable else "[TOOL_CALLS][{\"name\": \"get_wea get_wea get_wea",
        "finish_reason": "stop" if parsable else "length",
        "parsable": parsable,
        "schema_valid": quality > 0,
        "right_function": quality > 0,
        "exact": quality > 1,
    }  # fmt: skip
