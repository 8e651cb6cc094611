"""Greedy generation equals transformers'; sampling repeats; the command explains wrong input."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
import tiny_models
import torch
from transformers import AutoModelForCausalLM

from xlam_jax import generate as command
from xlam_jax.errors import UserError
from xlam_jax.models.config import ModelConfig
from xlam_jax.models.decoder import Decoder
from xlam_jax.models.generation import generate
from xlam_jax.models.params import binder
from xlam_jax.weights.hf import load_hf

TOKENIZER = Path(__file__).parent.parent / "examples" / "quickstart" / "tokenizer"
NEW = 12
NEVER = -1
"""No token: rows run to their limit."""


def load(folder: Path) -> Decoder:
    hf_config, params = load_hf(folder)
    return binder(ModelConfig.from_hf(hf_config), dtype=jnp.float32)(params)


@pytest.fixture(scope="module", params=["mixtral", "mistral"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    overrides = {"mixtral": {}, "mistral": {"sliding_window": 7}}[request.param]
    path = tmp_path_factory.mktemp("hf") / request.param
    tiny_models.hf_model(request.param, **overrides).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def model(folder: Path) -> Decoder:
    return load(folder)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    return [tiny_models.tokens(1, length, seed=length)[0].tolist() for length in (40, 3, 17)]


def hf_generate(folder: Path, prompts: list[list[int]], *eos: int) -> list[list[int]]:
    """What transformers generates for the left-padded batch, up to and with the first end token."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    hf = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    hf.generation_config.eos_token_id = list(eos) if eos != (NEVER,) else None
    out = hf.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, pad_token_id=0)
    rows = [row[longest:].tolist() for row in out]
    ends = [next((at for at, token in enumerate(row) if token in eos), NEW) for row in rows]
    return [row[: end + 1] for row, end in zip(rows, ends, strict=True)]


def test_greedy_equals_transformers(folder: Path, model: Decoder, prompts: list[list[int]]):
    ours = generate(model, prompts, max_new_tokens=NEW, eos_id=NEVER)
    assert ours == hf_generate(folder, prompts, NEVER)
    assert [len(row) for row in ours] == [NEW] * 3
    # The same with an end token that one of the rows comes to.
    eos = ours[1][4]
    ended = generate(model, prompts, max_new_tokens=NEW, eos_id=eos)
    assert ended == hf_generate(folder, prompts, eos)
    assert len(ended[1]) <= 5 < NEW
    # and with two of them, of which rows come to one each
    other = ours[0][2]
    ended = generate(model, prompts, max_new_tokens=NEW, eos_id=[eos, other])
    assert ended == hf_generate(folder, prompts, eos, other)
    assert len(ended[0]) <= 3


def test_a_row_of_a_batch_equals_the_row_alone(model: Decoder, prompts: list[list[int]]):
    together = generate(model, prompts, max_new_tokens=NEW, eos_id=NEVER)
    assert generate(model, prompts, max_new_tokens=NEW, eos_id=NEVER, rows=1) == together


def test_shapes_that_are_much_alike_share_a_compilation(
    model: Decoder, prompts: list[list[int]], caplog: pytest.LogCaptureFixture
):
    generate(model, prompts, max_new_tokens=NEW, eos_id=NEVER)
    with jax.log_compiles():
        generate(model, [prompt[1:] for prompt in prompts], max_new_tokens=NEW + 1, eos_id=7)
    assert "Compiling" not in caplog.text


def test_a_prompt_longer_than_a_chunk(tmp_path: Path):
    tiny_models.hf_model("mistral", sliding_window=50).save_pretrained(tmp_path)
    prompts = [tiny_models.tokens(1, length)[0].tolist() for length in (300, 20, 25)]
    ours = generate(load(tmp_path), prompts, max_new_tokens=NEW, eos_id=NEVER, rows=2)
    assert ours == hf_generate(tmp_path, prompts, NEVER)


def test_sampling_repeats_with_its_seed(model: Decoder, prompts: list[list[int]]):
    def draw(seed: int, **options: Any) -> list[list[int]]:
        return generate(model, prompts, max_new_tokens=NEW, eos_id=NEVER, temperature=1.5, seed=seed, **options)

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)
    greedy = generate(model, prompts, max_new_tokens=NEW, eos_id=NEVER)
    assert draw(1) != greedy
    assert draw(1, top_p=0.0) == greedy, "no probability left but the likeliest token's"


def test_rows_stop_at_the_last_position(tmp_path: Path):
    last = 50
    tiny_models.hf_model("mistral", max_position_embeddings=last).save_pretrained(tmp_path)
    model = load(tmp_path)
    prompts = [tiny_models.tokens(1, length)[0].tolist() for length in (last - 3, 5)]
    assert [len(row) for row in generate(model, prompts, max_new_tokens=NEW, eos_id=NEVER)] == [3, NEW]
    with pytest.raises(ValueError, match=f"{last + 1}"):
        generate(model, [[5] * (last + 1)], max_new_tokens=1, eos_id=NEVER)


USER = {"role": "user", "content": "Where is it sunny?"}
TOOL = {
    "type": "function",
    "function": {
        "name": "search",
        "description": "Search the web.",
        "parameters": {"type": "object", "properties": {"query": {"type": "string"}}, "required": ["query"]},
    },
}


@pytest.fixture(scope="module")
def with_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hf") / "model"
    tiny_models.hf_model("mistral", vocab_size=2048).save_pretrained(path)
    for file in TOKENIZER.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    return path


def run_command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["generate", *map(str, arguments)])
    command.main()


def test_command(with_tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any):
    messages, tools = tmp_path / "messages.json", tmp_path / "tools.json"
    messages.write_text(json.dumps([[USER], [{"role": "system", "content": "Be brief."}, USER]]))
    tools.write_text(json.dumps([TOOL]))
    run_command(monkeypatch, "--model", with_tokenizer, "--messages", messages, "--tools", tools, "--max-new-tokens", 5)
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [set(answer) for answer in answers] == [{"content", "tool_calls", "finish_reason"}] * 2


def test_tool_calls_are_parsed(with_tokenizer: Path, monkeypatch: pytest.MonkeyPatch):
    found = command.find_model(with_tokenizer)
    tokenizer = found.tokenizer
    calls = [{"name": "search", "arguments": {"query": "weather"}}]

    def answer(text: str, ended: bool) -> dict[str, Any]:
        new = tokenizer.encode(text, add_special_tokens=False) + [tokenizer.eos_token_id] * ended
        monkeypatch.setattr("xlam_jax.models.generation.generate", lambda *_, **__: [new])
        return command.complete(found.load(), tokenizer, [[1]], max_new_tokens=1)[0]

    text = f"Let me look.[TOOL_CALLS]{json.dumps(calls)}"
    assert answer(text, True) == {"content": "Let me look.", "tool_calls": calls, "finish_reason": "tool_calls"}
    assert answer("It is sunny.", True) == {"content": "It is sunny.", "tool_calls": [], "finish_reason": "stop"}
    assert answer("It is", False)["finish_reason"] == "length"


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        (None, "messages.json: no such file"),
        ('[{"role": "user",\n "content": }]', "messages.json, line 2, column 13: not valid JSON"),
        ("[]", "contains an empty list"),
        ('"hello"', "contains a str"),
        ('[{"role": "system", "content": "Be brief."}]', "messages.json: the last turn is by the system"),
        ('[[{"role": "user", "content": "a"}], [{"role": "assistant", "content": "b"}]]', "conversation 1: "),
        (json.dumps([{"role": "user", "content": "word " * 600}]), "positions"),
    ],
    ids=["missing", "malformed", "empty", "string", "no-user", "second-is-wrong", "too-long"],
)
def test_wrong_messages(
    with_tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, messages: str | None, expected: str
):
    path = tmp_path / "messages.json"
    if messages is not None:
        path.write_text(messages)
    with pytest.raises(UserError) as error:
        run_command(monkeypatch, "--model", with_tokenizer, "--messages", path)
    assert expected in str(error.value)


def test_a_folder_that_is_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    messages = tmp_path / "messages.json"
    messages.write_text(json.dumps([USER]))
    for model, expected in [(tmp_path, "neither a Hugging Face folder"), (tmp_path / "none", "no such folder")]:
        with pytest.raises(UserError, match=expected):
            run_command(monkeypatch, "--model", model, "--messages", messages)


def test_commands_answer_before_they_import_jax():
    modules = "xlam_jax.generate, converters.hf_to_orbax, converters.orbax_to_hf"
    code = f"import sys, {modules}; print({{'jax', 'transformers', 'orbax', 'flax'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
