"""Sends records to a tracker in a separate thread, so that a run never waits for it and never fails because of it."""

import threading
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from textwrap import shorten

from xlam_jax.training.run_folder import METRICS
from xlam_jax.training.trackers.tracker import Flat, TrackedRun, Tracker

QUEUE = 4096
"""Maximum number of records that wait for a tracker."""
FAILURES = 3
"""Number of consecutive failures after which a tracker gets no more records."""
CLOSE_SECONDS = 60.0
"""Maximum time in seconds that a run waits at its end for unsent records."""
Clock = Callable[[], float]
"""Seconds since some moment, monotonic."""


class Sender:
    """One tracker in its thread."""

    def __init__(
        self,
        name: str,
        tracker: Tracker,
        run: TrackedRun,
        report: Callable[[str], None],
        started: Callable[[str], None],
        clock: Clock,
    ):
        """`report` takes a line for people, `started` the tracker's own name of the run."""
        self.name = name
        self._tracker, self._run, self._report, self._started, self._clock = tracker, run, report, started, clock
        self._records: deque[tuple[int, Flat]] = deque()
        self._change = threading.Condition()
        self._received = self._sent = self._failures_in_a_row = 0
        self._is_slow = self._has_reported = self._is_off = self._ends = self._failed = False
        self._settled = threading.Event()
        self._thread = threading.Thread(target=self._work, name=f"tracker {name}", daemon=True)
        self._thread.start()

    def put(self, step: int, values: Flat) -> None:
        """Hands a record over; never waits."""
        self._received += 1
        with self._change:
            if self._is_off:
                return
            if len(self._records) < QUEUE:
                self._records.append((step, values))
                self._change.notify()
                return
        if not self._is_slow:
            self._is_slow = True
            self._report(f"tracker {self.name} is too slow: it misses records from step {step} on")

    def wait_start(self, until: float) -> None:
        """Waits until the tracker has started or failed to, or until the clock reaches `until`."""
        if not self._settled.wait(max(0.0, until - self._clock())):
            self._report(f"tracker {self.name} is not ready yet; the run continues without waiting for it")

    def end(self, failed: bool) -> None:
        """Asks it to end once everything is sent."""
        with self._change:
            self._failed, self._ends = failed, True
            self._change.notify()

    def wait_end(self, until: float) -> None:
        """Waits for the end, at most until the clock reaches `until`, and reports missing records."""
        self._thread.join(max(0.0, until - self._clock()))
        if self._thread.is_alive():
            self._report(f"tracker {self.name} does not end and is abandoned")
        missing = self._received - self._sent
        if missing:
            self._report(
                f"tracker {self.name} did not get {missing} of {self._received} records; {METRICS} has them all"
            )

    def _work(self) -> None:
        has_started = self._try("start", self._start)
        self._settled.set()
        self._is_off = not has_started
        while not self._is_off:
            with self._change:
                self._change.wait_for(lambda: self._records or self._ends)
                if not self._records:
                    break
                step, values = self._records.popleft()
            if self._try(f"take step {step}", partial(self._tracker.log, step, values)):
                self._sent += 1
                self._failures_in_a_row = 0
            elif self._failures_in_a_row == FAILURES:
                self._is_off = True
                self._report(
                    f"tracker {self.name} failed {FAILURES} times in a row and gets no more records after step {step}"
                )
        if has_started:
            self._try("end", lambda: self._tracker.close(self._failed))

    def _start(self) -> None:
        own_name = self._tracker.start(self._run)
        if own_name is not None:
            self._started(own_name)

    def _try(self, what: str, call: Callable[[], None]) -> bool:
        try:
            call()
        except (Exception, SystemExit) as error:  # any error of a tracker is not the run's
            self._failures_in_a_row += 1
            if not self._has_reported:
                self._has_reported = True
                reason = " ".join(f"{type(error).__name__}: {error}".split())
                self._report(f"tracker {self.name} failed to {what}, the run continues: {shorten(reason, 300)}")
            return False
        return True


class Trackers:
    """The trackers of a run; all receive the same."""

    def __init__(self, senders: Sequence[Sender], clock: Clock):
        self._senders, self._clock = senders, clock

    def log(self, step: int, values: Flat) -> None:
        """Hands values such as train/loss to all of them; never waits and never fails."""
        for sender in self._senders:
            sender.put(step, values)

    def close(self, failed: bool = False) -> None:
        """Ends the run in all of them and reports records that did not arrive; takes at most `CLOSE_SECONDS`."""
        for sender in self._senders:
            sender.end(failed)
        until = self._clock() + CLOSE_SECONDS
        for sender in self._senders:
            sender.wait_end(until)
        self._senders = ()
