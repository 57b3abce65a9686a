"""Left sides that name the right side: x, f(x), f(2), AB, (x, y), P(A), tan A; vectors in i, j, k."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import cast

from rewards.math.conditions import residue_class
from rewards.math.measure import measure_of_letters
from rewards.math.probe import same_value
from rewards.math.tree import Applied, Node, Scalar, Shape, Tree, has, parts, renamed, replaced, symbols

_C: Node = ("sym", "C")
_CONSTANTS = frozenset(("C", "D", "C_1", "C_2", "c_1", "c_2"))
OTHER_CONSTANTS = _CONSTANTS | {"c", "d", "K", "k", "A", "B"}
_OF_ONE_NAME = frozenset(("abs", "max", "min", "det", "Re", "Im", "arg", "gcd", "lcm"))
_BARRED = frozenset("zwABCDEFGHIJKLMNOPQRSTUVWXYZ")
_OF_AN_ANGLE = frozenset(("sin", "cos", "tan", "cot", "sec", "csc"))


def name_of(node: Node) -> tuple[str, ...] | None:
    """The names that a left side defines, "f()" for the function f; None if it is a formula."""
    match node:
        case ("sym", name):
            bare = name.removeprefix("accent ")  # not of a conjugate or a complement
            return (name if bare in _BARRED else bare.removeprefix("vector "),)
        case ("setop", _, *sides):
            return (repr(node),) if all(part[0] in ("sym", "setop") for part in sides) else None
        case ("call", name, arguments):
            is_function = all(map(_is_variable, arguments))
            return (f"{name}()",) if is_function else (repr(node),)
        case ("fn", *_):
            return _name_of_function(node)
        case ("big", *_):
            return (repr(node),)
        case ("mul", factors) if all(part[0] == "mul" or _is_point_or_vector(part) for part in factors):
            inner = [name_of(part) for part in factors]
            return ("".join(name[0] for name in inner if name),) if all(inner) else None
        case ("div", *sides) if all(map(_is_segment, sides)) or all(map(_is_differential, sides)):
            return (str(tuple(sides)),)  # NO/BO, dy/dx
        case ("seq", _, _, items) | ("ratio", items):
            names = [name_of(item) for item in items]
            if all(name is not None and len(name) == 1 for name in names):
                parts = tuple(name[0] for name in names if name)
                return parts if node[0] == "seq" else (":".join(parts),)
    return None


def names_in(nodes: tuple[Node, ...]) -> tuple[str, ...]:
    return tuple(part[1] for part in nodes if part[0] == "sym" or part[0] == "call" or part[0] == "fn")


def _is_variable(node: Node) -> bool:
    return node[0] == "sym" and not node[1].isupper()


def _is_point_or_vector(node: Node) -> bool:
    return node[0] == "sym" and (node[1][0].isupper() or node[1].startswith(("accent ", "vector ")))


def _name_of_function(node: Applied) -> tuple[str, ...] | None:
    """The name of |AB|, max f(x) or sin A (a value at the angle, not the angle)."""
    _, name, arguments = node
    if len(arguments) != 1:
        is_of_names = name in _OF_ONE_NAME and all(argument[0] == "sym" for argument in arguments)
        return (repr(node),) if is_of_names else None
    inner = name_of(arguments[0])
    if name in _OF_ONE_NAME:
        if name == "abs" and _is_segment(arguments[0]):
            return inner
        return (f"{name} {inner[0]}",) if inner and len(inner) == 1 else None
    return (repr(node),) if name in _OF_AN_ANGLE and symbols(arguments[0]) else None


def _is_segment(node: Node) -> bool:
    name = name_of(node)
    return name is not None and len(name[0]) > 1 and name[0].isupper() and name[0].isalpha()


def _is_differential(node: Node) -> bool:
    return node[0] == "mul" and len(node[1]) == 2 and node[1][0] == ("sym", "d") and node[1][1][0] == "sym"


def is_quantity(node: Node) -> bool:
    """Whether a formula is a quantity that a problem may ask for, such as x + y or xy. It has at least two
    variables and no numbers except exponents: 3x + 4y = 12 is a line.
    """
    return len(symbols(node)) > 1 and not has(_without_exponents(node), "num", "dec")


def _without_exponents(node: Tree) -> Tree:
    if node[0] == "pow":
        return cast("Tree", node[1])
    return tuple(_without_exponents(part) if isinstance(part, tuple) and part else part for part in node)


def same_renamed(gold: Scalar, prediction: Scalar, same: Callable[[Shape, Shape], bool]) -> bool:
    """Compares free names (C and c, i and j, \\vec a and a, k of 3k + 1) or units (2000 L and 2 m^3)."""
    left, right = gold[1], prediction[1]
    names, others = symbols(left), symbols(right)
    if names == others:
        return len(names) == 2 and _differ_by_constant(left, right)
    if any(name.startswith("unit ") for name in names ^ others):
        vectors = basis_vector(left), basis_vector(right)
        return None not in vectors and all(map(same_value, *(vector or () for vector in vectors)))
    if others - names == {"j"} and has(left, "i") and not has(right, "i"):
        return same(gold, ("scalar", replaced(right, ("sym", "j"), ("const", "i"))))
    mine, theirs = sorted(names - others), sorted(others - names)
    plain = {name: name.removeprefix("vector ") for name in names ^ others}
    if {plain[name] for name in mine} == {plain[name] for name in theirs}:
        return same(renamed(gold, plain), renamed(prediction, plain))
    is_apart = "".join(names & others).islower()  # from the C of A + B + C
    is_constant = is_apart and _CONSTANTS.issuperset(mine) and OTHER_CONSTANTS.issuperset(theirs)
    found = residue_class(("scalar", left)) if mine == ["k"] else None
    is_class = found is not None and found[1] not in (_ZERO, found[2]) and found[2] != _ONE  # 3k + 1
    if len(mine) == len(theirs) and (is_constant or is_class):
        return same(gold, renamed(prediction, dict(zip(theirs, mine, strict=True))))
    if not names or not others:
        return False
    measures = measure_of_letters(gold), measure_of_letters(prediction)
    return measures[0] is not None and measures[1] is not None and same(measures[0], measures[1])


def _differ_by_constant(gold: Node, prediction: Node) -> bool:
    """Antiderivatives of one variable, both with + C, are one answer if they differ by a constant."""
    difference: Node = ("add", (gold, ("neg", prediction)))
    renaming = {name: f"{name}'" for name in symbols(gold) if name != "C"}
    if gold[0] != "add" or prediction[0] != "add" or _C not in gold[1] or _C not in prediction[1]:
        return False
    is_integral = has(gold, "fn") and has(prediction, "fn") and not is_log_without_bars(gold, prediction)
    return is_integral and same_value(difference, renamed(difference, renaming))


def is_log_without_bars(gold: Node, prediction: Node) -> bool:
    """Whether the prediction has ln x where the gold has ln |x|."""
    if not has(gold, "abs") or has(prediction, "abs") or not has(prediction, "ln", "log"):
        return False
    logs = [part[2][0] for part in parts(gold) if part[0] == "fn" and part[1] in ("ln", "log")]
    return any(has(inside, "abs") for inside in logs)


_BASIS: tuple[Node, ...] = (("sym", "unit i"), ("sym", "unit j"), ("sym", "unit k"))
_LETTERS: tuple[Node, ...] = (("const", "i"), ("sym", "j"), ("sym", "k"))
_ZERO: Node = ("num", Fraction(0))
_ONE: Node = ("num", Fraction(1))


def basis_vector(node: Node) -> tuple[Node, ...] | None:
    """The coordinates (3, -2, 1) of 3i - 2j + k; None for a formula that is not such a sum, such as 2i."""
    if symbols(node).isdisjoint(("j", "k", "unit i", "unit j", "unit k")):
        return None
    for name, unit in zip(_LETTERS, _BASIS, strict=True):
        node = replaced(node, name, unit)
    coordinates: list[Node] = []
    for unit in _BASIS:
        part = replaced(node, unit, _ONE)
        for other in _BASIS:
            part = replaced(part, other, _ZERO)
        coordinates.append(part)
    total: Node = ("add", tuple(("mul", pair) for pair in zip(coordinates, _BASIS, strict=True)))
    return tuple(coordinates) if same_value(node, total) else None


def same_vector(gold: Shape, prediction: Shape, same: Callable[[Shape, Shape], bool]) -> bool:
    """Compares 3i - 2j + k with (3, -2, 1) or a column; (1, 2) has no k."""
    match gold, prediction:
        case ("scalar", _), ("matrix", ((entry,),)):
            return same(gold, ("scalar", entry))
        case ("seq", _, _, entries), ("scalar", ("fn", "perm", (x, y))) if len(entries) == 2:  # P(2, 3)
            return same(entries[0], ("scalar", x)) and same(entries[1], ("scalar", y))
        case (("scalar", formula), ("seq", _, _, entries)) | (("seq", _, _, entries), ("scalar", formula)):
            pass
        case (("scalar", formula), ("matrix", rows)) | (("matrix", rows), ("scalar", formula)):
            entries: tuple[Shape, ...] = tuple(("scalar", row[0]) for row in rows if len(row) == 1)
        case _:
            return False
    values = basis_vector(formula)
    if values is None or not 2 <= len(entries) <= 3:
        return False
    zero: Scalar = ("scalar", _ZERO)
    padded: tuple[Shape, ...] = (*entries, zero)[:3]
    numbers: tuple[Shape, ...] = tuple(("scalar", value) for value in values)
    return all(map(same, numbers, padded) if gold[0] == "scalar" else map(same, padded, numbers))
