"""Servers and controllers with unexpected answers."""

import json
import socket
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from serving.fastchat_worker import post
from serving.parity import TOOLS, Server
from serving.serve import check_port, model_folder
from xlam_jax.client.completion import ServerError
from xlam_jax.errors import UserError
from xlam_jax.report import runs


@pytest.fixture
def plain_server() -> Iterator[str]:
    """A server with OpenAI's API, without vLLM's extensions."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.answer({"data": [{"id": "m"}]})

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            text = {"text": "Hi", "index": 0, "logprobs": None, "message": {"role": "assistant", "content": "Hi"}}
            self.answer({"choices": [text]})

        def answer(self, value: object) -> None:
            body = json.dumps(value).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()


def test_parity_names_a_server_that_is_not_vllm(plain_server: str):
    server = Server(plain_server, None, 10)
    with pytest.raises(ServerError, match=r"the answer lacks a field of vLLM's \(KeyError: 'tokens'\)"):
        server.answer([{"role": "user", "content": "Hi"}], TOOLS, 4)


def test_a_controller_without_http_is_an_os_error():
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def answer() -> None:
            connection, _ = listening.accept()
            with connection:
                connection.recv(10_000)
                connection.sendall(b"220 hello\r\n\r\n")

        thread = Thread(target=answer)
        thread.start()
        with pytest.raises(OSError, match="RemoteProtocolError: illegal status line"):
            post(f"http://127.0.0.1:{listening.getsockname()[1]}/list_models", {})
        thread.join()


@pytest.mark.parametrize("host", ["no.such.host.invalid", "a" * 70, "é" * 64])
def test_an_unknown_host_is_one_message(host: str):
    with pytest.raises(UserError, match=f"--host {host}: not an address of this machine"):
        check_port(host, 8000)


@pytest.mark.parametrize("content", ["[" * 3000, "\0", "[]", '{"architectures": ["MistralForCausalLM"]}'])
def test_a_malformed_config_json_is_one_message(content: str, tmp_path: Path):
    (tmp_path / "config.json").write_text(content, encoding="utf-8")
    with pytest.raises(UserError):
        model_folder(str(tmp_path), None, False)


def test_integers_beyond_64_bits_in_a_report():
    assert runs.number(10**400) is None
    assert runs.number(10**40) == 1e40
    assert not runs.is_step(2**63)
    columns = runs._Columns()
    assert columns.add(1, {"loss": 10**400, "norm": 10**30}) == ["loss"]
