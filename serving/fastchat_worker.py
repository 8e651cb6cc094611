"""A served model behind FastChat's controller: `python -m serving.fastchat_worker --model DIR [-- <vLLM flags>]`.

FastChat (https://github.com/lm-sys/FastChat) joins a conversation into one text by rules of its own, which are not
those of training. This worker gives it rules that only keep the turns apart, reads them back, and has vLLM render them
with the model's chat template. It speaks FastChat's protocol over HTTP and needs nothing of it.
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
    check_port,
    command_of,
    reachable,
    serve,
    server_key,
    split,
    warn_of_strangers,
)
from xlam_jax.cli import Parser, add_server, run
from xlam_jax.digest import hex_digest
from xlam_jax.errors import UserError

HEART_BEAT = 45.0
"""Seconds; the controller forgets a worker of which it has heard nothing for 90."""
ADD_COLON_TWO = 2
"""FastChat's style of joining turns: `role: text`, the one that also takes a text given as a list of parts."""
ROLES = ("system", "user", "assistant")
CONTEXT_OVERFLOW, OVERLOADED, INTERNAL = 40303, 42903, 50001
"""FastChat's codes of errors."""


class Worker:
    """What FastChat asks of a worker, answered by an OpenAI-compatible server of vLLM."""

    def __init__(
        self, base_url: str, address: str, controller: str, beat: float = HEART_BEAT, api_key: str | None = None
    ):
        """`address`: where FastChat reaches the worker. Raises `UserError` where the server does not answer."""
        from openai import OpenAI

        from xlam_jax.client.completion import checked_key, xLAMChatCompletion

        key = checked_key(api_key)
        self._headers = {"Authorization": f"Bearer {key}"}
        self._llm = OpenAI(base_url=base_url, api_key=key, max_retries=0)
        self._root = base_url.rstrip("/").removesuffix("/v1")
        self._address, self._controller, self._beat = address, controller.rstrip("/"), beat
        with xLAMChatCompletion(base_url, "", api_key=key) as client:
            self.names = client.models()
        lengths = [getattr(model, "max_model_len", None) for model in self._llm.models.list().data]
        if not isinstance(lengths[0], int):
            raise UserError(f"{base_url}: does not tell its max_model_len; a server of vLLM is expected")
        self.context_length = lengths[0]
        # FastChat keeps a worker's rules for as long as it runs, so a restarted one must have the same; and a text
        # that somebody quotes must not look like a turn
        mark = "\x1e" + hex_digest(f"{socket.gethostname()} {address} {self.names}", length=16)
        self._turn = re.compile(f"{mark} ({'|'.join(ROLES)}):(?: |(?={mark})|$)")
        system, user, assistant = (f"{mark} {role}" for role in ROLES)
        self.rules = {
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
        """The turns that FastChat joined; None for a text that is no conversation."""
        before, *turns = self._turn.split(prompt)
        if before or not turns:
            return None
        messages = [{"role": role, "content": text} for role, text in zip(turns[::2], turns[1::2], strict=True)]
        if messages[-1] == {"role": "assistant", "content": ""}:  # the answer's place
            messages.pop()
        return [one for one in messages if one["role"] != "system" or one["content"]]

    def count_token(self, params: dict[str, Any]) -> dict[str, Any]:
        """Tokens of a prompt, as the model reads it."""
        messages = self.conversation(params["prompt"])
        asked = {"prompt": params["prompt"]} if messages is None else {"messages": messages}
        try:
            counted = post(
                f"{self._root}/tokenize", {"model": params.get("model", self.names[0])} | asked, self._headers
            )
        except OSError as error:
            return {"count": 0, **self._failure(error)}
        return {"count": counted["count"], "error_code": 0}

    def generate(self, params: dict[str, Any], *, grows: bool = True) -> Generator[dict[str, Any], None, None]:
        """The answer again and again as it grows, the last one with its end; or one that reports an error.

        Without `grows` only the last one: FastChat's protocol repeats the text with each piece.
        """
        import openai

        with self._counted():
            pieces: list[str] = []
            usage, finish, logprobs = None, None, None
            try:
                with self._asked(params) as chunks:
                    for chunk in chunks:
                        usage = chunk.usage or usage
                        for choice in chunk.choices:
                            pieces.append((choice.delta.content if hasattr(choice, "delta") else choice.text) or "")
                            finish = choice.finish_reason or finish
                            logprobs = _joined(logprobs, getattr(choice, "logprobs", None))
                        if grows and chunk.choices and finish is None:
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
            counted = {} if usage is None else {"usage": usage.model_dump(include=set(USAGE))}
            last = {"text": text, "error_code": 0, "logprobs": logprobs} | counted
            if grows:
                yield last | {"finish_reason": None}  # FastChat tells of the end in a piece of its own
            yield last | {"finish_reason": finish}

    def _asked(self, params: dict[str, Any]) -> Any:
        """The stream of the server's answer."""
        same = ("temperature", "top_p", "presence_penalty", "frequency_penalty", "stop")
        given = {name: params.get(name) for name in same} | {"max_tokens": params.get("max_new_tokens")}
        request: dict[str, Any] = {name: value for name, value in given.items() if value not in (None, [])}
        others = {name: params[name] for name in ("top_k", "stop_token_ids") if params.get(name)}
        request |= {"model": params.get("model", self.names[0]), "extra_body": others, "stream": True}
        request |= {"stream_options": {"include_usage": True}}
        messages = self.conversation(params["prompt"])
        if messages is not None:
            return self._llm.chat.completions.create(messages=messages, **request)
        request |= {name: params[name] for name in ("echo", "logprobs") if params.get(name)}
        return self._llm.completions.create(prompt=params["prompt"], **request)

    def _failure(self, error: Exception) -> dict[str, Any]:
        import openai

        said = str(error)
        if isinstance(error, openai.APIStatusError):
            body = error.body if isinstance(error.body, dict) else {}
            said = str(body.get("message") or said)
            if error.status_code == 429:
                return {"text": said, "error_code": OVERLOADED}
            if error.status_code == 400 and "context length" in said:
                return {"text": said, "error_code": CONTEXT_OVERFLOW}
        return {"text": f"the model's server failed: {said}", "error_code": INTERNAL}

    @contextmanager
    def _counted(self) -> Iterator[None]:
        with self._lock:
            self._active += 1
        try:
            yield
        finally:
            with self._lock:
                self._active -= 1

    def status(self) -> dict[str, Any]:
        """What the controller wants to know."""
        return {"model_names": self.names, "speed": 1, "queue_length": self._active}

    def register(self) -> None:
        """Tells the controller of this worker. Raises `UserError` where there is none, or none that can reach it."""
        try:
            answer = post(f"{self._address}/worker_get_status", {})
        except (OSError, ValueError) as error:
            answer = error
        if answer != self.status():
            raise UserError(
                f"--worker-address {self._address} does not lead to this worker ({answer}); give the address under "
                "which FastChat reaches the --port that it listens on"
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

    def live(self) -> None:
        """Sends a heart beat now and then, until `end`; a controller that was started anew is told of the worker."""
        while not self._stop.wait(self._beat):
            body = {"worker_name": self._address, "queue_length": self._active}
            try:
                if not post(f"{self._controller}/receive_heart_beat", body)["exist"]:
                    self.register()
                    print(f"{self._controller}: registered again", file=sys.stderr, flush=True)
            except (OSError, ValueError, KeyError, UserError) as error:
                print(f"{self._controller}: no heart beat ({error}); trying again", file=sys.stderr, flush=True)

    def end(self) -> None:
        """Ends `live`."""
        self._stop.set()


USAGE = ("prompt_tokens", "completion_tokens", "total_tokens")


def no_controller(address: str, error: Exception) -> UserError:
    """Tells how one is started."""
    return UserError(
        f"--controller-address {address}: no controller of FastChat answers there ({error}); start one with "
        "`python -m fastchat.serve.controller`"
    )


def _joined(before: dict[str, Any] | None, new: Any) -> dict[str, Any] | None:
    """Log-probabilities of the tokens so far, in the form of OpenAI's completions; adds to `before`."""
    if new is None or not hasattr(new, "token_logprobs"):
        return before
    joined = before or {}
    for name, values in new.model_dump().items():
        joined.setdefault(name, []).extend(values or [])
    return joined


def post(url: str, body: Any, headers: Mapping[str, str] | None = None) -> Any:
    """Posts JSON, and returns the JSON of the response, None for an empty one. Uses no proxy.

    Raises `OSError` where nothing answers, or with an error or not in HTTP, and `ValueError` for an invalid address and
    for a response that is not JSON.
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


def handler_of(worker: Worker) -> type[BaseHTTPRequestHandler]:
    """The worker's pages."""
    pages: dict[str, Callable[[dict[str, Any]], Any]] = {
        "/worker_get_status": lambda params: worker.status(),
        "/worker_get_conv_template": lambda params: {"conv": worker.rules},
        "/model_details": lambda params: {"context_length": worker.context_length},
        "/count_token": worker.count_token,
        "/worker_generate": lambda params: list(worker.generate(params, grows=False))[-1],
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
                elif page := pages.get(self.path):
                    body = json.dumps(page(params)).encode()
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
            except OSError:  # whoever asked has gone
                if answers is not None:
                    answers.close()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    return Handler


@contextmanager
def running(worker: Worker, host: str, port: int) -> Iterator[None]:
    """The worker listens and is registered, for as long as the context lasts."""
    server = ThreadingHTTPServer((host, port), handler_of(worker))
    threads = [threading.Thread(target=work, daemon=True) for work in (server.serve_forever, worker.live)]
    threads[0].start()
    try:
        worker.register()
        threads[1].start()
        yield
    finally:
        worker.end()
        server.shutdown()
        server.server_close()


def main() -> int:
    """The command line."""
    own, extra = split(sys.argv[1:])
    parser = Parser(
        prog="python -m serving.fastchat_worker",
        description="Registers a model, served by vLLM, with FastChat's controller.",
        epilog="Flags behind -- go to `vllm serve`.",
    )
    which = parser.add_mutually_exclusive_group(required=True)
    add_server(parser, required=False, model="none", timeout=None, group=which)
    add_model_arguments(parser, which)
    parser.add_argument("--host", default="127.0.0.1", help="where the worker listens (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=21002)
    parser.add_argument("--worker-address", metavar="URL", help="how FastChat reaches it (default: from host and port)")
    parser.add_argument("--controller-address", metavar="URL", default="http://localhost:21001")
    args = parser.parse_args(own)
    check_port(args.host, args.port)
    warn_of_strangers(args.host, args.port, "FastChat has none: keep the port within a network that you trust")
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
        command, name = command_of(args, "127.0.0.1", port, extra)
        return serve(command, "127.0.0.1", port, name, args.timeout, ready)
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    with ready(args.base_url):
        stop.wait()
    return 0


if __name__ == "__main__":
    run(main)
