"""What stands behind a value: its unit, and further values in smaller units. 60 km/h, 2 hours 15 minutes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rewards.math_constructs import raw_argument
from rewards.math_text import Node, Unparsable
from rewards.math_units import parse_unit

if TYPE_CHECKING:
    from rewards.math_parse import Parser

_ENDS = frozenset((",", ";", ")", "]", "}", "\\}", "\\\\", "&"))
_VALUES = ("num", "dec")


def measured(parser: Parser, node: Node) -> Node:
    """The value with what stands behind it."""
    parts = [_with_unit(parser, node)]
    while parts[-1][0] == "unit" and parser.kind() in _VALUES:
        parser.currency = ""
        parts.append(_with_unit(parser, parser.product()))
        if parts[-1][0] != "unit":
            raise Unparsable("a number behind a unit")
    return parts[0] if len(parts) == 1 else ("list", "and", tuple(parts))


def _with_unit(parser: Parser, node: Node) -> Node:
    words = parser.currency
    if parser.kind() == "cur":
        words += parser.take()[2]
    if parser.kind() == "text" or (parser.kind() == "cmd" and parser.value() == "frac"):
        words += " " + _unit_text(parser)
    elif not words:
        return node
    return ("unit", node, parse_unit(words.replace("\\$", "$").replace("$", " dollars ")))


def _unit_text(parser: Parser) -> str:
    pieces: list[str] = []
    depth = 0
    while depth or not (parser.kind() in ("end", "sep", "rel") or parser.value() in _ENDS):
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
