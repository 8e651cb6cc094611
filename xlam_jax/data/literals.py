"""Python literals in a source's text, parsed without evaluating them."""

import ast
import warnings
from typing import Any

LONGEST = 100_000
"""Maximum length in characters; longer texts are refused, as Python's parser is meant for code that people write."""
LARGEST = 10**4000
"""Numbers from here on are refused: Python refuses to print integers of more than 4300 digits, which a hexadecimal
literal may have."""
NAMES = {"true": True, "false": False, "null": None}
"""JSON's constants, which models mix into Python's notation."""


def expression(text: str) -> ast.expr:
    """Parses one Python expression. Raises `ValueError` for other text and for more than `LONGEST` characters."""
    if len(text) > LONGEST:
        raise ValueError(f"more than {LONGEST} characters")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "\d" is not an escape sequence, and stays as it is
            return ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, MemoryError, RecursionError) as error:
        raise ValueError(f"not a Python expression ({error})") from None


def value(node: ast.expr) -> Any:
    """Returns the JSON value of a literal. Raises `ValueError` for names, calls and values that JSON does not have."""
    try:
        return _value(node)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _value(node: ast.expr) -> Any:
    match node:
        case ast.Constant(value=str() | bool() | None as constant):
            return constant
        case ast.Constant(value=int() | float() as number) if number < LARGEST:  # excludes infinity
            return number
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as number)) if number < LARGEST:
            return -number
        case ast.Name(id=name) if name in NAMES:
            return NAMES[name]
        case ast.List(elts=items) | ast.Tuple(elts=items):
            return [_value(item) for item in items]
        case ast.Dict(keys=keys, values=values):
            names = [_value(key) for key in keys if key is not None]
            if len(names) < len(keys) or not all(isinstance(name, str) for name in names):
                raise ValueError("a key is not text")
            if len(set(names)) < len(names):
                raise ValueError("a key occurs twice")
            return dict(zip(names, map(_value, values), strict=True))
    raise ValueError(f"{node.id[:200] if isinstance(node, ast.Name) else type(node).__name__} is not a literal")
