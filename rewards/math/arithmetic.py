"""Arithmetic on numbers, exact if rational and by mpmath otherwise: + - * /, powers and roots.

Every step costs a share of a budget, more for larger numbers, so nothing here can hang.
"""

from __future__ import annotations

import math
import threading
from fractions import Fraction
from typing import Any

from mpmath import MPContext
from mpmath.libmp import from_rational

from rewards.math.tree import TooComplex, Undefined

Number = Any  # Fraction, mpf or mpc

BUDGET = 12_000
MAX_PRECISION_BITS = 12_000
PRECISION_BITS = 180
MAX_POWER_BITS = 60_000
NOTHING = -(10**12)  # the binary exponent of zero
_local = threading.local()


class Arithmetic:
    """Operations on numbers at one precision.

    Attributes:
        is_complex: whether a number that is not real occurred.
        extent: bits between the largest and the smallest number so far, which the precision must cover.
        budget: the steps left, shared by all computations of one comparison.
    """

    def __init__(self, budget: list[float], precision_bits: int = PRECISION_BITS) -> None:
        if not hasattr(_local, "context"):
            _local.context = MPContext()
        self.mp = _local.context
        self.mp.prec = precision_bits
        self.budget, self.extent = budget, 0
        self.is_complex = False
        self.charge_unit = 1 + (precision_bits / 1000) ** 2

    def charge(self, cost: float) -> None:
        self.budget[0] -= cost
        if self.budget[0] < 0:
            raise TooComplex("more arithmetic than an answer needs")

    def real(self, value: Number) -> Any:
        """A number as an mpf, or as an mpc if it is complex."""
        if isinstance(value, Fraction):
            self.extent = max(self.extent, abs(value.numerator.bit_length() - value.denominator.bit_length()))
            self.charge(self.charge_unit)
            return self.mp.make_mpf(from_rational(value.numerator, value.denominator, self.mp.prec, "n"))
        return value

    def checked(self, value: Number) -> Number:
        """Checks that an mpmath result is a number and not too large, and records its size."""
        self.charge(2 * self.charge_unit)
        if hasattr(value, "_mpc_"):
            if not self.mp.isfinite(value):
                raise Undefined("not a finite number")
            value = self._rounded_parts(value)
            self.is_complex = self.is_complex or hasattr(value, "_mpc_")
        size = magnitude(value)
        if size != NOTHING and abs(size) > self.extent:
            self.extent = abs(size)
            if self.extent > MAX_PRECISION_BITS:
                raise TooComplex("a number too large to compute with")
        return value

    def _rounded_parts(self, value: Number) -> Number:
        """A complex number without parts that are rounding errors: e^(i pi) is real."""
        parts = value.real, value.imag
        small = magnitude(value) + 30 - self.mp.prec
        if parts[1] == 0 or magnitude(parts[1]) < small:
            return parts[0]
        return self.mp.mpc(0, parts[1]) if parts[0] != 0 and magnitude(parts[0]) < small else value

    def literal(self, value: Fraction) -> None:
        """Records the digits of a constant: sqrt(2) + 10^-60 needs over sixty to differ from sqrt(2)."""
        bits = value.numerator.bit_length() + value.denominator.bit_length()
        if bits > 40:
            self.extent = max(self.extent, bits)

    def exact(self, value: Fraction) -> Fraction:
        bits = value.numerator.bit_length() + value.denominator.bit_length()
        if bits > 400:
            self.charge(bits / 200 + (bits / 500) ** 2)
            if bits > 100_000:
                raise TooComplex("a number too large to compute with")
        return value

    def combine(self, left: Number, right: Number, op: str) -> Number:
        """left op right for + - * /, exact if both are exact."""
        if isinstance(left, Fraction) and isinstance(right, Fraction):
            if op == "+":
                return self.exact(left + right)
            if op == "*":
                return self.exact(left * right)
            if right == 0:
                raise Undefined("division by zero")
            return self.exact(left / right)
        left, right = self.real(left), self.real(right)
        if op == "/" and right == 0:
            raise Undefined("division by zero")
        if op == "+":
            total = left + right
            size = max(magnitude(left), magnitude(right))
            is_rounding = total == 0 or magnitude(total) < size + 30 - self.mp.prec
            return Fraction(0) if is_rounding else self.checked(total)
        return self.checked(left * right if op == "*" else left / right)


def magnitude(value: Number) -> int:
    """The binary exponent of an mpmath number, within 2; `NOTHING` for zero.

    Raises:
        Undefined: the number is an infinity or NaN.
    """
    parts = value._mpc_ if hasattr(value, "_mpc_") else (value._mpf_,)
    sizes = [exponent + bits for _, mantissa, exponent, bits in parts if mantissa]
    if any(not mantissa and exponent for _, mantissa, exponent, _ in parts):
        raise Undefined("not a finite number")
    return max(sizes) if sizes else NOTHING


def power(arithmetic: Arithmetic, base: Number, exponent: Number) -> Number:
    """base ** exponent, with the real root of a negative base if the root is odd: (-8)^(1/3) = -2."""
    if isinstance(base, Fraction) and isinstance(exponent, Fraction):
        if base == 0 and exponent <= 0:
            raise Undefined("zero to a power that is not positive")
        if exponent.denominator == 1 and power_bits(base, exponent) <= MAX_POWER_BITS:
            return arithmetic.exact(base ** int(exponent))
        if 1 < exponent.denominator <= 64 and abs(exponent) < 1000:
            rooted = _exact_root(base, exponent.denominator)
            if rooted is not None and power_bits(rooted, exponent) <= MAX_POWER_BITS:
                return arithmetic.exact(rooted**exponent.numerator)
    is_odd_root = isinstance(exponent, Fraction) and exponent.denominator % 2 and exponent.denominator > 1
    if is_odd_root and not isinstance(base, arithmetic.mp.mpc) and base < 0:
        size = power(arithmetic, -base, exponent)
        return -size if exponent.numerator % 2 else size
    mp = arithmetic.mp
    base, exponent = arithmetic.real(base), arithmetic.real(exponent)
    if base == 0:
        if mp.re(exponent) <= 0:
            raise Undefined("zero to a power that is not positive")
        return Fraction(0)
    bits = (abs(magnitude(base)) + 4) * abs(exponent)
    if bits > MAX_POWER_BITS:
        raise TooComplex("a power too large to compute")
    arithmetic.charge(4 * arithmetic.charge_unit)
    return arithmetic.checked(mp.power(base, exponent))


def power_bits(base: Fraction, exponent: Fraction) -> int:
    size = max(base.numerator.bit_length(), base.denominator.bit_length())
    return 0 if size <= 1 else int(abs(exponent) * size)


def _exact_root(value: Fraction, degree: int) -> Fraction | None:
    bits = max(value.numerator.bit_length(), value.denominator.bit_length())
    if value < 0 or bits > (8000 if degree == 2 else 1000):
        return None
    top, bottom = _whole_root(value.numerator, degree), _whole_root(value.denominator, degree)
    return None if top is None or bottom is None else Fraction(top, bottom)


def _whole_root(number: int, degree: int) -> int | None:
    """The whole `degree`-th root of a whole number >= 0, by Newton's method; None if it has none."""
    if number < 2:
        return number
    if degree == 2:
        root = math.isqrt(number)
    else:
        root = 1 << -(-number.bit_length() // degree)
        while True:
            smaller = ((degree - 1) * root + number // root ** (degree - 1)) // degree
            if smaller >= root:
                break
            root = smaller
    return root if root**degree == number else None


def root(arithmetic: Arithmetic, value: Number, degree: Number) -> Number:
    if not isinstance(degree, Fraction) or degree == 0:
        raise Undefined("a root of this degree")
    return power(arithmetic, value, 1 / degree)


def determinant(arithmetic: Arithmetic, rows: list[list[Number]]) -> Number:
    """By expansion along the first row."""
    arithmetic.charge(1)
    if len(rows) == 1:
        return rows[0][0]
    total: Number = Fraction(0)
    for at, entry in enumerate(rows[0]):
        if entry != 0:
            minor = determinant(arithmetic, [row[:at] + row[at + 1 :] for row in rows[1:]])
            term = arithmetic.combine(entry, minor, "*")
            total = arithmetic.combine(total, -term if at % 2 else term, "+")
    return total
