"""GGUF files are read as transformers reads them: every tensor bit for bit, logits, config and tokenizer."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import gguf_files
import numpy as np
import pytest
import tiny_models
import torch
from chat_tokenizers import tokenizer_of
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen3Config

from converters import hf_to_orbax, inspect, orbax_to_hf
from xlam_jax import config as configs
from xlam_jax import generate, gguf_file
from xlam_jax.data.tokenizer import load_tokenizer, tokenizer_digest
from xlam_jax.errors import UserError
from xlam_jax.gguf_config import read_gguf_config
from xlam_jax.gguf_file import find_gguf, open_gguf
from xlam_jax.weights.gguf import GGUFShard
from xlam_jax.weights.hf import HFWeights, load_hf
from xlam_jax.weights.logits import compare_logits
from xlam_jax.weights.run import read_base, source_folder

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "vocab_size": 512,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 12_345.0},
}
K_SIZES = {"hidden_size": 256, "intermediate_size": 256}
"""Blocks of K-quants have 256 values."""


def write(folder: Path, quantization: str = "F32", *, metadata: dict[str, Any] | None = None, **overrides: Any) -> Path:
    """Writes a folder with one GGUF file and a tokenizer in it; returns the file."""
    model = tiny_models.hf_model("llama", **(SIZES | overrides))
    folder.mkdir(exist_ok=True)
    return gguf_files.write_gguf(
        folder / "model.gguf", model, quantization=quantization, tokenizer=tokenizer_of("qwen"), metadata=metadata
    )


def reference(path: Path) -> Any:
    """Returns the model that transformers reads from the file."""
    return AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, attn_implementation="eager"
    ).eval()


@pytest.mark.parametrize("quantization", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_1", "Q4_K", "Q6_K"])
def test_every_tensor_is_that_of_transformers(quantization: str, tmp_path: Path):
    k_quant = quantization.endswith("_K")
    overrides: dict[str, Any] = K_SIZES if k_quant else {"tie_word_embeddings": True}
    path = write(tmp_path / "m", quantization, **overrides)
    opened, expected = HFWeights(path), reference(path).state_dict()
    for tensor, source in opened.sources:
        value = source.read()
        assert value.dtype == source.dtype
        assert value.astype(np.float32).tobytes() == expected[tensor.key].numpy().tobytes(), tensor.key
    assert opened.hf_config["dtype"] == {"F16": "float16", "BF16": "bfloat16"}.get(quantization, "float32")
    assert opened.config.tie_embeddings is not k_quant


@pytest.mark.parametrize(("architecture", "model_type"), [("qwen2", Qwen2Config), ("qwen3", Qwen3Config)])
def test_tensors_of_qwen_are_those_of_transformers(architecture: str, model_type: Any, tmp_path: Path):
    """Rows are in order, biases and norms of heads have their names, whether or not a family reads them."""
    heads = {"head_dim": 128} if architecture == "qwen3" else {}
    model = AutoModelForCausalLM.from_config(model_type(**(tiny_models.SIZES | heads)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-1, 1)
    metadata = {f"{architecture}.attention.{key}_length": size for size in heads.values() for key in ("key", "value")}
    path = gguf_files.write_gguf(tmp_path / "model.gguf", model, architecture=architecture, metadata=metadata)
    expected = reference(path).state_dict()
    shard = GGUFShard(path, read_gguf_config(path), list(expected))
    assert shard.tensors.keys() == expected.keys()
    assert all(shard.read(key).tobytes() == value.numpy().tobytes() for key, value in expected.items())


def test_conversion_verifies_logits_and_keeps_the_tokenizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    path = write(tmp_path / "m", "Q4_1")
    monkeypatch.setattr(sys, "argv", ["x", "--hf", str(path.parent), "--out", str(tmp_path / "orbax"), "--verify"])
    hf_to_orbax.main()
    printed = capsys.readouterr()
    assert "bit for bit" in printed.out
    assert "are those of transformers" in printed.out
    assert "it/s" not in printed.err
    monkeypatch.setattr(sys, "argv", ["x", "--checkpoint", str(tmp_path / "orbax"), "--out", str(tmp_path / "hf")])
    orbax_to_hf.main()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", attn_implementation="eager").state_dict()
    assert all(torch.equal(value, again[key]) for key, value in reference(path).state_dict().items())
    tokenizer = load_tokenizer(str(tmp_path / "hf"))
    assert tokenizer_digest(tokenizer) == tokenizer_digest(load_tokenizer(str(path)))
    assert "GGUF" in inspect.inspect_hf(str(path))["folder"]


def test_logits_are_those_of_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("xlam_jax.weights.logits.TOLERANCE", 1e-5)
    path = write(tmp_path / "m", "Q8_0", num_key_value_heads=4)
    hf_config, params = load_hf(path)
    compare_logits(path, hf_config, params, tmp_path)
    assert "are those of transformers" in capsys.readouterr().out


def test_tokenizer_is_that_of_transformers(tmp_path: Path):
    path = write(tmp_path / "m")
    expected = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    for name in (path, path.parent):
        ours = load_tokenizer(str(name))
        assert ours.backend_tokenizer.to_str() == expected.backend_tokenizer.to_str()
        assert ours.special_tokens_map == expected.special_tokens_map
        assert ours.chat_template == expected.chat_template == gguf_files.CHATML
        text = "<|im_start|>user\n Hé 12345 <|im_end|>"
        assert ours(text).input_ids == expected(text).input_ids
        assert tokenizer_digest(ours) == tokenizer_digest(expected)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_config_is_that_of_transformers(architecture: str, tmp_path: Path):
    path = gguf_files.write_gguf(
        tmp_path / "model.gguf",
        tiny_models.hf_model("llama", rms_norm_eps=1e-5),
        architecture=architecture,
        metadata={f"{architecture}.attention.key_length": 8, "tokenizer.ggml.eos_token_id": 3},
    )
    ours = read_gguf_config(path)
    expected = AutoConfig.from_pretrained(tmp_path, gguf_file=path.name).to_dict()
    for key in ours.keys() - {"architectures", "dtype", "rope_theta", "head_dim", "rms_norm_eps"}:
        assert ours[key] == expected[key], key
    assert ours["rope_theta"] == expected["rope_parameters"]["rope_theta"]
    assert ours["rms_norm_eps"] == 1e-5
    assert np.float32(expected["rms_norm_eps"]) == np.float32(1e-5)
    assert ours.get("head_dim", 8) == 8


def test_a_run_starts_from_a_file(tmp_path: Path):
    """Config, tokenizer and weights come from model.init_from alone."""
    path = write(tmp_path / "m")
    trajectories = Path(__file__).parent.parent / "examples/quickstart/seal_tools.jsonl"
    config = tmp_path / "run.yaml"
    config.write_text(
        f"model: {{init_from: {path.parent}}}\n"
        f"data: {{sources: [{{name: seal, files: [{trajectories}], weight: 1}}], sequence_length: 512}}\n"
        "train: {steps: 1, batch_size: 1}\n",
        encoding="utf-8",
    )
    resolved = configs.load(config)
    assert resolved.config.data.tokenizer == resolved.config.model.config == str(path)
    assert resolved.model.rope_theta == 12_345.0

    assert source_folder(resolved) is None
    params = read_base(resolved)
    assert params is not None
    assert params["embedding"].shape == (512, 64)


def test_generation_from_a_file(tmp_path: Path):
    path = write(tmp_path / "m")
    for name in (path, path.parent):
        model = generate.find_model(name)
        assert model.tokenizer.convert_ids_to_tokens(model.stops) == ["<|im_end|>"]
    (answer,) = generate.complete(model.load(), model.tokenizer, [[1, 2, 3]], max_new_tokens=2)
    assert answer["finish_reason"] in ("length", "stop")


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "experts": ({"llama.expert_count": 4}, "llama.expert_count is 4"),
    "window": ({"llama.attention.sliding_window": 32}, "llama.attention.sliding_window is 32"),
    "scaling": ({"llama.rope.scaling.type": "yarn"}, "llama.rope.scaling.type is yarn"),
    "heads": ({"llama.attention.value_length": 4}, "attention.value_length is 4"),
    "split": ({"split.count": 3}, "one of 3 parts"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_computed_is_refused(name: str, tmp_path: Path):
    metadata, message = REFUSED[name]
    path = write(tmp_path / "m", metadata=metadata)
    with pytest.raises(UserError, match=message):
        HFWeights(path)


def test_linear_scaling_is_read(tmp_path: Path):
    metadata: dict[str, Any] = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    config = HFWeights(write(tmp_path / "m", metadata=metadata)).config
    assert config.rope_scaling is not None


def test_another_architecture_is_refused_by_name(tmp_path: Path):
    path = gguf_files.write_gguf(tmp_path / "model.gguf", tiny_models.hf_model("llama"))
    path.write_bytes(path.read_bytes().replace(b"llama", b"gemma"))
    with pytest.raises(UserError, match=r"general\.architecture is 'gemma'; llama, qwen2, qwen3 are read"):
        HFWeights(path)


def test_which_file_a_name_means(tmp_path: Path):
    path = write(tmp_path / "m")
    assert find_gguf(path) == find_gguf(path.parent) == path
    assert find_gguf(tmp_path) is None
    assert find_gguf("mistralai/Mistral-7B-v0.1") is None
    with pytest.raises(UserError, match="no such file"):
        HFWeights(tmp_path / "missing.gguf")
    with pytest.raises(UserError, match="download the file first"):
        HFWeights("gs://bucket/model.gguf")
    shutil.copy(path, path.with_name("other.gguf"))
    with pytest.raises(UserError, match=r"contains 2 GGUF files \(model.gguf, other.gguf\); name one"):
        HFWeights(path.parent)
    (path.parent / "model.safetensors").touch()
    assert find_gguf(path.parent) is None


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = write(tmp_path / "m")
    monkeypatch.setattr(gguf_file, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs the package gguf; install it: pip install 'xlam_jax\[gguf\]'"):
        HFWeights(path)


def test_damaged_files_are_refused(tmp_path: Path):
    """Truncated anywhere, and with any byte of the header changed: one message, at once."""
    path = write(tmp_path / "m", "Q4_0")
    whole = path.read_bytes()
    places = open_gguf(path).tensors.values()
    first, end = min(place.start for place in places), max(place.stop for place in places)
    damaged = tmp_path / "damaged.gguf"
    generator = np.random.default_rng(0)
    for length in [0, 3, 4, 8, 23, *generator.integers(24, end, 40).tolist(), first, end - 1]:
        damaged.write_bytes(whole[:length])
        with pytest.raises(UserError, match="truncated or damaged"):
            HFWeights(damaged)
    for at in range(8, 24):  # numbers of tensors and entries
        damaged.write_bytes(whole[:at] + bytes([whole[at] ^ 0x81]) + whole[at + 1 :])
        with pytest.raises(UserError, match="truncated or damaged"):
            HFWeights(damaged)
    for at in generator.integers(24, first, 60).tolist():  # may stay a valid file, such as one with another name
        damaged.write_bytes(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :])
        try:
            HFWeights(damaged)
        except UserError as error:
            assert "damaged.gguf" in str(error)  # noqa: PT017 (either is right)


def test_a_file_that_becomes_shorter(tmp_path: Path):
    path = write(tmp_path / "m")
    opened = HFWeights(path)
    path.write_bytes(path.read_bytes()[:-4096])
    last = max((source for _, source in opened.sources), key=lambda source: source.shard.tensors[source.key].stop)
    with pytest.raises(UserError, match="the file changed while it was read"):
        last.read()


def test_a_file_without_a_tokenizer(tmp_path: Path):
    path = gguf_files.write_gguf(tmp_path / "model.gguf", tiny_models.hf_model("llama"))
    with pytest.raises(UserError, match="contains no tokenizer"):
        load_tokenizer(str(path))
    assert json.dumps(read_gguf_config(path))
