"""Python files that users write: suites, agents, tools."""

import sys
import traceback
from pathlib import Path
from types import ModuleType

from xlam_jax.errors import UserError


def load(path: Path, what: str) -> ModuleType:
    """The module that a file defines, run anew: no bytecode is kept beside it, which could be that of an earlier text.

    `what` is expected there, for messages. Raises `UserError` with the line where it cannot be read or run.
    """
    try:
        text = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror}); {what} is expected here") from None
    name = str(path.resolve())
    module = ModuleType(name)
    module.__file__ = name
    sys.modules[name] = module  # where dataclasses and pickle look for it
    try:
        exec(compile(text, name, "exec"), vars(module))
    except Exception as error:
        raise UserError(f"{path}{_line(error, name)}: {type(error).__name__}: {error}") from None
    return module


def _line(error: Exception, name: str) -> str:
    """`:12`, the last line of the file on the way to the error."""
    if isinstance(error, SyntaxError):
        return ""  # says it itself
    lines = [at.lineno for at in traceback.extract_tb(error.__traceback__) if at.filename == name]
    return f":{lines[-1]}" if lines else ""
