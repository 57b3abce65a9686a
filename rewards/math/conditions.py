"""Answers followed by a condition: k pi, k in Z; 2n - 1 (n >= 1); y = 2x (x > 0).

That a variable is an integer may be left unsaid, and its name is free. Other conditions are part of an
answer.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction
from typing import NamedTuple

from rewards.math.arithmetic import BUDGET, Number
from rewards.math.region import linear
from rewards.math.tree import Inequality, MathError, Node, Residue, Shape, Undefined, renamed, symbols
from rewards.math.value import Evaluator

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
    r"(?:[,;\s(]|\\(?:q?quad|forall|[ ,;]|text\s*\{\s*,?\s*(?:where|with|for(?: all| any| some)?)?\s*\}))+$"
)
_RELATION = r"(?:[<>]|\\(?:leq?|geq?|neq?|leqslant|geqslant)(?![a-zA-Z]))"
_IN_BRACKETS = re.compile(rf"\((?P<relation>[^()]*{_RELATION}[^()]*)\)\s*$")
_OF_AN_INDEX = re.compile(r"\s*[nkmpqijN]\s*(?:\\geq?(?:slant)?|>)\s*[012]\s*")
_AFTER_COMMA = re.compile(rf"(?:,|\\q?quad)(?P<relation>{_OF_AN_INDEX.pattern})$")
_MAY_HOLD_ONE = re.compile(rf"\\in(?![a-z])|\\text|{_RELATION}")
_INDICES = frozenset("knmt")
_REASONS = ("\\text{since", "\\text{because", "\\text{as ", "\\because")
_TAIL_CHARS, _MAX_CONDITIONS = 120, 3


class Conditions(NamedTuple):
    """`members`: (variable, domain), "" for any integer, ">" for n >= 1; `relations`: texts."""

    members: tuple[tuple[str, str], ...]
    relations: tuple[str, ...]


NONE = Conditions((), ())


def split_conditions(text: str) -> tuple[str, Conditions]:
    """Splits a cleaned answer into the part before the conditions at its end, and the conditions."""
    is_index = text[-1:].isdigit() and len(re.findall(_RELATION, text)) == 1 and _AFTER_COMMA.search(text)
    if (text[-1:].isdigit() and not is_index) or not _MAY_HOLD_ONE.search(text):
        return text, NONE
    members: list[tuple[str, str]] = []
    relations: list[str] = []
    for _ in range(_MAX_CONDITIONS):
        tail = text[-_TAIL_CHARS:]
        found = is_index or _DOMAIN.search(tail) or _IN_BRACKETS.search(tail)
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
            domain = found.group("domain") or ""
            members.append((name, "Z+" if found.group("mark") and domain in "NZ" else domain))
        elif len(rest) < 2 and not rest.isdigit():  # P(X > 1)
            break
        elif _OF_AN_INDEX.fullmatch(relation):
            name = relation.strip()[0]
            if is_index and not re.search(rf"(?<![a-zA-Z\\]){name}(?![a-zA-Z])", rest):
                break
            members.append((name, ">"))
        elif not relation.lstrip().startswith(_REASONS):
            relations.append(relation)
        text = rest
    return text, Conditions(tuple(members), tuple(relations))


def same_under_conditions(gold: Shape, prediction: Shape, same: Callable[[Shape, Shape], bool]) -> bool:
    """Whether two shapes are one answer; at least one is ("given", shape, members, relations)."""
    left, members, relations = gold[1:] if gold[0] == "given" else (gold, (), ())
    is_given = prediction[0] == "given"
    right, other_members, other_relations = prediction[1:] if is_given else (prediction, (), ())
    if len(relations) != len(other_relations) or not all(map(same, relations, other_relations)):
        return False
    domains, others = ({domain for _, domain in found} for found in (members, other_members))
    is_half = (">" in domains) != (">" in others) and "Z" in domains | others  # n >= 1 for every n in Z
    if members and other_members and (is_half or len((domains | others) - {"", ">"}) > 1):
        return False
    mine, theirs = symbols(left) - symbols(right), symbols(right) - symbols(left)
    free = {name for name, _ in (*members, *other_members)}
    if len(mine) == len(theirs) == 1 and not free.isdisjoint(mine | theirs):
        right = renamed(right, dict(zip(theirs, mine, strict=True)))
    return same(left, right)


def residue_class(item: Shape) -> Residue | None:
    """3 (mod 7) as ("residue", 3, 7) for 7k + 3, where k is any whole number."""
    members: tuple[tuple[str, str], ...] = ()
    match item:
        case ("given", inner, members, ()) if members:
            item = inner
    match item:
        case ("named", name, inner, _) if len(name) == 1:  # not the terms a_n
            item = inner
    match item:
        case ("residue", *_):
            return item
        case ("scalar", node) if len(members) < 2 and all(domain == "Z" for _, domain in members):
            names = symbols(node)
        case _:
            return None
    if len(names) != 1 or not names <= (frozenset(members[0][:1]) if members else _INDICES):
        return None
    try:
        step, rest, _ = linear(node)
    except MathError:
        return None
    is_whole = step and step.denominator == rest.denominator == 1
    return ("residue", ("num", rest), ("num", abs(step))) if is_whole else None


# Equations and inequalities, up to a constant factor -------------------------------------------------------
_FLIPPED = {">": "<", ">=": "<=", "<": "<", "<=": "<=", "!=": "!="}


def as_equation(item: Shape) -> Node | None:
    """The tree that an equation sets to zero; None for a shape that is not an equation of variables."""
    match item:
        case ("equation", node, _):
            return node
        case ("named", name, ("scalar", node), _) if not name.endswith("()"):
            return ("add", (("sym", name), ("neg", node)))
    return None


def same_inequality(gold: Inequality, prediction: Inequality) -> bool:
    """Whether two inequalities differ by a constant factor; a negative one reverses the sign."""
    (_, op, left), (_, other_op, right) = gold, prediction
    if _FLIPPED[op] != _FLIPPED[other_op]:
        return False
    factor = proportion(left, right)
    if factor is None:
        return False
    return op == "!=" or (factor > 0) == (op[0] == other_op[0])


def proportion(left: Node, right: Node) -> Number:
    """The constant c with left = c right for all values of the variables, or None."""
    names = symbols(left)
    if names != symbols(right) or not names:
        return None
    budget: list[float] = [BUDGET]
    factor = None
    for point in (0, 1, 2, 3):
        evaluator = Evaluator(point, budget)
        try:
            a, b = evaluator.value(left), evaluator.value(right)
        except Undefined:
            continue
        if a == 0 or b == 0:
            return None
        quotient = evaluator.arithmetic.combine(a, b, "/")
        if isinstance(quotient, evaluator.arithmetic.mp.mpc):
            return None
        if factor is None:
            factor = quotient
            continue
        difference = evaluator.arithmetic.combine(quotient, -factor, "+")
        if difference != 0 and abs(difference) > abs(factor) * Fraction(1, 2**120):
            return None
    return factor
