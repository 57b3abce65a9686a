"""Equations and inequalities compared up to a constant factor."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

from rewards.math_text import Node, Shape, Undefined
from rewards.math_value import BUDGET, Evaluator, symbols

_FLIPPED = {">": "<", ">=": "<=", "<": "<", "<=": "<=", "!=": "!="}


def renamed(item: Any, names: dict[str, str]) -> Any:
    """A shape with its variables under other names."""
    if type(item) is not tuple:  # an interval of numbers has no names
        return item
    if len(item) == 2 and item[0] == "sym":
        return ("sym", names.get(item[1], item[1]))
    return tuple(renamed(part, names) for part in item)


def as_equation(item: Shape) -> Node | None:
    """The tree that an equation says is zero; None for a shape that says no equation of variables."""
    if item[0] == "equation":
        return item[1]
    if item[0] == "named" and item[2][0] == "scalar" and not item[1].endswith("()"):
        return ("add", (("sym", item[1]), ("neg", item[2][1])))
    return None


def same_inequality(gold: Shape, prediction: Shape) -> bool:
    """Whether two inequalities differ by a constant factor, and point the other way if it is negative."""
    if _FLIPPED[gold[1]] != _FLIPPED[prediction[1]]:
        return False
    factor = proportion(gold[2], prediction[2])
    if factor is None:
        return False
    return gold[1] == "!=" or (factor > 0) == (gold[1][0] == prediction[1][0])


def proportion(left: Node, right: Node) -> Any:
    """The constant c with left = c right for all values of the variables, or None."""
    names = symbols(left)
    if names != symbols(right) or not names:
        return None
    budget: list[float] = [BUDGET]
    factor = None
    for point in (0, 1, 2, 3):
        evaluator = Evaluator(point, budget)
        try:
            a, b = evaluator.value(left), evaluator.value(right)
        except Undefined:
            continue
        if a == 0 or b == 0:
            return None
        quotient = evaluator.combine(a, b, "/")
        if isinstance(quotient, evaluator.mp.mpc):
            return None
        if factor is None:
            factor = quotient
            continue
        difference = evaluator.combine(quotient, -factor, "+")
        if difference != 0 and abs(difference) > abs(factor) * Fraction(1, 2**120):
            return None
    return factor
