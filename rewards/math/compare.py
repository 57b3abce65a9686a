"""Decides whether a predicted shape is the gold shape, under the policy of `MathOptions`."""

from __future__ import annotations

import functools
import itertools
from fractions import Fraction
from typing import cast

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
from rewards.math.tree import Node, Pieces, Shape, TooComplex, has, renamed, symbols
from rewards.math.value import Evaluator

Items = tuple[Shape, ...]

MAX_ITEMS = 400
MAX_PAIRS = 2_500
MAX_PIECES = 20
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
    if gold[0] == "contradiction":
        return False
    if prediction[0] == "contradiction":
        return options.chains == "last" and same(gold, prediction[1], options)
    if prediction[0] == "equation" and prediction[2] and gold[0] == "scalar":  # m + n = 7 for 7
        return _same_number(gold[1], prediction[2], options)
    if "named" in kinds or kinds == ("equation", "equation"):
        return _same_named(gold, prediction, options)
    if (gold[0] == "ratio" or gold[0] == "measure") and (at := same_time(gold, prediction)) is not None:
        return at
    is_listed = gold[0] == "measure" and prediction[0] == "many" and gold[1][0] == "scalar"
    if "measure" in kinds and not is_listed:
        values = without_units(gold, prediction, options)
        return values is not None and same(*values, options)
    if "assign" in kinds:
        return _same_assigned(gold, prediction, options)
    if "region" in kinds:
        left, right = as_region(gold), as_region(prediction)
        left = listed_intervals(gold, may_be_points=False) if left is None else left
        right = listed_intervals(prediction, may_be_points=True) if right is None else right
        return left is not None and left == right and (options.loose_shapes or gold[0] == prediction[0])
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
        case ("scalar", left), ("scalar", right):
            again = functools.partial(same, options=options)
            return _same_number(left, right, options) or same_renamed(gold, prediction, again)
        case ("seq", *brackets, left), ("seq", *other_brackets, right):
            is_free = len(left) != 2 or "<<" in (brackets[0], other_brackets[0])
            return (is_free or brackets == other_brackets) and _same_each(left, right, options)
        case ("base", digits, base), ("base", other_digits, other_base):
            return base == other_base and digits.lstrip("0") == other_digits.lstrip("0")
        case ("pieces", left), ("pieces", right):
            return _same_pieces(left, right, options)
        case ("inequality", *_), ("inequality", *_):
            return same_inequality(gold, prediction)
        case ("setop", op, a, b), ("setop", other_op, c, d) if op == other_op:
            straight = same(a, c, options) and same(b, d, options)
            crossed = op != "minus" and same(a, d, options)
            return straight or (crossed and same(b, c, options))
    return gold == prediction


def _same_number(gold: Node, prediction: Node, options: MathOptions) -> bool:
    """Compares two numbers. If only one has a percent or degree sign, the policy decides what it means."""
    for mark, policy in (("percent", options.percent), ("deg", options.degrees)):
        left, right = _marked(gold, mark), _marked(prediction, mark)
        if (left is None) != (right is None):
            is_same = policy != "sign" and _close(gold, prediction, options)
            return is_same or (policy == "either" and _close(left or gold, right or prediction, options))
    return _close(gold, prediction, options)


def _marked(node: Node, mark: str) -> Node | None:
    """The value before a percent or degree sign; None without such a sign."""
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
    left, right = _items(gold), _items(prediction)
    if left is None or right is None:
        return options.loose_shapes and _same_across(gold, prediction, options)
    if max(len(left), len(right)) > MAX_ITEMS:
        raise TooComplex(f"more than {MAX_ITEMS} items")
    if _same_each(left, right, options):
        return True
    match gold, prediction:
        case ("many", how, _), ("many", other, _) if options.ordered_lists and "pm" not in (how, other):
            return False
    if ("dots",) in left or ("dots",) in right:
        return False
    return _same_unordered(left, right, options, is_set="set" in (gold[0], prediction[0]))


def _items(item: Shape) -> Items | None:
    return item[2] if item[0] == "many" else item[1] if item[0] == "set" else None


def _same_each(left: Items, right: Items, options: MathOptions) -> bool:
    return len(left) == len(right) and all(same(a, b, options) for a, b in zip(left, right, strict=True))


def _same_unordered(left: Items, right: Items, options: MathOptions, *, is_set: bool) -> bool:
    """Whether each item has an equal on the other side; what the gold repeats must be repeated."""
    a, b = ([x for x in side if x[0] == "scalar" and x[1][0] == "num"] for side in (left, right))
    if len(a) == len(left) and len(b) == len(right):
        return set(a) == set(b) and (is_set or len(set(a)) == len(left) or sorted(a) == sorted(b))
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
    """Compares a list with a tuple in the same order, or a single item with a value."""
    left, right = _in_order(gold), _in_order(prediction)
    is_tuple = ("(", ")") in (gold[1:3], prediction[1:3])
    if is_tuple and left is not None and right is not None and len(left) == len(right):
        return _same_each(left, right, options)
    if (items := _items(gold)) is not None:
        return len(items) == 1 and same(items[0], prediction, options)
    items = _items(prediction) or ()
    return 0 < len(items) <= 8 and all(same(gold, item, options) for item in items)  # 7 and 7


def _same_assigned(gold: Shape, prediction: Shape, options: MathOptions) -> bool:
    if gold[0] == "assign" and prediction[0] == "assign":
        mine, theirs = dict(gold[1]), dict(prediction[1])
        return mine.keys() == theirs.keys() and all(same(mine[name], theirs[name], options) for name in mine)
    pairs = gold[1] if gold[0] == "assign" else prediction[1] if prediction[0] == "assign" else ()
    if gold[0] != "assign" and all(len(name) == 1 for name, _ in pairs):
        pairs = sorted(pairs, key=lambda pair: pair[0])  # y = 2, x = 1 is the point (1, 2)
    values = tuple(value for _, value in pairs)
    numbered = all("_" in name for name, _ in pairs) and len({name.split("_")[0] for name, _ in pairs}) == 1
    items = _items(prediction if gold[0] == "assign" else gold)
    if numbered and items is not None and options.loose_shapes:  # x_1 = 3, x_2 = -1 for 1 ± 2
        sides = (values, items) if gold[0] == "assign" else (items, values)
        return _same_unordered(*sides, options, is_set=False)
    left = values if gold[0] == "assign" else _in_order(gold)
    right = values if prediction[0] == "assign" else _in_order(prediction)
    if left is None or right is None or len(left) != len(right) or not options.loose_shapes:
        return False
    return _same_each(left, right, options)


def _in_order(item: Shape) -> Items | None:
    """The entries of a tuple, or of a list whose items are not alternatives."""
    if item[0] == "many":
        return None if item[1] in ("pm", "or") else item[2]
    return item[3] if item[0] == "seq" else None


def _same_matrix(gold: Shape, prediction: Shape, options: MathOptions) -> bool:
    match gold, prediction:
        case ("matrix", left), ("matrix", right):
            if len(left) != len(right) or len(left[0]) != len(right[0]):
                return False
            pairs = zip(itertools.chain(*left), itertools.chain(*right), strict=True)
            return all(_same_number(a, b, options) for a, b in pairs)
        case (("matrix", rows), ("seq", _, _, items)) | (("seq", _, _, items), ("matrix", rows)):
            if not options.loose_shapes or 1 not in (len(rows), len(rows[0])):
                return False
            vector: Items = tuple(("scalar", entry) for row in rows for entry in row)
            return _same_each(*((vector, items) if gold[0] == "matrix" else (items, vector)), options)
    return False


def _same_ratio(gold: Shape, prediction: Shape, options: MathOptions) -> bool:
    match gold, prediction:
        case ("ratio", (a, b)), ("scalar", number) if options.loose_shapes and ("dots",) not in (a, b):
            return _same_number(("div", a, b), number, options)
        case ("scalar", number), ("ratio", (a, b)) if options.loose_shapes and ("dots",) not in (a, b):
            return _same_number(number, ("div", a, b), options)
    if gold[0] != "ratio" or prediction[0] != "ratio":
        return False
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
    if residue[0] != "residue":
        return False
    _, left, modulus = residue
    remainder: Node = ("fn", "mod", (left, modulus))
    if other[0] != "residue" and (found := residue_class(other)) is not None:
        other = found
    if other[0] == "residue":
        return same_value(modulus, other[2]) and same_value(remainder, ("fn", "mod", (other[1], modulus)))
    if other[0] != "scalar":
        return False
    return same_value(remainder, other[1]) or (residue is gold and same_value(left, other[1]))


def _same_pieces(left: Pieces, right: Pieces, options: MathOptions) -> bool:
    """The same values under the same conditions, in any order."""
    if len(left) != len(right) or len(left) > MAX_PIECES:
        return False
    pairs = [[same(a, b, options) and same(c, d, options) for b, d in right] for a, c in left]
    return all(map(any, pairs)) and all(map(any, zip(*pairs, strict=True)))


# Equations -------------------------------------------------------------------------------------------


def _same_named(gold: Shape, prediction: Shape, options: MathOptions) -> bool:
    """x = 5 against x = 5, 5 or x - 5 = 0. A function may be renamed, a variable may not."""
    for one, other in ((gold, prediction), (prediction, gold)):
        match one, other:
            case ("named", name, ("many", _, items), arguments), ("many", _, (("equation", *_), *_)):
                spread: Shape = ("many", "or", tuple(("named", name, item, arguments) for item in items))
                return same(spread, other, options) if one is gold else same(other, spread, options)
    match gold, prediction:
        case ("named", name, value, arguments), ("named", other_name, inner, other_arguments):
            if name.isupper() and other_name.islower() and inner[0] == "region":
                return same(value, inner, options)  # D = [2, 7] is 2 <= x <= 7
            is_function = name.endswith("()") or other_name.endswith("()")
            if name == other_name or is_function or "" in (name, other_name):
                if arguments and len(arguments) == len(other_arguments):
                    if (set(arguments) - set(other_arguments)) & symbols(inner):
                        return False  # f(z) = x for f(x) = x
                    inner = renamed(inner, dict(zip(other_arguments, arguments, strict=True)))
                if same(value, inner, options):
                    return True
        case ("named", _, value, _), _ if prediction[0] != "equation":
            return same(value, prediction, options)
        case _, ("named", _, value, _) if gold[0] != "equation":
            return same(gold, value, options)
    left, right = as_equation(gold), as_equation(prediction)
    return left is not None and right is not None and proportion(left, right) is not None
