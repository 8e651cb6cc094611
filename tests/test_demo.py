"""The demo with a pretrained model, with a small model of random weights in its place."""

import json
from pathlib import Path
from typing import Any

import gguf_files
import pytest
import tiny_models
from chat_tokenizers import tokenizer_of
from support import ROOT, Commands

from xlam_jax import config as configs
from xlam_jax.data import corpus
from xlam_jax.data.tokenizer import open_tokenizer
from xlam_jax.evaluate import next_call

FORMATS: dict[str, list[str]] = {"chatml": [], "xlam": ["data.format=xlam", "data.chat_template=null"]}
"""DEMO of the Makefile → its overrides."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GGUF file in place of the downloaded one."""
    sizes = {
        "vocab_size": 512,
        "intermediate_size": 64,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
        "rms_norm_eps": 1e-5,
    }
    path = tmp_path_factory.mktemp("model") / "small.gguf"
    return gguf_files.write_gguf(
        path, tiny_models.hf_model("llama", **sizes), quantization="Q8_0", tokenizer=tokenizer_of("qwen")
    )


def overrides(model: Path) -> list[str]:
    hammer = "[{name: hammer, files: [examples/quickstart/hammer.jsonl], weight: 1}]"
    return [
        f"model.config={model}",
        f"model.init_from={model}",
        f"data.tokenizer={model}",
        f"data.sources={hammer}",
        "data.sequence_length=2048",
        "train.steps=2",
        "train.batch_size=1",
        "train.warmup_steps=0",
        "eval.batches=1",
        "lora.rank=2",
    ]


@pytest.mark.parametrize("format", FORMATS)
def test_every_trajectory_is_rendered_and_read_back(model: Path, format: str, monkeypatch: pytest.MonkeyPatch):
    """Rendering refuses calls that would not be parsed from the text."""
    monkeypatch.chdir(ROOT)
    data = configs.load(
        ROOT / "configs/demo.yaml",
        [f"model.config={model}", f"data.tokenizer={model}", "data.sequence_length=8192", *FORMATS[format]],
    ).config.data
    loaded = corpus.load(data, open_tokenizer(data), lambda line: None)
    assert sum(len(source.train) + len(source.heldout) for source in loaded) == 608
    samples = [(source.source.name, sample) for source in loaded for sample in source.samples]
    assert len(list(next_call.requests(samples))) >= 200


@pytest.mark.parametrize("format", ["chatml", pytest.param("xlam", marks=pytest.mark.slow)])
def test_the_steps_of_the_demo(model: Path, format: str, tmp_path: Path, commands: Commands):
    run_dir = tmp_path / "run"
    options = [*overrides(model), *FORMATS[format]]
    commands.call("xlam_jax.train", "--config", "configs/demo.yaml", f"output_dir={run_dir}", *options)
    commands.call("converters.orbax_to_hf", "--checkpoint", run_dir, "--out", run_dir / "hf")
    commands.call("converters.orbax_to_hf", "--checkpoint", run_dir, "--out", run_dir / "adapter", "--lora", "adapter")
    answered = commands.call(
        "examples.demo.answer", "--run", run_dir, "--model", run_dir / "hf", "--requests", 3, "--shown", 2
    )
    assert answered.stdout.count("  recorded  ") == 2
    assert "before, 3" in answered.stdout
    assert "after, 3" in answered.stdout
    adapter = json.loads((run_dir / "adapter/adapter_config.json").read_text(encoding="utf-8"))
    assert adapter["base_model_name_or_path"] == str(model)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # of the other libraries
def test_the_comparison_with_trl(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Same adapters, same batches: the same losses to rounding."""
    from benchmarks import demo_peer

    monkeypatch.chdir(ROOT)
    arguments = ["demo_peer", "--requests", "2", "--out", str(tmp_path), *overrides(model)]
    monkeypatch.setattr("sys.argv", arguments)
    demo_peer.main()
    record: dict[str, Any] = json.loads((tmp_path / "comparison.json").read_text(encoding="utf-8"))
    assert record["ours"]["losses"] == pytest.approx(record["trl"]["losses"], rel=1e-5)
    assert record["ours"]["heldout"] == pytest.approx(record["trl"]["heldout"], rel=1e-5)
