"""Pages of a suite's own server: temporary failures are retried, others are faults of the environment."""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from support import deadline

from xlam_jax.evaluate._http import fetch
from xlam_jax.evaluate.endpoint import EndpointFault

HANGS_UP, CUT = 0, 1


@contextmanager
def serve(*statuses: int) -> Iterator[tuple[str, list[str]]]:
    """Answers with the statuses in turn; yields the address, and the requested paths."""
    remaining, paths = list(statuses), []

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

        def do_GET(self) -> None:
            paths.append(self.path)
            status = remaining.pop(0)
            if status == HANGS_UP:
                return
            self.send_response(200 if status == CUT else status)
            self.send_header("content-length", "100" if status == CUT else "7")
            self.end_headers()
            self.wfile.write("hällo\n".encode())

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/page", paths
        server.shutdown()


@pytest.mark.parametrize("first", [503, 429, HANGS_UP, CUT])
def test_temporary_failures_are_retried(first: int):
    with serve(first, 200) as (url, paths):
        assert asyncio.run(fetch(url, timeout=deadline(5))) == (url, "hällo\n")
    assert paths == ["/page"] * 2


@pytest.mark.parametrize("status", [404, 400])
def test_permanent_failures_are_not_retried(status: int):
    with serve(status) as (url, paths):
        with pytest.raises(EndpointFault, match=f"answered {status}") as caught:
            asyncio.run(fetch(url))
        assert len(paths) == 1
    assert caught.value.kind == "environment"


def test_a_server_that_stays_down(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("xlam_jax.evaluate._http.TRIES", 2)
    with pytest.raises(EndpointFault, match="cannot be fetched"):
        asyncio.run(fetch("http://127.0.0.1:9/"))


def test_a_page_that_is_too_long(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("xlam_jax.evaluate._http.TRIES", 1)
    monkeypatch.setattr("xlam_jax.evaluate._http.LONGEST", 6)
    with serve(200) as (url, _), pytest.raises(EndpointFault, match="the page has more than 6 bytes"):
        asyncio.run(fetch(url))


@pytest.mark.parametrize("url", ["http://[::1/", "file:///etc/passwd", "http://127.0.0.1:99999/", "no address"])
def test_an_address_that_cannot_be_fetched(url: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("xlam_jax.evaluate._http.TRIES", 1)
    with pytest.raises(EndpointFault, match="cannot be fetched"):
        asyncio.run(fetch(url))
