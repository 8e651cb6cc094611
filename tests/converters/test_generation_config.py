"""Generation stops at the token that ended trained turns, and conversions keep a model's generation config."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny_models
from support import ROOT, Commands
from transformers import AutoConfig, GenerationConfig

from xlam_jax.enums import STEPS_FOLDER
from xlam_jax.errors import UserError
from xlam_jax.generate import find_model
from xlam_jax.models.generation_config import align, read_generation_config, stop_ids
from xlam_jax.weights import checkpoint

TO_ORBAX, TO_HF = "converters.hf_to_orbax", "converters.orbax_to_hf"
SOURCE = {
    "bos_token_id": 1,
    "do_sample": True,
    "eos_token_id": [11, 12],
    "temperature": 0.6,
    "top_k": 20,
    "top_p": 0.95,
    "repetition_penalty": 1.05,
    "transformers_version": "5.0.0",
}


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def load(folder: Path, caplog: pytest.LogCaptureFixture) -> GenerationConfig:
    """Loads a generation config with transformers, and checks that it logs no warning."""
    with caplog.at_level(logging.WARNING):
        loaded = GenerationConfig.from_pretrained(folder)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    return loaded


@pytest.fixture
def run(trained: tuple[Path, str], tmp_path: Path) -> Path:
    """A finished run whose config.json has other token ids than its tokenizer: eos 7 instead of 2, and bos 5."""
    copy = tmp_path / "run"
    shutil.copytree(trained[0], copy)
    config = read(copy / "config.json") | {"eos_token_id": 7, "bos_token_id": 5}
    (copy / "config.json").write_text(json.dumps(config))
    for step in checkpoint.whole_steps(copy):  # as if the run had been saved with these files
        path = copy / STEPS_FOLDER / str(step) / checkpoint.METADATA
        note = read(path)
        note["custom_metadata"] |= {"model": config, checkpoint.FILES: {}}
        note["custom_metadata"][checkpoint.DIGEST] = checkpoint.metadata_digest(note["custom_metadata"])
        path.write_text(json.dumps(note))
    return copy


def test_a_generation_config_survives_the_round_trip(commands: Commands, tmp_path: Path, caplog: Any):
    """A converted model keeps its source's generation config, whatever its tokenizer."""
    hf = tmp_path / "hf"
    tiny_models.hf_model("mistral").save_pretrained(hf)
    written = json.dumps(SOURCE, indent=1)  # a different layout than ours
    (hf / "generation_config.json").write_text(written)
    shutil.copytree(ROOT / "examples/quickstart/tokenizer", hf, dirs_exist_ok=True)
    commands.call(TO_ORBAX, "--hf", hf, "--out", tmp_path / "orbax")
    assert (tmp_path / "orbax/generation_config.json").read_text() == written
    commands.call(TO_HF, "--checkpoint", tmp_path / "orbax", "--out", tmp_path / "back")
    assert read(tmp_path / "back/generation_config.json") == SOURCE
    assert read(tmp_path / "back/config.json") == read(hf / "config.json")
    loaded = load(tmp_path / "back", caplog)
    assert (loaded.eos_token_id, loaded.temperature, loaded.top_p) == ([11, 12], 0.6, 0.95)


def test_exports_stop_at_the_trained_end(commands: Commands, run: Path, tmp_path: Path, caplog: Any):
    out = tmp_path / "hf"
    output = commands.call(TO_HF, "--checkpoint", run, "--out", out).stdout
    assert "config.json: eos_token_id 7 is now 2 (</s>), bos_token_id 5 is now 1 (<s>)" in output
    assert AutoConfig.from_pretrained(out).eos_token_id == 2
    loaded = load(out, caplog)
    assert (loaded.bos_token_id, loaded.eos_token_id) == (1, 2)
    assert find_model(out).stops == find_model(run).stops == [2]


def test_exports_keep_stop_ids_and_sampling_of_the_source(commands: Commands, run: Path, tmp_path: Path, caplog: Any):
    out = tmp_path / "hf"
    (run / "generation_config.json").write_text(json.dumps(SOURCE))
    commands.call(TO_HF, "--checkpoint", run, "--out", out)
    pad = read(out / "config.json")["pad_token_id"]
    assert read(out / "generation_config.json") == SOURCE | {"eos_token_id": [2, 11, 12], "pad_token_id": pad}
    assert read(out / "config.json")["eos_token_id"] == 2, "the trained one"
    assert load(out, caplog).eos_token_id == [2, 11, 12]
    assert find_model(out).stops == find_model(run).stops == [2, 11, 12]


def test_files_that_only_repeat_the_config_add_no_stop_id(commands: Commands, run: Path, tmp_path: Path):
    (run / "generation_config.json").write_text('{"_from_model_config": true, "eos_token_id": 7}')
    commands.call(TO_HF, "--checkpoint", run, "--out", tmp_path / "hf")
    assert read(tmp_path / "hf/generation_config.json")["eos_token_id"] == 2


def test_a_trained_template_with_its_own_end(commands: Commands, run: Path, tmp_path: Path):
    """As in Llama 3, the template ends turns with another token than the tokenizer's end-of-sequence token."""
    from xlam_jax.data.tokenizer import load_tokenizer, save

    tokenizer = load_tokenizer(str(run / "tokenizer"))
    tokenizer.chat_template = (
        "{%- for m in messages -%}{{- '[INST]' + m.content if m.role != 'assistant' else m.content + '[/INST]' -}}"
        "{%- endfor -%}"
    )
    shutil.rmtree(run / "tokenizer")
    save(tokenizer, run / "tokenizer", "native")
    commands.call(TO_HF, "--checkpoint", run, "--out", tmp_path / "hf")
    end = tokenizer.convert_tokens_to_ids("[/INST]")
    assert end != tokenizer.eos_token_id
    assert read(tmp_path / "hf/config.json")["eos_token_id"] == end
    assert read(tmp_path / "hf/generation_config.json")["eos_token_id"] == end
    assert find_model(run).stops == [end]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{", "generation_config.json, line 1, column 2: not valid JSON"),
        ("[1]", "generation_config.json: contains a list; a JSON object is expected"),
        ('{"eos_token_id": "2"}', "eos_token_id is '2'; a token id or a list of them, or null is expected"),
        ('{"eos_token_id": [2, 1.5]}', r"eos_token_id is \[2, 1.5\]"),
        ('{"eos_token_id": true}', "eos_token_id is True"),
        ('{"pad_token_id": -1}', "pad_token_id is -1; a token id, or null is expected"),
    ],
)
def test_invalid_files_are_one_message(tmp_path: Path, text: str, expected: str):
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(UserError, match=expected):
        read_generation_config(tmp_path / "generation_config.json")


def test_an_invalid_file_stops_a_conversion_before_it_begins(commands: Commands, tmp_path: Path):
    tiny_models.hf_model("mistral").save_pretrained(tmp_path / "hf")
    (tmp_path / "hf/generation_config.json").write_text("{")
    assert "not valid JSON" in commands.fails(TO_ORBAX, "--hf", tmp_path / "hf", "--out", tmp_path / "orbax")
    assert not (tmp_path / "orbax").exists()


class Tokenizer:
    bos_token_id = None
    pad_token_id = 3


def test_alignment():
    config, generation = align({"eos_token_id": 7, "bos_token_id": 1}, None, [2, 4], Tokenizer)
    assert config == {"eos_token_id": [2, 4], "bos_token_id": 1, "pad_token_id": 3}
    assert generation == config | {"_from_model_config": True}
    assert stop_ids([2], {"eos_token_id": [2, 9, None]}) == [2, 9]
    assert stop_ids([2], {"eos_token_id": 9}) == [2, 9]
    assert stop_ids([2], {}) == [2]
