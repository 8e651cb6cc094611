"""A real HTTP server in a thread, with answers defined by the test."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = Callable[["Handler", dict[str, Any]], None]
"""Writes an answer to a request."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.send(200, json.dumps({"object": "list", "data": [{"id": "tiny", "object": "model", "max_model_len": 64}]}))

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["content-length"])))
        server: Any = self.server
        server.requests.append(request)
        replies = server.replies
        (replies.pop(0) if len(replies) > 1 else replies[0])(self, request)

    def send(self, status: int, body: str, kind: str = "application/json") -> None:
        data = body.encode()
        self.send_response(status)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def send_event(self, body: str) -> None:
        data = f"data: {body}\n\n".encode()
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
        self.wfile.flush()


class Running:
    """A server and the requests that it received."""

    def __init__(self, server: Any):
        self._server = server
        self.url = f"http://127.0.0.1:{server.server_port}/v1"

    def answer(self, *replies: Reply) -> None:
        """Sets the answers to the following requests."""
        self._server.replies = list(replies)

    @property
    def requests(self) -> list[dict[str, Any]]:
        return self._server.requests


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256  # connections that many tasks open at once


@contextmanager
def serve(*replies: Reply) -> Iterator[Running]:
    """Answers the requests in order; the last answer is repeated for all further ones."""
    server: Any = _Server(("127.0.0.1", 0), Handler)
    server.replies, server.requests = list(replies), []
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield Running(server)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def call(name: str, arguments: Any, id: str = "call_1") -> dict[str, Any]:
    """Returns a call in the form of a server; arguments other than strings are encoded as JSON."""
    text = arguments if isinstance(arguments, str) else json.dumps(arguments)
    return {"id": id, "type": "function", "function": {"name": name, "arguments": text}}


def says(content: str | None, calls: list[dict[str, Any]] | None = None, finish: str = "stop") -> Reply:
    """Answers with a completion; if a stream is requested, in pieces of three characters."""

    def reply(handler: Handler, request: dict[str, Any]) -> None:
        if not request.get("stream"):
            message = {"role": "assistant", "content": content} | ({"tool_calls": calls} if calls else {})
            choice = {"index": 0, "message": message, "finish_reason": finish}
            handler.send(200, json.dumps({"id": "1", "object": "chat.completion", "choices": [choice]}))
            return
        deltas: list[dict[str, Any]] = [
            {"content": (content or "")[at : at + 3]} for at in range(0, len(content or ""), 3)
        ]
        for index, one in enumerate(calls or ()):
            text = one["function"]["arguments"]
            deltas.append({"tool_calls": [{"index": index} | one | {"function": one["function"] | {"arguments": ""}}]})
            for at in range(0, len(text), 4):
                deltas.append({"tool_calls": [{"index": index, "function": {"arguments": text[at : at + 4]}}]})
        events(deltas, finish)(handler, request)

    return reply


def sends(message: dict[str, Any], deltas: list[dict[str, Any]], finish: str = "stop") -> Reply:
    """Answers with a message unchanged; if a stream is requested, with the deltas."""

    def reply(handler: Handler, request: dict[str, Any]) -> None:
        if request.get("stream"):
            return events(deltas, finish)(handler, request)
        choice = {"index": 0, "message": message, "finish_reason": finish}
        handler.send(200, json.dumps({"id": "1", "object": "chat.completion", "choices": [choice]}))

    return reply


def events(deltas: list[dict[str, Any]], finish: str | None, cut: bool = False) -> Reply:
    """Answers with a stream of deltas. Without `finish` the stream ends early; with `cut` the connection closes."""

    def reply(handler: Handler, request: dict[str, Any]) -> None:
        handler.send_response(200)
        handler.send_header("content-type", "text/event-stream")
        handler.send_header("transfer-encoding", "chunked")
        handler.end_headers()
        for delta in deltas:
            handler.send_event(json.dumps({"id": "1", "choices": [{"index": 0, "delta": delta}]}))
        if cut:
            handler.close_connection = True
            return
        if finish:
            handler.send_event(json.dumps({"id": "1", "choices": [{"index": 0, "delta": {}, "finish_reason": finish}]}))
        handler.send_event("[DONE]")
        handler.wfile.write(b"0\r\n\r\n")

    return reply


def answers(status: int, body: str, kind: str = "application/json") -> Reply:
    """Answers with any status and body."""
    return lambda handler, request: handler.send(status, body, kind)


def hangs_up(handler: Handler, request: dict[str, Any]) -> None:
    """Closes the connection without an answer."""
    handler.close_connection = True


def never(handler: Handler, request: dict[str, Any]) -> None:
    """Gives no answer while the client waits."""
    handler.rfile.read(1)  # nothing comes, until the client hangs up
    handler.close_connection = True


def refuses(status: int, message: str) -> Reply:
    """Answers with an error in the form of OpenAI's API."""
    return answers(status, json.dumps({"error": {"message": message, "type": "error", "code": status}}))
