"""Measures the overhead of an evaluation: runs the whole command against an endpoint with a fixed latency.

The endpoint is a separate process. The minimum time is that of all answers, `concurrency` at a time. Any further time
(start and imports, requests, records, the summary) is overhead.
"""

import argparse
import asyncio
import json
import math
import multiprocessing
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
CALL = {"id": "call_1", "type": "function", "function": {"name": "search", "arguments": '{"query": "Oslo"}'}}
MESSAGE = {"role": "assistant", "content": "I look.", "tool_calls": [CALL]}
BODY = json.dumps(
    {
        "id": "1",
        "object": "chat.completion",
        "choices": [{"index": 0, "message": MESSAGE, "finish_reason": "tool_calls"}],
    }
).encode()
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(BODY)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Time an evaluation against an endpoint of known speed.")
    parser.add_argument("--examples", type=int, default=500, metavar="N", help="number of examples (default: 500)")
    parser.add_argument(
        "--concurrency", type=int, default=64, metavar="K", help="number of concurrent requests (default: 64)"
    )
    parser.add_argument(
        "--latency", type=float, default=0.2, metavar="SECONDS", help="latency of an answer (default: 0.2)"
    )
    options = parser.parse_args()
    receiver, sender = multiprocessing.Pipe(duplex=False)
    endpoint = multiprocessing.Process(target=serve, args=(options.latency, sender), daemon=True)
    endpoint.start()
    port = receiver.recv()
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data.jsonl"
        data.write_text("".join(make_row(number) for number in range(options.examples)), encoding="utf-8")
        start = time.perf_counter()
        subprocess.run(
            [
                sys.executable, "-m", "xlam_jax.evaluate", "--suite", "trajectories", "--data", data, "--model", "any",
                "--base-url", f"http://127.0.0.1:{port}/v1", "--concurrency", str(options.concurrency),
                "--out", Path(folder) / "out",
            ],
            cwd=ROOT, check=True,
        )  # fmt: skip
        seconds = time.perf_counter() - start
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)  # without the endpoint, which has not ended
        scored = json.loads((Path(folder) / "out/summary.json").read_text(encoding="utf-8"))["scored"]
    endpoint.terminate()
    minimum = math.ceil(options.examples / options.concurrency) * options.latency
    print(f"{scored} of {options.examples} scored, {options.concurrency} concurrent, {options.latency:g} s per answer")
    print(f"{seconds:.2f} s, of which the endpoint takes at least {minimum:.2f} s: {seconds - minimum:.2f} s overhead")
    print(f"{usage.ru_utime + usage.ru_stime:.2f} s of CPU time")


def make_row(number: int) -> str:
    """Returns a JSON line with a held-out trajectory that contains one call."""
    parameters = {"type": "object", "properties": {"query": {"type": "string"}}, "required": ["query"]}
    tool = {"type": "function", "function": {"name": "search", "description": "Searches.", "parameters": parameters}}
    call = {"type": "function", "id": "call_1", "function": {"name": "search", "arguments": {"query": "Oslo"}}}
    conversation = [
        {"role": "user", "content": f"Question {number}: where is Oslo?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
    ]
    return json.dumps({"unique_trajectory_id": str(number), "tools": [tool], "conversation": conversation}) + "\n"


def serve(latency: float, port: Any) -> None:
    """Answers every request after `latency` seconds. Sends its port through the pipe `port`."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                length = next(
                    int(line.split(b":")[1])
                    for line in head.lower().split(b"\r\n")
                    if line.startswith(b"content-length")
                )
                await reader.readexactly(length)
                await asyncio.sleep(latency)
                writer.write(HEAD + BODY)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    async def run() -> None:
        server = await asyncio.start_server(answer, "127.0.0.1", 0, backlog=1024)
        port.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(run())


if __name__ == "__main__":
    main()
