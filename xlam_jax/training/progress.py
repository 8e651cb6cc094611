"""What a person sees of a run: lines in a log; on a terminal a panel at the bottom, and finished lines above it.

rich draws the panel; where it stands is kept by the few lines below, for the live displays of rich and tqdm leave
debris when a terminal gets narrower: they move up by as many rows as they wrote, and a terminal that wraps what no
longer fits has made more of them. Here the cursor waits on the empty row above the panel. It stays with that row
through any resizing, and drawing anew means to write from there on and to erase what is left below.
"""

import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO, Self

from rich.cells import cell_len
from rich.console import Console, Group
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

TICK = 0.5
"""Seconds between redraws when nothing happens: the time left runs on, and a new width is taken up."""
REST = 0.1
"""Seconds between redraws at least, however short the steps are."""
GAP = 3
"""Columns between the panel's fields."""


def duration(seconds: float) -> str:
    """`1:02:03`, or `2:03` below an hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


@dataclass(frozen=True, kw_only=True)
class Status:
    """Where a run stands."""

    step: int
    steps: int
    left: float
    """Seconds to the end, as far as one can tell."""
    fields: tuple[tuple[str, str], ...]
    """What else the panel shows: name (may be empty) and value, the most wanted first."""
    line: str
    """All of it in one line, for a log."""


class Progress:
    """Prints what happens, on stderr unless `out` says otherwise; `quiet` prints nothing, for all hosts but one.

    A reader that goes away, such as a closed terminal or the `tee` of a pipe at Ctrl-C, ends the printing, not the run.

    A context manager: leaving it takes the panel away, so that what is written next (an error, the shell's prompt)
    stands below the finished lines.
    """

    def __init__(self, out: IO[str] | None = None, *, quiet: bool = False, clock: Callable[[], float] = time.monotonic):
        self._out = out or sys.stderr
        self._quiet, self._clock = quiet, clock
        self._console = Console(file=self._out, highlight=False)
        self.live = not quiet and self._out.isatty() and not self._console.is_dumb_terminal
        """Whether there is a terminal to draw on."""
        self._lock = threading.Lock()  # trackers tell of their failures from threads of their own
        self._status: Status | None = None
        self._doing = ""
        self._told = self._drawn = 0.0
        self._closed = threading.Event()
        self._ticker: threading.Thread | None = None

    def line(self, text: str) -> None:
        """A line that stays."""
        if self._quiet:
            return
        with self._lock:
            if self._status:
                self._draw(above=text)
            else:
                self._print(f"{text}\n")

    def step(self, status: Status, *, keep: bool) -> None:
        """The state of the run: in the panel on a terminal; in a log a line, when `keep` says so."""
        if not self.live:
            if keep:
                self.line(status.line)
            return
        with self._lock:
            self._status, self._told = status, self._clock()
            if self._told - self._drawn >= REST:
                self._draw()
        if self._ticker is None:
            self._ticker = threading.Thread(target=self._tick, name="progress", daemon=True)
            self._ticker.start()

    def doing(self, what: str) -> None:
        """Says in the panel what the run does between steps, such as `saving`; an empty text ends it."""
        with self._lock:
            self._doing = what
            if self._status:
                self._draw()

    def close(self) -> None:
        """Takes the panel away."""
        self._closed.set()
        if self._ticker:
            self._ticker.join()
        with self._lock:
            if self._status:
                self._status = None
                self._print("\r\x1b[J")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _tick(self) -> None:
        while not self._closed.wait(TICK):
            with self._lock:
                self._draw()

    def _print(self, text: str) -> None:
        try:
            self._out.write(text)
            self._out.flush()
        except OSError:
            self._quiet, self.live = True, False

    def _draw(self, above: str | None = None) -> None:
        """Draws the panel from the cursor's row down, under a line that stays; everything in one write."""
        self._drawn = self._clock()
        status = self._status
        if status is None:
            return
        columns, lines = self._size()
        kept = [] if above is None else above.split("\n")
        # after a row that is full the cursor still stands on its last character, which erasing would take
        ends = ["" if (cells := cell_len(one)) and cells % columns == 0 else "\x1b[K" for one in kept]
        text = "".join(f"{one}{end}\n" for one, end in zip(kept, ends, strict=True))
        rows = ["", *self._panel(status, columns)[: max(lines - 2, 1)]]
        self._print(f"\r{text}" + "\x1b[K\n".join(rows) + f"\x1b[J\x1b[{len(rows) - 1}A\r")

    def _size(self) -> tuple[int, int]:
        """Columns and rows."""
        try:
            columns, rows = os.get_terminal_size(self._out.fileno())
        except OSError:
            columns, rows = 0, 0
        return columns or 80, rows or 24

    def _panel(self, status: Status, columns: int) -> list[str]:
        """The panel's rows, with their colours; each is shorter than the terminal is wide."""
        width = max(columns, 20) - 1
        left = max(0.0, status.left - (self._drawn - self._told))
        head = Table.grid(expand=True, padding=(0, 1, 0, 0))
        head.add_column(ratio=1)
        head.add_column(no_wrap=True)
        head.add_column(no_wrap=True)
        head.add_row(
            ProgressBar(total=status.steps, completed=status.step),
            f"{status.step:,}/{status.steps:,}",
            self._doing or f"left {duration(left)}",
        )
        rows: list[Text] = []
        for name, value in status.fields:
            field = Text.assemble((f"{name} ", "dim"), value) if name else Text(value)
            if rows and rows[-1].cell_len + GAP + field.cell_len <= width:
                rows[-1].append(" " * GAP).append_text(field)
            else:
                rows.append(field)
        self._console.width = width
        with self._console.capture() as drawn:
            self._console.print(Group(head, *rows), no_wrap=True, overflow="ellipsis")
        return drawn.get().splitlines()
