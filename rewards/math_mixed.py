"""Mixed numbers: 2 1/3 and 2\\frac{1}{3} are 7/3; 2\\frac{x}{3} is a product."""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING

from rewards.math_text import Node, Unparsable

if TYPE_CHECKING:
    from rewards.math_parse import Parser


def read_mixed(parser: Parser, factors: list[Node]) -> Node:
    """2 1/3, at its second number."""
    whole, top, slash, bottom = factors[0], parser.peek(), parser.peek(1), parser.peek(2)
    if (
        len(factors) == 1
        and slash[1] == "/"
        and whole[0] == top[0] == bottom[0] == "num"
        and 0 < top[1] < bottom[1]
    ):
        parser.at += 3
        return ("num", whole[1] + top[1] / bottom[1])
    raise Unparsable("two numbers without an operator")


def as_mixed(node: Node, right: Node) -> Node:
    """2\\frac{1}{3} is 7/3 when the fraction is proper and made of integers; anything else is a product."""
    if right[0] in ("percent", "deg"):
        return (right[0], as_mixed(node, right[1]))
    if right[0] == "div" and right[1][0] == "num" and right[2][0] == "num" and 0 < right[1][1] < right[2][1]:
        whole = node[1][1] if node[0] == "neg" else node[1]
        if isinstance(whole, Fraction) and whole.denominator == 1:
            total: Node = ("num", whole + right[1][1] / right[2][1])
            return ("neg", total) if node[0] == "neg" else total
    return ("mul", (node, right))
