"""Evaluates arithmetic expressions without executing code."""

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
_LARGEST_INTEGER = 10**4300
"""Python cannot print larger integers, and products of even larger ones would take hours."""


def evaluate(node: ast.expr) -> int | float:
    """Returns the value of a parsed expression. Raises `ArithmeticError`, and `ValueError` if it is not a number."""
    match node:
        case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
            return value
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -evaluate(operand)
        case ast.UnaryOp(op=ast.UAdd(), operand=operand):
            return evaluate(operand)
        case ast.BinOp(left=left, op=ast.Pow(), right=right):
            base, exponent = evaluate(left), evaluate(right)
            if abs(exponent) > _LARGEST_EXPONENT or abs(base) > _LARGEST_BASE:
                raise ValueError("a power that is too large")
            value = base**exponent
            if isinstance(value, complex):
                raise ValueError("a complex number")
            return value
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATIONS:
            value = _OPERATIONS[type(op)](evaluate(left), evaluate(right))
            if isinstance(value, int) and abs(value) >= _LARGEST_INTEGER:
                raise ValueError("a number that is too large")
            return value
    raise ValueError(f"{type(node).__name__} is not a number")
