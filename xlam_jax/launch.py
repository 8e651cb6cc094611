"""`python -m xlam_jax.launch --processes N [--devices-per-process D] -- --config FILE.yaml …`: a run of several
processes on this machine.

Starts `python -m xlam_jax.train` N times with what stands behind `--`. On a machine with GPUs each process gets its
share of them, else each splits the CPU into D devices. SIGTERM, SIGINT and SIGHUP are passed on. The exit code is that
of the first process that fails, and 75 when a signal stopped all; no process outlives this one. Why a run ended is
printed once: by process 0 while it can, else by the others.
"""

import argparse
import ctypes
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO

from xlam_jax import cli, train
from xlam_jax import config as configs
from xlam_jax.errors import STOPPED, UserError
from xlam_jax.parallel.link import HEARTBEAT_TIMEOUT, LOST, SECRET, SETTLE

GRACE = HEARTBEAT_TIMEOUT + 3 * SETTLE
"""Seconds that the others have to end by themselves once one has ended: as long as it may take to learn of its loss."""
POLL = 0.05
"""Seconds between looks at the processes."""
PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
NOISE = "[Gloo] Rank "
"""What each process on a CPU writes whenever some of them connect."""
PR_SET_PDEATHSIG = 1
"""Of prctl(2): a signal that a process gets when its parent dies."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = cli.Parser(
        prog="python -m xlam_jax.launch",
        usage="python -m xlam_jax.launch --processes N [--devices-per-process D] -- ARGUMENTS OF xlam_jax.train",
        description="Train with several processes on this machine.",
    )
    made.add_argument("--processes", type=cli.positive, required=True, metavar="N", help="how many to start")
    made.add_argument(
        "--devices-per-process",
        type=cli.positive,
        metavar="D",
        help="GPUs of each (default: all, dealt out), or devices that each splits the CPU into (default: 1)",
    )
    return made


def main() -> int:
    own, of_train = split(sys.argv[1:])
    arguments = parser().parse_args(own)
    given = train.parser().parse_intermixed_args(of_train)
    if given.coordinator or given.num_processes is not None or given.process_id is not None:
        raise UserError("--coordinator, --num-processes and --process-id are set by this command; leave them out")
    resolved = train.check(given)  # what is wrong is told once
    if given.print_config:
        print(configs.describe(resolved))
        return 0
    gpus = visible_gpus(os.environ)
    share = arguments.devices_per_process
    command = [sys.executable, "-m", "xlam_jax.train", *of_train]
    if not gpus and share:
        command.append(f"mesh.cpu_devices={share}")
    command += ["--coordinator", f"localhost:{free_ports()}", "--num-processes", str(arguments.processes)]
    dealt = deal(gpus, arguments.processes, share) if gpus else [None] * arguments.processes
    return Processes([[*command, "--process-id", str(at)] for at in range(arguments.processes)], dealt).wait()


def split(words: list[str]) -> tuple[list[str], list[str]]:
    """The command line before and behind `--`."""
    if "--" not in words:
        parser().parse_known_args(words)  # --help, and mistakes of its own
        parser().error("-- is missing; the arguments of python -m xlam_jax.train stand behind it")
    at = words.index("--")
    return words[:at], words[at + 1 :]


def visible_gpus(environment: Mapping[str, str]) -> list[str]:
    """The GPUs of this machine that may be used, as CUDA_VISIBLE_DEVICES names them."""
    if environment.get("JAX_PLATFORMS", "cuda").split(",")[0] not in ("cuda", "gpu", ""):
        return []
    if "CUDA_VISIBLE_DEVICES" in environment:
        return [name for name in environment["CUDA_VISIBLE_DEVICES"].split(",") if name and name != "-1"]
    found = (path.name.removeprefix("nvidia") for path in Path("/dev").glob("nvidia*"))
    return [str(at) for at, _ in enumerate(sorted(name for name in found if name.isdigit()))]


def deal(gpus: list[str], processes: int, share: int | None) -> list[str | None]:
    """Each process's CUDA_VISIBLE_DEVICES. Raises `UserError` when there are not enough."""
    share = share or len(gpus) // processes
    if share * processes > len(gpus) or not share:
        raise UserError(
            f"{processes} processes with {share or 1} GPUs each need {processes * (share or 1)}, and {len(gpus)} are "
            "visible; start fewer processes, give each fewer with --devices-per-process, or set JAX_PLATFORMS=cpu"
        )
    return [",".join(gpus[at * share : (at + 1) * share]) for at in range(processes)]


def free_ports() -> int:
    """A port of this machine that nobody uses, and neither the next."""
    for _ in range(100):
        with socket.create_server(("", 0)) as first:
            port = first.getsockname()[1]
            try:
                socket.create_server(("", port + 1)).close()
            except (OSError, OverflowError):
                continue
            return port
    raise UserError("no two free ports next to each other were found on this machine")


class Processes:
    """The processes of a run, from their start to the end of the last."""

    def __init__(self, commands: list[list[str]], gpus: list[str | None]):
        """`gpus`: of each, its CUDA_VISIBLE_DEVICES; None leaves it alone."""
        me = os.getpid()
        variables = {SECRET: secrets.token_hex(32)} | os.environ
        libc = ctypes.CDLL(None) if sys.platform == "linux" else None

        def dies_with_parent() -> None:
            if libc:
                libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
                if os.getppid() != me:
                    os._exit(1)

        self._started: list[subprocess.Popen[str]] = []
        for one in PASSED_ON:
            signal.signal(one, self._pass_on)
        try:
            for at, (command, visible) in enumerate(zip(commands, gpus, strict=True)):
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT if at else None,  # process 0 draws on the terminal
                    env=variables | ({} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}),
                    process_group=0,  # Ctrl-C comes here, and from here to each once
                    preexec_fn=dies_with_parent,
                    text=True,
                    errors="replace",
                )
                self._started.append(process)
        except OSError:
            self._kill()
            raise
        self._errors: dict[str, int] = {}  # of processes but the first, and who told it first
        self._tellers = [
            threading.Thread(target=self._tell, args=(process.stdout, at), daemon=True)
            for at, process in enumerate(self._started)
        ]
        for teller in self._tellers:
            teller.start()

    def wait(self) -> int:
        """Returns when all have ended: 0, or the code of the first that failed."""
        codes: list[int] = []
        until = float("inf")
        running = list(self._started)
        killed: list[subprocess.Popen[str]] = []
        while running:
            time.sleep(POLL)
            ended = [process for process in running if process.poll() is not None]
            running = [process for process in running if process not in ended]
            codes += [_code(process) for process in ended if process not in killed]
            if ended and running and until == float("inf"):
                until = time.monotonic() + GRACE
            if running and time.monotonic() > until:
                until = float("inf")
                which = ", ".join(str(self._started.index(process)) for process in running)
                print(f"launch: process {which} did not end within {GRACE:.0f} s, killed", file=sys.stderr, flush=True)
                killed = running
                self._kill()
        for teller in self._tellers:
            teller.join(timeout=5)
        if self._started[0].returncode <= 0:  # else it told why
            for text, process in self._errors.items():
                print(f"[{process}] {text}", file=sys.stderr, flush=True)
        # who lost another one, or was killed here because of it, is not the one that failed first
        failed = [code for code in codes if code] or [_code(process) for process in killed]
        return min(failed, key=lambda code: {LOST: 2, STOPPED: 1}.get(code, 0), default=0)

    def _pass_on(self, number: int, _: object) -> None:
        for process in self._started:
            if process.poll() is None:
                process.send_signal(number)

    def _tell(self, said: IO[str], process: int) -> None:
        """Passes on what a process says, with its number; an error, which is its last word, is kept."""
        lines = (line for line in said if not line.startswith(NOISE))
        for line in lines:
            if process and line.startswith("error: "):
                self._errors.setdefault((line + "".join(lines)).strip(), process)
            elif process:
                print(f"[{process}] {line}", end="", file=sys.stderr, flush=True)
            else:
                print(line, end="", flush=True)

    def _kill(self) -> None:
        for process in self._started:
            if process.poll() is None:
                process.kill()


def _code(process: subprocess.Popen[str]) -> int:
    """The exit code as a shell tells it."""
    return process.returncode if process.returncode >= 0 else 128 - process.returncode


if __name__ == "__main__":
    cli.run(main)
