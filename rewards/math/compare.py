"""Gold shape x predicted shape -> whether they are one answer, under the policy of `MathOptions`."""

from __future__ import annotations

import functools
import itertools
from fractions import Fraction
from typing import Any, cast

from rewards.math.arithmetic import BUDGET
from rewards.math.conditions import (
    as_equation,
    proportion,
    residue_class,
    same_inequality,
    same_under_conditions,
)
from rewards.math.measure import same_time, without_units
from rewards.math.names import is_log_without_bars, same_renamed, same_vector
from rewards.math.options import MathOptions
from rewards.math.probe import same_value
from rewards.math.region import as_region, listed_intervals
from rewards.math.tree import Node, Shape, TooComplex, has, renamed, symbols
from rewards.math.value import Evaluator

Items = tuple[Shape, ...]

MAX_ITEMS = 400
MAX_PAIRS = 2_500
MAX_PIECES = 20
_TIMES = ("ratio", "measure")
_VECTORS = (("seq", "scalar"), ("scalar", "seq"), ("matrix", "scalar"), ("scalar", "matrix"))


def is_multiple(item: Shape) -> bool:
    """Whether a shape offers more than one value, which is a hedge where the gold is one."""
    match item:
        case ("named", _, inner, _) | ("measure", inner, _) | ("given", inner, _, _):
            return is_multiple(inner)
        case ("many", _, items) | ("set" | "assign", items):
            return len(items) > 1
    return item[0] in ("contradiction", "region", "setop")


def same(gold: Shape, prediction: Shape, options: MathOptions) -> bool:
    """Whether a prediction is the gold.

    Raises:
        Undefined, TooComplex, ...: the prediction, or the gold, has no value.
    """
    kinds = gold[0], prediction[0]
    if gold == prediction and gold[0] != "contradiction":
        return True
    if "given" in kinds:
        left, right = residue_class(gold), residue_class(prediction)
        is_class = gold[0] == "given" or has(gold, "residue")
        if is_class and left is not None and (right is not None or prediction[0] == "given"):
            return right is not None and _same_residue(left, right)
        return same_under_conditions(gold, prediction, functools.partial(same, options=options))
    if "contradiction" in kinds:
        last = prediction[1] if options.chains == "last" and gold[0] != "contradiction" else None
        return last is not None and same(gold, last, options)
    if prediction[0] == "equation" and prediction[2] and gold[0] == "scalar":  # m + n = 7 for 7
        return _same_number(gold[1], prediction[2], options)
    if "named" in kinds or kinds == ("equation", "equation"):
        return _same_named(gold, prediction, options)
    if gold[0] in _TIMES and (verdict := same_time(gold, prediction)) is not None:
        return verdict
    if "measure" in kinds and not (kinds == ("measure", "many") and gold[1][0] == "scalar"):
        values = without_units(gold, prediction, options)
        return values is not None and same(*values, options)
    if "assign" in kinds:
        return _same_assigned(gold, prediction, options)
    if "region" in kinds:
        left, right = as_region(gold), as_region(prediction)
        left = listed_intervals(gold, may_be_points=False) if left is None else left
        right = listed_intervals(prediction, may_be_points=True) if right is None else right
        return left is not None and left == right and (options.loose_shapes or kinds == ("region", "region"))
    if kinds in _VECTORS:
        return same_vector(gold, prediction, functools.partial(same, options=options))
    if "many" in kinds or "set" in kinds:
        return _same_items(gold, prediction, options)
    if "matrix" in kinds:
        return _same_matrix(gold, prediction, options)
    if "ratio" in kinds:
        return _same_ratio(gold, prediction, options)
    if "residue" in kinds:
        return _same_residue(gold, prediction)
    if gold[0] != prediction[0]:
        return False
    return _same_kind(gold, prediction, options)


def _same_kind(gold: Shape, prediction: Shape, options: MathOptions) -> bool:
    match gold, prediction:
        case ("scalar", left), (_, right):
            again = functools.partial(same, options=options)
            return _same_number(left, right, options) or same_renamed(gold, prediction, again)
        case ("seq", _, _, left), (_, _, _, right):
            return _brackets_agree(gold, prediction) and _same_each(left, right, options)
        case ("base", digits, base), (_, other_digits, other_base):
            return base == other_base and digits.lstrip("0") == other_digits.lstrip("0")
        case ("pieces", left), (_, right):
            return _same_pieces(left, right, options)
        case ("inequality", *_), _:
            return same_inequality(gold, prediction)
        case ("setop", op, a, b), (_, other_op, c, d):
            if op != other_op:
                return False
            straight = same(a, c, options) and same(b, d, options)
            crossed = op != "minus" and same(a, d, options)
            return straight or (crossed and same(b, c, options))
    return gold == prediction


def _brackets_agree(gold: Shape, prediction: Shape) -> bool:
    """An interval's brackets mean something; a tuple's do not."""
    if len(gold[3]) != 2 or "<<" in (gold[1], prediction[1]):
        return True
    return gold[1:3] == prediction[1:3]


def _same_number(gold: Node, prediction: Node, options: MathOptions) -> bool:
    """Where one of two numbers has a mark, they may be equal with it or, where it is free, without it."""
    for mark, policy in (("percent", options.percent), ("deg", options.degrees)):
        left, right = _marked(gold, mark), _marked(prediction, mark)
        if (left is None) != (right is None):
            is_same = policy != "sign" and _close(gold, prediction, options)
            return is_same or (policy == "either" and _close(left or gold, right or prediction, options))
    return _close(gold, prediction, options)


def _marked(node: Node, mark: str) -> Node | None:
    """What stands before a percent or degree sign."""
    if node[0] == mark:
        return cast("tuple[str, Node]", node)[1]  # `mark` is "percent" or "deg"
    if node[0] == "neg" and (inner := _marked(node[1], mark)) is not None:
        return ("neg", inner)
    return None


def _close(gold: Node, prediction: Node, options: MathOptions) -> bool:
    if same_value(gold, prediction):
        return not is_log_without_bars(gold, prediction)
    is_decimal = has(gold, "dec") or has(prediction, "dec")
    if options.decimal_rtol <= 0 or not is_decimal or symbols(gold) or symbols(prediction):
        return False
    evaluator = Evaluator(0, [BUDGET])
    a, b = evaluator.value(gold), evaluator.value(prediction)
    if not (isinstance(a, Fraction) and isinstance(b, Fraction)):
        a, b = evaluator.arithmetic.real(a), evaluator.arithmetic.real(b)
        return bool(abs(a - b) <= options.decimal_rtol * max(abs(a), abs(b)))
    return abs(a - b) <= Fraction(options.decimal_rtol) * max(abs(a), abs(b))


# Several values --------------------------------------------------------------------------------------


def _same_items(gold: Shape, prediction: Shape, options: MathOptions) -> bool:
    if gold[0] not in ("many", "set") or prediction[0] not in ("many", "set"):
        return options.loose_shapes and _same_across(gold, prediction, options)
    left, right = gold[-1], prediction[-1]
    if max(len(left), len(right)) > MAX_ITEMS:
        raise TooComplex(f"more than {MAX_ITEMS} items")
    if _same_each(left, right, options):
        return True
    if options.ordered_lists and gold[0] == prediction[0] == "many" and "pm" not in (gold[1], prediction[1]):
        return False
    if ("dots",) in left or ("dots",) in right:
        return False
    return _same_unordered(left, right, options, is_set="set" in (gold[0], prediction[0]))


def _same_each(left: Items, right: Items, options: MathOptions) -> bool:
    return len(left) == len(right) and all(same(a, b, options) for a, b in zip(left, right, strict=True))


def _same_unordered(left: Items, right: Items, options: MathOptions, *, is_set: bool) -> bool:
    """Each item has its like on the other side; what the gold repeats must be repeated."""
    plain = [
        [item[1][1] for item in items if item[0] == "scalar" and item[1][0] == "num"]
        for items in (left, right)
    ]
    if len(plain[0]) == len(left) and len(plain[1]) == len(right):
        return set(plain[0]) == set(plain[1]) and (
            is_set or len(set(plain[0])) == len(left) or sorted(plain[0]) == sorted(plain[1])
        )
    if len(left) * len(right) > MAX_PAIRS:
        raise TooComplex(f"more than {MAX_PAIRS} pairs of items to compare")
    covered: set[int] = set()
    for item in right:
        found = [index for index, other in enumerate(left) if same(other, item, options)]
        if not found:
            return False
        fresh = next((index for index in found if index not in covered), found[0])
        covered.update(found if is_set else (fresh,))
    return len(covered) == len(left)


def _same_across(gold: Shape, prediction: Shape, options: MathOptions) -> bool:
    """A list against a tuple with the same order, or a single item against a value."""
    kinds = gold[0], prediction[0]
    if kinds in (("many", "seq"), ("seq", "many")):
        listed, tupled = (gold, prediction) if gold[0] == "many" else (prediction, gold)
        is_tuple = listed[1] not in ("pm", "or") and tupled[1:3] == ("(", ")")
        if is_tuple and len(listed[2]) == len(tupled[3]):
            return _same_each(gold[-1], prediction[-1], options)
    one, other = (gold, prediction) if gold[0] in ("many", "set") else (prediction, gold)
    if one is gold:
        return len(one[-1]) == 1 and same(one[-1][0], other, options)
    return 0 < len(one[-1]) <= 8 and all(same(other, item, options) for item in one[-1])  # 7 and 7


def _same_assigned(gold: Shape, prediction: Shape, options: MathOptions) -> bool:
    if gold[0] == prediction[0]:
        left, right = dict(gold[1]), dict(prediction[1])
        return left.keys() == right.keys() and all(same(left[name], right[name], options) for name in left)
    assigned, other = (gold, prediction) if gold[0] == "assign" else (prediction, gold)
    if other[0] not in ("seq", "many") or (other[0] == "many" and other[1] in ("pm", "or")):
        return False
    pairs = list(assigned[1])
    if assigned is prediction and all(len(name) == 1 for name, _ in pairs):
        pairs.sort(key=lambda pair: pair[0])  # y = 2, x = 1 is the point (1, 2)
    values = tuple(value for _, value in pairs)
    if len(values) != len(other[-1]) or not options.loose_shapes:
        return False
    left, right = (values, other[-1]) if assigned is gold else (other[-1], values)
    if _same_each(left, right, options):
        return True
    numbered = all("_" in name for name, _ in pairs) and len({name.split("_")[0] for name, _ in pairs}) == 1
    return numbered and other[0] == "many" and _same_unordered(left, right, options, is_set=False)


def _same_matrix(gold: Shape, prediction: Shape, options: MathOptions) -> bool:
    if gold[0] == prediction[0]:
        left, right = gold[1], prediction[1]
        if len(left) != len(right) or len(left[0]) != len(right[0]):
            return False
        pairs = zip(itertools.chain(*left), itertools.chain(*right), strict=True)
        return all(_same_number(a, b, options) for a, b in pairs)
    matrix, other = (gold, prediction) if gold[0] == "matrix" else (prediction, gold)
    if not options.loose_shapes or other[0] != "seq" or 1 not in (len(matrix[1]), len(matrix[1][0])):
        return False
    vector = tuple(("scalar", entry) for row in matrix[1] for entry in row)
    left, right = (vector, other[3]) if matrix is gold else (other[3], vector)
    return _same_each(left, right, options)


def _same_ratio(gold: Shape, prediction: Shape, options: MathOptions) -> bool:
    if gold[0] != prediction[0]:
        ratio, other = (gold, prediction) if gold[0] == "ratio" else (prediction, gold)
        if not options.loose_shapes or other[0] != "scalar" or len(ratio[1]) != 2 or ("dots",) in ratio[1]:
            return False
        quotient = ("div", *ratio[1])
        sides = (quotient, other[1]) if ratio is gold else (other[1], quotient)
        return _same_number(*sides, options)
    left, right = gold[1], prediction[1]
    if [part == ("dots",) for part in left] != [part == ("dots",) for part in right]:
        return False
    pairs = [(a, b) for a, b in zip(left, right, strict=True) if a != ("dots",)]
    if all(same_value(a, b) for a, b in pairs):
        return True
    if ("dots",) in left:
        return False
    first, second = pairs[0]
    return all(same_value(("mul", (a, second)), ("mul", (b, first))) for a, b in pairs[1:])


def _same_residue(gold: Shape, prediction: Shape) -> bool:
    """3 (mod 7) is 10 (mod 7), 7k + 3, and 3."""
    residue, other = (gold, prediction) if gold[0] == "residue" else (prediction, gold)
    _, left, modulus = residue
    remainder = ("fn", "mod", (left, modulus))
    if other[0] != "residue" and (found := residue_class(other)) is not None:
        other = found
    if other[0] == "residue":
        return same_value(modulus, other[2]) and same_value(remainder, ("fn", "mod", (other[1], modulus)))
    if other[0] != "scalar":
        return False
    return same_value(remainder, other[1]) or (residue is gold and same_value(left, other[1]))


def _same_pieces(left: tuple[Any, ...], right: tuple[Any, ...], options: MathOptions) -> bool:
    """The same values under the same conditions, in any order."""
    if len(left) != len(right) or len(left) > MAX_PIECES:
        return False
    pairs = [[same(a, b, options) and same(c, d, options) for b, d in right] for a, c in left]
    return all(map(any, pairs)) and all(map(any, zip(*pairs, strict=True)))


# Equations -------------------------------------------------------------------------------------------


def _same_named(gold: Shape, prediction: Shape, options: MathOptions) -> bool:
    """x = 5 against x = 5, 5, x - 5 = 0.

    Two different variables are different answers; a function may be renamed.
    """
    for one, other in ((gold, prediction), (prediction, gold)):
        if one[0] == "named" and one[2][0] == other[0] == "many" and other[2][0][0] == "equation":
            spread = ("many", "or", tuple(("named", one[1], item, one[3]) for item in one[2][2]))
            return same(spread, other, options) if one is gold else same(other, spread, options)
    if gold[0] == "named" and prediction[0] == "named":
        if gold[1].isupper() and prediction[1].islower() and prediction[2][0] == "region":
            return same(gold[2], prediction[2], options)  # D = [2, 7] is 2 <= x <= 7
        is_function = gold[1].endswith("()") or prediction[1].endswith("()")
        if gold[1] == prediction[1] or is_function or "" in (gold[1], prediction[1]):
            inner = prediction[2]
            if gold[3] and len(gold[3]) == len(prediction[3]):
                inner = renamed(inner, dict(zip(prediction[3], gold[3], strict=True)))
            if same(gold[2], inner, options):
                return True
    elif gold[0] == "named" and prediction[0] != "equation":
        return same(gold[2], prediction, options)
    elif gold[0] not in ("named", "equation"):
        return same(gold, prediction[2], options)
    left, right = as_equation(gold), as_equation(prediction)
    return left is not None and right is not None and proportion(left, right) is not None
