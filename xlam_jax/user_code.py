"""Loads Python files that users write: suites, agents, tools."""

import sys
import traceback
from pathlib import Path
from types import ModuleType

from xlam_jax.errors import UserError


def load(path: Path, what: str) -> ModuleType:
    """Runs a Python file and returns it as a module.

    No bytecode is cached: a file edited within the same second would otherwise load as its earlier version. `what`: the
    expected content, for error messages. Raises `UserError` if the file can't be read, or with the line that failed.
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
    """Returns `:12` for the innermost line of file `name` in the error's traceback."""
    if isinstance(error, SyntaxError):
        return ""  # its message contains the line
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == name]
    return f":{lines[-1]}" if lines else ""
