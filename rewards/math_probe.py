"""Whether two trees are one number or one function: compared at fixed points of their variables."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from typing import Any

from rewards.math_functions import magnitude
from rewards.math_text import Node, TooComplex, Undefined
from rewards.math_value import BUDGET, EQUAL_BITS, MAX_PRECISION_BITS, PRECISION_BITS, Evaluator, has, symbols

Number = Any  # Fraction, mpf or mpc
_REAL_POINTS = (0, 1, 2, 3)
_RATIONAL_POINTS = (1, 3)
_POSITIVE_POINTS = (0, 1, 6)  # sqrt(a / b) is sqrt(a b) / b where radicals are meant to be taken
_FAR_POINTS = (4, 5)  # where max(7, x), |x + 10| and floor(x / 100) are not what they are near zero
_WITH_BREAKS = ("abs", "max", "min", "floor", "ceil", "sgn", "root")
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
    if (a := _quotient(left)) is not None and (b := _quotient(right)) is not None:
        return a == b
    names = symbols(left) | symbols(right)
    budget = [float(BUDGET)]
    if not names:
        return _same_at(0, left, right, budget) is True
    usable = 0
    undefined: Undefined | None = None
    for point in _points(names, left, right):
        try:
            verdict = _same_at(point, left, right, budget)
        except TooComplex:
            if point not in _FAR_POINTS:
                raise
            continue
        except Undefined as error:
            undefined = error
            continue
        if verdict is False:
            return False
        usable += verdict is True
    if not usable and undefined is not None:
        raise undefined
    return usable >= 2


def _quotient(node: Node) -> Fraction | None:
    """The value of a plain fraction, decimal or whole number; None for any other tree."""
    if node[0] in ("num", "dec"):
        return node[1]
    if node[0] == "neg":
        value = _quotient(node[1])
        return None if value is None else -value
    if node[0] == "div" and node[1][0] == node[2][0] == "num" and node[2][1]:
        return node[1][1] / node[2][1]
    return None


def _points(names: frozenset[str], left: Node, right: Node) -> tuple[int, ...]:
    pair = ("pair", left, right)
    if names <= _WHOLE_NAMES and (has(pair, "floor", "ceil", "gcd", "lcm") or _has_alternation(pair)):
        return _WHOLE_POINTS
    if _is_rational(left, right):
        return _RATIONAL_POINTS
    if _has_radical(left) and _has_radical(right):
        return _POSITIVE_POINTS
    return _REAL_POINTS + _FAR_POINTS if has(pair, *_WITH_BREAKS) or _has_broken_power(pair) else _REAL_POINTS


def _has_alternation(pair: Node) -> bool:
    """(-1)^n, which is real at whole numbers only."""
    return any(part[0] == "pow" and part[1][0] == "neg" and symbols(part[2]) for part in _parts(pair))


def _has_broken_power(pair: Node) -> bool:
    """(x^2)^(1/2), which is |x|."""
    return any(part[0] == "pow" and part[2][0] != "num" and not symbols(part[2]) for part in _parts(pair))


def _has_radical(node: Node) -> bool:
    """A root of a variable."""
    for part in _parts(node):
        if part[:2] == ("fn", "root") and symbols(part[2][0]):
            return True
        if part[0] == "pow" and part[2][0] != "num" and not symbols(part[2]) and symbols(part[1]):
            return True
    return False


def _parts(node: Node) -> Iterator[Node]:
    stack = [node]
    while stack:
        part = stack.pop()
        if part and type(part[0]) is str:
            yield part
        stack.extend([child for child in part if type(child) is tuple])


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
        if point in (2, 3, *_FAR_POINTS) and evaluator.is_complex:
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
