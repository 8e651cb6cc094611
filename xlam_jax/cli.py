"""What all commands share: how they end, their parser, types of arguments, and the options of a server."""

import argparse
import contextlib
import errno
import importlib.metadata
import math
import signal
import sys
from collections.abc import Callable
from typing import Any

from xlam_jax.errors import STOPPED, UNWRITABLE, StoppedError, UserError

_OF_PATHS = (errno.EACCES, errno.EISDIR, errno.ENAMETOOLONG, errno.ENOENT, errno.ENOTDIR, errno.EPERM)


def run(main: Callable[[], int | None]) -> None:
    """Runs a command's `main` and exits with its code.

    A `UserError` is printed on stderr as one message, without a traceback, and exits with code 2; so does an `OSError`
    that a user can do something about.
    """
    for stream in (sys.stdout, sys.stderr):  # a terminal's encoding may lack characters that data and names have
        getattr(stream, "reconfigure", lambda **_: None)(errors="backslashreplace")
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
    except BrokenPipeError:  # the reader of the output has gone (`… | head`), which needs no report
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


class Parser(argparse.ArgumentParser):
    """A parser with --version, whose errors look like those of `run`."""

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        self.add_argument(
            "--version", action=_Version, nargs=0, default=argparse.SUPPRESS, help="print the version and exit"
        )

    def error(self, message: str) -> Any:
        """Prints the usage and the message, and exits with code 2."""
        self.print_usage(sys.stderr)
        self.exit(2, f"error: {message}\n")


class _Version(argparse.Action):
    """Prints the version, which is looked up only then."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        try:
            version = importlib.metadata.version("xlam_jax")
        except importlib.metadata.PackageNotFoundError:
            version = "of a source tree that is not installed"
        print(f"xlam_jax {version}")
        parser.exit()


def number(
    low: float = -math.inf, high: float = math.inf, kind: type = float, *, above: bool = False
) -> Callable[[str], Any]:
    """Returns a `type=` of an argument: a finite number from `low` (or `above` it) to `high`."""
    bounds = f" from {low:g} to {high:g}"
    if math.isinf(high):
        bounds = "" if math.isinf(low) else f" above {low:g}" if above else f" of {low:g} or more"
    expected = f"{'whole' if kind is int else 'finite'} number{bounds}"

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or not low <= value <= high or (above and value == low):
            raise argparse.ArgumentTypeError(f"{text!r} is not a {expected}")
        return value

    return parse


positive = number(1, kind=int)
"""A `type=` of an argument: a count of 1 or more."""


def add_server(
    parser: argparse.ArgumentParser,
    *,
    required: bool = True,
    model: str = "required",
    timeout: float | None = 120.0,
    retries: int | None = None,
    group: "argparse._ActionsContainer | None" = None,
) -> None:
    """Adds the options of a command that talks to an OpenAI-compatible server.

    `required`: whether --base-url, and --model with it, must be given. `model`: "required", "optional" (the first model
    of the server is the default), or "none" (no such option). `timeout`, `retries`: defaults; None for no such option.
    `group` takes --base-url where it excludes other options.
    """
    (group or parser).add_argument(
        "--base-url", required=required, metavar="URL", help="address of the server, up to and with /v1"
    )
    if model == "required":
        parser.add_argument("--model", required=required, metavar="NAME", help="name of the model on the server")
    elif model == "optional":
        parser.add_argument(
            "--model", metavar="NAME", help="name of the model on the server (default: the first that it lists)"
        )
    parser.add_argument("--api-key", metavar="KEY", help="the server's key (default: the variable OPENAI_API_KEY)")
    if timeout is not None:
        parser.add_argument(
            "--timeout",
            type=number(0, above=True),
            default=timeout,
            metavar="SECONDS",
            help="time to wait for an answer (default: %(default)g)",
        )
    if retries is not None:
        parser.add_argument(
            "--retries",
            type=number(0, kind=int),
            default=retries,
            metavar="N",
            help="of a request that failed (default: %(default)s)",
        )
