"""Whether two trees are the same number or function, by comparison at fixed points of their variables."""

from __future__ import annotations

from collections import defaultdict
from fractions import Fraction
from typing import cast

from rewards.math.arithmetic import BUDGET, MAX_PRECISION_BITS, PRECISION_BITS, Number, magnitude
from rewards.math.tree import Node, TooComplex, Undefined, has, parts, symbols
from rewards.math.value import EQUAL_BITS, Evaluator

_REAL_POINTS = (0, 1, 2, 3)
_RATIONAL_POINTS = (1, 3)
_POSITIVE_POINTS = (0, 1, 7, 6)  # sqrt(a / b) is sqrt(a b) / b, as radicals are meant
_FAR_POINTS = (4, 5, 6, 7)  # max(7, x), |x + 10| and floor(x / 100) differ here from near zero
_WITH_BREAKS = ("abs", "max", "min", "floor", "ceil", "sgn", "root")
_WHOLE_POINTS = (10, 11, 12, 13, 14, 15, 16, 17)
_WHOLE_NAMES = frozenset("nkmpqrNKMij")


def constant(node: Node, precision_bits: int = PRECISION_BITS) -> Number:
    """The value of a tree without variables."""
    return Evaluator(0, [BUDGET], precision_bits).value(node)


def same_value(left: Node, right: Node) -> bool:
    """Whether two trees are the same number, or the same function of their variables.

    Negative points that lead to complex numbers are left out: sqrt(1/n) is 1/sqrt(n) for n > 0.

    Raises:
        Undefined: both have a value at no point.
        TooComplex, Unparsable, Unsupported.
    """
    if (a := _quotient(left)) is not None and (b := _quotient(right)) is not None:
        return a == b
    names = symbols(left) | symbols(right)
    budget = [float(BUDGET)]
    if not names:
        try:
            return _same_at(0, left, right, budget) is True
        except TooComplex:
            if _form(left) == _form(right):
                return True
            raise
    usable = 0
    undefined: Undefined | None = None
    for point in _points(names, left, right):
        try:
            verdict = _same_at(point, left, right, budget)
        except TooComplex:
            if point not in _FAR_POINTS:
                if _form(left) == _form(right):
                    return True
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
    match node:
        case ("num" | "dec", value):
            return value
        case ("neg", inner):
            value = _quotient(inner)
            return None if value is None else -value
        case ("div", ("num", above), ("num", below)) if below:
            return above / below
    return None


def _points(names: frozenset[str], left: Node, right: Node) -> tuple[int, ...]:
    pair = ("pair", left, right)
    if all(part[0] in _RATIONAL and (part[0] != "pow" or part[2][0] == "num") for part in parts(pair[1:])):
        return _RATIONAL_POINTS  # rational functions agree at random points only if they agree everywhere
    powers = [part for part in parts(pair) if part[0] == "pow"]
    alternates = any(part[1][0] == "neg" and symbols(part[2]) for part in powers)  # (-1)^n
    if names <= _WHOLE_NAMES and (alternates or has(pair, "floor", "ceil", "gcd", "lcm")):
        return _WHOLE_POINTS
    if _has_open_sum(left) and _has_open_sum(right):
        return _WHOLE_POINTS
    if _has_radical(left) and _has_radical(right):
        return _POSITIVE_POINTS
    is_broken = any(part[2][0] != "num" and not symbols(part[2]) for part in powers)  # (x^2)^(1/2) is |x|
    return (*_REAL_POINTS, 4, 5) if is_broken or has(pair, *_WITH_BREAKS) else _REAL_POINTS


def _has_open_sum(node: Node) -> bool:
    """Whether a sum has a variable bound."""
    return any(part[0] == "big" and symbols(("pair", part[3], part[4])) for part in parts(node))


def _has_radical(node: Node) -> bool:
    """Whether there is a root of a variable."""
    roots = [part[2][0] for part in parts(node) if part[0] == "fn" and part[1] == "root"]
    powers = [part for part in parts(node) if part[0] == "pow" and part[2][0] != "num"]
    return any(map(symbols, roots)) or any(symbols(part[1]) and not symbols(part[2]) for part in powers)


_RATIONAL = frozenset(("num", "dec", "sym", "add", "mul", "div", "neg", "pow"))


def _same_at(point: int, left: Node, right: Node, budget: list[float]) -> bool | None:
    precision = PRECISION_BITS
    while True:
        evaluator = Evaluator(point, budget, precision)
        a, b = evaluator.value(left), evaluator.value(right)
        if isinstance(a, Fraction) and isinstance(b, Fraction):
            return a == b
        a, b = evaluator.arithmetic.real(a), evaluator.arithmetic.real(b)
        if point in (2, 3, 4, 5) and evaluator.arithmetic.is_complex:
            return None
        wanted = PRECISION_BITS + (2 * evaluator.arithmetic.extent if evaluator.arithmetic.extent > 40 else 0)
        if wanted <= precision:
            break
        if wanted > 2 * MAX_PRECISION_BITS:
            raise TooComplex("numbers of very different sizes")
        precision = wanted
    difference = a - b
    if difference == 0:
        return True
    wanted_bits = EQUAL_BITS + (evaluator.arithmetic.extent if evaluator.arithmetic.extent > 40 else 0)
    return magnitude(difference) - max(magnitude(a), magnitude(b)) < -wanted_bits


_ONE: Node = ("num", Fraction(1))


def _form(node: object) -> object:
    """A normal form for numbers too large to compute: sorted terms and factors, 9^500000 as 3^1000000."""
    if not isinstance(node, tuple) or not node or type(node[0]) is not str:
        return node
    if node[0] == "add":
        return ("add", *sorted(map(_form, node[1]), key=repr))
    factors = _factors(cast("Node", node))
    factors[-1] %= 2
    return ("mul", *sorted((item for item in factors.items() if item[1]), key=repr))


def _factors(node: Node) -> defaultdict[object, Fraction]:
    """Primes, -1 and the forms of other factors, with their exponents."""
    found: defaultdict[object, Fraction] = defaultdict(Fraction)
    sides: list[tuple[int, Node]] = []
    match node:
        case ("num" | "dec", value) if 0 < abs(value.numerator) < 10**8 > value.denominator:
            found[-1] += value < 0
            for number, step in ((abs(value.numerator), 1), (value.denominator, -1)):
                divisor = 2
                while number > 1:
                    divisor = divisor if divisor * divisor <= number else number
                    while number % divisor == 0:
                        found[divisor], number = found[divisor] + step, number // divisor
                    divisor += 1
        case ("mul", factors):
            sides = [(1, part) for part in factors]
        case ("div", above, below):
            sides = [(1, above), (-1, below)]
        case ("neg", inner):
            sides, found[-1] = [(1, inner)], Fraction(1)
        case ("pow", base, exponent):
            return _powers(base, exponent)
        case ("fn", "root", (base, degree)):
            return _powers(base, ("div", _ONE, degree))
        case _:
            found[(node[0], *map(_form, node[1:]))] += 1
    for sign, part in sides:
        for factor, power in _factors(part).items():
            found[factor] += sign * power
    return found


def _powers(base: Node, exponent: Node) -> defaultdict[object, Fraction]:
    inner, value = _factors(base), constant(exponent) if not symbols(exponent) else None
    if isinstance(value, Fraction) and not inner[-1] and all(isinstance(factor, int) for factor in inner):
        return defaultdict(Fraction, {factor: power * value for factor, power in inner.items()})
    return defaultdict(Fraction, {("pow", _form(base), _form(exponent)): Fraction(1)})
