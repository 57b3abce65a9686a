"""Sets of reals as sorted, disjoint intervals, with unions, complements, solutions of linear inequalities."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

from rewards.math import tree
from rewards.math.probe import constant
from rewards.math.tree import Endpoint, Interval, Node, Region, Shape, Unparsable, Unsupported, symbols

_MANTISSA_BITS = 140
REALS: Region = (Interval(-math.inf, False, math.inf, False),)
DOMAINS: dict[str, Region] = {"R": REALS, "R+": (Interval(Fraction(0), False, math.inf, False),)}


def endpoint(node: Node) -> Endpoint:
    """The real number of a tree without variables (rounded to 140 bits unless rational), or an infinity.

    Raises:
        Unsupported: it has variables, or is not real.
    """
    if sign := infinity(node):
        return sign * math.inf
    if symbols(node):
        raise Unsupported("an interval with variables")
    value = constant(node)
    if isinstance(value, Fraction):
        return value
    if hasattr(value, "_mpc_"):
        raise Unsupported("a complex end of an interval")
    sign, mantissa, exponent, bits = value._mpf_
    if bits > _MANTISSA_BITS:
        shift = bits - _MANTISSA_BITS
        mantissa, exponent = (int(mantissa) + (1 << (shift - 1))) >> shift, exponent + shift
    return Fraction(-int(mantissa) if sign else int(mantissa)) * Fraction(2) ** exponent


def infinity(node: Node) -> int:
    """1 or -1 for plus or minus infinity, else 0."""
    if node == ("const", "inf"):
        return 1
    return -infinity(node[1]) if node[0] == "neg" else 0


def interval(low: Endpoint, has_low: bool, high: Endpoint, has_high: bool) -> Region:
    """One interval; empty if its ends are the wrong way round."""
    if low > high or (low == high and not (has_low and has_high)):
        return ()
    return (Interval(low, has_low and low != -math.inf, high, has_high and high != math.inf),)


def union(*regions: Region) -> Region:
    parts = sorted(itertools.chain(*regions), key=lambda part: (part.low, not part.has_low))
    merged: list[Interval] = []
    for part in parts:
        last = merged[-1] if merged else None
        if last is None or (part.low, not part.has_low) > (last.high, last.has_high):
            merged.append(part)
        else:
            high, has_high = max((last.high, last.has_high), (part.high, part.has_high))
            merged[-1] = Interval(last.low, last.has_low, high, has_high)
    return tuple(merged)


def complement(region: Region) -> Region:
    gaps: list[Interval] = []
    low: Endpoint = -math.inf
    has_low = False
    for part in region:
        gaps.extend(interval(low, has_low, part.low, not part.has_low and part.low != -math.inf))
        low, has_low = part.high, not part.has_high
    if low != math.inf:
        gaps.extend(interval(low, has_low, math.inf, False))
    return tuple(gaps)


def is_finite(region: Region) -> bool:
    """Whether a set consists of single points."""
    return all(part.low == part.high for part in region)


def intersection(left: Region, right: Region) -> Region:
    return complement(union(complement(left), complement(right)))


def solve(ops: tuple[str, ...], sides: tuple[Node, ...]) -> tuple[str, Region]:
    """The variable and the solutions of a chain such as -2 < 3 - x <= 5 that is linear in x, |x| or f(x).

    Raises:
        Unsupported: it is not such a chain.
    """
    unknown: Node | None = None
    region = REALS
    for op, left, right in zip(ops, sides, sides[1:], strict=False):
        if infinity(left) or infinity(right):
            found, part = linear(right if infinity(left) else left)[2], REALS  # x < infinity says nothing
            if op not in ("<", ">", "<=", ">=") or found is None or unknown not in (None, found):
                raise Unsupported("not an inequality in one variable")
            unknown = found
        else:
            (a, b, found), (c, d, other) = linear(left), linear(right)
            names = [each for each in (found, other, unknown) if each is not None]
            if not names or any(each != names[0] for each in names) or a == c:
                raise Unsupported("not an inequality in one variable")
            unknown, part = names[0], _half_line(op, a - c, (d - b) / (a - c))
        region = intersection(region, part)
    if unknown is None:
        raise Unsupported("an inequality without a variable")
    match unknown:
        case ("fn", _, (("sym", name), *_)):  # |x|
            return name, _unfold(region)
        case ("fn", _, (inner, *_)):
            return repr(inner), _unfold(region)
        case ("sym", name):
            return name, region
    return "", region  # f(x)


def _half_line(op: str, slope: Fraction, bound: Fraction) -> Region:
    if op in ("=", "==", "!="):
        point = interval(bound, True, bound, True)
        return complement(point) if op == "!=" else point
    if op not in ("<", ">", "<=", ">="):
        raise Unsupported(f"the relation {op}")
    if slope < 0:
        op = {"<": ">", ">": "<", "<=": ">=", ">=": "<="}[op]
    closed = op.endswith("=")
    if op[0] == "<":
        return interval(-math.inf, False, bound, closed)
    return interval(bound, closed, math.inf, False)


def _unfold(region: Region) -> Region:
    """The x whose |x| lies in a region."""
    positive = intersection(region, interval(Fraction(0), True, math.inf, False))
    mirrored = tuple(Interval(-p.high, p.has_high, -p.low, p.has_low) for p in reversed(positive))
    return union(mirrored, positive)


def linear(node: Node) -> tuple[Fraction, Fraction, Node | None]:
    """(a, b, u) with node = a u + b, where u is x, |x| or f(x), or None for a constant.

    Raises:
        Unsupported: it is not linear in one unknown.
    """
    if node[0] == "sym":
        return Fraction(1), Fraction(0), node
    names = [part for part in tree.parts(node) if part[0] in ("call", "sym") or part[:2] == ("fn", "abs")]
    outer = [part for part in names if (part[0] == "fn" or part[0] == "call") and part[2][0][0] == "sym"]
    unknown = (outer or names or [None])[0]
    try:
        at = [tree.replaced(node, unknown, ("num", x)) for x in _LINE_POINTS] if unknown else [node]
        values = [Fraction(endpoint(each)) for each in at]
    except (tree.Undefined, OverflowError):
        raise Unsupported("not linear") from None
    slope = values[1] - values[0] if unknown else Fraction(0)
    plain = slope.limit_denominator(10**6)  # 1, though the values were rounded
    slope = plain if abs(slope - plain) < Fraction(1, 2**100) else slope
    for point, value in zip(_LINE_POINTS, values, strict=False):
        if abs(value - values[0] - slope * point) > (abs(value) + abs(slope)) * Fraction(1, 2**100):
            raise Unsupported("not linear")
    return slope, values[0], unknown


_LINE_POINTS = (Fraction(0), Fraction(1), Fraction(22, 7), Fraction(-37, 5))


def as_region(item: Shape) -> Region | None:
    """The set of reals of a shape that is an interval, a finite set or a union; None for others."""
    try:
        return _as_region(item)
    except tree.MathError:
        return None


def listed_intervals(item: Shape, *, may_be_points: bool) -> Region | None:
    """The union of (-1, 2), (3, 5). They are surely intervals if one is closed or infinite."""
    if item[0] != "many" or item[1] == "pm" or any(part[0] not in ("seq", "region") for part in item[2]):
        return None
    sure = any(map(_is_interval, item[2]))
    return as_region(("many", "or", item[2])) if sure or may_be_points else None


def _is_interval(item: Shape) -> bool:
    match item:
        case ("seq", opening, closing, ends):
            return opening == "[" or closing == "]" or any(end[0] == "infinity" for end in ends)
    return item[0] == "region"


def _as_region(item: Shape) -> Region | None:
    match item:
        case ("region", region):
            return region
        case ("named", _, inner, _):
            return _as_region(inner)
        case ("seq", "(" | "[" as opening, ")" | "]" as closing, (left, right)):
            low, high = _end(left), _end(right)
            return interval(low, opening == "[", high, closing == "]") if low < high else None
        case ("set", items):
            points = [_end(end) for end in items]
            return union(*(interval(point, True, point, True) for point in points))
        case ("many", "or", items):
            parts = [_as_region(part) for part in items]
            return None if None in parts else union(*filter(None, parts))
    return None


def _end(item: Shape) -> Endpoint:
    return item[1] * float("inf") if item[0] == "infinity" else endpoint(scalar(item))


def scalar(item: Shape) -> Node:
    """The tree of a shape that is one value."""
    if item[0] != "scalar":
        raise Unparsable(f"a {item[0]} where a number should be")
    return item[1]
