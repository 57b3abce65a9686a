"""Whether two trees are one number or one function: compared at fixed points of their variables."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

from rewards.math_functions import magnitude
from rewards.math_text import Node, TooComplex, Undefined
from rewards.math_value import BUDGET, EQUAL_BITS, MAX_PRECISION_BITS, PRECISION_BITS, Evaluator, has, symbols

Number = Any  # Fraction, mpf or mpc
_REAL_POINTS = (0, 1, 2, 3)
_RATIONAL_POINTS = (1, 3)
_WHOLE_POINTS = (10, 11, 12, 13, 14, 15, 16, 17)
_WHOLE_NAMES = frozenset("nkmpqrNKMij")


def constant(node: Node, precision_bits: int = PRECISION_BITS) -> Number:
    """The value of a tree without variables."""
    return Evaluator(0, [BUDGET], precision_bits).value(node)


def same_value(left: Node, right: Node) -> bool:
    """Whether two trees are the same number, or the same function of their variables.

    Where a variable is negative, points that lead through complex numbers are left out: sqrt(1/n) is
    1/sqrt(n) for n > 0.

    Raises:
        Undefined: there is no point where both have a value.
        TooComplex, Unparsable, Unsupported.
    """
    if left[0] == right[0] == "num":
        return left[1] == right[1]
    names = symbols(left) | symbols(right)
    budget = [float(BUDGET)]
    if not names:
        return _same_at(0, left, right, budget) is True
    whole = names <= _WHOLE_NAMES and has(("pair", left, right), "floor", "ceil", "gcd", "lcm")
    usable = 0
    undefined: Undefined | None = None
    points = _WHOLE_POINTS if whole else _REAL_POINTS if not _is_rational(left, right) else _RATIONAL_POINTS
    for point in points:
        try:
            verdict = _same_at(point, left, right, budget)
        except Undefined as error:
            undefined = error
            continue
        if verdict is False:
            return False
        usable += verdict is True
    if not usable and undefined is not None:
        raise undefined
    return usable >= 2


def _is_rational(*nodes: Node) -> bool:
    """Whether trees are rational functions, which agree at random points only if they agree everywhere."""
    stack = list(nodes)
    while stack:
        part = stack.pop()
        if part and part[0] not in _RATIONAL and type(part[0]) is str:
            return False
        if part and part[0] == "pow" and part[2][0] != "num":
            return False
        stack.extend([child for child in part if type(child) is tuple])
    return True


_RATIONAL = frozenset(("num", "dec", "sym", "add", "mul", "div", "neg", "pow"))


def _same_at(point: int, left: Node, right: Node, budget: list[float]) -> bool | None:
    precision = PRECISION_BITS
    while True:
        evaluator = Evaluator(point, budget, precision)
        a, b = evaluator.value(left), evaluator.value(right)
        if isinstance(a, Fraction) and isinstance(b, Fraction):
            return a == b
        a, b = evaluator.real(a), evaluator.real(b)
        if point in (2, 3) and evaluator.is_complex:
            return None
        wanted = PRECISION_BITS + (2 * evaluator.extent if evaluator.extent > 40 else 0)
        if wanted <= precision:
            break
        if wanted > 2 * MAX_PRECISION_BITS:
            raise TooComplex("numbers of very different sizes")
        precision = wanted
    difference = a - b
    if difference == 0:
        return True
    wanted_bits = EQUAL_BITS + (evaluator.extent if evaluator.extent > 40 else 0)
    return magnitude(difference) - max(magnitude(a), magnitude(b)) < -wanted_bits
