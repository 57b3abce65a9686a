"""Powers, roots and named functions on exact and mpmath numbers, each with the bound that keeps it cheap."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from rewards.math.text import TooComplex, Undefined, Unsupported

if TYPE_CHECKING:
    from rewards.math.value import Evaluator, Number

MAX_POWER_BITS = 60_000
MAX_FACTORIAL = 3_000
MAX_SPECIAL_BITS = 700  # gamma and zeta take seconds to thousands of bits
NOTHING = -(10**12)  # the binary exponent of zero


def magnitude(value: Number) -> int:
    """The binary exponent of an mpmath number, within 2; `NOTHING` for zero.

    Raises:
        Undefined: an infinity or NaN.
    """
    parts = value._mpc_ if hasattr(value, "_mpc_") else (value._mpf_,)
    sizes = [exponent + bits for _, mantissa, exponent, bits in parts if mantissa]
    if any(not mantissa and exponent for _, mantissa, exponent, _ in parts):
        raise Undefined("not a finite number")
    return max(sizes) if sizes else NOTHING


def power(evaluator: Evaluator, base: Number, exponent: Number) -> Number:
    """base ** exponent.

    A negative base has its real root where the exponent's denominator is odd: (-8)^(1/3) = -2.
    """
    if isinstance(base, Fraction) and isinstance(exponent, Fraction):
        if base == 0 and exponent <= 0:
            raise Undefined("zero to a power that is not positive")
        if exponent.denominator == 1 and _power_bits(base, exponent) <= MAX_POWER_BITS:
            return evaluator.exact(base ** int(exponent))
        if 1 < exponent.denominator <= 64 and abs(exponent) < 1000:
            rooted = _exact_root(base, exponent.denominator)
            if rooted is not None and _power_bits(rooted, exponent) <= MAX_POWER_BITS:
                return evaluator.exact(rooted**exponent.numerator)
    is_odd_root = isinstance(exponent, Fraction) and exponent.denominator % 2 and exponent.denominator > 1
    if is_odd_root and not isinstance(base, evaluator.mp.mpc) and base < 0:
        size = power(evaluator, -base, exponent)
        return -size if exponent.numerator % 2 else size
    mp = evaluator.mp
    base, exponent = evaluator.real(base), evaluator.real(exponent)
    if base == 0:
        if mp.re(exponent) <= 0:
            raise Undefined("zero to a power that is not positive")
        return Fraction(0)
    bits = (abs(magnitude(base)) + 4) * abs(exponent)
    if bits > MAX_POWER_BITS:
        raise TooComplex("a power too large to compute")
    evaluator.charge(4 * evaluator.charge_unit)
    return evaluator.checked(mp.power(base, exponent))


def _power_bits(base: Fraction, exponent: Fraction) -> int:
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


def root(evaluator: Evaluator, value: Number, degree: Number) -> Number:
    if not isinstance(degree, Fraction) or degree == 0:
        raise Undefined("a root of that degree")
    return power(evaluator, value, 1 / degree)


def factorial(evaluator: Evaluator, value: Number) -> Number:
    if isinstance(value, Fraction) and value.denominator == 1:
        if value < 0:
            raise Undefined("the factorial of a negative number")
        if value > MAX_FACTORIAL:
            raise TooComplex(f"the factorial of a number above {MAX_FACTORIAL}")
        evaluator.charge(1 + float(value) / 10)
        return evaluator.exact(Fraction(math.factorial(int(value))))
    return _gamma(evaluator, evaluator.combine(value, Fraction(1), "+"))


def _gamma(evaluator: Evaluator, value: Number) -> Number:
    if isinstance(value, Fraction) and value.denominator == 1:
        return factorial(evaluator, value - 1)
    value = evaluator.real(value)
    if abs(value) > 40 or evaluator.mp.prec > MAX_SPECIAL_BITS:
        raise TooComplex("the gamma function of a large number")
    evaluator.charge(400 * evaluator.charge_unit)
    return evaluator.checked(evaluator.mp.gamma(value))


def _binomial(evaluator: Evaluator, n: Number, k: Number) -> Number:
    if all(isinstance(number, Fraction) and number.denominator == 1 for number in (n, k)):
        return _whole(math.comb, 20_000, "a choice")(evaluator, n, k)
    one = Fraction(1)
    top = _gamma(evaluator, evaluator.combine(n, one, "+"))
    left = _gamma(evaluator, evaluator.combine(k, one, "+"))
    right = _gamma(evaluator, evaluator.combine(evaluator.combine(n, -k, "+"), one, "+"))
    return evaluator.combine(top, evaluator.combine(left, right, "*"), "/")


def _whole(compute: Callable[..., int], limit: float, name: str) -> Callable[..., Number]:
    """A function of whole numbers, bounded."""

    def function(evaluator: Evaluator, *values: Number) -> Number:
        if any(not isinstance(value, Fraction) or value.denominator != 1 for value in values):
            raise Unsupported(f"{name} of a number that is not whole")
        if min(values) < 0 and compute is not operator.mod:
            raise Undefined(f"{name} of negative numbers")
        if max(values) > limit:
            raise TooComplex(f"{name} of large numbers")
        evaluator.charge(1 + float(max(values)) / 10 if limit < math.inf else 1)
        return evaluator.exact(Fraction(compute(*map(int, values))))

    return function


def _plain(name: str, limit: float, cost: float = 8) -> Callable[..., Number]:
    """An mpmath function of one argument whose size stays within `limit`.

    Trigonometric functions round to zero, and are undefined, where the working precision cannot tell:
    sin(pi), tan(pi/2).
    """
    periodic = name in ("sin", "cos", "tan", "asin", "acos", "atan")

    def function(evaluator: Evaluator, value: Number) -> Number:
        value = evaluator.real(value)
        if abs(value) > limit:
            raise TooComplex(f"{name} of a large number")
        evaluator.charge(cost * evaluator.charge_unit)
        result = getattr(evaluator.mp, name)(value)
        if periodic and result != 0 and abs(magnitude(result)) > evaluator.mp.prec - 30:
            if magnitude(result) > 0:
                raise Undefined(f"{name} there")
            if magnitude(value) > -40:
                return Fraction(0)
        return evaluator.checked(result)

    return function


def _zeta(evaluator: Evaluator, value: Number) -> Number:
    if not isinstance(value, Fraction) or value.denominator != 1 or not 2 <= value <= 40:
        raise Unsupported("the zeta function there")
    if evaluator.mp.prec > MAX_SPECIAL_BITS:
        raise TooComplex("the zeta function to many digits")
    evaluator.charge(1500 * evaluator.charge_unit)
    return evaluator.checked(evaluator.mp.zeta(int(value)))


def _logarithm(evaluator: Evaluator, value: Number, base: Number | None = None) -> Number:
    if value == 0:
        raise Undefined("the logarithm of zero")
    whole = isinstance(base, Fraction) and base.denominator == 1 < base
    if isinstance(value, Fraction) and isinstance(base, Fraction) and whole and value > 0:
        number, sign = (value.numerator, 1) if value.denominator == 1 else (value.denominator, -1)
        number = 1 if min(value.numerator, value.denominator) > 1 else number
        exponent = round(math.log(number) / math.log(base))
        if exponent and _power_bits(base, Fraction(exponent)) < MAX_POWER_BITS and base**exponent == number:
            return Fraction(sign * exponent)
    if value == 1:
        return Fraction(0)
    evaluator.charge(8 * evaluator.charge_unit)
    natural = evaluator.mp.log(evaluator.real(value))
    if natural == 0 or magnitude(natural) < 30 - evaluator.mp.prec:
        return Fraction(0)
    natural = evaluator.checked(natural)
    return natural if base is None else evaluator.combine(natural, _logarithm(evaluator, base), "/")


def _absolute(evaluator: Evaluator, value: Number) -> Number:
    if not isinstance(value, evaluator.mp.mpc):
        return abs(value)
    square = evaluator.mp.re(value) ** 2 + evaluator.mp.im(value) ** 2
    return evaluator.checked(evaluator.mp.sqrt(square))


def _rounded(up: bool) -> Callable[..., Number]:
    def function(evaluator: Evaluator, value: Number) -> Number:
        if isinstance(value, Fraction):
            return Fraction(math.ceil(value) if up else math.floor(value))
        mp = evaluator.mp
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
    def function(evaluator: Evaluator, *values: Number) -> Number:
        if not values or any(isinstance(value, evaluator.mp.mpc) for value in values):
            raise Undefined("the extreme of these")
        return choose(values, key=evaluator.real)

    return function


def _divisor(least: bool) -> Callable[..., Number]:
    """gcd and lcm of rationals: gcd(a/b, c/d) = gcd(ad, cb) / bd."""

    def function(evaluator: Evaluator, *values: Number) -> Number:
        if not values or not all(isinstance(value, Fraction) for value in values):
            raise Unsupported("a divisor of irrational numbers", evaluates=True)
        result = abs(values[0])
        for value in values[1:]:
            common = Fraction(
                math.gcd(result.numerator * value.denominator, value.numerator * result.denominator),
                result.denominator * value.denominator,
            )
            result = (abs(result * value) / common if common else Fraction(0)) if least else common
        return evaluator.exact(result)

    return function


def _reciprocal(name: str, limit: float) -> Callable[..., Number]:
    plain = _plain(name, limit)
    return lambda evaluator, value: evaluator.combine(Fraction(1), plain(evaluator, value), "/")


def _inverse_reciprocal(name: str) -> Callable[..., Number]:
    plain = _plain(name, 1e30)
    return lambda evaluator, value: plain(evaluator, evaluator.combine(Fraction(1), value, "/"))


def _sign(evaluator: Evaluator, value: Number) -> Number:
    if isinstance(value, evaluator.mp.mpc):
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
    "lg": lambda evaluator, value: _logarithm(evaluator, value, Fraction(10)),
    "root": root,
    "cis": lambda evaluator, angle: evaluator.checked(evaluator.mp.expj(evaluator.real(angle))),
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
    "Re": lambda evaluator, value: evaluator.mp.re(evaluator.real(value)),
    "Im": lambda evaluator, value: evaluator.mp.im(evaluator.real(value)),
    "arg": lambda evaluator, value: evaluator.mp.arg(evaluator.real(value)),
    "conj": lambda evaluator, value: evaluator.mp.conj(evaluator.real(value)),
}
