"""Errors that a user can act on: one message, no traceback, exit code 2; and what a signal ends, exit code 75."""

import argparse
import contextlib
import difflib
import errno
import signal
import sys
import traceback
from collections.abc import Callable, Iterable
from urllib.parse import urlsplit

STOPPED = 75
"""Exit code of a run that a signal stopped (EX_TEMPFAIL): nothing failed, and the same command continues it."""
UNWRITABLE = {
    errno.ENOSPC: ("the disk is full", "free some space"),
    errno.EDQUOT: ("the disk quota is used up", "remove files that count towards it, or have it raised"),
    errno.EFBIG: ("a file is larger than allowed here", "raise the limit (ulimit -f), or use another file system"),
    errno.EMFILE: ("this process has too many open files", "raise the limit (ulimit -n)"),
    errno.ENFILE: ("this machine has too many open files", "end programs that have many open, or raise fs.file-max"),
    errno.EIO: ("the device reported an input/output error", "check the disk, or use another one"),
    errno.EROFS: ("the file system is read-only", "mount it writable, or use another one"),
}
"""Reasons for which a file can't be written although its path is right, and what to do."""
_OF_PATHS = (errno.EACCES, errno.EISDIR, errno.ENAMETOOLONG, errno.ENOENT, errno.ENOTDIR, errno.EPERM)


class StoppedError(BaseException):
    """A signal ended a command that continues when it is started again. Like KeyboardInterrupt, it is not an
    `Exception`: code that catches errors and continues must not catch it."""


class UserError(Exception):
    """A mistake in the input: the message names the file, the line or key, both offending values, and what to do."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Returns `"; did you mean 'x'?"` for the closest known name, or an empty string when nothing is close."""
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean '{match[0]}'?" if match else ""


def positive(text: str) -> int:
    """A count on a command line: `type=positive` of an argument."""
    number = int(text) if text.isascii() and text.isdigit() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return number


def check_address(name: str, url: str) -> None:
    """Raises `UserError` for what is no web address; `name` is that of the option or setting."""
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        good = False
    if not good:
        raise UserError(f"{name} {url}: is no web address; give one like http://localhost:8000")


def fault(error: BaseException) -> str:
    """What an unexpected error was and where it arose, in one line."""
    at = traceback.extract_tb(error.__traceback__)[-1:]
    where = f" ({at[0].filename}:{at[0].lineno})" if at else ""
    return f"{type(error).__name__}: {error}"[:500] + where


def run(main: Callable[[], int | None]) -> None:
    """Runs a command's `main`, prints a `UserError` as one message on stderr, and exits with the command's code."""
    try:
        code = main()
    except UserError as error:
        _print(f"error: {error}")
        sys.exit(2)
    except StoppedError as stopped:
        _print(str(stopped))
        sys.exit(STOPPED)
    except KeyboardInterrupt:
        _print("interrupted")
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:  # the reader of our output went away (`… | head`); not ours to report
        sys.stderr.close()
        sys.exit(1)
    except OSError as error:
        if error.errno in UNWRITABLE:
            problem, advice = UNWRITABLE[error.errno]
            message = f"{error.filename or 'an output'}: {problem}; {advice} and run again"
        elif error.errno in _OF_PATHS and error.filename:
            message = f"{error.filename}: {error.strerror}; check the path, and who may write there"
        else:
            raise
        _print(f"error: {message}")
        sys.exit(2)
    sys.exit(code or 0)


def _print(text: str) -> None:
    with contextlib.suppress(OSError):  # a terminal that is gone
        print(text, file=sys.stderr)
