"""Named functions of exact and mpmath numbers, each with a bound that keeps it cheap."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from fractions import Fraction
from typing import Any

from rewards.math.arithmetic import MAX_POWER_BITS, Arithmetic, Number, magnitude, power_bits, root
from rewards.math.tree import TooComplex, Undefined, Unsupported

MAX_FACTORIAL = 3_000
MAX_SPECIAL_BITS = 700  # at thousands of bits gamma and zeta take seconds


def factorial(arithmetic: Arithmetic, value: Number) -> Number:
    if isinstance(value, Fraction) and value.denominator == 1:
        if value < 0:
            raise Undefined("the factorial of a negative number")
        if value > MAX_FACTORIAL:
            raise TooComplex(f"the factorial of a number above {MAX_FACTORIAL}")
        arithmetic.charge(1 + float(value) / 10)
        return arithmetic.exact(Fraction(math.factorial(int(value))))
    return _gamma(arithmetic, arithmetic.combine(value, Fraction(1), "+"))


def _gamma(arithmetic: Arithmetic, value: Number) -> Number:
    if isinstance(value, Fraction) and value.denominator == 1:
        return factorial(arithmetic, value - 1)
    value = arithmetic.real(value)
    if abs(value) > 40 or arithmetic.mp.prec > MAX_SPECIAL_BITS:
        raise TooComplex("the gamma function of a large number")
    arithmetic.charge(400 * arithmetic.charge_unit)
    return arithmetic.checked(arithmetic.mp.gamma(value))


def _binomial(arithmetic: Arithmetic, n: Number, k: Number) -> Number:
    if all(isinstance(number, Fraction) and number.denominator == 1 for number in (n, k)):
        return _whole(math.comb, 20_000, "a choice")(arithmetic, n, k)
    one = Fraction(1)
    top = _gamma(arithmetic, arithmetic.combine(n, one, "+"))
    left = _gamma(arithmetic, arithmetic.combine(k, one, "+"))
    right = _gamma(arithmetic, arithmetic.combine(arithmetic.combine(n, -k, "+"), one, "+"))
    return arithmetic.combine(top, arithmetic.combine(left, right, "*"), "/")


def _whole(compute: Callable[..., int], limit: float, name: str) -> Callable[..., Number]:
    """Makes a bounded function of whole numbers."""

    def function(arithmetic: Arithmetic, *values: Number) -> Number:
        if any(not isinstance(value, Fraction) or value.denominator != 1 for value in values):
            raise Unsupported(f"{name} of a number that is not whole")
        if min(values) < 0 and compute is not operator.mod:
            raise Undefined(f"{name} of negative numbers")
        if max(values) > limit:
            raise TooComplex(f"{name} of large numbers")
        arithmetic.charge(1 + float(max(values)) / 10 if limit < math.inf else 1)
        return arithmetic.exact(Fraction(compute(*map(int, values))))

    return function


def _plain(name: str, limit: float, cost: float = 8) -> Callable[..., Number]:
    """Makes an mpmath function of one argument whose size is limited.

    Trigonometric functions round sin(pi) to zero and leave tan(pi/2) undefined, at the working precision.
    """
    periodic = name in ("sin", "cos", "tan", "asin", "acos", "atan")

    def function(arithmetic: Arithmetic, value: Number) -> Number:
        value = arithmetic.real(value)
        if abs(value) > limit:
            raise TooComplex(f"{name} of a large number")
        arithmetic.charge(cost * arithmetic.charge_unit)
        result = getattr(arithmetic.mp, name)(value)
        if periodic and result != 0 and abs(magnitude(result)) > arithmetic.mp.prec - 30:
            if magnitude(result) > 0:
                raise Undefined(f"{name} at this point")
            if magnitude(value) > -40:
                return Fraction(0)
        return arithmetic.checked(result)

    return function


def _zeta(arithmetic: Arithmetic, value: Number) -> Number:
    if not isinstance(value, Fraction) or value.denominator != 1 or not 2 <= value <= 40:
        raise Unsupported("the zeta function at this point")
    if arithmetic.mp.prec > MAX_SPECIAL_BITS:
        raise TooComplex("the zeta function to many digits")
    arithmetic.charge(1500 * arithmetic.charge_unit)
    return arithmetic.checked(arithmetic.mp.zeta(int(value)))


def _logarithm(arithmetic: Arithmetic, value: Number, base: Number | None = None) -> Number:
    if value == 0:
        raise Undefined("the logarithm of zero")
    whole = isinstance(base, Fraction) and base.denominator == 1 < base
    if isinstance(value, Fraction) and isinstance(base, Fraction) and whole and value > 0:
        number, sign = (value.numerator, 1) if value.denominator == 1 else (value.denominator, -1)
        number = 1 if min(value.numerator, value.denominator) > 1 else number
        exponent = round(math.log(number) / math.log(base))
        if exponent and power_bits(base, Fraction(exponent)) < MAX_POWER_BITS and base**exponent == number:
            return Fraction(sign * exponent)
    if value == 1:
        return Fraction(0)
    arithmetic.charge(8 * arithmetic.charge_unit)
    natural = arithmetic.mp.log(arithmetic.real(value))
    if natural == 0 or magnitude(natural) < 30 - arithmetic.mp.prec:
        return Fraction(0)
    natural = arithmetic.checked(natural)
    return natural if base is None else arithmetic.combine(natural, _logarithm(arithmetic, base), "/")


def _absolute(arithmetic: Arithmetic, value: Number) -> Number:
    if not isinstance(value, arithmetic.mp.mpc):
        return abs(value)
    square = arithmetic.mp.re(value) ** 2 + arithmetic.mp.im(value) ** 2
    return arithmetic.checked(arithmetic.mp.sqrt(square))


def _rounded(up: bool) -> Callable[..., Number]:
    def function(arithmetic: Arithmetic, value: Number) -> Number:
        if isinstance(value, Fraction):
            return Fraction(math.ceil(value) if up else math.floor(value))
        mp = arithmetic.mp
        if isinstance(value, mp.mpc):
            raise Undefined("rounding of a complex number")
        if magnitude(value) > 10_000:
            raise TooComplex("rounding of a large number")
        nearest = mp.nint(value)  # log(1000) / log(10) is 3, not a little less
        if value != nearest and magnitude(value - nearest) < -100:
            value = nearest
        return Fraction(int(mp.ceil(value) if up else mp.floor(value)))

    return function


def _extreme(choose: Callable[..., Any]) -> Callable[..., Number]:
    def function(arithmetic: Arithmetic, *values: Number) -> Number:
        if not values or any(isinstance(value, arithmetic.mp.mpc) for value in values):
            raise Undefined("the maximum or minimum of complex numbers")
        return choose(values, key=arithmetic.real)

    return function


def _divisor(least: bool) -> Callable[..., Number]:
    """gcd and lcm of rationals: gcd(a/b, c/d) = gcd(ad, cb) / bd."""

    def function(arithmetic: Arithmetic, *values: Number) -> Number:
        if not values or not all(isinstance(value, Fraction) for value in values):
            raise Unsupported("gcd or lcm of irrational numbers", evaluates=True)
        result = abs(values[0])
        for value in values[1:]:
            common = Fraction(
                math.gcd(result.numerator * value.denominator, value.numerator * result.denominator),
                result.denominator * value.denominator,
            )
            result = (abs(result * value) / common if common else Fraction(0)) if least else common
        return arithmetic.exact(result)

    return function


def _reciprocal(name: str, limit: float) -> Callable[..., Number]:
    plain = _plain(name, limit)
    return lambda arithmetic, value: arithmetic.combine(Fraction(1), plain(arithmetic, value), "/")


def _inverse_reciprocal(name: str) -> Callable[..., Number]:
    plain = _plain(name, 1e30)
    return lambda arithmetic, value: plain(arithmetic, arithmetic.combine(Fraction(1), value, "/"))


def _sign(arithmetic: Arithmetic, value: Number) -> Number:
    if isinstance(value, arithmetic.mp.mpc):
        raise Undefined("the sign of a complex number")
    return Fraction((value > 0) - (value < 0))


_ANGLE, _GROWTH, _ANY = 1e30, 5_000, 1e300
FUNCTIONS: dict[str, Callable[..., Number]] = {
    **{name: _plain(name, _ANGLE) for name in ("sin", "cos", "tan")},
    **{name: _plain(name, _GROWTH) for name in ("sinh", "cosh", "tanh", "exp")},
    **{name: _plain(name, _ANY) for name in ("asin", "acos", "atan", "asinh", "acosh", "atanh", "erf")},
    "zeta": _zeta,
    "erf": _plain("erf", 10, cost=100),
    **{name: _reciprocal(of, _ANGLE) for name, of in (("sec", "cos"), ("csc", "sin"), ("cot", "tan"))},
    **{name: _reciprocal(of, _GROWTH) for name, of in (("sech", "cosh"), ("csch", "sinh"), ("coth", "tanh"))},
    **{f"a{name}": _inverse_reciprocal(f"a{of}") for name, of in (("cot", "tan"), ("sec", "cos"))},
    **{f"a{name}": _inverse_reciprocal(f"a{of}") for name, of in (("csc", "sin"), ("coth", "tanh"))},
    **dict.fromkeys(("ln", "log"), _logarithm),
    "lg": lambda arithmetic, value: _logarithm(arithmetic, value, Fraction(10)),
    "root": root,
    "cis": lambda arithmetic, angle: arithmetic.checked(arithmetic.mp.expj(arithmetic.real(angle))),
    "abs": _absolute,
    "gamma": _gamma,
    "binom": _binomial,
    "perm": _whole(math.perm, 20_000, "a choice"),
    "double factorial": _whole(lambda n: math.prod(range(n, 0, -2)), MAX_FACTORIAL, "a factorial"),
    "mod": _whole(operator.mod, math.inf, "a remainder"),
    "floor": _rounded(up=False),
    "ceil": _rounded(up=True),
    "max": _extreme(max),
    "min": _extreme(min),
    "gcd": _divisor(least=False),
    "lcm": _divisor(least=True),
    "sgn": _sign,
    "Re": lambda arithmetic, value: arithmetic.mp.re(arithmetic.real(value)),
    "Im": lambda arithmetic, value: arithmetic.mp.im(arithmetic.real(value)),
    "arg": lambda arithmetic, value: arithmetic.mp.arg(arithmetic.real(value)),
    "conj": lambda arithmetic, value: arithmetic.mp.conj(arithmetic.real(value)),
}
