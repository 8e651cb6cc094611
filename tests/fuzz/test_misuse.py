"""Invalid command lines give exit code 2 and one message without a traceback."""

import socket
from collections.abc import Iterator
from pathlib import Path
from threading import Thread

import pytest
from support import Commands

CONFIG = "configs/quickstart.yaml"
BASES: dict[str, list[str]] = {
    "xlam_jax.train": ["--config", CONFIG],
    "xlam_jax.plan": ["--config", CONFIG, "--topology", "cpu:1"],
    "xlam_jax.generate": ["--model", "FOLDER", "--messages", "examples/quickstart/request.json"],
    "xlam_jax.report": ["FOLDER"],
    "xlam_jax.evaluate": ["--suite", "next_call", "--out", "FOLDER"],
    "xlam_jax.evaluate.corpus": ["--pages", "FILE", "--out", "NEW"],
    "xlam_jax.data validate": ["FILE"],
    "xlam_jax.data stats": ["--config", CONFIG],
    "xlam_jax.data preview": ["--config", CONFIG],
    "xlam_jax.data prepare": ["--config", CONFIG, "--out", "NEW"],
    "xlam_jax.data pairs": ["FILE", "--out", "NEW"],
    "xlam_jax.data rate": ["FILE", "--base-url", "http://127.0.0.1:9/v1", "--model", "m", "--out", "NEW"],
    "converters.hf_to_orbax": ["--hf", "FOLDER", "--out", "NEW"],
    "converters.orbax_to_hf": ["--checkpoint", "FOLDER", "--out", "NEW"],
    "converters.inspect": ["FOLDER"],
    "converters.trajectories": ["--format", "openai", "--in", "FILE", "--out", "NEW"],
    "serving.serve": ["--model", "FOLDER", "--print-command"],
    "serving.parity": ["--checkpoint", "FOLDER", "--base-url", "http://127.0.0.1:9/v1"],
    "serving.fastchat_worker": ["--base-url", "http://127.0.0.1:9/v1", "--controller-address", "http://127.0.0.1:9"],
    "serving.chat": ["--base-url", "http://127.0.0.1:9/v1"],
}
"""Commands with arguments that argparse takes."""
CONFIGURED = [name for name, arguments in BASES.items() if CONFIG in arguments]
BAD_PATHS = ("/none/there", "x" * 300, "FOLDER/binary", "FOLDER/empty", "FOLDER", "FOLDER/locked/x", "FOLDER/text/x")
BAD_OVERRIDES = (
    "train.steps", "train.steps=x", "train.steps=-1", "train.stepz=1", "=", "train=3", "train.steps.x=1", "seed=[",
    "seed=2026-13-45", "model.config=/none", "model.overrides={rope_theta: null}", "data.tokenizer=7", "lora.x=1",
    "data.sources=[]", "data.sources.9.name=x", "model.overrides={hidden_size: 2026-01-01}", "train.batch_size=7.5",
    "mesh.data=0", "output_dir=null", "schema=99", "extends.a=1", "seed=" + "[" * 3000, "seed=&a [*a]",
    'model.config="\\0"',
)  # fmt: skip


def command_lines() -> list[tuple[str, list[str]]]:
    """Returns at least 300 of them: a command, and its arguments."""
    lines = []
    for name, base in BASES.items():
        lines += [(name, [*base, "--no-such-option"]), (name, [])]
        for at, word in enumerate(base):
            if word == CONFIG or word in ("FOLDER", "FILE"):
                lines += [(name, [*base[:at], path, *base[at + 1 :]]) for path in BAD_PATHS]
            if word.startswith("--") and word != "--print-command":
                lines.append((name, base[:at] + base[at + 2 :]))
                lines.append((name, [*base[:at], word]))
            if word.startswith("http"):
                urls = ("ftp://x/v1", "http://", "http://127.0.0.1:99999", "localhost", "http://127.0.0.1:SILENT/v1")
                lines += [(name, [*base[:at], url, *base[at + 1 :]]) for url in urls]
    lines += [(name, [*BASES[name], override]) for name in CONFIGURED for override in BAD_OVERRIDES]
    lines += [("serving.serve", ["--model", "FOLDER", "--host", host]) for host in ("no.such.host.invalid", "a" * 70)]
    lines += [("serving.serve", ["--model", "FOLDER", "--port", port]) for port in ("0", "-1", "99999", "x")]
    lines += [("xlam_jax.generate", ["--model", "FOLDER", "--messages", path]) for path in BAD_PATHS]
    for name, out in (("converters.hf_to_orbax", "gs://a/b"), ("converters.trajectories", "FOLDER/text/x")):
        lines.append((name, [*BASES[name][:-1], out]))
    return lines


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("misuse")
    (folder / "binary").write_bytes(bytes(range(256)))
    (folder / "empty").touch()
    (folder / "text").write_text("text\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def silent() -> Iterator[int]:
    """The port of a server that answers everything with a line that is not HTTP."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                with connection:
                    connection.sendall(b"220 hello\r\n")

        Thread(target=answer, daemon=True).start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)


def test_there_are_300_command_lines():
    assert len(command_lines()) >= 300


def check(commands: Commands, folder: Path, silent: int, lines: list[tuple[str, list[str]]]) -> list[str]:
    problems = []
    for name, arguments in lines:
        module, *command = name.split()
        words = [
            word.replace("FOLDER", str(folder)).replace("FILE", str(folder / "text")).replace("SILENT", str(silent))
            for word in arguments
        ]
        words = [str(folder / "new") if word == "NEW" else word for word in words]
        try:
            said = commands.call(module, *command, *words, code=2).stderr
            messages = sum(line.startswith("error: ") or ": error: " in line for line in said.splitlines())
            problem = f"{messages} messages: {said[-300:]}" if messages != 1 or "Traceback" in said else ""
        except (Exception, AssertionError) as error:
            problem = f"{type(error).__name__}: {error}"[-300:]
        if problem:
            problems.append(f"{name} {' '.join(arguments)[:200]}: {problem}")
    return problems


def test_misused_command_lines_give_one_message(commands: Commands, folder: Path, silent: int):
    """Every ninth by default; all of them in the slow tests."""
    assert check(commands, folder, silent, command_lines()[::9]) == []


@pytest.mark.slow
def test_300_misused_command_lines_give_one_message(commands: Commands, folder: Path, silent: int):
    assert check(commands, folder, silent, command_lines()) == []
