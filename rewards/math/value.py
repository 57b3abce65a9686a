"""Trees -> numbers, exactly where they are rational and to as many digits as they need elsewhere.

Two formulas are compared at fixed points of their variables. A rational formula has an exact value there, so
that equality is exact; any other is evaluated by mpmath with at least 50 digits, more when its parts differ
much in size, and compared by relative error.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from rewards.math.arithmetic import PRECISION_BITS, Arithmetic, Number, determinant, power
from rewards.math.functions import FUNCTIONS, factorial
from rewards.math.tree import Node, TooComplex, Undefined, Unparsable, Unsupported, progression, symbols

MAX_TERMS = 2_000
# Two numbers are equal when they agree to this many bits, and to more where their parts differ much in size.
EQUAL_BITS = 130


class Evaluator:
    """Values of trees at one point, at one precision."""

    def __init__(self, point: int, budget: list[float], precision_bits: int = PRECISION_BITS) -> None:
        self.arithmetic = Arithmetic(budget, precision_bits)
        self.point = point
        self.bound: dict[str, Fraction] = {}

    def value(self, node: Node) -> Number:
        """The number a tree stands for at this point.

        Raises:
            Undefined, TooComplex, Unparsable (not a number), Unsupported.
        """
        kind = node[0]
        self.arithmetic.charge(1)
        if kind == "num" or kind == "dec":
            self.arithmetic.literal(node[1])
            return node[1]
        handler = _HANDLERS.get(kind)
        if handler is None:
            raise Unparsable(f"a {kind} is not a number")
        try:
            return handler(self, node)
        except (ValueError, ZeroDivisionError, OverflowError) as error:  # mpmath's words for a pole
            raise Undefined(str(error)) from None

    def probe(self, name: str) -> Fraction:
        """The value of a variable at this point: dyadic, fixed by its name."""
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
        """The value of an undefined function: the same for the same name and arguments only."""
        return Fraction(2**18 + zlib.crc32(f"{self.point}:{key}".encode()) % 2**22, 2**21)

    def key(self, node: Node) -> str:
        """A number as a name: 15 digits of it."""
        if node == ("const", "inf"):
            return "inf"
        mp, value = self.arithmetic.mp, self.arithmetic.real(self.value(node))
        parts = [mp.re(value), mp.im(value)]
        return ",".join("0" if abs(part) < 1e-25 else str(mp.nstr(part, 15)) for part in parts)


def _fold(evaluator: Evaluator, node: Node) -> Number:
    op = "+" if node[0] == "add" else "*"
    terms = progression(node[1]) if op == "+" and ("dots",) in node[1] else node[1]
    total = evaluator.value(terms[0])
    for term in terms[1:]:
        total = evaluator.arithmetic.combine(total, evaluator.value(term), op)
    return total


def _constant(evaluator: Evaluator, node: Node) -> Number:
    if node[1] == "inf":
        raise Undefined("infinity in a formula")
    mp = evaluator.arithmetic.mp
    return mp.mpc(0, 1) if node[1] == "i" else +(mp.pi if node[1] == "pi" else mp.e)


def _degrees(evaluator: Evaluator, node: Node) -> Number:
    turned = evaluator.arithmetic.combine(evaluator.value(node[1]), +evaluator.arithmetic.mp.pi, "*")
    return evaluator.arithmetic.combine(turned, Fraction(180), "/")


def _big(evaluator: Evaluator, node: Node) -> Number:
    """A sum with whole bounds is carried out; any other is an undefined function of its bounds and body."""
    _, kind, name, low, high, body = node
    first = last = None
    if low != ("const", "inf") and high != ("const", "inf"):
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


def _call(evaluator: Evaluator, node: Node) -> Number:
    return evaluator.opaque(f"{node[1]}({';'.join(evaluator.key(argument) for argument in node[2])})")


def _function(evaluator: Evaluator, node: Node) -> Number:
    _, name, arguments = node
    if name == "det":
        rows = arguments[0][1] if arguments[0][0] == "matrix" else ()
        if not rows or len(rows) != len(rows[0]):
            raise Unparsable("a determinant of something that is not a square matrix")
        return determinant(evaluator.arithmetic, [[evaluator.value(entry) for entry in row] for row in rows])
    if name in ("gcd", "lcm") and evaluator.point < 10 and symbols(node):
        raise Unsupported("a divisor of formulas", evaluates=True)
    function = FUNCTIONS.get(name)
    if function is None:
        raise Unsupported(f"the function {name}")
    try:
        return function(evaluator.arithmetic, *(evaluator.value(argument) for argument in arguments))
    except TypeError:  # the wrong number of arguments
        raise Unparsable(f"{name} of {len(arguments)} arguments") from None


def _power(evaluator: Evaluator, node: Node) -> Number:
    if node[2] == ("neg", ("const", "inf")) or node[2] == ("const", "inf"):
        raise Undefined("an infinite power")
    result = power(evaluator.arithmetic, evaluator.value(node[1]), evaluator.value(node[2]))
    if isinstance(result, Fraction) and not symbols(node):
        evaluator.arithmetic.literal(result)
    return result


_HANDLERS: Mapping[str, Any] = {
    "add": _fold,
    "mul": _fold,
    "div": lambda ev, node: ev.arithmetic.combine(ev.value(node[1]), ev.value(node[2]), "/"),
    "neg": lambda ev, node: -ev.value(node[1]),
    "pow": _power,
    "sym": lambda ev, node: ev.probe(node[1]),
    "const": _constant,
    "fn": _function,
    "call": _call,
    "big": _big,
    "fact": lambda ev, node: factorial(ev.arithmetic, ev.value(node[1])),
    "deg": _degrees,
    "percent": lambda ev, node: ev.arithmetic.combine(ev.value(node[1]), Fraction(100), "/"),
}
