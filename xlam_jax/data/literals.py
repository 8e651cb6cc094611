"""Python literals in a source's text, read without running them."""

import ast
import warnings
from typing import Any

LONGEST = 100_000
"""Characters. Longer texts are refused: Python's parser is made for code that somebody wrote."""
LARGEST = 10**4000
"""Numbers from here on are refused: Python writes no more than 4300 digits, which hexadecimal ones may have."""
NAMES = {"true": True, "false": False, "null": None}
"""JSON's names, which models mix into Python's notation."""


def expression(text: str) -> ast.expr:
    """Parses one Python expression. Raises `ValueError` for what is none."""
    if len(text) > LONGEST:
        raise ValueError(f"more than {LONGEST} characters")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "\d" is no escape, and stays what it is
            return ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, MemoryError, RecursionError) as error:
        raise ValueError(f"no Python expression ({error})") from None


def value(node: ast.expr) -> Any:
    """Returns the JSON value that a literal stands for. Raises `ValueError` for names, calls and what JSON lacks."""
    try:
        return _value(node)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _value(node: ast.expr) -> Any:
    match node:
        case ast.Constant(value=str() | bool() | None as constant):
            return constant
        case ast.Constant(value=int() | float() as number) if number < LARGEST:  # which infinity is not
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
                raise ValueError("a key is no text")
            if len(set(names)) < len(names):
                raise ValueError("a key stands twice")
            return dict(zip(names, map(_value, values), strict=True))
    raise ValueError(f"{node.id[:200] if isinstance(node, ast.Name) else type(node).__name__} is no literal")
