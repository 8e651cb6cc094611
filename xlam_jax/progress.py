"""Progress of a command: lines in a log; on a terminal a panel at the bottom, and lines that stay above it.

rich renders the panel, but its position is kept by the code below: the live displays of rich and tqdm leave debris when
a terminal gets narrower, because they move up by as many rows as they wrote, and a terminal that wraps what no longer
fits has made more of them. Here the cursor waits on the empty row above the panel. It stays with that row through any
resizing; drawing again means to write from there on and to erase what is left below.
"""

import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Self

if TYPE_CHECKING:
    from rich.console import Console

EVERY = 10.0
"""Seconds between two lines in a log."""
TICK = 0.5
"""Seconds between redraws when nothing happens, so that the time left runs on and a new width is taken up."""
REST = 0.1
"""Minimum seconds between redraws, however short the steps are."""
GAP = 3
"""Columns between the panel's fields."""
BYTES = "bytes"
"""The unit of a `Throughput` that is shown as MB and GB."""


def duration(seconds: float) -> str:
    """Returns `1:02:03`, or `2:03` below an hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


@dataclass(frozen=True, kw_only=True)
class Status:
    """The state of a command at one moment."""

    step: int
    steps: int
    left: float
    """Estimated seconds to the end."""
    fields: tuple[tuple[str, str], ...]
    """Further fields of the panel: name (may be empty) and value, the most important first."""
    line: str
    """All of it in one line, for a log."""


class Progress:
    """Prints lines and the panel, on stderr unless `out` is given; `quiet` prints nothing, for all hosts but one.

    When the reader goes away, such as a closed terminal or the `tee` of a pipe at Ctrl-C, printing ends, and the
    command continues.

    A context manager: leaving it removes the panel, so that what is printed next (an error, the shell's prompt)
    appears below the lines.
    """

    def __init__(self, out: IO[str] | None = None, *, quiet: bool = False, clock: Callable[[], float] = time.monotonic):
        self._out = out or sys.stderr
        self._quiet, self._clock = quiet, clock
        dumb = os.environ.get("TERM", "").lower() in ("dumb", "unknown")
        self.live = not quiet and self._out.isatty() and not dumb
        """Whether there is a terminal to draw on."""
        self._lock = threading.Lock()  # trackers report failures from their own threads
        self._console: Console | None = None
        self._status: Status | None = None
        self._doing = ""
        self._updated = self._drawn = 0.0
        self._closed = threading.Event()
        self._ticker: threading.Thread | None = None

    def line(self, text: str) -> None:
        """Prints a line that stays."""
        if self._quiet:
            return
        with self._lock:
            if self._status:
                self._draw(above=text)
            else:
                self._print(f"{text}\n")

    def step(self, status: Status, *, keep: bool) -> None:
        """Shows a state: in the panel on a terminal; in a log as a line, if `keep`."""
        if not self.live:
            if keep:
                self.line(status.line)
            return
        with self._lock:
            self._status, self._updated = status, self._clock()
            if self._updated - self._drawn >= REST:
                self._draw()
        if self._ticker is None:
            self._ticker = threading.Thread(target=self._tick, name="progress", daemon=True)
            self._ticker.start()

    def doing(self, what: str) -> None:
        """Shows in the panel what happens between steps, such as `saving`; an empty text ends it."""
        with self._lock:
            self._doing = what
            if self._status:
                self._draw()

    def close(self) -> None:
        """Removes the panel."""
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
        from rich.cells import cell_len

        self._drawn = self._clock()
        status = self._status
        if status is None:
            return
        columns, lines = self._size()
        kept = [] if above is None else above.split("\n")
        # after a full row the cursor is still on its last character, which erasing would remove
        ends = ["" if (cells := cell_len(row)) and cells % columns == 0 else "\x1b[K" for row in kept]
        text = "".join(f"{row}{end}\n" for row, end in zip(kept, ends, strict=True))
        rows = ["", *self._panel(status, columns)[: max(lines - 2, 1)]]
        self._print(f"\r{text}" + "\x1b[K\n".join(rows) + f"\x1b[J\x1b[{len(rows) - 1}A\r")

    def _size(self) -> tuple[int, int]:
        """Columns and rows of the terminal."""
        try:
            columns, rows = os.get_terminal_size(self._out.fileno())
        except OSError:
            columns, rows = 0, 0
        return columns or 80, rows or 24

    def _panel(self, status: Status, columns: int) -> list[str]:
        """Returns the panel's rows, with their colours; each is shorter than the terminal is wide."""
        from rich.console import Console, Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        self._console = console = self._console or Console(file=self._out, highlight=False)
        width = max(columns, 20) - 1
        left = max(0.0, status.left - (self._drawn - self._updated))
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
        console.width = width
        with console.capture() as drawn:
            console.print(Group(head, *rows), no_wrap=True, overflow="ellipsis")
        return drawn.get().splitlines()


class Throughput:
    """Progress of a task whose work can be counted: how much is done, how fast, how long the rest takes.

    It appears in the panel of `out`, or as a line every ten seconds where that is a log. A context manager.
    """

    def __init__(
        self,
        task: str,
        total: int | None = None,
        *,
        unit: str,
        out: Progress | Callable[[str], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        """`total`: the amount of work, None where it is not known; `unit`: its name in the plural, or `BYTES`.

        `out`: a `Progress`, or a function that takes lines; None for a `Progress` on stderr of its own.
        """
        self._task, self._total, self._unit, self._clock = task, total, unit, clock
        self._own = Progress() if out is None else None
        self._out = self._own or out
        self._live = isinstance(self._out, Progress) and self._out.live and total is not None
        self.done = self._skipped = 0
        self._began = self._kept = clock()
        self._shown = float("-inf")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._own:
            self._own.close()

    @property
    def seconds(self) -> float:
        """Seconds since the beginning, more than 0."""
        return max(self._clock() - self._began, 1e-9)

    def skip(self, amount: int) -> None:
        """Counts work that an earlier process has done; it does not count towards the rate."""
        self.done += amount
        self._skipped += amount
        if amount:
            self._line(f"{self._task}: {self._amount(amount)} are there already")

    def add(self, amount: int = 1, *, last: bool = False, **fields: str) -> None:
        """Counts work that is done. `fields` are shown too, by name. `last` shows the state even if it is not due."""
        self.done += amount
        now = self._clock()
        keep = last or now - self._kept >= EVERY
        if not keep and not (self._live and now - self._shown >= REST):
            return
        self._shown = now
        if keep:
            self._kept = now
        status = self._status(fields)
        if isinstance(self._out, Progress) and self._total is not None:
            self._out.step(status, keep=keep)
        elif keep:
            self._line(status.line)

    def _line(self, text: str) -> None:
        if isinstance(self._out, Progress):
            self._out.line(text)
        elif self._out:
            self._out(text)

    def _status(self, fields: dict[str, str]) -> Status:
        rate = (self.done - self._skipped) / self.seconds
        total = self.done if self._total is None else self._total
        left = (total - self.done) / max(rate, 1e-9)
        speed = f"{self._amount(rate)}/s"
        count = self._amount(self.done) if self._total is None else f"{self._count(self.done)} of {self._amount(total)}"
        shown = [f"{self._task}: {count}", speed, *([] if self._total is None else [f"left {duration(left)}"])]
        shown += [f"{name} {value}" for name, value in fields.items()]
        size = 10**6 if self._unit == BYTES else 1
        return Status(
            step=self.done // size,
            steps=max(1, total // size),
            left=left,
            fields=(("", self._task), ("", speed), *fields.items()),
            line="  ".join(shown),
        )

    def _amount(self, amount: float) -> str:
        if self._unit != BYTES:
            return f"{self._count(amount)} {self._unit}"
        return f"{amount / 1e9:.2f} GB" if amount >= 1e9 else f"{amount / 1e6:.1f} MB"

    def _count(self, amount: float) -> str:
        if self._unit == BYTES:
            return self._amount(amount)
        return f"{amount:,.1f}" if isinstance(amount, float) and amount < 100 else f"{amount:,.0f}"
