"""Trees of tuples, and what may be wrong with one: their variables, parts replaced, matrices carried out."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

Node = Any  # a tuple whose first field names it: `rewards.math.parse`
Shape = Any  # a tuple whose first field names it: `rewards.math.shape`


class MathError(Exception):
    """A text that has no value. Subclasses say why."""


class Unparsable(MathError):
    """Not mathematics, or not well formed."""


class Unsupported(MathError):
    """Mathematics outside this grammar.

    `evaluates` marks a value that sympy can work out where this module cannot; an integral is not one, as it
    restates a problem more often than it answers it.
    """

    def __init__(self, message: str, *, evaluates: bool = False) -> None:
        super().__init__(message)
        self.evaluates = evaluates


class TooComplex(MathError):
    """Over a size bound: characters, nesting, bits of a number, arithmetic steps."""


class Undefined(MathError):
    """No number: 1/0, 0^0, infinity - infinity."""


def symbols(node: Node) -> frozenset[str]:
    """The variables and undefined functions of a tree."""
    if node[0] in _LITERALS:
        return _NONE
    names, stack = set(), [node]
    while stack:
        part = stack.pop()
        if part and part[0] in _LITERALS:
            continue
        if part and (part[0] == "sym" or part[0] == "call"):
            names.add(part[1])
        stack.extend([child for child in part if type(child) is tuple])
    return frozenset(names)


def kinds(node: Node) -> set[str]:
    """The first fields of a tree and of all its parts."""
    found, stack = set(), [node]
    while stack:
        part = stack.pop()
        if part:
            found.add(part[0])
            stack.extend([child for child in part if type(child) is tuple])
    return found


def has(node: Node, *kinds: str) -> bool:
    """Whether a tree holds a node of one of these kinds, or a function or constant of one of these names."""
    stack = [node]
    while stack:
        part = stack.pop()
        if part and (part[0] in kinds or (part[0] in _NAMED and part[1] in kinds)):
            return True
        stack.extend([child for child in part if type(child) is tuple])
    return False


_LITERALS = frozenset(("num", "dec", "const", "base", "text", "domain"))
_NAMED = frozenset(("fn", "const"))
_NONE: frozenset[str] = frozenset()


def parts(node: Node) -> Iterator[Node]:
    stack = [node]
    while stack:
        part = stack.pop()
        if part and type(part[0]) is str:
            yield part
        stack.extend([child for child in part if type(child) is tuple])


def replaced(node: Node, old: Node, new: Node) -> Node:
    if node == old:
        return new
    return tuple(replaced(part, old, new) for part in node) if isinstance(node, tuple) else node


def renamed(item: Any, names: dict[str, str]) -> Any:
    """A shape with its variables under other names."""
    if type(item) is not tuple:  # an interval of numbers has no names
        return item
    if len(item) == 2 and item[0] == "sym":
        return ("sym", names.get(item[1], item[1]))
    return tuple(renamed(part, names) for part in item)


def variants(node: Node) -> tuple[Node, ...]:
    """The trees that ± stands for: ±1 ± i has four values; where there is a ∓, there are two."""
    marks = _marks(node)
    if len(marks) > 3 or -1 in marks:
        return tuple(_signed(node, itertools.repeat(sign)) for sign in (1, -1))
    return tuple(_signed(node, iter(signs)) for signs in itertools.product((1, -1), repeat=len(marks)))


def _marks(node: Any) -> list[int]:
    if not isinstance(node, tuple):
        return []
    inner = [mark for part in node for mark in _marks(part)]
    return [node[1], *inner] if node and node[0] == "pm" else inner


def _signed(node: Any, signs: Iterator[int]) -> Any:
    """The tree with the signs ± read, in their order, as these."""
    if not isinstance(node, tuple):
        return node
    if node and node[0] == "pm":
        sign = node[1] * next(signs)
        before, term = _signed(node[2], signs), _signed(node[3], signs)
        term = term if sign > 0 else ("neg", term)
        return term if before is None else ("add", (before, term))
    return tuple(_signed(part, signs) for part in node)


_DOTS = ("dots",)


def progression(items: tuple[Node, ...]) -> tuple[Node, ...]:
    """1, 2, ..., 10 written out, where whole numbers in equal steps lead over the dots to the last one."""
    if items[-2:-1] != (_DOTS,) or len(items) < 3 or any(item[0] != "num" for item in items if item != _DOTS):
        return items
    *first, last = [item[1] for item in items if item != _DOTS]
    step = first[1] - first[0] if len(first) > 1 else Fraction(1)
    count = (last - first[0]) / step if step else Fraction(0)
    is_even = all(b - a == step for a, b in itertools.pairwise(first))
    if not is_even or count.denominator > 1 or not len(first) <= count < 400:
        return items
    return tuple(("num", first[0] + step * index) for index in range(int(count) + 1))


MAX_SIZE = 12


def fold(node: Node) -> Node:
    """A tree with matrices -> one matrix, or a scalar tree if they cancel out of it."""
    match node:
        case ("matrix" | "fn", *_):
            return node
        case ("transpose", part):
            inner = fold(part)
            return ("matrix", tuple(zip(*inner[1], strict=True))) if inner[0] == "matrix" else inner
        case _ if not has(node, "matrix"):
            return node
        case ("neg", part):
            return _scaled(("num", Fraction(-1)), fold(part))
        case ("add" | "mul" as kind, (first, *rest)):
            return functools.reduce(_sum if kind == "add" else _product, map(fold, rest), fold(first))
        case ("div", above, below) if not has(below, "matrix"):
            return _scaled(("div", ("num", Fraction(1)), below), fold(above))
        case ("pow", base, ("num", exponent)) if exponent in (2, 3, 4, 5):
            return functools.reduce(_product, [fold(base)] * int(exponent))
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
