"""A sandbox for a model's Python code: a child process that sees no network and no files but Python's own.

`_shut_in` sets it up with Linux namespaces, a seccomp filter and resource limits, and describes what each is for. One
process runs the code; it can start threads and no other processes, so that the limits of one process bound them all.
Where a machine does not allow any part of that, nothing is executed.
"""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Self

from xlam_jax.errors import UserError

LONGEST_OUTPUT = 2000
"""Characters of an output that are kept, as in MINT."""
DISK_MB = 64
"""Of files that the code writes; they are in memory."""


class Sandbox:
    """One Python session, whose variables last from code to code. Use it in an `async with`."""

    def __init__(self, *, seconds: float = 30, memory_mb: int = 2048):
        """`seconds` for each piece of code, `memory_mb` of addresses for the process; the files that it writes may take
        `DISK_MB` of memory more. Raises `UserError` where the machine does not allow a sandbox."""
        if problem := why_not():
            raise UserError(f"a model's code is only executed in a sandbox, and this machine allows none: {problem}")
        self._seconds, self._memory = seconds, memory_mb
        self._process: asyncio.subprocess.Process | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._end()

    async def run(self, code: str) -> str:
        """Executes code; returns what it printed, the value of its last expression, and its error.

        Where it takes too long, or ends the process, the session begins anew, which the text says.
        """
        if self._process is None:
            self._process = await self._start()
        process = self._process
        assert process.stdin
        assert process.stdout
        try:
            process.stdin.write(json.dumps(code).encode() + b"\n")
            line = await asyncio.wait_for(process.stdout.readline(), self._seconds)
            output = json.loads(line)
            if not isinstance(output, str):
                raise ValueError("not the frame's")
        except TimeoutError:
            await self._end()
            return f"Timed out after {self._seconds:g} seconds; all variables are gone."
        except (ValueError, RecursionError, ConnectionError):  # it ended, or wrote where only its frame writes
            await self._end()
            return "The process ended (out of memory, perhaps); all variables are gone."
        if len(output) > LONGEST_OUTPUT:
            return f"{output[:LONGEST_OUTPUT]}...\n[Output Truncated]"
        return output or "[Executed Successfully with No Output]"

    async def _start(self) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            *_command(_source("_sandboxed.py"), self._memory, str(LONGEST_OUTPUT + 1)),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            env=_ENVIRONMENT,
            limit=1 << 20,
            start_new_session=True,
        )

    async def _end(self) -> None:
        if self._process is None:
            return
        process, self._process = self._process, None
        if process.returncode is None:
            # Both the process that waits outside and the one inside: by their group, or as its parent has died.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        if process.stdin:
            process.stdin.close()
        await process.wait()


_ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/tmp", "LANG": "C.UTF-8", "OPENBLAS_NUM_THREADS": "1"}
"""Nothing of the user's: it may hold keys."""
_PROBE = """
import os, socket, sys, threading

def refused(call):
    try:
        call()
    except (OSError, RuntimeError):
        return True
    return False

enough = threading.Event()

def start_many_threads():
    threading.stack_size(1 << 16)
    for _ in range(int(sys.argv[1]) + 1):
        threading.Thread(target=enough.wait, daemon=True).start()

has = [
    os.getpid() == 1 or "other processes",
    refused(lambda: socket.socket(type=socket.SOCK_DGRAM).connect(("127.0.0.1", 9))) or "the network",
    not os.path.exists("/proc/self") or "/proc",
    refused(lambda: os.chmod("/dev/null", 0o666)) or "/dev/null, writable",
    refused(os.fork) or "fork",
    refused(lambda: os.memfd_create("")) or "memory without limit",
    refused(start_many_threads) or "threads without limit",
]
enough.set()
print(", ".join(one for one in has if one is not True))
"""
"""Prints what the sandbox does not keep from the program."""


@cache
def why_not() -> str:
    """Why this machine allows no sandbox; empty where it does."""
    if sys.platform != "linux":
        return f"{sys.platform} has no Linux namespaces"
    from xlam_jax.evaluate._shut_in import THREADS

    try:
        done = subprocess.run(
            _command(_PROBE, 512, str(THREADS)), capture_output=True, text=True, env=_ENVIRONMENT, timeout=60
        )
    except (OSError, subprocess.SubprocessError) as error:
        return str(error)
    if done.returncode:
        return (done.stderr.strip() or f"its set-up ended with code {done.returncode}").splitlines()[-1]
    return f"the code would still have {done.stdout.strip()}" if done.stdout.strip() else ""


def _command(program: str, memory_mb: int, *arguments: str) -> list[str]:
    """Runs the text of a program in a sandbox."""
    system = ("/usr", "/lib", "/lib64", "/bin")
    existing = [path for path in dict.fromkeys([*system, sys.base_prefix, sys.prefix]) if Path(path).exists()]
    paths = [
        path
        for path in existing
        if not any(Path(path) != Path(other) and Path(path).is_relative_to(other) for other in existing)
    ]
    settings = {
        "program": program,
        "parent": os.getpid(),
        "paths": paths,
        "disk_mb": DISK_MB,
        "memory_mb": memory_mb,
    }
    return [sys.executable, "-I", "-c", _source("_shut_in.py"), json.dumps(settings), *arguments]


def _source(name: str) -> str:
    return files("xlam_jax.evaluate").joinpath(name).read_text(encoding="utf-8")
