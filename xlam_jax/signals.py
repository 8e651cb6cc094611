"""Signals that stop a training run: it saves and exits with code 75, which asks its launcher to start it again."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable
from typing import Any, Self

from xlam_jax.errors import StoppedError

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Stop:
    """Context manager in which SIGTERM, SIGINT (Ctrl-C) and SIGHUP stop the run.

    Before `save_first` is called, a signal raises `StoppedError`. Afterwards it sets `requested`, so that the training
    loop saves and ends after the current step. A second SIGINT ends the process at once, even inside a long call of the
    runtime, during which no Python signal handler runs. A signal that was ignored at the start (nohup) stays ignored.
    """

    def __init__(self) -> None:
        self.requested = False
        self.name = "a signal to another host"
        """Name of the first signal."""
        self._report: Callable[[str], None] | None = None
        self._previous: dict[int, Any] = {}
        """Signal → handler before this context."""

    def save_first(self, report: Callable[[str], None]) -> None:
        """From now on, the first signal lets the loop save. `report`: prints a line; called from another thread."""
        self._report = report

    def __enter__(self) -> Self:
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._handle) or signal.SIG_DFL
        read_end, self._write_end = os.pipe()
        os.set_blocking(self._write_end, False)
        self._wakeup = signal.set_wakeup_fd(self._write_end, warn_on_full_buffer=False)
        self._watcher = threading.Thread(target=self._watch, args=(read_end,), name="signals", daemon=True)
        self._watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        os.close(self._write_end)
        self._watcher.join()

    def _handle(self, number: int, _: object) -> None:
        if self.requested:
            return
        self.requested, self.name = True, signal.Signals(number).name
        if self._report is None:
            raise StoppedError(f"stopped by {self.name} before the first step; run the same command to start again")

    def _watch(self, read_end: int) -> None:
        """Reads each signal from the wake-up pipe at once, also while the main thread is busy in a long call."""
        received: list[int] = []
        with open(read_end, "rb", buffering=0) as pipe:
            while numbers := pipe.read(64):
                for number in numbers:
                    received.append(number)
                    if received.count(signal.SIGINT) > 1:
                        with contextlib.suppress(OSError):
                            os.write(2, b"\ninterrupted twice: ended at once, nothing was saved\n")
                        os._exit(128 + signal.SIGINT)
                    if self._report and len(received) == 1:
                        name = signal.Signals(number).name
                        self._report(f"{name}: the run saves after this step and ends; a second Ctrl-C ends it at once")
