"""The types of nodes and shapes, their errors, and operations on them: variables, replacement, matrices.

A node is a part of the parsed answer. A shape is the kind of answer: a value, several, a point, a set, an
equation. Both are tuples, which a type checker tells apart by their first field.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from fractions import Fraction
from typing import Literal, NamedTuple, TypeAlias, TypeVar, cast

from rewards.math.units import Unit

Tree = tuple[object, ...]  # a node, a shape, or several of them
Names = tuple[str, ...]
T = TypeVar("T")
Nodes: TypeAlias = "tuple[Node, ...]"
Num = tuple[Literal["num", "dec"], Fraction]  # dec was written as a decimal
Named = tuple[Literal["sym", "const"], str]  # const pi, e, i, inf
Text = tuple[Literal["text"], str]
Domain = tuple[Literal["domain"], str]
Dots = tuple[Literal["dots"]]
Base = tuple[Literal["base"], str, int]  # digits and base
Ratio: TypeAlias = "tuple[Literal['ratio'], Nodes]"
Residue: TypeAlias = "tuple[Literal['residue'], Node, Node]"  # 3 (mod 7)
Matrix: TypeAlias = "tuple[Literal['matrix'], tuple[Nodes, ...]]"
Builder: TypeAlias = "tuple[Literal['builder'], Node, Node]"  # the head of a set, its conditions
Applied: TypeAlias = "tuple[Literal['fn', 'call'], str, Nodes]"  # call: an undefined function
Seq: TypeAlias = "tuple[Literal['seq'], str, str, Nodes]"  # its brackets and entries
Node: TypeAlias = """(
    Num | Named | Text | Domain | Dots | Base | Ratio | Residue | Matrix | Seq | Builder | Applied
    | tuple[Literal["add", "mul", "set"], Nodes] | tuple[Literal["div", "pow"], Node, Node]
    | tuple[Literal["neg", "fact", "percent", "deg", "transpose"], Node]
    | tuple[Literal["pm"], int, Node | None, Node] | tuple[Literal["big"], str, str, Node, Node, Node]
    | tuple[Literal["list"], str, Nodes] | tuple[Literal["rel"], Names, Nodes]
    | tuple[Literal["setop"], str, Node, Node] | tuple[Literal["unit"], Node, Unit]
    | tuple[Literal["digits"], str, Fraction] | tuple[Literal["cases"], tuple[tuple[Node, Node], ...]]
)"""  # pm: sign, a, b of a ± b; big: sum or prod, index, low, high, body; list: joined by "," ";" "or" "and"
Endpoint = Fraction | float  # a float is an infinity


class Interval(NamedTuple):
    low: Endpoint
    has_low: bool
    high: Endpoint
    has_high: bool


Region = tuple[Interval, ...]
Pairs = tuple[tuple[str, str], ...]
Shapes: TypeAlias = "tuple[Shape, ...]"
Pieces: TypeAlias = "tuple[tuple[Shape, Shape], ...]"
Scalar: TypeAlias = tuple[Literal["scalar"], Node]
Measure: TypeAlias = "tuple[Literal['measure'], Shape, Unit]"
Inequality: TypeAlias = tuple[Literal["inequality"], str, Node]
Shape: TypeAlias = """(
    Scalar | Measure | Inequality | Base | Ratio | Residue | Matrix | Builder | Text | Domain | Dots
    | tuple[Literal["infinity"], int] | tuple[Literal["region"], Region] | tuple[Literal["set"], Shapes]
    | tuple[Literal["many"], str, Shapes] | tuple[Literal["seq"], str, str, Shapes]
    | tuple[Literal["given"], Shape, Pairs, Shapes] | tuple[Literal["named"], str, Shape, Names]
    | tuple[Literal["assign"], tuple[tuple[str, Shape], ...]] | tuple[Literal["pieces"], Pieces]
    | tuple[Literal["setop"], str, Shape, Shape] | tuple[Literal["equation"], Node, Node | None]
    | tuple[Literal["contradiction"], Shape]
)"""  # what their fields mean: `rewards.math.shape`


class MathError(Exception):
    """A text has no value; subclasses say why."""


class Unparsable(MathError):
    """The text is not mathematics, or not well formed."""


class Unsupported(MathError):
    """The text is mathematics outside this grammar.

    `evaluates` marks a value that sympy can work out; an integral is excluded, as it often restates the
    problem.
    """

    def __init__(self, message: str, *, evaluates: bool = False) -> None:
        super().__init__(message)
        self.evaluates = evaluates


class TooComplex(MathError):
    """A bound was exceeded: characters, nesting, bits of a number or arithmetic steps."""


class Undefined(MathError):
    """The value is not a number: 1/0, 0^0, infinity - infinity."""


def symbols(node: Tree) -> frozenset[str]:
    """The variables and undefined functions of a tree."""
    if node[0] in _LITERALS:
        return _NONE
    names: set[str] = set()
    stack: list[Tree] = [node]
    while stack:
        part = stack.pop()
        if part and part[0] in _LITERALS:
            continue
        if part and (part[0] == "sym" or part[0] == "call") and type(part[1]) is str:
            names.add(part[1])
        stack.extend([child for child in part if type(child) is tuple])
    return frozenset(names)


def kinds(node: Tree) -> set[object]:
    """The first fields of a tree and all its parts."""
    found: set[object] = set()
    stack: list[Tree] = [node]
    while stack:
        part = stack.pop()
        if part:
            found.add(part[0])
            stack.extend([child for child in part if type(child) is tuple])
    return found


def has(node: Tree, *kinds: str) -> bool:
    """Whether a tree holds a node of one of these kinds, or a function or constant of one of these names."""
    stack: list[Tree] = [node]
    while stack:
        part = stack.pop()
        if part and (part[0] in kinds or (part[0] in _NAMED and part[1] in kinds)):
            return True
        stack.extend([child for child in part if type(child) is tuple])
    return False


_LITERALS = frozenset(("num", "dec", "const", "base", "text", "domain"))
_NAMED = frozenset(("fn", "const"))
_NONE: frozenset[str] = frozenset()


def parts(node: Tree) -> list[Node]:
    found: list[Tree] = []
    stack: list[Tree] = [node]
    while stack:
        part = stack.pop()
        if part and type(part[0]) is str:
            found.append(part)
        stack.extend([child for child in part if type(child) is tuple])
    return cast("list[Node]", found)


def replaced(node: T, old: Node, new: Node) -> T:
    if node == old:
        return cast("T", new)
    if not isinstance(node, tuple):
        return node
    return cast("T", tuple([replaced(part, old, new) for part in node]))


def renamed(item: T, names: dict[str, str]) -> T:
    """A shape with its variables under other names."""
    if type(item) is not tuple:  # an interval of numbers has no names
        return item
    if len(item) == 2 and item[0] == "sym":
        return cast("T", ("sym", names.get(item[1], item[1])))
    return cast("T", tuple([renamed(part, names) for part in item]))


def variants(node: Node) -> tuple[Node, ...]:
    """The trees that ± stands for: ±1 ± i has four values, but with a ∓ there are two."""
    marks = _marks(node)
    if len(marks) > 3 or -1 in marks:
        return tuple(_signed(node, itertools.repeat(sign)) for sign in (1, -1))
    return tuple(_signed(node, iter(signs)) for signs in itertools.product((1, -1), repeat=len(marks)))


def _marks(node: object) -> list[int]:
    if not isinstance(node, tuple):
        return []
    inner = [mark for part in node for mark in _marks(part)]
    return [node[1], *inner] if node and node[0] == "pm" else inner


def _signed(node: T, signs: Iterator[int]) -> T:
    """The tree with its signs ± replaced, in order, by `signs`."""
    if not isinstance(node, tuple):
        return node
    if node and node[0] == "pm":
        sign = node[1] * next(signs)
        before, term = _signed(node[2], signs), _signed(node[3], signs)
        term = term if sign > 0 else ("neg", term)
        return cast("T", term if before is None else ("add", (before, term)))
    return cast("T", tuple([_signed(part, signs) for part in node]))


_DOTS = ("dots",)


def progression(items: tuple[Node, ...]) -> tuple[Node, ...]:
    """1, 2, ..., 10 written out, if equal steps of numbers lead over the dots to the last one."""
    numbers = [item[1] for item in items if item[0] == "num"]
    if items[-2:-1] != (_DOTS,) or len(items) < 3 or len(numbers) + items.count(_DOTS) < len(items):
        return items
    *first, last = numbers
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
    pairs = (tuple(tuple(zip(row, column, strict=True)) for column in columns) for row in left[1])
    return (
        "matrix",
        tuple(tuple(("add", tuple(("mul", p) for p in entry)) for entry in row) for row in pairs),
    )


def with_columns(node: T) -> T:
    """A formula of tuples as a formula of column vectors."""
    if not isinstance(node, tuple) or node[:1] == ("fn",):
        return node
    if node[:3] == ("seq", "(", ")"):
        return cast("T", ("matrix", tuple((entry,) for entry in node[3])))
    return cast("T", tuple(map(with_columns, node)))
