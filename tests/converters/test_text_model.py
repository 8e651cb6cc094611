"""The text model of a model of text and images is read, converted and exported; what is skipped is reported."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
import transformers
from safetensors.numpy import load_file, save_file

from converters import hf_to_orbax, inspect, orbax_to_hf
from xlam_jax.errors import UserError
from xlam_jax.models.config import ModelConfig, read_hf_config
from xlam_jax.weights.hf import HFWeights

VISION = {
    "model_type": "pixtral",
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "head_dim": 8,
    "patch_size": 4,
    "image_size": 16,
}
VISION_TENSORS = 15


def wrapped(family: str, **overrides: Any) -> Any:
    """Returns a transformers model of text and images around a tiny text model."""
    text = tiny_models.hf_model(family, **overrides)
    config = transformers.Mistral3Config(
        architectures=["Mistral3ForConditionalGeneration"],
        text_config=text.config.to_dict(),
        vision_config=VISION,
        tie_word_embeddings=text.config.tie_word_embeddings,
    )
    torch.manual_seed(0)
    model = transformers.Mistral3ForConditionalGeneration._from_config(config, attn_implementation="eager").eval()
    model.model.language_model.load_state_dict(text.model.state_dict())
    model.lm_head.load_state_dict(text.lm_head.state_dict())
    return model


@pytest.fixture
def folder(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    family, overrides = getattr(request, "param", ("ministral3", {}))
    wrapped(family, **overrides).save_pretrained(tmp_path / "hf", max_shard_size="20KB")
    return tmp_path / "hf"


def run(module: Any, *arguments: object) -> None:
    sys.argv = [module.__name__, *map(str, arguments)]
    module.main()


@pytest.mark.parametrize(
    "folder",
    [
        ("ministral3", {"tie_word_embeddings": True}),
        ("mistral", {"head_dim": 24}),
    ],
    ids=["ministral3-tied", "mistral"],
    indirect=True,
)
def test_the_text_model_is_converted_and_exported(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(sys, "argv", [])
    run(hf_to_orbax, "--hf", folder, "--out", tmp_path / "orbax", "--verify")
    printed = capsys.readouterr()
    assert f"{VISION_TENSORS} tensors of the vision encoder are skipped" in printed.err
    assert "verified: the logits of 32 tokens are those of transformers" in printed.out
    run(orbax_to_hf, "--checkpoint", tmp_path / "orbax", "--out", tmp_path / "back")
    stored: dict[str, np.ndarray] = {}
    for file in folder.glob("*.safetensors"):
        stored |= load_file(file)
    back = load_file(tmp_path / "back" / "model.safetensors")
    prefix = "language_model."
    text = {key.removeprefix(prefix): value for key, value in stored.items() if key.startswith(prefix)}
    assert back.keys() == text.keys()
    assert all(back[key].tobytes() == text[key].tobytes() for key in back)
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    inner = json.loads((folder / "config.json").read_text())["text_config"]
    assert {key: config[key] for key in inner} == inner
    whole: Any = transformers.AutoModelForImageTextToText.from_pretrained(folder, attn_implementation="eager")
    alone: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back", attn_implementation="eager")
    assert config["architectures"] == [type(alone).__name__]
    tokens = tiny_models.tokens(2, 40)
    with torch.no_grad():
        expected = whole(torch.from_numpy(tokens).long()).logits.numpy()
        assert np.array_equal(alone(torch.from_numpy(tokens).long()).logits.numpy(), expected)


def rename(folder: Path, change: Callable[[str], str]) -> None:
    """Renames the tensors of a folder, and writes them into one file."""
    tensors: dict[str, np.ndarray] = {}
    for file in folder.glob("*.safetensors"):
        tensors |= {change(key): value for key, value in load_file(file).items()}
        file.unlink()
    (folder / "model.safetensors.index.json").unlink()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def test_names_of_transformers_parameters(folder: Path):
    expected = {tensor.key: source.read() for tensor, source in HFWeights(folder).sources}

    def change(key: str) -> str:
        key = key.removeprefix("language_model.") if "lm_head" in key else f"model.{key}"
        return key.replace("model.language_model.model.", "model.language_model.")

    rename(folder, change)
    opened = HFWeights(folder)
    assert not opened.renamed, "which vLLM reads"
    read = {tensor.key: source.read() for tensor, source in opened.sources}
    assert read.keys() == expected.keys()
    assert all(np.array_equal(read[key], expected[key]) for key in read)


def test_what_is_inspected(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "argv", [])
    run(inspect, folder)
    printed = capsys.readouterr().out
    assert "of this Mistral3ForConditionalGeneration, only the text model is read, a Ministral3ForCausalLM" in printed
    assert f"{VISION_TENSORS} tensors of the vision encoder are skipped" in printed


def test_unknown_tensors_are_refused(folder: Path):
    rename(folder, lambda key: key.replace("vision_tower", "audio_tower"))
    with pytest.raises(UserError, match=r"audio_tower.* is not part of this model"):
        HFWeights(folder)


def test_a_tensor_under_two_names_is_refused(folder: Path):
    rename(folder, lambda key: key)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"lm_head.weight": tensors["language_model.lm_head.weight"]}, file, {"format": "pt"})
    with pytest.raises(UserError, match="contains a tensor under two names"):
        HFWeights(folder)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"text_config": None}, "text_config is None; the config of the text model"),
        ({"text_config": {"model_type": "mistral4"}}, "text_config is 'mistral4'; in a Mistral3For"),
    ],
)
def test_text_models_that_are_refused(tmp_path: Path, values: dict[str, Any], message: str):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"architectures": ["Mistral3ForConditionalGeneration"], **values}))
    with pytest.raises(UserError, match=message):
        read_hf_config(path)


def test_keys_of_the_wrapper_are_shared(tmp_path: Path):
    path = tmp_path / "config.json"
    text = {**tiny_models.SIZES, "head_dim": 16, "eos_token_id": 5}
    shared = {"torch_dtype": "bfloat16", "eos_token_id": 2, "quantization_config": {"quant_method": "fp8"}}
    path.write_text(json.dumps({"architectures": ["Mistral3ForConditionalGeneration"], "text_config": text, **shared}))
    read = read_hf_config(path)
    assert read == shared | text | {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
    assert ModelConfig.from_hf(read).family == "mistral"
