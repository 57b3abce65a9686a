"""Values with units: what is left to compare once the units are settled, and measures in two units."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from fractions import Fraction

from rewards.math_options import MathOptions
from rewards.math_text import Node, Shape
from rewards.math_units import Unit, parse_unit, units_agree


def without_units(gold: Shape, prediction: Shape, options: MathOptions) -> tuple[Shape, Shape] | None:
    """The values to compare, in one unit; None where the units rule it out. One side is a measure."""
    gold_inner, gold_unit = (gold[1], gold[2]) if gold[0] == "measure" else (gold, None)
    inner, unit = (prediction[1], prediction[2]) if prediction[0] == "measure" else (prediction, None)
    if gold_unit is not None and unit is None:
        inner, unit = _with_letter_unit(inner, gold_unit)
    for written, other in ((unit, gold_unit), (gold_unit, unit)):
        if written is not None and written.is_claim and (other is None or other.words != written.words):
            return None
    if options.units != "ignore" and (_is_odd(gold, unit) or _is_odd(prediction, gold_unit)):
        return None
    if gold_inner[0] == inner[0] == "ratio":
        gold_inner, inner = _on_one_clock(gold_inner, gold_unit, inner, unit)
    if options.units != "ignore" and gold_unit and unit:
        if not units_agree(gold_unit, unit):
            return None
        if gold_unit.dimensions != unit.dimensions:
            return gold_inner, inner
        return _scaled(gold_inner, gold_unit.factor), _scaled(inner, unit.factor)
    # A count such as "million" or "dozen" belongs to the value; any other single unit does not.
    counted = [each is not None and each.dimensions == () for each in (gold_unit, unit)]
    if options.units == "strict" and not all(
        each is None or count for each, count in zip((gold_unit, unit), counted, strict=True)
    ):
        return None
    left = _scaled(gold_inner, gold_unit.factor) if gold_unit and counted[0] else gold_inner
    right = _scaled(inner, unit.factor) if unit and counted[1] else inner
    return left, right


def _is_odd(item: Shape, unit: Unit | None) -> bool:
    """25% beside 25 dollars, 25 degrees beside 25 cm or 25 degrees Celsius: a mark is a unit, too."""
    is_marked = item[0] == "scalar" and item[1][0] in ("percent", "deg")
    return is_marked and unit is not None and bool(unit.dimensions) and unit.dimensions != (("rad", 1),)


def _scaled(item: Shape, factor: Fraction) -> Shape:
    return ("scalar", ("mul", (item[1], ("num", factor)))) if item[0] == "scalar" and factor != 1 else item


def _with_letter_unit(inner: Shape, gold_unit: Unit) -> tuple[Shape, Unit | None]:
    """5m, where 5 m is expected, has a unit and no variable."""
    if inner[0] != "scalar" or inner[1][0] != "mul" or inner[1][1][-1][0] != "sym":
        return inner, None
    *factors, letter = inner[1][1]
    unit = parse_unit(letter[1])
    if not unit.dimensions or unit.dimensions != gold_unit.dimensions:
        return inner, None
    return ("scalar", factors[0] if len(factors) == 1 else ("mul", tuple(factors))), unit


def _on_one_clock(
    gold: Shape, gold_unit: Unit | None, prediction: Shape, unit: Unit | None
) -> tuple[Shape, Shape]:
    """7:45 pm as 19:45, where the other side says nothing of noon."""
    if gold_unit is not None and unit is None and gold_unit.words == {"pm"} and _hours(prediction) > 12:
        return _twelve_hours_on(gold), prediction
    if unit is not None and gold_unit is None and unit.words == {"pm"} and _hours(gold) > 12:
        return gold, _twelve_hours_on(prediction)
    return gold, prediction


def _hours(clock: Shape) -> Fraction:
    hours: Node = clock[1][0]
    return hours[1] if hours[0] == "num" else Fraction(0)


def _twelve_hours_on(clock: Shape) -> Shape:
    hours = _hours(clock)
    return ("ratio", (("num", hours + 12), *clock[1][1:])) if 0 < hours < 12 else clock


def compound(items: Sequence[Shape]) -> Shape | None:
    """2 hours 15 minutes as one measure: known units of one dimension, each smaller than the one before."""
    if len(items) < 2 or any(item[0] != "measure" or item[1][0] != "scalar" for item in items):
        return None
    units: list[Unit] = [item[2] for item in items]
    falling = all(a.factor > b.factor for a, b in itertools.pairwise(units))
    dimensions = {unit.dimensions for unit in units}
    if not falling or len(dimensions) > 1 or not units[0].dimensions or any(unit.is_claim for unit in units):
        return None
    terms = tuple(("mul", (item[1][1], ("num", item[2].factor))) for item in items)
    words = frozenset(word for unit in units for word in unit.words)
    return ("measure", ("scalar", ("add", terms)), Unit(units[0].dimensions, Fraction(1), words, False))
