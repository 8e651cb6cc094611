"""The presets: each resolves without a device, and has the values that its header promises."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from support import ROOT

from xlam_jax import config as configs
from xlam_jax.config import check_divisible, flatten, reference
from xlam_jax.enums import MESH_AXES

FILES = {path.stem: path for path in sorted((ROOT / "configs").glob("*.yaml"))}
PUBLISHED = sorted(name for name in FILES if not name.startswith(("quickstart", "demo")))
ARXIV = re.compile(r"\b2\d{3}\.\d{5}\b")

FULL = {
    "train.trainable": "full",
    "train.optimizer": "adamw",
    "train.schedule": "cosine",
    "train.learning_rate": 5e-6,
    "train.end_learning_rate": 1e-6,
    "train.warmup_steps": 100,
    "train.beta1": 0.9,
    "train.beta2": 0.999,
    "train.weight_decay": 0.01,
    "train.batch_size": 48,
    "train.steps": 250,
    "data.sequence_length": 16384,
    "objective.kind": "sft",
}
LORA = FULL | {
    "train.trainable": "lora",
    "train.learning_rate": 5e-5,
    "train.batch_size": 64,
    "train.steps": 500,
    "data.sequence_length": 4096,
    "lora.targets": ["q", "k", "v", "o"],
    "lora.rank": 32,
    "lora.alpha": 64.0,
    "lora.dropout": 0.05,
    "lora.rank_stabilized": False,
}
DPO = LORA | {
    "objective.kind": "sigmoid",
    "objective.beta": 0.1,
    "objective.reference": "auto",
    "data.sources.0.format": "pairs",
    "data.sequence_length": 8192,
    "train.learning_rate": 1e-5,
    "train.end_learning_rate": 0.0,
    "train.weight_decay": 0.0,
    "train.batch_size": 16,
    "train.steps": 400,
    "lora.alpha": 16.0,
    "lora.dropout": 0.0,
}
AGENTOHANA = LORA | {
    "train.trainable": "qlora",
    "train.learning_rate": 1e-4,
    "train.end_learning_rate": 0.0,
    "train.weight_decay": 0.0,
    "train.batch_size": 48,
    "train.steps": 1000,
    "lora.alpha": 16.0,
}
APIGEN = {
    "train.trainable": "full",
    "train.optimizer": "adamw",
    "train.schedule": "cosine",
    "train.learning_rate": 5e-6,
    "train.end_learning_rate": 0.0,
    "train.warmup_steps": 50,
    "train.beta2": 0.999,
    "train.weight_decay": 0.0,
    "train.batch_size": 24,
    "train.steps": 2500,
    "data.sequence_length": 2048,
}
V03, V8X7B, V8X22B = (
    {"model.config": f"configs/models/{name}.json", "data.tokenizer": f"mistral:{tokenizer}"}
    for name, tokenizer in (("mistral_7b_v0.3", "v3"), ("mixtral_8x7b", "v1"), ("mixtral_8x22b", "v3"))
)
V8X7B, V8X22B = V8X7B | {"train.router_aux_weight": 0.02}, V8X22B | {"train.router_aux_weight": 0.001}
PROMISED: dict[str, dict[str, Any]] = {
    "mistral_7b_sft": FULL | V03,
    "mistral_7b_lora": LORA | V03,
    "mistral_7b_qlora": LORA | V03 | {"train.trainable": "qlora"},
    "mistral_7b_dpo": DPO | V03 | {"model.init_from": "weights/mistral_7b_sft"},
    "mixtral_8x7b_sft": FULL | V8X7B,
    "mixtral_8x7b_lora": LORA | V8X7B,
    "mixtral_8x7b_qlora": AGENTOHANA | V8X7B | {"model.init_from": "weights/Mixtral-8x7B-Instruct-v0.1"},
    "mixtral_8x7b_dpo": DPO | V8X7B | {"model.init_from": "weights/mixtral_8x7b_sft", "train.router_aux_weight": 0.0},
    "mixtral_8x22b_sft": FULL | V8X22B | {"model.remat": "full"},
    "mixtral_8x22b_lora": LORA | V8X22B | {"model.remat": "full"},
    **{
        f"xlam_2_{size}": FULL | {"model.config": f"configs/models/{model}.json", "data.format": "xlam2"} | more
        for size, model, more in (
            ("1b", "qwen2.5_1.5b", {}),
            ("3b", "qwen2.5_3b", {}),
            ("8b", "llama_3.1_8b", {}),
            ("32b", "qwen2.5_32b", {"model.remat": "full", "train.batch_size": 64}),
            ("70b", "llama_3.1_70b", {"model.remat": "full", "train.batch_size": 64}),
        )
    },
    "qwen3_8b_sft": FULL | {"model.config": "configs/models/qwen3_8b.json", "data.format": "native"},
    "qwen3_30b_a3b_lora": LORA
    | {"model.config": "configs/models/qwen3_30b_a3b.json", "data.format": "native", "train.router_aux_weight": 0.001},
    "llama_3_1_8b_sft": FULL | {"model.config": "configs/models/llama_3.1_8b.json", "data.format": "native"},
    "xlam_1b_fc": APIGEN | {"model.config": "configs/models/deepseek_coder_1.3b.json"},
    "xlam_7b_fc": APIGEN | {"model.config": "configs/models/deepseek_coder_6.7b.json"},
}
DEVICES = {
    "full": {
        "xlam_2_32b": (16, 32),
        "xlam_2_70b": (64,),
        "qwen3_8b": (1, 2, 4, 8),
        "llama": (1, 2, 4, 8),
        "mistral_7b": (1, 2, 4, 8),
        "mixtral_8x7b": (16,),
        "mixtral_8x22b": (48,),
        "xlam": (1, 4, 8),
    }
}


@pytest.fixture(autouse=True)
def at_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def header(name: str) -> str:
    lines = FILES[name].read_text(encoding="utf-8").splitlines()
    return "\n".join(line for line in lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))])


def test_there_is_a_promise_for_every_preset():
    assert sorted(PROMISED) == PUBLISHED
    for name in FILES.keys() - PROMISED.keys():
        configs.load(FILES[name])


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_preset_has_the_values_it_promises(name):
    resolved = configs.load(FILES[name])
    values = dict(flatten(resolved.config))
    assert {key: values.get(key) for key in PROMISED[name]} == PROMISED[name]
    assert values["output_dir"] == f"runs/{name}"
    on_pairs = values["objective.kind"] != "sft"
    assert reference(resolved.config) == ("adapters_off" if on_pairs else "none")
    assert (resolved.model.lora is None) == (values["train.trainable"] == "full")


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_header_cites_its_source(name):
    assert ARXIV.search(header(name)) or "extends" in yaml.safe_load(FILES[name].read_text(encoding="utf-8"))
    base, cited = FILES[name], set()
    while base:
        cited |= set(ARXIV.findall(header(base.stem)))
        values = yaml.safe_load(base.read_text(encoding="utf-8"))
        base = base.parent / values["extends"] if "extends" in values else None
    assert cited


@pytest.mark.parametrize("name", PUBLISHED)
def test_numbers_in_a_header_are_those_resolved(name):
    """Rank, α, β, rates and steps in a header must change with the values."""
    values = dict(flatten(configs.load(FILES[name]).config))
    text = header(name).replace("\n#", "").split("An older script")[0]
    said = {
        "lora.rank": r"rank (\d+)",
        "lora.alpha": r"α (\d+)",
        "objective.beta": r"β (\d+\.\d+)",
        "train.learning_rate": r"learning rate (\d+e-\d+)",
        "train.end_learning_rate": r"cosine decay to (\d+e-\d+|0)",
        "train.warmup_steps": r"(\d+)\s+warm-up\s+steps",
    }
    for key, pattern in said.items():
        for number in re.findall(pattern, text):
            assert float(number) == values[key], (key, number)


@pytest.mark.parametrize("name", PUBLISHED)
def test_rows_divide_over_the_devices_it_is_made_for(name):
    resolved = configs.load(FILES[name])
    full = next((counts for model, counts in DEVICES["full"].items() if name.startswith(model)), ())
    for count in full if resolved.model.lora is None else (1, 2, 4, 8):
        check_divisible(
            resolved.config, resolved.model, {f"mesh.{axis}": count if axis == "fsdp" else 1 for axis in MESH_AXES}
        )


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_preset_holds_only_what_differs(name):
    def leaves(path: Path) -> dict[str, Any]:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        base = values.pop("extends", None)
        merged = leaves(path.parent / base) if base else {}
        for section, inner in values.items():
            for key, value in inner.items() if isinstance(inner, dict) else [("", inner)]:
                if path == FILES[name]:
                    assert merged.get(f"{section}.{key}") != value, f"{section}.{key} is that of {base}"
                merged[f"{section}.{key}"] = value
        return merged

    leaves(FILES[name])
