"""Signals that stop a training run: it saves and ends with code 75, so that whoever started it starts it again."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable
from typing import Any, Self

from xlam_jax.errors import StoppedError

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Stop:
    """A context manager in which SIGTERM, SIGINT (Ctrl-C) and SIGHUP stop the run.

    Until `save_first` is called they raise `StoppedError`; from then on they set `requested`, for the loop to save and
    end after the step it is at. A second SIGINT ends the process at once, even inside a long call of the runtime, which
    delays handlers in Python. A signal that was ignored at the start, as by nohup, stays ignored.
    """

    def __init__(self) -> None:
        self.requested = False
        self.name = "a signal to another host"
        """Of the first signal."""
        self._report: Callable[[str], None] | None = None
        self._before: dict[int, Any] = {}

    def save_first(self, report: Callable[[str], None]) -> None:
        """There is a state to save now. `report`: prints a line; called in a thread."""
        self._report = report

    def __enter__(self) -> Self:
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._handle) or signal.SIG_DFL
        reads, self._writes = os.pipe()
        os.set_blocking(self._writes, False)
        self._wakeup = signal.set_wakeup_fd(self._writes, warn_on_full_buffer=False)
        self._watcher = threading.Thread(target=self._watch, args=(reads,), name="signals", daemon=True)
        self._watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        os.close(self._writes)
        self._watcher.join()

    def _handle(self, number: int, _: object) -> None:
        if self.requested:
            return
        self.requested, self.name = True, signal.Signals(number).name
        if self._report is None:
            raise StoppedError(f"stopped by {self.name} before the first step; run the same command to start again")

    def _watch(self, reads: int) -> None:
        """Receives each signal as it comes, whatever the main thread does."""
        received: list[int] = []
        with open(reads, "rb", buffering=0) as pipe:
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
