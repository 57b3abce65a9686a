"""Sums, products, powers and transposes of matrices, carried out on their entries; i, j, k vectors."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

from rewards.math.probe import same_value
from rewards.math.text import Node, Shape, TooComplex, Unparsable
from rewards.math.tree import has, replaced, symbols

MAX_SIZE = 12


def fold(node: Node) -> Node:
    """A tree with matrices -> one matrix, or a scalar tree if they cancel out of it."""
    kind = node[0]
    if kind == "matrix":
        return node
    if kind == "transpose":
        inner = fold(node[1])
        return ("matrix", tuple(zip(*inner[1], strict=True))) if inner[0] == "matrix" else inner
    if not has(node, "matrix"):
        return node
    if kind == "neg":
        return _scaled(("num", Fraction(-1)), fold(node[1]))
    if kind in ("add", "mul"):
        total = fold(node[1][0])
        for part in node[1][1:]:
            total = _sum(total, fold(part)) if kind == "add" else _product(total, fold(part))
        return total
    if kind == "div" and not has(node[2], "matrix"):
        return _scaled(("div", ("num", Fraction(1)), node[2]), fold(node[1]))
    if kind == "pow" and node[2][0] == "num" and node[2][1] in (2, 3, 4, 5):
        base = fold(node[1])
        total = base
        for _ in range(int(node[2][1]) - 1):
            total = _product(total, base)
        return total
    if kind == "fn":
        return node
    raise Unparsable("a formula of matrices that is not a sum or product")


def _scaled(factor: Node, matrix: Node) -> Node:
    if matrix[0] != "matrix":
        return ("mul", (factor, matrix))
    return ("matrix", tuple(tuple(("mul", (factor, entry)) for entry in row) for row in matrix[1]))


def _sum(left: Node, right: Node) -> Node:
    if left[0] != "matrix" or right[0] != "matrix":
        if left[0] != "matrix" and right[0] != "matrix":
            return ("add", (left, right))
        raise Unparsable("the sum of a matrix and a number")
    if len(left[1]) != len(right[1]) or len(left[1][0]) != len(right[1][0]):
        raise Unparsable("the sum of matrices of different sizes")
    rows = zip(left[1], right[1], strict=True)
    return ("matrix", tuple(tuple(("add", pair) for pair in zip(a, b, strict=True)) for a, b in rows))


def _product(left: Node, right: Node) -> Node:
    if left[0] != "matrix":
        return _scaled(left, right)
    if right[0] != "matrix":
        return _scaled(right, left)
    if len(left[1][0]) != len(right[1]):
        raise Unparsable("the product of matrices whose sizes do not fit")
    if max(len(left[1]), len(right[1]), len(right[1][0])) > MAX_SIZE:
        raise TooComplex(f"a product of matrices larger than {MAX_SIZE}")
    columns = tuple(zip(*right[1], strict=True))
    products = [[[("mul", pair) for pair in zip(row, c, strict=True)] for c in columns] for row in left[1]]
    return ("matrix", tuple(tuple(("add", tuple(terms)) for terms in row) for row in products))


_BASIS = (("sym", "unit i"), ("sym", "unit j"), ("sym", "unit k"))
_ZERO, _ONE = ("num", Fraction(0)), ("num", Fraction(1))


def basis_vector(node: Node) -> tuple[Node, ...] | None:
    """The coordinates (3, -2, 1) of 3i - 2j + k; None for a formula that is no such sum, such as 2i."""
    if symbols(node).isdisjoint(("j", "k", "unit i", "unit j", "unit k")):
        return None
    for name, unit in zip((("const", "i"), ("sym", "j"), ("sym", "k")), _BASIS, strict=True):
        node = replaced(node, name, unit)
    coordinates: list[Node] = []
    for unit in _BASIS:
        part = replaced(node, unit, _ONE)
        for other in _BASIS:
            part = replaced(part, other, _ZERO)
        coordinates.append(part)
    total = ("add", tuple(("mul", pair) for pair in zip(coordinates, _BASIS, strict=True)))
    return tuple(coordinates) if same_value(node, total) else None


def same_vector(gold: Shape, prediction: Shape, same: Callable[[Shape, Shape], bool]) -> bool:
    """3i - 2j + k against (3, -2, 1) or a column; (1, 2) has no k."""
    formula, other = (gold, prediction) if gold[0] == "scalar" else (prediction, gold)
    if other[0] == "matrix" and len(other[1]) == len(other[1][0]) == 1 and other is prediction:
        return same(gold, ("scalar", other[1][0][0]))
    values = basis_vector(formula[1])
    entries = other[3] if other[0] == "seq" else tuple(("scalar", row[0]) for row in other[1])
    if values is None or not 2 <= len(entries) <= 3 or (other[0] == "matrix" and len(other[1][0]) > 1):
        return False
    padded = (*entries, ("scalar", ("num", Fraction(0))))[:3]
    pairs = zip(padded, (("scalar", value) for value in values), strict=True)
    return all(same(a, b) if other is gold else same(b, a) for a, b in pairs)
