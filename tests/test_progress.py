"""The panel on a real pseudo-terminal, seen through a terminal emulator; plain lines without a terminal."""

import errno
import fcntl
import io
import os
import select
import struct
import subprocess
import sys
import termios
import threading
from collections.abc import Callable
from pathlib import Path

import pyte
import pytest
from support import ROOT, wait_until

from xlam_jax import progress as module
from xlam_jax.progress import BYTES, Progress, Status, Throughput, duration

FIELDS = (
    ("loss", "0.8123 (last 0.7911)"),
    ("held-out", "0.8850 at 400"),
    ("", "123,456 tok/s"),
    ("trained", "34%"),
    ("lr", "2.90e-04"),
    ("grad norm", "0.912"),
)


def status(step: int, steps: int = 1000, left: float = 3723.0) -> Status:
    return Status(step=step, steps=steps, left=left, fields=FIELDS, line=f"step {step}")


class Out(io.TextIOWrapper):
    """The output of a program; flushed data is read at once, because a pseudo-terminal buffers little."""

    def __init__(self, slave: int, encoding: str, read: Callable[[], None]):
        super().__init__(os.fdopen(slave, "wb"), encoding=encoding)
        self._read = read

    def flush(self) -> None:
        super().flush()
        self._read()


class Terminal:
    """A pseudo-terminal and the contents of its screen."""

    def __init__(self, columns: int, rows: int = 24, encoding: str = "utf-8"):
        self._master, slave = os.openpty()
        self._lock = threading.Lock()
        self._screen = pyte.HistoryScreen(columns, rows, history=1000)
        self._stream = pyte.ByteStream(self._screen)
        self.out = Out(slave, encoding, self._read)
        self.resize(columns, rows)

    def resize(self, columns: int, rows: int = 24) -> None:
        fcntl.ioctl(self.out, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        self._screen.resize(rows, columns)

    def rows(self) -> list[str]:
        """Returns the non-empty rows, top to bottom, including those that scrolled away."""
        with self._lock:
            top = self._screen.history.top
            gone = ["".join(row[column].data for column in range(self._screen.columns)) for row in top]
            return [row.rstrip() for row in [*gone, *self._screen.display] if row.strip()]

    def _read(self) -> None:
        with self._lock:
            while select.select([self._master], [], [], 0.01)[0]:
                self._stream.feed(os.read(self._master, 65536))

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, *_: object) -> None:
        self.out.close()
        os.close(self._master)


@pytest.fixture(autouse=True)
def always_drawn(monkeypatch: pytest.MonkeyPatch):
    """Draws each step at once, and never from the other thread, so that the contents of the screen are known."""
    monkeypatch.setattr(module, "REST", 0.0)
    monkeypatch.setattr(module, "TICK", 1000.0)
    monkeypatch.delenv("TERM", raising=False)


@pytest.mark.parametrize("columns", [40, 57, 80, 120, 200])
def test_the_panel_fits_below_the_lines_that_stay(columns: int):
    with Terminal(columns) as terminal:
        progress = Progress(terminal.out)
        progress.line("weights from the seed")
        for step in range(1, 31):
            progress.step(status(step), keep=True)
            if step % 10 == 0:
                progress.line(f"step {step}/1000  held-out loss 0.9")
        lines, panel = (rows := terminal.rows())[:4], rows[4:]
        progress.close()
        after = terminal.rows()
    assert lines == ["weights from the seed", *(f"step {step}/1000  held-out loss 0.9" for step in (10, 20, 30))]
    assert all(len(row) < columns for row in panel)
    assert "━━━━━━━━" in panel[0]
    assert panel[0].endswith("30/1,000 left 1:02:03")
    shown = "   ".join(panel[1:])
    assert shown == "   ".join(f"{name} {value}".strip() for name, value in FIELDS)
    assert (len(panel) == 2) == (columns >= 120)
    assert after == lines


def test_narrower_and_wider_there_is_one_panel():
    with Terminal(120) as terminal:
        progress = Progress(terminal.out)
        for columns in (120, 40, 200, 60, 41, 100):
            terminal.resize(columns)
            progress.step(status(1), keep=True)
            progress.line(f"at {columns}")
            progress.step(status(2), keep=True)
            rows = terminal.rows()
            assert [row for row in rows if "1,000" in row] == [row for row in rows if "2/1,000 left" in row]
            assert len([row for row in rows if "2/1,000 left" in row]) == 1
            assert len([row for row in rows if "grad norm" in row]) == 1
            assert len(rows[rows.index(f"at {columns}") + 1]) == columns - 1
        progress.close()
        assert terminal.rows() == [f"at {columns}" for columns in (120, 40, 200, 60, 41, 100)]


@pytest.mark.slow  # slow not because of its time, but because it needs tmux, which rewraps lines when it is resized
def test_a_terminal_that_wraps_lines_anew_keeps_one_panel(tmp_path: Path):
    tmux = ["tmux", "-S", str(tmp_path / "socket"), "-f", os.devnull]
    drawn, script = tmp_path / "drawn", tmp_path / "draw.py"
    widths = (120, 60, 40, 50, 200, 45, 120)
    script.write_text(
        f"""
import os, sys, time
from pathlib import Path
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
from test_progress import Progress, module, status
module.REST, module.TICK = 0.0, 1000.0
progress = Progress()
for step, columns in enumerate({widths}, start=1):
    while os.get_terminal_size(2).columns != columns:
        time.sleep(0.02)
    progress.line(f"line {{step}}")
    progress.step(status(step), keep=True)
    Path({str(drawn)!r}).write_text(str(step))
time.sleep(1000)
""",
        encoding="utf-8",
    )

    def seen() -> list[str]:
        pane = subprocess.run([*tmux, "capture-pane", "-p", "-S", "-"], check=True, capture_output=True, text=True)
        return [row.rstrip() for row in pane.stdout.splitlines() if row.strip()]

    full = "for i in $(seq 30); do echo before; done"
    start = ["new-session", "-d", "-x", str(widths[0]), "-y", "20", f"{full}; exec {sys.executable} {script}"]
    subprocess.run([*tmux, *start], check=True)
    try:
        for step, columns in enumerate(widths, start=1):
            subprocess.run([*tmux, "resize-window", "-x", str(columns), "-y", "20"], check=True)
            wait_until(lambda step=step: drawn.exists() and drawn.read_text() == str(step))
        wait_until(lambda: any(row.endswith("7/1,000 left 1:02:03") for row in seen()))
        rows = seen()
    finally:
        subprocess.run([*tmux, "kill-server"], check=False)
    assert rows[:30] == ["before"] * 30
    assert rows[30:37] == [f"line {step}" for step in range(1, 8)]
    assert rows[37].endswith("7/1,000 left 1:02:03")
    assert rows[38].endswith("grad norm 0.912")
    assert len(rows) == 39


def test_what_others_write_is_not_lost():
    with Terminal(80) as terminal:
        progress = Progress(terminal.out)
        progress.step(status(1), keep=True)
        terminal.out.write("a warning of a library\n")
        terminal.out.flush()
        progress.step(status(2), keep=True)
        rows = terminal.rows()
        progress.close()
    assert rows[0] == "a warning of a library"
    assert rows[1].endswith("2/1,000 left 1:02:03")
    assert rows[-1].endswith("grad norm 0.912")
    assert len([row for row in rows if "1,000" in row]) == 1


def test_a_line_longer_than_the_terminal_and_several_at_once():
    with Terminal(40) as terminal:
        progress = Progress(terminal.out)
        progress.step(status(1), keep=True)
        progress.line("x" * 39 + "y" + "z" * 10)
        progress.line("q" * 40)
        progress.line("one\ntwo")
        rows = terminal.rows()
        progress.close()
    assert rows[:5] == ["x" * 39 + "y", "z" * 10, "q" * 40, "one", "two"]
    assert rows[5].endswith("1/1,000 left 1:02:03")


def test_a_low_terminal_shows_what_fits():
    with Terminal(40, rows=4) as terminal:
        progress = Progress(terminal.out)
        for step in (1, 2, 3):
            progress.step(status(step), keep=True)
        assert terminal.rows()[0].endswith("3/1,000 left 1:02:03")
        assert len(terminal.rows()) == 2
        progress.close()


def test_the_time_left_runs_on_between_steps(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "TICK", 0.01)
    now = [5.0]
    with Terminal(80) as terminal:
        progress = Progress(terminal.out, clock=lambda: now[0])
        progress.step(status(1, left=100.0), keep=True)
        assert "left 1:40" in terminal.rows()[0]
        now[0] += 2
        wait_until(lambda: "left 1:38" in terminal.rows()[0])
        progress.doing("evaluating")
        assert terminal.rows()[0].endswith("1/1,000 evaluating")
        progress.doing("")
        assert "left" in terminal.rows()[0]
        progress.close()


def test_a_terminal_that_knows_only_ascii():
    with Terminal(60, encoding="ascii") as terminal:
        progress = Progress(terminal.out)
        progress.step(status(500), keep=True)
        assert terminal.rows()[0].startswith("-----")
        progress.close()


def test_an_error_leaves_the_screen_to_what_follows():
    with Terminal(80) as terminal:

        def run() -> None:
            with Progress(terminal.out) as progress:
                progress.line("kept")
                progress.step(status(1), keep=True)
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run()
        print("Traceback …", file=terminal.out, flush=True)
        assert terminal.rows() == ["kept", "Traceback …"]


def test_without_a_terminal_there_are_plain_lines():
    out = io.StringIO()
    with Progress(out) as progress:
        progress.line("first")
        progress.step(status(1), keep=False)
        progress.doing("saving")
        progress.step(status(2), keep=True)
    assert out.getvalue() == "first\nstep 2\n"


def test_a_dumb_terminal_gets_plain_lines(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TERM", "dumb")
    with Terminal(80) as terminal:
        progress = Progress(terminal.out)
        progress.step(status(1), keep=False)
        progress.step(status(2), keep=True)
        progress.close()
        assert terminal.rows() == ["step 2"]


def test_a_quiet_one_says_nothing():
    with Terminal(80) as terminal:
        with Progress(terminal.out, quiet=True) as progress:
            progress.line("no")
            progress.step(status(1), keep=True)
            progress.doing("saving")
        assert terminal.rows() == []


def test_durations():
    assert [duration(seconds) for seconds in (0, 59.6, 3599, 3600, 90061)] == [
        "0:00",
        "1:00",
        "59:59",
        "1:00:00",
        "25:01:01",
    ]


class Gone(io.StringIO):
    """A closed terminal, or a pipe without a reader."""

    def write(self, text: str) -> int:
        raise OSError(errno.EIO, "Input/output error")


def test_a_reader_that_goes_away_does_not_end_the_run():
    with Progress(Gone()) as progress:
        progress.line("a line")
        progress.step(Status(step=1, steps=2, left=1.0, fields=(), line="step 1"), keep=True)
        progress.line("another")


class Clock:
    """Seconds that pass only when the test advances them."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_count_is_a_line_every_ten_seconds():
    lines: list[str] = []
    clock = Clock()
    rows = Throughput("reading", 2000, unit="rows", out=lines.append, clock=clock)
    for _ in range(25):
        clock.now += 1.0
        rows.add(50, dropped="3")
    rows.add(750, last=True)
    assert lines == [
        "reading: 500 of 2,000 rows  50.0 rows/s  left 0:30  dropped 3",
        "reading: 1,000 of 2,000 rows  50.0 rows/s  left 0:20  dropped 3",
        "reading: 2,000 of 2,000 rows  80.0 rows/s  left 0:00",
    ]
    assert (rows.done, rows.seconds) == (2000, 25.0)


def test_a_count_without_an_end_tells_no_time_left():
    lines: list[str] = []
    clock = Clock()
    rows = Throughput("reading", unit="rows", out=lines.append, clock=clock)
    clock.now += 20.0
    rows.add(10_000)
    assert lines == ["reading: 10,000 rows  500 rows/s"]


def test_bytes_of_an_earlier_process_do_not_count_towards_the_rate():
    out = io.StringIO()
    clock = Clock()
    moved = Throughput("converting", 4 * 10**9, unit=BYTES, out=Progress(out), clock=clock)
    moved.skip(0)
    moved.skip(10**9)
    clock.now += 10.0
    moved.add(10**9)
    assert out.getvalue() == (
        "converting: 1.00 GB are there already\nconverting: 2.00 GB of 4.00 GB  100.0 MB/s  left 0:20\n"
    )


def test_a_count_in_the_panel():
    with Terminal(80) as terminal:
        clock = Clock()
        with Progress(terminal.out, clock=clock) as progress:
            rows = Throughput("examples", 10, unit="examples", out=progress, clock=clock)
            for _ in range(4):
                clock.now += 0.5
                rows.add(errors="1")
            head, fields = terminal.rows()
        assert head.endswith("4/10 left 0:03")
        assert fields.split("   ") == ["examples", "2.0 examples/s", "errors 1"]
        assert terminal.rows() == []


def test_what_rich_costs_is_paid_on_a_terminal_alone():
    script = "import sys; from xlam_jax.progress import Progress; Progress().line('x'); print('rich' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("False\n", "x\n")
