"""Arithmetic of written matrices: sums, products, scalar multiples, powers, transposes, carried out on their
entries.
"""

from __future__ import annotations

from fractions import Fraction

from rewards.math_text import Node, TooComplex, Unparsable
from rewards.math_value import has

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
    return ("matrix", tuple(tuple(_dot(row, column) for column in columns) for row in left[1]))


def _dot(row: tuple[Node, ...], column: tuple[Node, ...]) -> Node:
    terms = tuple(("mul", pair) for pair in zip(row, column, strict=True))
    return terms[0] if len(terms) == 1 else ("add", terms)
