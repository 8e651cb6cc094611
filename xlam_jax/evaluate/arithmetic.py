"""What an expression of numbers comes to, without executing it."""

import ast
import operator
from collections.abc import Callable
from typing import Any

_OPERATIONS: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_LARGEST_BASE = 1e9
_LARGEST_EXPONENT = 64
_LARGEST = 10**4300
"""Beyond it Python writes no integer, and products of ever larger ones would take hours."""


def number(node: ast.expr) -> int | float:
    """The number that a parsed expression stands for; raises `ValueError` for what is none, and `ArithmeticError`."""
    match node:
        case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
            return value
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -number(operand)
        case ast.UnaryOp(op=ast.UAdd(), operand=operand):
            return number(operand)
        case ast.BinOp(left=left, op=ast.Pow(), right=right):
            base, exponent = number(left), number(right)
            if abs(exponent) > _LARGEST_EXPONENT or abs(base) > _LARGEST_BASE:
                raise ValueError("a power that is too large")
            value = base**exponent
            if isinstance(value, complex):
                raise ValueError("a complex number")
            return value
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATIONS:
            value = _OPERATIONS[type(op)](number(left), number(right))
            if isinstance(value, int) and abs(value) >= _LARGEST:
                raise ValueError("a number that is too large")
            return value
    raise ValueError(f"{type(node).__name__} is no number")
