"""Errors that the user can fix (`cli.run` prints one message and exits with code 2), and the stop by a signal."""

import difflib
import errno
import traceback
from collections.abc import Iterable
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
"""errno → why a file can't be written although its path is valid, and what to do."""


class StoppedError(BaseException):
    """A signal stopped a command that can be resumed by running it again.

    Like KeyboardInterrupt, it is not an `Exception`: code that catches errors and continues must not catch it.
    """


class UserError(Exception):
    """Invalid input. The message names the file, the line or key, both offending values, and what to do."""


def nearest(name: str, choices: Iterable[str]) -> str:
    """Returns `"; did you mean 'x'?"` for the choice closest to `name`, or an empty string when none is close."""
    match = difflib.get_close_matches(name, list(choices), n=1, cutoff=0.6)
    return f"; did you mean '{match[0]}'?" if match else ""


def check_address(name: str, url: str) -> None:
    """Raises `UserError` when `url` is not a web address. `name`: the option or setting that contains it."""
    try:
        parts = urlsplit(url)
        is_valid = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        is_valid = False
    if not is_valid:
        raise UserError(f"{name} {url}: is not a web address; give one like http://localhost:8000")


def fault(error: BaseException) -> str:
    """Returns a one-line description of an unexpected error: type, message, and the file and line that raised it."""
    frames = traceback.extract_tb(error.__traceback__)[-1:]
    where = f" ({frames[0].filename}:{frames[0].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}"[:500] + where
