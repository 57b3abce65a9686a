"""Values with units: the values to compare once units agree, times of day, and measures in two units."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from fractions import Fraction

from rewards.math.constructs import raw_argument
from rewards.math.cursor import Grammar
from rewards.math.options import MathOptions
from rewards.math.probe import same_value
from rewards.math.region import scalar
from rewards.math.tree import Measure, Node, Nodes, Shape, Unparsable
from rewards.math.units import Unit, parse_unit, units_agree


def without_units(gold: Shape, prediction: Shape, options: MathOptions) -> tuple[Shape, Shape] | None:
    """The values to compare, in the same unit; None if the units differ. At least one side is a measure."""
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
    written = gold_unit or unit
    if written and written.dimensions == (("rad", 1),):  # in a product, the sign of 45° counts
        return _scaled(gold_inner, Fraction(2)), _scaled(inner, Fraction(2))
    return gold_inner, inner


_TEMPERATURES = {(("°C", 1),), (("°F", 1),)}


def _in_fahrenheit(item: Shape, unit: Unit) -> Shape:
    if item[0] != "scalar" or unit.dimensions == (("°F", 1),):
        return item
    return ("scalar", ("add", (("mul", (("num", Fraction(9, 5)), item[1])), ("num", Fraction(32)))))


def _is_odd(item: Shape, unit: Unit | None) -> bool:
    """Whether a marked number meets another unit: 25% and 25 dollars, 25 degrees and 25 cm or 25 °C."""
    if item[0] != "scalar" or item[1][0] not in ("percent", "deg"):
        return False
    if unit is not None and unit.dimensions is None:
        return item[1][0] == "percent"  # 15% and 15 students
    dimensions = unit.dimensions if unit and unit.dimensions else ()
    is_rate = all(exponent < 0 for _, exponent in dimensions)  # 8% per year
    return not is_rate and dimensions != (("rad", 1),)


def _scaled(item: Shape, factor: Fraction) -> Shape:
    return ("scalar", ("mul", (item[1], ("num", factor)))) if item[0] == "scalar" and factor != 1 else item


def _with_letter_unit(inner: Shape, other: Unit) -> tuple[Shape, Unit | None]:
    """If a unit is expected, letters after a number are read as one: the m of 5m, 5 kg m / s."""
    found = measure_of_letters(inner)
    return (found[1], found[2]) if found and found[2].dimensions == other.dimensions else (inner, None)


def measure_of_letters(item: Shape) -> Measure | None:
    """Reads letters after a value as its unit: 2000 L as a measure instead of a formula in L."""
    values, letters = _letters_behind(item[1]) if item[0] == "scalar" else ((), "")
    unit = parse_unit(letters)
    value: Node = values[0] if len(values) == 1 else ("mul", values)
    return ("measure", ("scalar", value), unit) if values and letters and unit.dimensions else None


def _letters_behind(node: Node) -> tuple[tuple[Node, ...], str]:
    """The factors of a value and the letters after them, as text: (5,), "m / s"."""
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
    """Whether two times of day, or a duration and a time such as 1:20, agree; None if one is neither.

    A time without a.m. or p.m. may be either, unless the other time uses 24 hours.
    """
    left, right = _clock(gold), _clock(prediction)
    if left is None or right is None:
        if left is None and right and gold[0] == "measure" and gold[2].dimensions == (("s", 1),):
            return same_value(scalar(_scaled(gold[1], gold[2].factor)), ("num", 60 * right[0]))
        is_time = gold[0] == "ratio" or (gold[0] == "measure" and gold[1][0] == "ratio")
        is_fraction = left and is_time and prediction[0] == "scalar"
        return False if is_fraction else None  # 2:15 is a quarter past two
    if bool(left[1]) == bool(right[1]):
        return left == right
    marked, plain = (left, right) if left[1] else (right, left)
    minutes = marked[0] % _NOON_MINUTES + _NOON_MINUTES * (marked[1] == "pm")
    is_half = plain[0] < _NOON_MINUTES + 60 and (plain[0] - minutes) % _NOON_MINUTES == 0
    return plain[0] == minutes or is_half


def _clock(item: Shape) -> tuple[Fraction, str] | None:
    """The minutes of a time such as 7 a.m., 7:05 pm or 17:05, and its "am", "pm" or ""."""
    inner, unit = (item[1], item[2]) if item[0] == "measure" else (item, None)
    if unit and unit.words not in ({"am"}, {"pm"}, {"time"}):
        return None
    half = next(iter(unit.words)).replace("time", "") if unit else ""
    match inner:
        case ("ratio", (("num", hours), ("num", minutes))):
            is_time = hours <= 24 and 0 <= minutes < 60 and (unit or minutes >= 10 or minutes == 0)
            return (60 * hours + minutes, half) if is_time else None
        case ("scalar", ("num", hours)) if half and 0 < hours <= 12:
            return (60 * hours, half)
    return None


def compound(items: Sequence[Shape]) -> Measure | None:
    """2 hours 15 minutes as one measure; its units are known, of one dimension and decreasing."""
    found: list[tuple[Node, Unit]] = []
    for item in items:
        match item:
            case ("measure", ("scalar", value), unit):
                found.append((value, unit))
    if len(items) < 2 or len(found) < len(items):
        return None
    units = [unit for _, unit in found]
    falling = all(a.factor > b.factor for a, b in itertools.pairwise(units))
    dimensions = {unit.dimensions for unit in units}
    if not falling or len(dimensions) > 1 or not units[0].dimensions or any(unit.is_claim for unit in units):
        return None
    terms: Nodes = tuple(("mul", (value, ("num", unit.factor))) for value, unit in found)
    words = frozenset(word for unit in units for word in unit.words)
    return ("measure", ("scalar", ("add", terms)), Unit(units[0].dimensions, Fraction(1), words, False))


ENDS = frozenset((",", ";", ")", "]", "}", "\\}", "\\\\", "&"))
_VALUES = ("num", "dec")


def measured(parser: Grammar, node: Node) -> Node:
    """The value with the unit that follows it."""
    parts = [_with_unit(parser, node)]
    while parts[-1][0] == "unit" and parser.kind() in _VALUES:
        parser.currency = ""
        parts.append(_with_unit(parser, parser.product()))
        if parts[-1][0] != "unit":
            raise Unparsable("a number after a unit")
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
