"""A sandbox for a model's Python code: a child process without network, and without files other than Python's own.

`_isolate` sets it up with Linux namespaces, a seccomp filter and resource limits, and describes their purpose. One
process runs the code; it can start threads but no other processes, so the limits of one process apply to all of the
code. If a machine does not allow all parts of the set-up, nothing is executed.

bubblewrap is not an alternative: its file system in memory does not limit the number of files, and a process that root
starts in it still counts as root outside, which is exempt from the limit of threads. It starts its program after
loading the seccomp filter, but this filter refuses to start programs. It could replace only the namespaces and mounts
of `_isolate`.
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
"""Maximum length of an output in characters, as in MINT."""
DISK_MB = 64
"""Maximum size of the files that the code writes; they are kept in memory."""


class Sandbox:
    """A Python session that keeps its variables between calls of `run`. Use it in an `async with`."""

    def __init__(self, *, seconds: float = 30, memory_mb: int = 2048):
        """Limits each piece of code to `seconds`, and the process to `memory_mb` of address space, plus `DISK_MB` for
        the files that it writes. Raises `UserError` if the machine does not allow a sandbox."""
        if problem := find_problem():
            raise UserError(
                f"a model's code is only executed in a sandbox, which this machine does not allow: {problem}"
            )
        self._seconds, self._memory = seconds, memory_mb
        self._process: asyncio.subprocess.Process | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._end()

    async def run(self, code: str) -> str:
        """Executes code; returns its output, the value of its last expression, and its error.

        If the code takes too long or ends the process, the session restarts, and the returned text describes it.
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
                raise ValueError("not written by _execute.py")
        except TimeoutError:
            await self._end()
            return f"Timed out after {self._seconds:g} seconds; all variables are gone."
        except (
            ValueError,
            RecursionError,
            ConnectionError,
        ):  # the process ended, or the code wrote to the output of _execute.py
            await self._end()
            return "The process ended (out of memory, perhaps); all variables are gone."
        if len(output) > LONGEST_OUTPUT:
            return f"{output[:LONGEST_OUTPUT]}...\n[Output Truncated]"
        return output or "[Executed Successfully with No Output]"

    async def _start(self) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            *_command(_source("_execute.py"), self._memory, str(LONGEST_OUTPUT + 1)),
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
            # Kills the process group of the outer process; the inner one dies with its parent.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        if process.stdin:
            process.stdin.close()
        await process.wait()


_ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/tmp", "LANG": "C.UTF-8", "OPENBLAS_NUM_THREADS": "1"}
"""Contains none of the user's variables, because they may contain keys."""
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
"""Prints which restrictions are not in effect."""


@cache
def find_problem() -> str:
    """Returns why this machine does not allow a sandbox; empty if it does."""
    if sys.platform != "linux":
        return f"{sys.platform} has no Linux namespaces"
    from xlam_jax.evaluate._isolate import THREADS

    try:
        process = subprocess.run(
            _command(_PROBE, 512, str(THREADS)), capture_output=True, text=True, env=_ENVIRONMENT, timeout=60
        )
    except (OSError, subprocess.SubprocessError) as error:
        return str(error)
    if process.returncode:
        return (process.stderr.strip() or f"its set-up ended with code {process.returncode}").splitlines()[-1]
    return f"the code would still have {process.stdout.strip()}" if process.stdout.strip() else ""


def _command(program: str, memory_mb: int, *arguments: str) -> list[str]:
    """Returns the command that runs a program, given as source text, in a sandbox."""
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
    return [sys.executable, "-I", "-c", _source("_isolate.py"), json.dumps(settings), *arguments]


def _source(name: str) -> str:
    return files("xlam_jax.evaluate").joinpath(name).read_text(encoding="utf-8")
