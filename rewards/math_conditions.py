"""Answers with a condition behind them: k pi, k in Z; 2n - 1 (n >= 1); y = 2x (x > 0).

Where a variable is an integer, an answer may leave that unsaid, and may call it otherwise. Any other
condition belongs to the answer.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

from rewards.math_equation import renamed
from rewards.math_text import Shape
from rewards.math_value import symbols

_NAME = r"(?P<{0}>[a-zA-Z])"
_SIGN = r"(?:[+*]|\\ast)"
_MEMBER = (
    _NAME.format("member")
    + r"\s*\\in\s*(?:\\(?:mathbb|mathbf|mathrm|bf)\s*)?\{?\s*(?P<domain>[ZNRQ])\s*\}?\s*"
    + rf"(?P<mark>[\^_]\s*(?:\{{\s*{_SIGN}\s*\}}|{_SIGN}))?"
)
_SPOKEN = (
    r"\\text\s*\{\s*,?\s*(?:for|where)\s+(?:(?:any|all|some|every|each|an)\s*)*(?:integers?\s*)?\}\s*"
    + _NAME.format("spoken")
    + r"(?:\s*\\text\s*\{\s*is\s+any?\s+integer\s*\})?"
)
_DOMAIN = re.compile(rf"(?:{_MEMBER}|{_SPOKEN})\s*\)?\s*$")
_SEPARATOR = re.compile(
    r"(?:[,;\s(]|\\q?quad|\\[ ,;]|\\text\s*\{\s*,?\s*(?:where|for|with|for all|for any|for some)?\s*\})+$"
)
_RELATION = r"(?:[<>]|\\(?:leq?|geq?|neq?|leqslant|geqslant)(?![a-zA-Z]))"
_IN_BRACKETS = re.compile(rf"\((?P<relation>[^()]*{_RELATION}[^()]*)\)\s*$")
_OF_AN_INDEX = re.compile(r"\s*[nkmpqijN]\s*(?:\\geq?(?:slant)?|>)\s*[012]\s*")
_MAY_HOLD_ONE = re.compile(rf"\\in(?![a-z])|\\text|{_RELATION}")
_REASONS = ("\\text{since", "\\text{because", "\\text{as ", "\\because")
_TAIL_CHARS, _MAX_CONDITIONS = 120, 3


class Conditions(NamedTuple):
    """`members`: (variable, domain) pairs, the domain "" if it is only said to be an integer; `relations`:
    texts.
    """

    members: tuple[tuple[str, str], ...]
    relations: tuple[str, ...]


NONE = Conditions((), ())


def split_conditions(text: str) -> tuple[str, Conditions]:
    """A cleaned answer without the conditions at its end, and these."""
    if text[-1:].isdigit() or not _MAY_HOLD_ONE.search(text):
        return text, NONE
    members: list[tuple[str, str]] = []
    relations: list[str] = []
    for _ in range(_MAX_CONDITIONS):
        tail = text[-_TAIL_CHARS:]
        found = _DOMAIN.search(tail)
        found = found or _IN_BRACKETS.search(tail)
        if found is None:
            break
        rest = text[: len(text) - len(tail) + found.start()]
        between = _SEPARATOR.search(rest[-_TAIL_CHARS:])
        rest = rest[: len(rest) - len(between.group())] if between else rest
        if rest.count("{") != rest.count("}") or rest.count("(") != rest.count(")"):
            break
        if (relation := found.groupdict().get("relation")) is None:
            name = found.group("member") or found.group("spoken")
            is_apart = between is not None and not between.group().isspace()
            is_apart = is_apart or found.group("spoken") is not None
            if not is_apart or not re.search(rf"(?<![a-zA-Z\\]){name}(?![a-zA-Z])", rest):
                break
            members.append((name, _domain(found)))
        elif len(rest) < 2 and not rest.isdigit():  # P(X > 1)
            break
        elif _OF_AN_INDEX.fullmatch(relation):
            members.append((relation.strip()[0], ""))
        elif not relation.lstrip().startswith(_REASONS):
            relations.append(relation)
        text = rest
    return text, Conditions(tuple(members), tuple(relations))


def _domain(found: re.Match[str]) -> str:
    domain = found.group("domain") or ""
    return "Z+" if found.group("mark") and domain in "NZ" else domain


def same_under_conditions(gold: Shape, prediction: Shape, same: Callable[[Shape, Shape], bool]) -> bool:
    """Whether two shapes, of which one at least is ("given", shape, members, relations), are one answer."""
    left, members, relations = gold[1:] if gold[0] == "given" else (gold, (), ())
    right, other_members, other_relations = (
        prediction[1:] if prediction[0] == "given" else (prediction, (), ())
    )
    if len(relations) != len(other_relations) or not all(map(same, relations, other_relations)):
        return False
    domains = {domain for _, domain in members} | {domain for _, domain in other_members}
    if members and other_members and len(domains - {""}) > 1:
        return False
    mine, theirs = symbols(left) - symbols(right), symbols(right) - symbols(left)
    free = {name for name, _ in (*members, *other_members)}
    if len(mine) == len(theirs) == 1 and not free.isdisjoint(mine | theirs):
        right = renamed(right, dict(zip(theirs, mine, strict=True)))
    return same(left, right)
