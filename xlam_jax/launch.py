"""Starts a run of several processes on this machine:
`python -m xlam_jax.launch --processes N [--devices-per-process D] -- --config FILE.yaml …`.

Runs `python -m xlam_jax.train` N times with the arguments after `--`. On a machine with GPUs, each process gets a
share of them; otherwise each splits the CPU into D devices. SIGTERM, SIGINT and SIGHUP are forwarded. The exit code is
that of the first process that fails, or 75 if a signal stopped all. No process outlives this one. The reason why a run
ended is printed once: by process 0 if possible, otherwise from another process.
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
"""Seconds in which the other processes must end after the first has ended: the time in which they detect its loss."""
POLL = 0.05
"""Polling interval in seconds."""
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
NOISE = "[Gloo] Rank "
"""Start of a line that each process on a CPU prints for each connection."""
PR_SET_PDEATHSIG = 1
"""Option of prctl(2) that sends a signal to a process when its parent dies."""


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    result = cli.Parser(
        prog="python -m xlam_jax.launch",
        usage="python -m xlam_jax.launch --processes N [--devices-per-process D] -- ARGUMENTS OF xlam_jax.train",
        description="Train with several processes on this machine.",
    )
    result.add_argument("--processes", type=cli.positive, required=True, metavar="N", help="number of processes")
    result.add_argument(
        "--devices-per-process",
        type=cli.positive,
        metavar="D",
        help="number of GPUs per process (default: all, divided evenly), or of devices that each process splits the "
        "CPU into (default: 1)",
    )
    return result


def main() -> int:
    own_words, train_words = split(sys.argv[1:])
    arguments = parser().parse_args(own_words)
    train_arguments = train.parser().parse_intermixed_args(train_words)
    if (
        train_arguments.coordinator
        or train_arguments.num_processes is not None
        or train_arguments.process_id is not None
    ):
        raise UserError("--coordinator, --num-processes and --process-id are set by this command; remove them")
    resolved = train.check(train_arguments)  # reports errors once, not in each process
    if train_arguments.print_config:
        print(configs.describe(resolved))
        return 0
    gpus = visible_gpus(os.environ)
    share = arguments.devices_per_process
    command = [sys.executable, "-m", "xlam_jax.train", *train_words]
    if not gpus and share:
        command.append(f"mesh.cpu_devices={share}")
    command += ["--coordinator", f"localhost:{free_ports()}", "--num-processes", str(arguments.processes)]
    shares = divide_gpus(gpus, arguments.processes, share) if gpus else [None] * arguments.processes
    commands = [[*command, "--process-id", str(process)] for process in range(arguments.processes)]
    return Processes(commands, shares).wait()


def split(words: list[str]) -> tuple[list[str], list[str]]:
    """Splits the command line at `--`. Returns the arguments before it, and those after it."""
    if "--" not in words:
        parser().parse_known_args(words)  # handles --help, and errors in this command's own arguments
        parser().error("-- is missing; the arguments of python -m xlam_jax.train must follow it")
    index = words.index("--")
    return words[:index], words[index + 1 :]


def visible_gpus(environment: Mapping[str, str]) -> list[str]:
    """Returns the names of the GPUs that may be used, as in CUDA_VISIBLE_DEVICES."""
    if environment.get("JAX_PLATFORMS", "cuda").split(",")[0] not in ("cuda", "gpu", ""):
        return []
    if "CUDA_VISIBLE_DEVICES" in environment:
        return [name for name in environment["CUDA_VISIBLE_DEVICES"].split(",") if name and name != "-1"]
    names = (path.name.removeprefix("nvidia") for path in Path("/dev").glob("nvidia*"))
    return [str(index) for index in range(sum(name.isdigit() for name in names))]


def divide_gpus(gpus: list[str], processes: int, share: int | None) -> list[str | None]:
    """Returns CUDA_VISIBLE_DEVICES of each process.

    `share`: GPUs per process; None: all GPUs, divided evenly. Raises `UserError` if there are not enough.
    """
    share = share or len(gpus) // processes
    if share * processes > len(gpus) or not share:
        raise UserError(
            f"{processes} processes with {share or 1} GPUs each need {processes * (share or 1)}, and {len(gpus)} are "
            "visible; start fewer processes, use fewer GPUs for each (--devices-per-process), or set JAX_PLATFORMS=cpu"
        )
    return [",".join(gpus[process * share : (process + 1) * share]) for process in range(processes)]


def free_ports() -> int:
    """Returns a port such that it and the next one are free. Raises `UserError` if there is none."""
    for _ in range(100):
        with socket.create_server(("", 0)) as first:
            port = first.getsockname()[1]
            try:
                socket.create_server(("", port + 1)).close()
            except (OSError, OverflowError):
                continue
            return port
    raise UserError("this machine has no two consecutive free ports; end programs that use ports")


class Processes:
    """The processes of a run, which are started on construction."""

    def __init__(self, commands: list[list[str]], gpus: list[str | None]):
        """`commands`, `gpus`: command and CUDA_VISIBLE_DEVICES of each process; None keeps that of this process."""
        launcher = os.getpid()
        variables = {SECRET: secrets.token_hex(32)} | os.environ
        libc = ctypes.CDLL(None) if sys.platform == "linux" else None

        def die_with_parent() -> None:
            if libc:
                libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
                if os.getppid() != launcher:
                    os._exit(1)

        self._started: list[subprocess.Popen[str]] = []
        for number in FORWARDED:
            signal.signal(number, self._forward_signal)
        try:
            for index, (command, visible) in enumerate(zip(commands, gpus, strict=True)):
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT if index else None,  # process 0 draws its progress on the terminal
                    env=variables | ({} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}),
                    process_group=0,  # Ctrl-C reaches only the launcher, which forwards it once
                    preexec_fn=die_with_parent,
                    text=True,
                    errors="replace",
                )
                self._started.append(process)
        except OSError:
            self._kill()
            raise
        self._errors: dict[str, int] = {}
        """Error message of a process other than 0 → the first process that printed it."""
        self._readers = [
            threading.Thread(target=self._forward_output, args=(process.stdout, index), daemon=True)
            for index, process in enumerate(self._started)
        ]
        for reader in self._readers:
            reader.start()

    def wait(self) -> int:
        """Waits deadline all processes have ended. Returns 0, or the exit code of the first that failed."""
        codes: list[int] = []
        deadline = float("inf")
        running = list(self._started)
        killed: list[subprocess.Popen[str]] = []
        while running:
            time.sleep(POLL)
            ended = [process for process in running if process.poll() is not None]
            running = [process for process in running if process not in ended]
            codes += [_code(process) for process in ended if process not in killed]
            if ended and running and deadline == float("inf"):
                deadline = time.monotonic() + GRACE
            if running and time.monotonic() > deadline:
                deadline = float("inf")
                numbers = ", ".join(str(self._started.index(process)) for process in running)
                print(
                    f"launch: process {numbers} did not end within {GRACE:.0f} s, killed", file=sys.stderr, flush=True
                )
                killed = running
                self._kill()
        for reader in self._readers:
            reader.join(timeout=5)
        if self._started[0].returncode <= 0:  # otherwise process 0 has printed the reason
            for text, process in self._errors.items():
                print(f"[{process}] {text}", file=sys.stderr, flush=True)
        # a process that lost another one, or was killed here because of that, did not fail first
        failed = [code for code in codes if code] or [_code(process) for process in killed]
        return min(failed, key=lambda code: {LOST: 2, STOPPED: 1}.get(code, 0), default=0)

    def _forward_signal(self, number: int, _: object) -> None:
        for process in self._started:
            if process.poll() is None:
                process.send_signal(number)

    def _forward_output(self, output: IO[str], process: int) -> None:
        """Prints the lines of a process with its number. An error message, which ends the output, is stored instead."""
        lines = (line for line in output if not line.startswith(NOISE))
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
    """Returns the exit code as a shell reports it: 128 + the number of a signal."""
    return process.returncode if process.returncode >= 0 else 128 - process.returncode


if __name__ == "__main__":
    cli.run(main)
