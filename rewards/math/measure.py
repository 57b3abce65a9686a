"""Values with units: what is left to compare once the units are settled, and measures in two units."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from fractions import Fraction

from rewards.math.constructs import raw_argument
from rewards.math.cursor import Grammar
from rewards.math.options import MathOptions
from rewards.math.probe import same_value
from rewards.math.tree import Node, Shape, Unparsable
from rewards.math.units import Unit, parse_unit, units_agree


def without_units(gold: Shape, prediction: Shape, options: MathOptions) -> tuple[Shape, Shape] | None:
    """The values to compare, in one unit; None where the units rule it out. One side is a measure."""
    gold_inner, gold_unit = (gold[1], gold[2]) if gold[0] == "measure" else (gold, None)
    inner, unit = (prediction[1], prediction[2]) if prediction[0] == "measure" else (prediction, None)
    if gold_unit is not None and unit is None:
        inner, unit = _with_letter_unit(inner, gold_unit)
    elif unit is not None and gold_unit is None:
        gold_inner, gold_unit = _with_letter_unit(gold_inner, unit)
    for written, other in ((unit, gold_unit), (gold_unit, unit)):
        if written is not None and written.is_claim and (other is None or other.words != written.words):
            return None
    if options.units != "ignore" and (_is_odd(gold, unit) or _is_odd(prediction, gold_unit)):
        return None
    if options.units != "ignore" and gold_unit and unit:
        if {gold_unit.dimensions, unit.dimensions} == _TEMPERATURES:
            return _in_fahrenheit(gold_inner, gold_unit), _in_fahrenheit(inner, unit)
        if not units_agree(gold_unit, unit):
            return None
        if gold_unit.dimensions != unit.dimensions:
            return gold_inner, inner
        return _scaled(gold_inner, gold_unit.factor), _scaled(inner, unit.factor)
    if options.units == "strict" and (gold_unit or unit):
        return None
    return gold_inner, inner


_TEMPERATURES = {(("°C", 1),), (("°F", 1),)}


def _in_fahrenheit(item: Shape, unit: Unit) -> Shape:
    if item[0] != "scalar" or unit.dimensions == (("°F", 1),):
        return item
    return ("scalar", ("add", (("mul", (("num", Fraction(9, 5)), item[1])), ("num", Fraction(32)))))


def _is_odd(item: Shape, unit: Unit | None) -> bool:
    """25% beside 25 dollars, 25 degrees beside 25 cm or 25 degrees Celsius: a mark is a unit, too."""
    is_marked = item[0] == "scalar" and item[1][0] in ("percent", "deg")
    dimensions = (unit.dimensions if unit else None) or ()
    is_rate = all(exponent < 0 for _, exponent in dimensions)  # 8% per year
    return is_marked and not is_rate and dimensions != (("rad", 1),)


def _scaled(item: Shape, factor: Fraction) -> Shape:
    return ("scalar", ("mul", (item[1], ("num", factor)))) if item[0] == "scalar" and factor != 1 else item


def _with_letter_unit(inner: Shape, other: Unit) -> tuple[Shape, Unit | None]:
    """5m, where 5 m is expected, has a unit and no variable; so has 5 kg m / s."""
    found = measure_of_letters(inner)
    return (found[1], found[2]) if found and found[2].dimensions == other.dimensions else (inner, None)


def measure_of_letters(item: Shape) -> Shape | None:
    """2000 L as a measure, where a formula in L makes no sense."""
    values, letters = _letters_behind(item[1]) if item[0] == "scalar" else ((), "")
    unit = parse_unit(letters)
    value = values[0] if len(values) == 1 else ("mul", values)
    return ("measure", ("scalar", value), unit) if values and letters and unit.dimensions else None


def _letters_behind(node: Node) -> tuple[tuple[Node, ...], str]:
    """The factors of a value and the letters behind them, as text: (5,), "m / s"."""
    match node:
        case ("sym", name):
            return (), {"Omega": "Ω", "mu": "µ"}.get(str(name), str(name))
        case ("pow", ("sym", name), ("num", exponent)):
            return (), f"{name}^{exponent}"
        case ("neg", inner):
            values, letters = _letters_behind(inner)
            return ((("neg", ("mul", values)),) if values else ()), letters
        case ("div", *sides):
            (values, above), (below_values, below) = map(_letters_behind, sides)
            if below and not below_values:
                return values, f"{above} / {below}"
        case ("mul", factors):
            found = [_letters_behind(part) for part in factors]
            if not any(before[1] and after[0] for before, after in itertools.combinations(found, 2)):
                letters = " ".join(text for _, text in found if text).replace("µ ", "µ")
                return tuple(value for values, _ in found for value in values), letters
    return (node,), ""


_NOON_MINUTES = 720


def same_time(gold: Shape, prediction: Shape) -> bool | None:
    """Whether two times of day, or a duration and one such as 1:20, agree; None where one is neither.

    A time without a.m. or p.m. may be either, unless the other one counts to 24 hours.
    """
    left, right = _clock(gold), _clock(prediction)
    if left is None or right is None:
        if left is None and right and gold[0] == "measure" and gold[2].dimensions == (("s", 1),):
            return same_value(_scaled(gold[1], gold[2].factor)[1], ("num", 60 * right[0]))
        is_fraction = left and prediction[0] == "scalar" and "ratio" in (gold[0], gold[1][0])
        return False if is_fraction else None  # 2:15 is a quarter past two
    if bool(left[1]) == bool(right[1]):
        return left == right
    marked, plain = (left, right) if left[1] else (right, left)
    minutes = marked[0] % _NOON_MINUTES + _NOON_MINUTES * (marked[1] == "pm")
    return plain[0] == minutes or (
        plain[0] < _NOON_MINUTES + 60 and (plain[0] - minutes) % _NOON_MINUTES == 0
    )


def _clock(item: Shape) -> tuple[Fraction, str] | None:
    """The minutes of a time, and "am", "pm" or "" for what it says of noon: 7 a.m., 7:05 pm, 17:05."""
    inner, unit = (item[1], item[2]) if item[0] == "measure" else (item, None)
    if unit and unit.words not in ({"am"}, {"pm"}, {"time"}):
        return None
    half = next(iter(unit.words)).replace("time", "") if unit else ""
    if inner[0] == "ratio" and len(inner[1]) == 2 and {part[0] for part in inner[1]} == {"num"}:
        hours, minutes = (part[1] for part in inner[1])
        is_time = hours <= 24 and 0 <= minutes < 60 and (unit or minutes >= 10 or minutes == 0)
        return (60 * hours + minutes, half) if is_time else None
    is_hour = half and inner[0] == "scalar" and inner[1][0] == "num" and 0 < inner[1][1] <= 12
    return (60 * inner[1][1], half) if is_hour else None


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


ENDS = frozenset((",", ";", ")", "]", "}", "\\}", "\\\\", "&"))
_VALUES = ("num", "dec")


def measured(parser: Grammar, node: Node) -> Node:
    """The value with what stands behind it."""
    parts = [_with_unit(parser, node)]
    while parts[-1][0] == "unit" and parser.kind() in _VALUES:
        parser.currency = ""
        parts.append(_with_unit(parser, parser.product()))
        if parts[-1][0] != "unit":
            raise Unparsable("a number behind a unit")
    return parts[0] if len(parts) == 1 else ("list", "and", tuple(parts))


def _with_unit(parser: Grammar, node: Node) -> Node:
    words = parser.currency
    if parser.kind() == "cur":
        words += parser.take()[2]
    if parser.kind() == "text" or (parser.kind() == "cmd" and parser.value() == "frac"):
        words += " " + _unit_text(parser)
    elif not words:
        return node
    unit = parse_unit(words.replace("\\$", "$").replace("$", " dollars "))
    node = node if unit.count == 1 else ("mul", (node, ("num", unit.count)))
    return ("unit", node, unit) if unit.words or unit.is_claim else node


def _unit_text(parser: Grammar) -> str:
    pieces: list[str] = []
    depth = 0
    while depth or not (parser.kind() in ("end", "sep", "rel") or parser.value() in ENDS):
        kind, value, raw = parser.peek()
        if kind == "end" or (kind in _VALUES and not depth and pieces and pieces[-1].endswith(" ")):
            break
        parser.take()
        if kind == "cmd" and value == "frac":
            pieces.append(f" {raw_argument(parser)} / {raw_argument(parser)} ")
            continue
        depth += {"{": 1, "}": -1}.get(value, 0)
        pieces.append({"text": f" {raw} ", "circ": "°", "*": "·"}.get("*" if value == "*" else kind, raw))
    return "".join(pieces).replace("{", "").replace("}", "")
