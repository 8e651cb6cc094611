"""A place where a model's Python code can run: a child process that sees no network and no files but Python's own.

Linux namespaces make it (`unshare` of util-linux): of users, so that it has no rights outside; of the network, in which
even the loopback is down; of processes, so that all it starts ends with it; and of mounts, so that its root is an empty
folder in memory with Python's and the system's libraries in it, read-only. The rights to undo any of that are given up.
Where a machine does not allow it, nothing is executed.
"""

import asyncio
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Self

from xlam_jax.errors import UserError

LONGEST_OUTPUT = 2000
"""Characters of an output that are kept, as in MINT."""
_DISK = "64m"
"""Of files that the code writes; they are in memory."""

_ENTER = f"""
set -e
root=$1; shift
mount -t tmpfs -o size={_DISK} tmpfs "$root"
while [ "$1" != -- ]; do
  mkdir -p "$root$1"
  mount --bind "$1" "$root$1"
  mount -o remount,bind,ro,nosuid "$root$1"
  shift
done
shift
mkdir -p "$root/tmp" "$root/dev" "$root/old"
touch "$root/dev/null"
mount --bind /dev/null "$root/dev/null"
cd "$root"
pivot_root . old
cd /
python=$1; shift
exec "$python" -I -c "$leave" "$@"
"""
_LEAVE = """
import ctypes, os, sys
if ctypes.CDLL(None, use_errno=True).umount2(b"/old", 2):  # the command of that name wants /proc
    sys.exit(os.strerror(ctypes.get_errno()))
os.rmdir("/old")
del os.environ["leave"]
drop = ["--bounding-set=-all", "--inh-caps=-all", "--no-new-privs"]
os.execvp("setpriv", ["setpriv", *drop, sys.executable, *sys.argv[1:]])
"""
"""Leaves the world outside behind, and all rights to mounts."""


class Sandbox:
    """One Python session, whose variables last from code to code. Use it in an `async with`."""

    def __init__(self, *, seconds: float = 30, memory_mb: int = 2048):
        """`seconds` for each piece of code, `memory_mb` of addresses for the process. Raises `UserError` where the
        machine does not allow such a place."""
        if problem := why_not():
            raise UserError(f"model's code is only executed where it can be shut in, which is not so here: {problem}")
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
        except (ValueError, ConnectionError):  # it ended, or wrote where only its frame writes
            await self._end()
            return "The process ended (out of memory, perhaps); all variables are gone."
        if len(output) > LONGEST_OUTPUT:
            return f"{output[:LONGEST_OUTPUT]}...\n[Output Truncated]"
        return output or "[Executed Successfully with No Output]"

    async def _start(self) -> asyncio.subprocess.Process:
        self._folder = tempfile.mkdtemp(prefix="sandbox-")
        source = files("xlam_jax.evaluate").joinpath("_sandboxed.py").read_text(encoding="utf-8")
        return await asyncio.create_subprocess_exec(
            *_command(self._folder, [sys.executable, "-I", "-c", source, str(self._memory), str(LONGEST_OUTPUT + 1)]),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            env=_ENVIRONMENT | {"leave": _LEAVE},
            limit=1 << 20,
        )

    async def _end(self) -> None:
        if self._process is None:
            return
        process, self._process = self._process, None
        if process.returncode is None:
            process.kill()  # and with it, all that is in its namespace of processes
        if process.stdin:
            process.stdin.close()
        await process.wait()
        os.rmdir(self._folder)  # what was in it was mounted in the namespace alone


_ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/tmp", "LANG": "C.UTF-8", "OPENBLAS_NUM_THREADS": "1"}
"""Nothing of the user's: it may hold keys."""
_PROBE = "import os, socket; print(os.getpid(), os.path.exists('/old'), [name for _, name in socket.if_nameindex()])"
_SHUT_IN = "1 False ['lo']\n"


@cache
def why_not() -> str:
    """Why no sandbox can be had on this machine; empty where it can."""
    if sys.platform != "linux":
        return f"{sys.platform} has no Linux namespaces"
    if shutil.which("unshare") is None:
        return "there is no `unshare` (package util-linux)"
    folder = tempfile.mkdtemp(prefix="sandbox-")
    try:
        check = _command(folder, [sys.executable, "-I", "-c", _PROBE])
        done = subprocess.run(check, capture_output=True, text=True, env=_ENVIRONMENT | {"leave": _LEAVE}, timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        return str(error)
    finally:
        os.rmdir(folder)
    if done.returncode or done.stdout != _SHUT_IN:
        return (done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}").splitlines()[-1]
    return ""


def _command(folder: str, command: Sequence[str]) -> list[str]:
    system = ("/usr", "/lib", "/lib64", "/bin")
    wanted = [*system, sys.base_prefix, sys.prefix]
    shown = [path for path in dict.fromkeys(wanted) if Path(path).exists()]
    shown = [
        path for path in shown if not any(Path(path) != Path(one) and Path(path).is_relative_to(one) for one in shown)
    ]
    flags = ("--user", "--map-root-user", "--net", "--mount", "--pid", "--ipc", "--uts", "--fork", "--kill-child")
    return ["unshare", *flags, "sh", "-c", _ENTER, "sh", folder, *shown, "--", *command]
