"""FastChat worker for a served model: `python -m serving.fastchat_worker --model DIR [-- <vLLM flags>]`.

FastChat (https://github.com/lm-sys/FastChat) joins a conversation into one prompt with its own templates, which differ
from the trained chat template. This worker gives it a template that only marks the turns, splits the prompt into turns
again, and lets vLLM render them with the model's chat template. It implements FastChat's HTTP protocol and does not
import FastChat.
"""

import json
import re
import signal
import socket
import sys
import threading
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from serving.serve import (
    add_model_arguments,
    build_command,
    check_port,
    reachable,
    serve,
    server_key,
    split,
    warn_if_exposed,
)
from xlam_jax.cli import Parser, add_server, run
from xlam_jax.digest import hex_digest
from xlam_jax.errors import UserError

HEART_BEAT = 45.0
"""Interval of heartbeats in seconds. The controller removes a worker after 90 s without one."""
ADD_COLON_TWO = 2
"""FastChat's separator style `role: text`, the only one that also accepts content as a list of parts."""
ROLES = ("system", "user", "assistant")
CONTEXT_OVERFLOW, OVERLOADED, INTERNAL = 40303, 42903, 50001
"""FastChat's error codes."""


class Worker:
    """Answers FastChat's requests with a vLLM server."""

    def __init__(
        self, base_url: str, address: str, controller: str, beat: float = HEART_BEAT, api_key: str | None = None
    ):
        """Connects to the vLLM server.

        `address`: URL under which FastChat reaches the worker. `controller`: URL of FastChat's controller. `beat`:
        interval of heartbeats in seconds. Raises `UserError` if the server does not answer, or is not vLLM.
        """
        from openai import OpenAI

        from xlam_jax.client.completion import resolve_key, xLAMChatCompletion

        key = resolve_key(api_key)
        self._headers = {"Authorization": f"Bearer {key}"}
        self._llm = OpenAI(base_url=base_url, api_key=key, max_retries=0)
        self._root = base_url.rstrip("/").removesuffix("/v1")
        self._address, self._controller, self._beat = address, controller.rstrip("/"), beat
        with xLAMChatCompletion(base_url, "", api_key=key) as client:
            self.names = client.models()
        lengths = [getattr(model, "max_model_len", None) for model in self._llm.models.list().data]
        if not isinstance(lengths[0], int):
            raise UserError(f"{base_url}: does not report max_model_len; a vLLM server is expected")
        self.context_length = lengths[0]
        # FastChat caches a worker's template while it runs, so a restarted worker must have the same mark; and the mark
        # must not occur in users' texts
        mark = "\x1e" + hex_digest(f"{socket.gethostname()} {address} {self.names}", length=16)
        self._turn = re.compile(f"{mark} ({'|'.join(ROLES)}):(?: |(?={mark})|$)")
        system, user, assistant = (f"{mark} {role}" for role in ROLES)
        self.template = {
            "name": "xlam_jax",
            "system_template": system + ": {system_message}",
            "system_message": "",
            "roles": [user, assistant],
            "messages": [],
            "offset": 0,
            "sep_style": ADD_COLON_TWO,
            "sep": "",
            "sep2": "",
            "stop_str": None,
            "stop_token_ids": None,
        }
        self._lock, self._active = threading.Lock(), 0
        self._stop = threading.Event()

    def conversation(self, prompt: str) -> list[Any] | None:
        """Splits a prompt of FastChat into messages. Returns None for a text that is not a conversation."""
        prefix, *turns = self._turn.split(prompt)
        if prefix or not turns:
            return None
        messages = [{"role": role, "content": text} for role, text in zip(turns[::2], turns[1::2], strict=True)]
        if messages[-1] == {"role": "assistant", "content": ""}:  # the turn to be generated
            messages.pop()
        return [message for message in messages if message["role"] != "system" or message["content"]]

    def count_token(self, params: dict[str, Any]) -> dict[str, Any]:
        """Returns the number of tokens of a prompt after the chat template."""
        messages = self.conversation(params["prompt"])
        text = {"prompt": params["prompt"]} if messages is None else {"messages": messages}
        try:
            answer = post(f"{self._root}/tokenize", {"model": params.get("model", self.names[0])} | text, self._headers)
        except OSError as error:
            return {"count": 0, **self._failure(error)}
        return {"count": answer["count"], "error_code": 0}

    def generate(self, params: dict[str, Any], *, stream: bool = True) -> Generator[dict[str, Any], None, None]:
        """Yields the answer: with `stream`, the whole text so far for each chunk, as FastChat's protocol requires.

        The last item has the finish reason and the usage. An error is yielded as one item with its code.
        """
        import openai

        with self._count_active():
            pieces: list[str] = []
            usage, finish, logprobs = None, None, None
            try:
                with self._stream(params) as chunks:
                    for chunk in chunks:
                        usage = chunk.usage or usage
                        for choice in chunk.choices:
                            pieces.append((choice.delta.content if hasattr(choice, "delta") else choice.text) or "")
                            finish = choice.finish_reason or finish
                            logprobs = _join_logprobs(logprobs, getattr(choice, "logprobs", None))
                        if stream and chunk.choices and finish is None:
                            pieces = ["".join(pieces)]
                            yield {"text": pieces[0], "error_code": 0, "finish_reason": None}
            except (openai.OpenAIError, OSError) as error:
                yield {"text": "", **self._failure(error)}
                return
            text = "".join(pieces)
            if finish is None:
                broken = ConnectionError(f"its answer broke off after {len(text)} characters")
                yield {"text": "", **self._failure(broken)}
                return
            usage_entry = {} if usage is None else {"usage": usage.model_dump(include=set(USAGE))}
            last = {"text": text, "error_code": 0, "logprobs": logprobs} | usage_entry
            if stream:
                yield last | {"finish_reason": None}  # FastChat expects the finish reason in a separate item
            yield last | {"finish_reason": finish}

    def _stream(self, params: dict[str, Any]) -> Any:
        """Sends the request to the server. Returns the stream of its answer."""
        same_name = ("temperature", "top_p", "presence_penalty", "frequency_penalty", "stop")
        options = {name: params.get(name) for name in same_name} | {"max_tokens": params.get("max_new_tokens")}
        request: dict[str, Any] = {name: value for name, value in options.items() if value not in (None, [])}
        vllm_options = {name: params[name] for name in ("top_k", "stop_token_ids") if params.get(name)}
        request |= {"model": params.get("model", self.names[0]), "extra_body": vllm_options, "stream": True}
        request |= {"stream_options": {"include_usage": True}}
        messages = self.conversation(params["prompt"])
        if messages is not None:
            return self._llm.chat.completions.create(messages=messages, **request)
        request |= {name: params[name] for name in ("echo", "logprobs") if params.get(name)}
        return self._llm.completions.create(prompt=params["prompt"], **request)

    def _failure(self, error: Exception) -> dict[str, Any]:
        """Returns FastChat's text and error code for an error."""
        import openai

        message = str(error)
        if isinstance(error, openai.APIStatusError):
            body = error.body if isinstance(error.body, dict) else {}
            message = str(body.get("message") or message)
            if error.status_code == 429:
                return {"text": message, "error_code": OVERLOADED}
            if error.status_code == 400 and "context length" in message:
                return {"text": message, "error_code": CONTEXT_OVERFLOW}
        return {"text": f"the model's server failed: {message}", "error_code": INTERNAL}

    @contextmanager
    def _count_active(self) -> Iterator[None]:
        with self._lock:
            self._active += 1
        try:
            yield
        finally:
            with self._lock:
                self._active -= 1

    def status(self) -> dict[str, Any]:
        """Returns the worker's status for the controller."""
        return {"model_names": self.names, "speed": 1, "queue_length": self._active}

    def register(self) -> None:
        """Registers this worker with the controller.

        Raises `UserError` if no controller answers, or if the worker's address does not lead to this worker.
        """
        try:
            answer = post(f"{self._address}/worker_get_status", {})
        except (OSError, ValueError) as error:
            answer = error
        if answer != self.status():
            raise UserError(
                f"--worker-address {self._address} does not lead to this worker ({answer}); set it to the address "
                "under which FastChat reaches the --port that the worker listens on"
            )
        body = {
            "worker_name": self._address,
            "check_heart_beat": True,
            "worker_status": self.status(),
            "multimodal": False,
        }
        try:
            post(f"{self._controller}/register_worker", body)
        except (OSError, ValueError) as error:
            raise no_controller(self._controller, error) from None

    def send_heartbeats(self) -> None:
        """Sends heartbeats until `stop` is called, and registers again with a controller that was restarted."""
        while not self._stop.wait(self._beat):
            body = {"worker_name": self._address, "queue_length": self._active}
            try:
                if not post(f"{self._controller}/receive_heart_beat", body)["exist"]:
                    self.register()
                    print(f"{self._controller}: registered again", file=sys.stderr, flush=True)
            except (OSError, ValueError, KeyError, UserError) as error:
                print(f"{self._controller}: heartbeat failed ({error}); trying again", file=sys.stderr, flush=True)

    def stop(self) -> None:
        """Makes `send_heartbeats` return."""
        self._stop.set()


USAGE = ("prompt_tokens", "completion_tokens", "total_tokens")


def no_controller(address: str, error: Exception) -> UserError:
    """Returns the error for a controller that does not answer, with the command that starts one."""
    return UserError(
        f"--controller-address {address}: no controller of FastChat answers there ({error}); start one with "
        "`python -m fastchat.serve.controller`"
    )


def _join_logprobs(previous: dict[str, Any] | None, new: Any) -> dict[str, Any] | None:
    """Appends the log-probabilities of a chunk, in the format of OpenAI's completions, to `previous` in place."""
    if new is None or not hasattr(new, "token_logprobs"):
        return previous
    joined = previous or {}
    for name, values in new.model_dump().items():
        joined.setdefault(name, []).extend(values or [])
    return joined


def post(url: str, body: Any, headers: Mapping[str, str] | None = None) -> Any:
    """Posts JSON without a proxy. Returns the JSON of the response, None if it is empty.

    Raises `OSError` if there is no answer, an HTTP error status, or a response that is not HTTP; `ValueError` for an
    invalid URL or a response that is not JSON.
    """
    import httpx2

    try:
        with httpx2.Client(timeout=30, headers=headers, trust_env=False, follow_redirects=True) as client:
            response = client.post(url, json=body)
        response.raise_for_status()
    except httpx2.HTTPStatusError as error:
        raise ConnectionError(f"answered {error.response.status_code} {error.response.reason_phrase}") from None
    except httpx2.HTTPError as error:
        raise ConnectionError(f"{type(error).__name__}: {str(error)[:100]}") from None
    except httpx2.InvalidURL as error:
        raise ValueError(str(error)) from None
    return json.loads(response.content or b"null")


def make_handler(worker: Worker) -> type[BaseHTTPRequestHandler]:
    """Returns the HTTP handler class with the worker's endpoints."""
    endpoints: dict[str, Callable[[dict[str, Any]], Any]] = {
        "/worker_get_status": lambda params: worker.status(),
        "/worker_get_conv_template": lambda params: {"conv": worker.template},
        "/model_details": lambda params: {"context_length": worker.context_length},
        "/count_token": worker.count_token,
        "/worker_generate": lambda params: list(worker.generate(params, stream=False))[-1],
    }

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            answers: Generator[Any, None, None] | None = None
            body = b""
            try:
                text = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                params = json.loads(text) if text else {}
                if self.path == "/worker_generate_stream":
                    answers = worker.generate(params)
                elif endpoint := endpoints.get(self.path):
                    body = json.dumps(endpoint(params)).encode()
                else:
                    self.send_error(404)
                    return
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                self.send_error(400, explain=repr(error))
                return
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(body)
            try:
                for answer in answers or ():
                    self.wfile.write(json.dumps(answer).encode() + b"\0")
            except OSError:  # the client has disconnected
                if answers is not None:
                    answers.close()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    return Handler


@contextmanager
def running(worker: Worker, host: str, port: int) -> Iterator[None]:
    """Context manager in which the worker listens, is registered, and sends heartbeats. Raises as `register`."""
    server = ThreadingHTTPServer((host, port), make_handler(worker))
    threads = [threading.Thread(target=work, daemon=True) for work in (server.serve_forever, worker.send_heartbeats)]
    threads[0].start()
    try:
        worker.register()
        threads[1].start()
        yield
    finally:
        worker.stop()
        server.shutdown()
        server.server_close()


def main() -> int:
    """The command line."""
    own, extra = split(sys.argv[1:])
    parser = Parser(
        prog="python -m serving.fastchat_worker",
        description="Registers a model, served by vLLM, with FastChat's controller.",
        epilog="Flags after -- are passed to `vllm serve`.",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    add_server(parser, required=False, model="none", timeout=None, group=source)
    add_model_arguments(parser, source)
    parser.add_argument("--host", default="127.0.0.1", help="address that the worker listens on (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=21002, help="port that the worker listens on (default: 21002)")
    parser.add_argument(
        "--worker-address", metavar="URL", help="URL under which FastChat reaches the worker (default: host and port)"
    )
    parser.add_argument(
        "--controller-address",
        metavar="URL",
        default="http://localhost:21001",
        help="URL of FastChat's controller (default: %(default)s)",
    )
    args = parser.parse_args(own)
    check_port(args.host, args.port)
    warn_if_exposed(args.host, args.port, "FastChat has no keys: keep the port within a trusted network")
    key = args.api_key if args.base_url else args.api_key or server_key(extra)
    try:
        post(f"{args.controller_address.rstrip('/')}/list_models", {})
    except (OSError, ValueError) as error:
        raise no_controller(args.controller_address, error) from None
    address = (args.worker_address or f"http://{reachable(args.host)}:{args.port}").rstrip("/")

    @contextmanager
    def ready(base_url: str) -> Iterator[None]:
        worker = Worker(base_url, address, args.controller_address, api_key=key)
        with running(worker, args.host, args.port):
            print(
                f"ready: {', '.join(worker.names)} at {address}, registered with {args.controller_address}", flush=True
            )
            yield

    if args.base_url is None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command, name = build_command(args, "127.0.0.1", port, extra)
        return serve(command, "127.0.0.1", port, name, args.timeout, ready)
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    with ready(args.base_url):
        stop.wait()
    return 0


if __name__ == "__main__":
    run(main)
