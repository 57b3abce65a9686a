"""Trees -> shapes: an answer is one value, several, a point, a set of reals, an equation, a word.

A shape is a tuple whose first field names it:
    scalar node, measure shape Unit, infinity sign, base digits base, ratio nodes, text words, dots
    residue node modulus, pieces ((shape, condition), ...), given shape members relations (`conditions`)
    named name shape arguments (f(x) = ...), assign ((name, shape), ...)
    many how shapes (a bare list), set shapes, seq open close shapes, matrix rows
    region intervals, setop op shape shape, builder node nodes, domain name
    equation node value (node = 0; x + y = 5 has the value 5), inequality op node (node op 0)
    contradiction shape (a chain such as 8 = 7, and the shape of its last side)
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from fractions import Fraction

from rewards.math import region as regions
from rewards.math import tree
from rewards.math.measure import compound
from rewards.math.names import is_quantity, name_of, names_in
from rewards.math.probe import same_value
from rewards.math.region import as_region, scalar
from rewards.math.tree import MathError, Node, Shape, Unparsable, Unsupported, has, progression, symbols
from rewards.math.units import Unit
from rewards.math.words import EMPTY_WORDS, NUMBER_WORDS, REAL_WORDS, split

_PLAIN = frozenset(("num", "dec", "const"))
_NOT_IN_FORMULAS = frozenset(("set", "list", "rel", "text", "setop", "cases"))
_NO_NUMBERS = split("seq set list text unit ratio domain setop matrix pm base inf dots")
_INEQUALITIES = frozenset(("<", ">", "<=", ">=", "!="))
_SPOKEN: dict[str, Shape] = {
    **{word: ("scalar", ("num", Fraction(number))) for word, number in NUMBER_WORDS.items()},
    **dict.fromkeys(REAL_WORDS, ("region", regions.REALS)),
    **dict.fromkeys(EMPTY_WORDS, ("set", ())),
}


def shape(node: Node) -> Shape:
    """The shape of a tree.

    Raises:
        MathError: it has no shape, such as the sum of a matrix and a number.
    """
    match node:
        case ("num" | "dec", _):
            return ("scalar", node)
        case ("unit", value, unit):
            return _measure(shape(value), unit)
        case ("list", how, items):
            return _several(how, [shape(item) for item in progression(items)])
        case ("rel", ops, sides):
            return _relation(ops, sides)
        case ("set", items):
            return ("set", _flat(shape(item) for item in progression(items)))
        case ("seq" | "residue", *_) if "pm" in tree.kinds(node):
            return ("many", "pm", tuple(map(shape, tree.variants(node))))
        case ("seq", *_):
            return _sequence(node)
        case ("setop", op, left, right):
            return _set_operation(op, shape(left), shape(right))
        case ("add", (("domain" | "seq", *_) as left, ("neg", ("set", _) as right))):
            return _set_operation("minus", shape(left), shape(right))
        case ("mul", (("sym", name), ("seq", "(", ")", _) as point)) if len(name) == 1 and name.isupper():
            return ("named", name, _sequence(point), ())  # A(2, -3)
        case ("builder", head, conditions):
            return _builder(head, conditions)
        case ("cases", pieces):
            return ("pieces", _without_otherwise([(shape(a), shape(condition)) for a, condition in pieces]))
        case ("text", words):
            return _SPOKEN.get(words, node)
        case ("domain", name):
            return ("region", regions.DOMAINS[name]) if name in regions.DOMAINS else node
        case ("base" | "dots" | "ratio" | "residue", *_):
            return node
    kind = node[0]
    if (kind == "const" or kind == "neg") and (sign := regions.infinity(node)):
        return ("infinity", sign)
    if kind in _PLAIN or (node[0] == "div" and node[1][0] in _PLAIN and node[2][0] in _PLAIN):
        return ("scalar", node)
    inside = tree.kinds(node)
    if "seq" in inside and kind in ("add", "mul", "neg", "div"):  # (1, 3) + t (2, -1)
        columns = tree.with_columns(node)
        if has(columns, "seq"):
            raise Unparsable("a formula with an interval in it")
        return shape(columns)
    if "pm" in inside:
        return ("many", "pm", tuple(map(shape, tree.variants(node))))
    if "matrix" in inside or "transpose" in inside:
        folded = tree.fold(node)
        return ("matrix", folded[1]) if folded[0] == "matrix" else ("scalar", folded)
    if not inside.isdisjoint(_NOT_IN_FORMULAS):
        raise Unparsable("a formula with a set or a sentence in it")
    if node[0] == "sym" and node[1] in ("", None):
        raise Unparsable("an empty name")
    return ("scalar", node)


def _without_otherwise(pieces: list[tuple[Shape, Shape]]) -> tree.Pieces:
    """Pieces with "otherwise" replaced by what the other conditions leave, if they are about one variable."""
    *others, (value, last) = pieces
    names = {condition[1] for _, condition in others if condition[0] == "named"}
    if last != ("text", "otherwise") or len(names) != 1:
        return tuple(pieces)
    covered = [
        as_region(("set", (inner[2],)) if inner[0] == "named" and inner[2][0] == "scalar" else inner)
        for _, inner in others
    ]
    known = [region for region in covered if region is not None]
    if len(known) < len(covered):
        return tuple(pieces)
    rest: Shape = ("named", names.pop(), ("region", regions.complement(regions.union(*known))), ())
    return (*others, (value, rest))


def _measure(inner: Shape, unit: Unit) -> Shape:
    if unit.words and unit.words <= {"pct", "percent", "percentage"} and inner[0] == "scalar":
        return ("scalar", ("percent", inner[1]))
    if unit.words and unit.dimensions == (("deg", 1),) and inner[0] == "scalar":
        return ("scalar", ("deg", inner[1]))
    return ("measure", inner, unit)


def _sequence(node: tree.Seq) -> Shape:
    items = tuple(shape(item) for item in node[3])
    inner = [item for item in items if item[0] == "seq" and (len(items) == 1 or item[1] == node[1] == "[")]
    if inner and len(inner) == len(items):  # [[1, 2]]
        rows = tuple(tuple(scalar(entry) for entry in item[3]) for item in inner)
        if len({len(row) for row in rows}) == 1:
            return ("matrix", rows)
    return ("seq", node[1], node[2], items)


def _flat(items: Iterable[Shape]) -> tuple[Shape, ...]:
    flat: list[Shape] = []
    for item in items:
        flat.extend(item[2] if item[0] == "many" and item[1] == "pm" else (item,))
    return tuple(flat)


# Relations -------------------------------------------------------------------------------------------


def _relation(ops: tuple[str, ...], sides: tuple[Node, ...]) -> Shape:
    if "~" in ops:  # the side before ≈ is the answer, unless it is only a name
        at = ops.index("~")
        if at == 0 and name_of(sides[0]) is None:
            return shape(sides[0])
        ops, sides = (("=",), sides[:2]) if at == 0 else (ops[:at], sides[: at + 1])
    if any(op in _INEQUALITIES for op in ops):
        return _inequality(ops, sides)
    if name_of(sides[0]) is None and name_of(sides[-1]) is None and "pm" in tree.kinds(sides):
        return ("many", "pm", tuple(map(shape, tree.variants(("rel", ops, sides)))))
    if ops == ("in",):
        names = name_of(sides[0])
        if names is None:
            raise Unsupported("membership of a formula")
        return ("named", ", ".join(names), shape(sides[1]), ())
    if any(op not in ("=", "==") for op in ops):
        raise Unsupported(f"the relation {ops[0]}")
    return _equality(sides)


def _equality(sides: tuple[Node, ...]) -> Shape:
    first: Node = sides[0]
    names = name_of(first)
    if bases := [side for side in sides if side[0] == "base"]:  # 1101_2 = 13_{10}
        others: list[tree.Tree] = [side for side in sides if side[0] not in ("base", "sym")]
        numbers = {*(int(digits, base) for _, digits, base in bases), *(side[1] for side in others)}
        return bases[0] if len(numbers) == 1 else ("contradiction", bases[0])
    match sides[-1]:
        case ("residue", value, modulus) as last if names is None and first[0] in ("num", "neg"):
            remainder: Node = ("fn", "mod", (value, modulus))  # 12 = 5 (mod 7)
            return last if _agree(("fn", "mod", (first, modulus)), remainder) else ("contradiction", last)
    if names is None and len(sides) == 2 and name_of(sides[1]) is not None and sides[1][0] != "mul":
        return _equality((sides[1], sides[0]))
    values: Sequence[Node] = sides[1:] if names else sides
    plain = [side for side in values if not symbols(side) and _is_number(side)]
    is_circular = bool(sides[2:]) and names and any(names[0] in symbols(side) for side in values)
    is_false = is_circular or any(not _agree(plain[0], other) for other in plain[1:])
    if is_false or _is_unlike(sides[:-1], sides[-1]):
        return ("contradiction", shape(sides[-1]))
    if names is None:
        if all(side in plain or side[0] == "unit" for side in sides):
            return shape(sides[-1])
        if has(sides[0], "dots") and len(plain) == len(sides) - 1:  # 1 + 2 + ... + 10 = 55
            return shape(sides[-1])
        if len(sides) != 2 and (sides[0] in plain or len(plain) < len(sides) - 1):  # not a + b = 6 + 8 = 14
            raise Unsupported("a chain of equations")
        left, right = _number(sides[0]), _number(sides[-1])
        is_value = bool(plain) and is_quantity(left) and not _agree(right, ("num", Fraction(0)))
        return ("equation", ("add", (left, ("neg", right))), right if is_value else None)
    value = shape(sides[-1])
    name, *more = names
    if more:
        if value[0] == "seq" and len(value[3]) == len(names):
            return ("assign", tuple(zip(names, value[3], strict=True)))
        return value
    if name.endswith("()") and (first[0] == "call" or first[0] == "fn"):
        return ("named", name, value, names_in(first[2]))
    return ("named", name, value, ())


def _is_unlike(sides: Sequence[Node], last: Node) -> bool:
    """Whether a chain disagrees in its units: 5 cm = 60 mm, 12 = 13 cm, 5 maybe x = 6."""
    end, ending = last[1:] if last[0] == "unit" else (last, None)
    for side in sides:
        value, unit = side[1:] if side[0] == "unit" else (side, None)
        if unit and (unit.is_claim or (ending and ending.dimensions not in (unit.dimensions, None))):
            return True
        scales = (unit.factor, ending.factor) if unit and ending and ending.dimensions else (1, 1)
        scaled = zip((value, end), scales, strict=True)
        pair: list[Node] = [("mul", (x, ("num", Fraction(y)))) for x, y in scaled]
        is_known = _is_number(value) and _is_number(end) and not symbols(value)
        if (unit or ending) and is_known and not _agree(*pair):
            return True
    return False


def _number(node: Node) -> Node:
    return scalar(shape(node))


def _is_number(node: Node) -> bool:
    return not has(node, *_NO_NUMBERS)


def _agree(left: Node, right: Node) -> bool:
    try:
        return same_value(left, right)
    except MathError:
        return False


def _inequality(ops: tuple[str, ...], sides: tuple[Node, ...]) -> Shape:
    """The solutions of a chain, or its links (left - right against 0) if it is not linear in one unknown."""
    try:
        name, region = regions.solve(ops, sides)
        return ("named", name, ("region", region), ()) if name else ("region", region)
    except Unsupported:
        if any(op not in _INEQUALITIES for op in ops):
            raise
    links = zip(ops, sides, sides[1:], strict=False)
    zeros: list[tuple[str, Node]] = [(op, ("add", (_number(a), ("neg", _number(b))))) for op, a, b in links]
    parts: list[Shape] = [("inequality", *pair) for pair in zeros]
    return parts[0] if len(parts) == 1 else ("many", "and", tuple(parts))


# Several items, sets ---------------------------------------------------------------------------------


def _several(how: str, items: list[Shape]) -> Shape:
    flat = list(_flat(items))
    if how == "and" and (measure := compound(flat)) is not None:
        return measure
    rest = flat[1:]
    first = flat[0]
    are_values = bool(rest) and all(item[0] in ("scalar", "dots", "measure") for item in rest)
    match first:
        case ("named", name, ("scalar" | "measure", *_) as value, _) if how != ";" and are_values:
            return ("named", name, ("many", how, (value, *rest)), ())  # n = 1, 2, 3
    if (left_out := _left_out(flat)) is not None:
        return left_out
    named = [(item[1], item[2]) for item in flat if item[0] == "named"]
    if len(named) == len(flat) and first[0] == "named":
        names = {name for name, _ in named}
        if len(names) == 1:
            return ("named", first[1], _joined(how, [value for _, value in named], of_one=True), first[3])
        if len(names) == len(named) and how != "or" and not any(value[0] == "region" for _, value in named):
            return ("assign", tuple((name, _all(value)) for name, value in named))
        first_names = list(dict.fromkeys(name for name, _ in named))
        size = len(first_names)
        if [name for name, _ in named] == first_names * (len(named) // size):  # x = 2, y = 1 or x = 1, y = 2
            parts = [named[at : at + size] for at in range(0, len(named), size)]
            return ("many", "or", tuple(("assign", tuple(part)) for part in parts))
    return _joined(how, [_unnamed(item) for item in flat])


def _all(item: Shape) -> Shape:
    return ("set", item[2]) if item[0] == "many" else item


def _unnamed(item: Shape) -> Shape:
    if item[0] == "assign":
        return ("seq", "(", ")", tuple(value for _, value in item[1]))
    return item[2] if item[0] == "named" else item


def _left_out(items: list[Shape]) -> Shape | None:
    """x != 1, 2: all reals except these."""
    first, *rest = items
    match first:
        case ("named", name, ("region", region), _) if rest and all(item[0] == "scalar" for item in rest):
            points = as_region(("set", tuple(rest)))
            if points is not None and regions.is_finite(regions.complement(region)):
                others = regions.intersection(region, regions.complement(points))
                return ("named", name, ("region", others), ())
    return None


def _joined(how: str, items: list[Shape], *, of_one: bool = False) -> Shape:
    """`of_one`: these are conditions of one variable; a comma is "and", or "or" if that leaves nothing."""
    items = list(_flat(items))
    parts = [item[1] for item in items if item[0] == "region"]
    if parts and len(parts) == len(items) and (of_one or how in ("or", "and")):
        either, both = regions.union(*parts), functools.reduce(regions.intersection, parts)
        return ("region", either if how == "or" or (how != "and" and not both) else both)
    return ("many", how, tuple(items))


def _set_operation(op: str, left: Shape, right: Shape) -> Shape:
    a, b = as_region(left), as_region(right)
    if a is None or b is None:
        return ("setop", op, _unnamed(left), _unnamed(right))
    if op == "minus":
        return ("region", regions.intersection(a, regions.complement(b)))
    return ("region", regions.union(a, b) if op == "cup" else regions.intersection(a, b))


def _builder(first: Node, conditions: Node) -> Shape:
    """{x | x > 2} becomes the solutions of its condition; over the integers it stays a formula."""
    head = first
    rules = conditions[2] if conditions[0] == "list" and conditions[1] != "or" else (conditions,)
    members = tuple(filter(None, map(_membership, rules)))
    others = [rule for rule in rules if _membership(rule) is None]
    if members and head[0] != "sym" and not others:  # {2k | k in Z}
        return ("given", ("set", (shape(head),)), members, ())
    if members and head[0] == "sym" and len(others) == 1 and others[0][:2] == ("rel", ("=",)):
        return ("given", _unnamed(shape(others[0])), members, ())  # {x | x = 2k, k in Z}
    domain = "R"
    match head:
        case ("rel", ("in",), (inner, ("domain", name))):
            domain, head = name, inner
    if head[0] == "sym" and domain in ("R", "C"):
        inner = _unnamed(shape(conditions))
        if inner[0] in ("region", "set", "scalar"):
            return inner if inner[0] != "scalar" else ("set", (inner,))
        if inner[0] == "many":
            return ("set", inner[2])
    return ("builder", first, conditions)


def _membership(rule: Node) -> tuple[str, str] | None:
    """(k, Z) of k in Z."""
    match rule:
        case ("rel", ("in",), (("sym", name), ("domain", domain))):
            return name, domain
    return None
