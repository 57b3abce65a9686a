"""Trees -> numbers: exact if they are rational, otherwise with as many digits as they need.

Formulas are compared at fixed points of their variables. Rational formulas have exact values there. Others
are evaluated by mpmath with at least 50 digits (more if their parts differ much in size), and compared by
relative error.
"""

from __future__ import annotations

import zlib
from fractions import Fraction

from rewards.math.arithmetic import PRECISION_BITS, Arithmetic, Number, determinant, power
from rewards.math.functions import FUNCTIONS, factorial
from rewards.math.tree import Node, TooComplex, Undefined, Unparsable, Unsupported, progression, symbols

MAX_TERMS = 2_000
# Two numbers are equal when they agree to this many bits, and to more where their parts differ much in size.
EQUAL_BITS = 130
_INFINITY = ("const", "inf")


class Evaluator:
    """Values of trees at one point, at one precision."""

    def __init__(self, point: int, budget: list[float], precision_bits: int = PRECISION_BITS) -> None:
        self.arithmetic = Arithmetic(budget, precision_bits)
        self.point = point
        self.bound: dict[str, Fraction] = {}

    def value(self, node: Node) -> Number:
        """The number that a tree has at this point.

        Raises:
            Undefined, TooComplex, Unparsable (not a number), Unsupported.
        """
        self.arithmetic.charge(1)
        match node:
            case ("num" | "dec", number):
                self.arithmetic.literal(number)
                return number
        try:
            return self._formula(node)
        except (ValueError, ZeroDivisionError, OverflowError) as error:  # how mpmath reports a pole
            raise Undefined(str(error)) from None

    def _formula(self, node: Node) -> Number:
        arithmetic = self.arithmetic
        match node:  # the frequent ones first
            case ("sym", name):
                return self.probe(name)
            case ("mul", factors):
                return _fold(self, factors, "*")
            case ("add", terms):
                return _fold(self, progression(terms) if ("dots",) in terms else terms, "+")
            case ("pow", base, exponent):
                return _power(self, base, exponent)
            case ("div", above, below):
                return arithmetic.combine(self.value(above), self.value(below), "/")
            case ("neg", inner):
                return -self.value(inner)
            case ("fn", name, arguments):
                return _function(self, name, arguments)
            case ("const", "inf"):
                raise Undefined("infinity in a formula")
            case ("const", name):
                mp = arithmetic.mp
                return mp.mpc(0, 1) if name == "i" else +(mp.pi if name == "pi" else mp.e)
            case ("deg", inner):
                turned = arithmetic.combine(self.value(inner), +arithmetic.mp.pi, "*")
                return arithmetic.combine(turned, Fraction(180), "/")
            case ("percent", inner):
                return arithmetic.combine(self.value(inner), Fraction(100), "/")
            case ("fact", inner):
                return factorial(arithmetic, self.value(inner))
            case ("call", name, arguments):
                return self.opaque(f"{name}({';'.join(map(self.key, arguments))})")
            case ("big", kind, name, low, high, body):
                return _big(self, (kind, name), low=low, high=high, body=body)
        raise Unparsable(f"a {node[0]} is not a number")

    def probe(self, name: str) -> Fraction:
        """A dyadic value fixed by the name. Points 0-3 are near zero, 4-6 far, 7 between, 10 and up whole."""
        if self.bound:
            if name in self.bound:
                return self.bound[name]
            letter, _, index = name.partition("_")
            if index in self.bound:  # the a_k of a sum over k
                return self.opaque(f"{letter}_{self.bound[index]}")
        code = zlib.crc32(f"{self.point}:{name}".encode())
        unit = Fraction(code % 128, 128)
        if self.point >= 10:
            return Fraction(2 + code % 11 + (self.point - 10))
        if self.point == 0:
            return Fraction(1, 4) + unit * Fraction(11, 16)
        if self.point == 7:
            return 5 + unit * 20
        if self.point >= 4:
            far = 20_000 + unit * 10**6
            return far if self.point == 6 or (code & 4096 > 0) == (self.point == 4) else -far
        size = Fraction(9, 8) + unit * 3
        return size if self.point == 1 else -size if self.point == 2 or code & 4096 else size

    def opaque(self, key: str) -> Fraction:
        """A value for an undefined function, which only the same name and arguments share."""
        return Fraction(2**18 + zlib.crc32(f"{self.point}:{key}".encode()) % 2**22, 2**21)

    def key(self, node: Node) -> str:
        """A name for a number: 15 of its digits."""
        if node == _INFINITY:
            return "inf"
        mp, value = self.arithmetic.mp, self.arithmetic.real(self.value(node))
        parts = [mp.re(value), mp.im(value)]
        return ",".join("0" if abs(part) < 1e-25 else str(mp.nstr(part, 15)) for part in parts)


def _fold(evaluator: Evaluator, nodes: tuple[Node, ...], op: str) -> Number:
    total = evaluator.value(nodes[0])
    for node in nodes[1:]:
        total = evaluator.arithmetic.combine(total, evaluator.value(node), op)
    return total


def _big(evaluator: Evaluator, of: tuple[str, str], *, low: Node, high: Node, body: Node) -> Number:
    """Evaluates a sum or product with whole bounds; any other is an undefined function of bounds and body."""
    kind, name = of
    first = last = None
    if low != _INFINITY and high != _INFINITY:
        first, last = evaluator.value(low), evaluator.value(high)
    outer = dict(evaluator.bound)
    try:
        whole = all(isinstance(bound, Fraction) and bound.denominator == 1 for bound in (first, last))
        if not whole or (symbols(("pair", low, high)) and evaluator.point < 10):
            evaluator.bound[name] = evaluator.opaque(f"bound {len(outer)}")
            return evaluator.opaque(f"{kind}({';'.join(map(evaluator.key, (low, high, body)))})")
        assert isinstance(first, Fraction) and isinstance(last, Fraction)
        if last - first >= MAX_TERMS:
            raise TooComplex(f"a {kind} of more than {MAX_TERMS} terms")
        total: Number = Fraction(0 if kind == "sum" else 1)
        for index in range(int(first), int(last) + 1):
            evaluator.bound[name] = Fraction(index)
            total = evaluator.arithmetic.combine(total, evaluator.value(body), "+" if kind == "sum" else "*")
        return total
    finally:
        evaluator.bound = outer


def _function(evaluator: Evaluator, name: str, arguments: tuple[Node, ...]) -> Number:
    if name == "det":
        rows = arguments[0][1] if arguments[0][0] == "matrix" else ()
        if not rows or len(rows) != len(rows[0]):
            raise Unparsable("a determinant of something that is not a square matrix")
        return determinant(evaluator.arithmetic, [[evaluator.value(entry) for entry in row] for row in rows])
    if name in ("gcd", "lcm") and evaluator.point < 10 and symbols(("fn", name, arguments)):
        raise Unsupported("gcd or lcm of formulas", evaluates=True)
    function = FUNCTIONS.get(name)
    if function is None:
        raise Unsupported(f"the function {name}")
    try:
        return function(evaluator.arithmetic, *(evaluator.value(argument) for argument in arguments))
    except TypeError:  # the wrong number of arguments
        raise Unparsable(f"{name} of {len(arguments)} arguments") from None


def _power(evaluator: Evaluator, base: Node, exponent: Node) -> Number:
    if exponent == ("neg", _INFINITY) or exponent == _INFINITY:
        raise Undefined("an infinite power")
    result = power(evaluator.arithmetic, evaluator.value(base), evaluator.value(exponent))
    if isinstance(result, Fraction) and not symbols(("pow", base, exponent)):
        evaluator.arithmetic.literal(result)
    return result
