"""Left sides that name what stands on the right: x, f(x), f(2), AB, (x, y), P(A), tan A."""

from __future__ import annotations

from rewards.math_text import Node
from rewards.math_value import has, symbols

_OF_ONE_NAME = frozenset(("abs", "max", "min"))
_OF_AN_ANGLE = frozenset(("sin", "cos", "tan", "cot", "sec", "csc"))


def name_of(node: Node) -> tuple[str, ...] | None:
    """The names that a left side gives values to; "f()" for the function f. None if it is a formula."""
    kind = node[0]
    if kind == "sym":
        return (node[1],)
    if kind == "call":
        is_function = all(argument[0] == "sym" and not argument[1].isupper() for argument in node[2])
        return (f"{node[1]}()",) if is_function else (repr(node),)
    if kind == "fn":
        return _name_of_function(node)
    if kind == "big":
        return (repr(node),)
    if kind == "mul" and all(part[0] == "mul" or _is_point_or_vector(part) for part in node[1]):
        inner = [name_of(part) for part in node[1]]
        return ("".join(name[0] for name in inner if name),) if all(inner) else None
    if kind == "div" and (all(map(_is_segment, node[1:])) or all(map(_is_differential, node[1:]))):
        return (str(node[1:]),)  # NO/BO, dy/dx
    if kind in ("seq", "ratio"):
        names = [name_of(item) for item in node[-1]]
        if all(name is not None and len(name) == 1 for name in names):
            parts = tuple(name[0] for name in names if name)
            return parts if kind == "seq" else (":".join(parts),)
    return None


def _is_point_or_vector(node: Node) -> bool:
    return node[0] == "sym" and (node[1][0].isupper() or node[1].startswith("accent "))


def _name_of_function(node: Node) -> tuple[str, ...] | None:
    """|AB|, max f(x), and sin A, which is a value of the angle and not the angle."""
    _, name, arguments = node
    if len(arguments) != 1:
        return None
    inner = name_of(arguments[0])
    if name in _OF_ONE_NAME:
        return (f"{name} {inner[0]}",) if inner and len(inner) == 1 else None
    return (repr(node),) if name in _OF_AN_ANGLE and symbols(arguments[0]) else None


def _is_segment(node: Node) -> bool:
    name = name_of(node)
    return name is not None and len(name[0]) > 1 and name[0].isupper() and name[0].isalpha()


def _is_differential(node: Node) -> bool:
    return node[0] == "mul" and len(node[1]) == 2 and node[1][0] == ("sym", "d") and node[1][1][0] == "sym"


def is_quantity(node: Node) -> bool:
    """Whether a formula is what one may be asked for, such as x + y or xy, not the side of an equation.

    It has two variables at least and no number but exponents: 3x + 4y = 12 is a line.
    """
    return len(symbols(node)) > 1 and not has(_without_exponents(node), "num", "dec")


def _without_exponents(node: Node) -> Node:
    if node[0] == "pow":
        return node[1]
    return tuple(_without_exponents(part) if isinstance(part, tuple) and part else part for part in node)
