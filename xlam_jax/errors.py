"""Mistakes a user can make, told in one message: no traceback, exit code 2."""

import difflib
import errno
import sys
from collections.abc import Callable, Iterable


class UserError(Exception):
    """A mistake in the input: the message names the file, the line or key, both offending values, and what to do."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Returns `"; did you mean 'x'?"` for the closest known name, or an empty string when nothing is close."""
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean '{match[0]}'?" if match else ""


def run(main: Callable[[], int | None]) -> None:
    """Runs a command's `main`, prints a `UserError` as one message on stderr, and exits with the command's code."""
    try:
        code = main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # the reader of our output went away (`… | head`); not ours to report
        sys.stderr.close()
        sys.exit(1)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        print(
            f"error: {error.filename or 'an output'}: the disk is full; free some space and run again", file=sys.stderr
        )
        sys.exit(2)
    sys.exit(code or 0)
