"""Computes arithmetic that a model wrote by walking its syntax tree; nothing is evaluated as Python."""

from __future__ import annotations

import ast
import operator
from fractions import Fraction
from typing import Any

MAX_CHARACTERS = 1000
MAX_BITS = 4096  # of a numerator or denominator
OPERATORS: dict[Any, Any] = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}
OPERATORS |= {ast.Div: operator.truediv, ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod}


def value_of(expression: str) -> str:
    """The exact value if it is an integer, else 15 digits.

    Raises:
        ValueError: the expression is not arithmetic or too long, or its value has too many digits.
        ZeroDivisionError: the expression divides by 0.
    """
    if len(expression) > MAX_CHARACTERS:
        raise ValueError(f"the expression has more than {MAX_CHARACTERS} characters")
    try:
        tree = ast.parse(expression.strip(), mode="eval")
        value = _value(tree.body)
    except (SyntaxError, RecursionError, MemoryError):
        raise ValueError(f"{expression[:60]!r} is not an arithmetic expression") from None
    try:
        return str(value.numerator) if value.denominator == 1 else f"{float(value):.15g}"
    except OverflowError:
        raise ValueError("the value has too many digits") from None


def _value(node: ast.expr) -> Fraction:
    match node:
        case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
            return Fraction(number if isinstance(number, int) else str(number))
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand)
        case ast.UnaryOp(op=ast.UAdd(), operand=operand):
            return _value(operand)
        case ast.BinOp(left=left, op=ast.Pow(), right=right):
            return _power(_value(left), _value(right))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
            value = Fraction(OPERATORS[type(op)](_value(left), _value(right)))
            if max(value.numerator.bit_length(), value.denominator.bit_length()) > MAX_BITS:
                raise ValueError("the value has too many digits")
            return value
    raise ValueError(f"{ast.unparse(node)[:60]!r} is not arithmetic")


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    if exponent.denominator != 1:
        raise ValueError("exponents must be integers")
    bits = max(base.numerator.bit_length(), base.denominator.bit_length())
    if bits * abs(exponent.numerator) > MAX_BITS and bits > 1:
        raise ValueError("the value has too many digits")
    return base**exponent.numerator
