"""A position in a token list, and the grammar rules that call each other across modules."""

from __future__ import annotations

from typing import Any, Protocol

from rewards.math.lex import Token
from rewards.math.tree import Node, TooComplex, Unparsable

MAX_DEPTH = 32
END: Token = ("end", "", "")


class Grammar(Protocol):
    """The parser of `rewards.math.parse` as the grammar rules see it.

    Attributes:
        tokens: the tokens; the last is `END`.
        depth: number of open brackets; `bars`: open absolute values among them.
        in_builder: inside {x | ...}, where a bar and a colon separate.
        currency: the sign before the value that is being read.
    """

    tokens: list[Token]
    at: int
    depth: int
    bars: int
    in_builder: bool
    currency: str

    def items(self, closers: tuple[str, ...]) -> Node: ...
    def relation(self, left: Node | None = None) -> Node: ...
    def setop(self) -> Node: ...
    def sum(self) -> Node: ...
    def product(self) -> Node: ...
    def power(self) -> Node: ...
    def atom(self) -> Node: ...
    def bracket(self, opener: str) -> Node: ...
    def named(self, name: str) -> Node: ...

    def peek(self, ahead: int = 0) -> Token:
        return self.tokens[min(self.at + ahead, len(self.tokens) - 1)]

    def kind(self) -> str:
        return self.tokens[self.at][0]

    def value(self) -> Any:
        return self.tokens[self.at][1]

    def take(self) -> Token:
        token = self.tokens[self.at]
        self.at += token is not END
        return token

    def accept(self, value: str) -> bool:
        if self.tokens[self.at][:2] == ("op", value):
            self.at += 1
            return True
        return False

    def expect(self, value: str) -> None:
        if not self.accept(value):
            raise Unparsable(f"{value!r} is missing before {self.peek()[2][:20]!r}")

    def descend(self) -> None:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise TooComplex(f"more than {MAX_DEPTH} nested brackets")
