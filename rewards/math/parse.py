"""Tokens -> tree: the structure of an answer, before anything is evaluated."""

from __future__ import annotations

from typing import Any, Literal, cast

from rewards.math.atoms import atom, bracket, symbol
from rewards.math.constructs import as_mixed, exponent, read_mixed, subscript
from rewards.math.cursor import END, MAX_DEPTH, Grammar
from rewards.math.lex import Token, lex
from rewards.math.measure import ENDS, measured
from rewards.math.text import introduces, is_prose, number_in_base, text_key
from rewards.math.tree import Node, TooComplex, Unparsable
from rewards.math.units import CLAIMS

_POSTFIXES = frozenset("^_!'%")
_COMMAS = (",", ";")
MAX_TOKENS = 1500
MAX_SIGNS = 6
_ENDING_KINDS = frozenset(("end", "op", "rel", "sep"))
_AFTER_ITEM = frozenset((",", ";", ")", "]", "}", "\\}"))
# Before one of these, a number or letter is a complete power.
_BARE = frozenset(("num", "sym", "dec", "const"))
_AFTER_BARE = _AFTER_ITEM | {"+", "-", "*", "/"}
_AFTER_TERM = _AFTER_ITEM | {"+", "-"}
_NO_FACTORS = frozenset(("end", "rel", "sep", "text", "cur"))
_NO_MARKS = frozenset(("end", "rel", "sep", "sym", "const", "cmd", "fn", "text"))
_VALUE_STARTS = frozenset(("num", "dec", "sym", "const", "fn", "open", "big", "prefix", "set0", "domain"))


def parse(text: str, *, thousands: bool = True, scientific: bool = True) -> Node:
    """The tree of a cleaned text.

    Raises:
        Unparsable, Unsupported, TooComplex: see `rewards.math.tree`.
    """
    if ("_" in text or "base" in text) and (based := number_in_base(text)) is not None:
        return based
    if is_prose(text):
        return ("text", text_key(text))
    tokens = lex(text, thousands=thousands, scientific=scientific)
    if not tokens:
        raise Unparsable("an empty answer")
    if len(tokens) > MAX_TOKENS:
        raise TooComplex(f"{len(tokens)} tokens")
    parser = Parser(tokens)
    node = parser.items(())
    if parser.kind() != "end":
        raise Unparsable(f"{parser.peek()[2]!r} is out of place")
    return node


class Parser(Grammar):
    """A recursive-descent parser over a token list."""

    def __init__(self, tokens: list[Token]) -> None:
        self.tokens = [*tokens, END]
        self.at = 0
        self.depth = 0
        self.bars = 0
        self.signs = 0
        self.in_builder = False
        self.currency = ""

    # Lists, relations, sets --------------------------------------------------------------------------

    def items(self, closers: tuple[str, ...]) -> Node:
        """Items between commas, semicolons, "or" and "and", up to a closer. One item is returned as it is."""
        first = self.item()
        commas = _COMMAS if closers else (*_COMMAS, "\\\\")
        kind, separator, _ = self.tokens[self.at]
        if kind != "sep" and separator not in commas:
            return first
        groups: list[list[Node]] = [[first]]
        how: set[str] = set()
        while True:
            kind, separator, _ = self.tokens[self.at]
            if kind != "sep" and separator not in commas:
                break
            while kind == "sep" or self.value() in commas:
                how.add(self.take()[1])
                kind = self.kind()
            if kind == "end" or (kind == "op" and self.value() != "[" and self.value() in closers):
                break
            if separator == ";":
                groups.append([])
            groups[-1].append(self.item())
        if len(groups) > 1 and "," in how:  # p=5,q=2; p=7,q=2
            return ("list", ";", tuple(_listed(group, ",") for group in groups))
        flat = [node for group in groups for node in group]
        return _listed(flat, next((word for word in ("or", "and", ";") if word in how), ","))

    def item(self) -> Node:
        """A chain of relations, without a text before it that only introduces it."""
        kind, value, _ = self.tokens[self.at]
        # A bare number needs none of the levels below.
        if kind == "num" and self.tokens[self.at + 1][1] in _AFTER_ITEM:
            self.at += 1
            return ("num", value)
        if kind != "text":
            return self.relation()
        start = self.at
        while self.kind() == "text":
            self.take()
        words = " ".join(token[2] for token in self.tokens[start : self.at])
        if self.kind() in ("end", "sep") or self.value() in ENDS:
            return ("text", text_key(words))
        if self.accept(":") or (words.endswith(":") and CLAIMS.isdisjoint(words[:-1].casefold().split())):
            return self.item()
        if self.kind() == "rel":
            return self.relation(("sym", text_key(words)))
        if not introduces(words):
            raise Unparsable(f"{words[:40]!r} before the value")
        return self.relation()

    def relation(self, left: Node | None = None) -> Node:
        """Sides and the relations between them; "≈ 7" and "= 7" give 7, "< 7" something below 7."""
        if left is None:
            while self.tokens[self.at][0] == "rel" and self.value() in ("~", "=", "sim"):
                self.take()
            left = ("sym", "") if self.tokens[self.at][0] == "rel" else self.side()
        sides, ops = [left], []
        while self.tokens[self.at][0] == "rel":
            ops.append(self.take()[1])
            sides.append(self.side())
        return ("rel", tuple(ops), tuple(sides)) if ops else left

    def side(self) -> Node:
        self.currency = ""
        if self.tokens[self.at][0] == "dots":
            self.take()
            return ("dots",)
        node = self.setop()
        kind, value, _ = self.tokens[self.at]
        if kind in _ENDING_KINDS and not self.currency:
            return node
        if kind == "cmd" and value == "over":
            self.take()
            node = ("div", node, self.setop())
        if self.kind() == "mod":
            is_operator = self.take()[1] == "remainder"
            modulus = self.atom()
            return ("fn", "mod", (node, modulus)) if is_operator else ("residue", node, modulus)
        return measured(self, node)

    def setop(self) -> Node:
        node = self.ratio()
        while self.tokens[self.at][0] == "setop":
            node = ("setop", self.take()[1], node, self.ratio())
        return node

    def ratio(self) -> Node:
        node = self.sum()
        if self.in_builder or self.tokens[self.at][1] != ":":
            return node
        parts = [node]
        while self.accept(":"):
            if self.kind() == "dots":
                self.take()
                parts.append(("dots",))
            else:
                parts.append(self.sum())
        return ("ratio", tuple(parts))

    # Arithmetic --------------------------------------------------------------------------------------

    def sum(self) -> Node:
        terms: list[Node] = []
        while True:
            kind, value, _ = self.tokens[self.at]
            if kind == "pm":
                self.take()
                self.signs += 1
                if self.signs > MAX_SIGNS:
                    raise TooComplex(f"more than {MAX_SIGNS} signs ±")
                terms = [("pm", value, _joined("add", terms) if terms else None, self.product())]
            elif kind == "op" and value in ("+", "-"):
                self.take()
                term = self.product()
                terms.append(("neg", term) if value == "-" else term)
            elif not terms:
                terms.append(self.product())
            else:
                return _joined("add", terms)

    def product(self) -> Node:
        factors: list[Node] = [self.power() if self.tokens[self.at][0] != "op" else self.signed()]
        divisions = 0
        while True:
            kind, value, _ = self.tokens[self.at]
            if kind in _NO_FACTORS or value in _AFTER_TERM:
                return _joined("mul", factors)
            if kind == "op" and value == "*":
                self.take()
                factors.append(self.signed())
            elif kind == "op" and value == "/":
                self.take()
                divisions += 1
                if divisions > MAX_DEPTH:
                    raise TooComplex(f"more than {MAX_DEPTH} consecutive divisions")
                factors = [("div", _joined("mul", factors), self.signed())]
            elif self.starts_value(kind, value):
                previous = self.tokens[self.at - 1]
                if kind in ("num", "dec") and previous[0] in ("num", "dec"):
                    factors = [read_mixed(self, factors)]
                    continue
                is_mixed = len(factors) == 1 and kind == "cmd" and value == "frac" and previous[0] == "num"
                is_mixed = is_mixed and factors[0][0] in ("num", "neg")
                right = self.power()
                factors = [as_mixed(factors[0], right)] if is_mixed else [*factors, right]
            else:
                return _joined("mul", factors)

    def starts_value(self, kind: str, value: Any) -> bool:
        if kind in _VALUE_STARTS:
            return True
        if kind == "cmd":
            if value == "frac" and self.peek(1)[1] == "{" and self.peek(2)[0] == "text":  # km over h
                return False
            return value in ("frac", "binom", "sqrt", "begin", "accent", "vector")
        if kind == "op" and value == "[":  # not the end of [0, 1[
            following = self.peek(1)
            return following[0] not in ("end", "setop", "sep", "op") or following[1] in ("(", "-", "{", "\\{")
        is_bar = value == "|" and not self.bars and not self.in_builder
        return kind == "op" and (value in ("(", "{", "<<") or is_bar)

    def signed(self) -> Node:
        if self.tokens[self.at][0] != "op":
            return self.power()
        negative = False
        while self.tokens[self.at][0] == "op" and self.value() in ("+", "-"):
            negative ^= self.take()[1] == "-"
        return ("neg", self.power()) if negative else self.power()

    def atom(self) -> Node:
        return atom(self)

    def bracket(self, opener: str) -> Node:
        return bracket(self, opener)

    def named(self, name: str) -> Node:
        return symbol(self, name)

    def power(self) -> Node:
        kind, value, _ = self.tokens[self.at]
        if kind in _BARE:
            following = self.tokens[self.at + 1]
            if following[0] in _NO_MARKS or following[1] in _AFTER_BARE:
                self.at += 1
                return cast("Node", (kind, value))
        node, marked, postfixes = self.atom(), True, 0
        while marked and self.kind() in ("op", "deg"):
            postfixes += 1
            if postfixes > MAX_DEPTH:
                raise TooComplex(f"more than {MAX_DEPTH} marks on one value")
            node, marked = self.postfix(node)
        return node

    def postfix(self, node: Node) -> tuple[Node, bool]:
        """The node with the mark after it, if there is one."""
        kind, value, _ = self.tokens[self.at]
        if (kind != "deg" and value not in _POSTFIXES) or (value == "'" and node[0] not in ("sym", "call")):
            return node, False
        self.take()
        if kind == "deg":
            return ("deg", node), True
        if value == "^":
            return exponent(self, node), True
        if value == "_":
            return subscript(self, node), True
        if value == "!":
            return ("fn", "double factorial", (node,)) if self.accept("!") else ("fact", node), True
        if node[0] == "sym" and value == "'":
            return ("sym", node[1] + "'"), True
        if node[0] == "call" and value == "'":
            return ("call", node[1] + "'", node[2]), True
        return ("percent", node), True


def _listed(nodes: list[Node], how: str) -> Node:
    return nodes[0] if len(nodes) == 1 else ("list", how, tuple(nodes))


def _joined(kind: Literal["add", "mul"], parts: list[Node]) -> Node:
    return parts[0] if len(parts) == 1 else (kind, tuple(parts))
