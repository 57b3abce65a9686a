"""Commands with arguments (roots, sums, environments), and the marks after a value (^, _, °)."""

from __future__ import annotations

import re
from fractions import Fraction

from rewards.math.cursor import Grammar
from rewards.math.tree import Node, TooComplex, Unparsable, Unsupported, replaced
from rewards.math.units import parse_unit
from rewards.math.words import split

_MATRICES = split("matrix pmatrix bmatrix Bmatrix smallmatrix array pmatrix* bmatrix*")
_LINES = split("cases aligned align align* split gathered gather* equation equation*")
_PLAIN_ARGUMENT = frozenset(("num", "dec", "sym", "const", "cmd", "open"))
_INVERSE = ["{", "-", "1", "}", "("]
_IF, _OTHERWISE = split("if when for where 当 若"), split("otherwise else 其他 其它")
_ORDINALS = frozenset(f"{{{ending}}}" for ending in ("th", "st", "nd", "rd"))
_TRANSPOSED = ("T", "\\top", "\\intercal", "t")
_BASES = {"two": 2, "three": 3, "eight": 8, "ten": 10, "sixteen": 16}
_OF_SETS = split("max min gcd lcm")
_TOTAL = re.compile(r"(\d{0,4})([a-z])")
_INVERSES = split("asin acos atan acot asec acsc asinh acosh atanh acoth")


def digit_argument(parser: Grammar) -> Node:
    """The argument of \\frac or \\sqrt without braces: one token, and of a number its first digit."""
    kind, value, raw = parser.tokens[parser.at]
    if value == "{" and parser.tokens[parser.at + 1][0] == "num" and parser.tokens[parser.at + 2][1] == "}":
        parser.at += 3
        return ("num", parser.tokens[parser.at - 2][1])
    if kind == "num" and raw.isdigit() and len(raw) > 1:
        parser.tokens[parser.at] = (kind, Fraction(int(raw[1:])), raw[1:])
        return ("num", Fraction(int(raw[0])))
    return parser.atom()


def command(parser: Grammar, name: str) -> Node:
    if name == "frac":
        above = digit_argument(parser)
        below = digit_argument(parser)
        if above == ("sym", "d") and below[0] == "mul" and below[1][0] == above:
            raise Unsupported("a derivative is not worked out")
        return ("div", above, below)
    if name == "binom":
        above = digit_argument(parser)
        return ("fn", "binom", (above, digit_argument(parser)))
    if name == "sqrt":
        degree: Node = ("num", Fraction(2))
        if parser.accept("["):
            degree = parser.sum()
            parser.expect("]")
        return ("fn", "root", (digit_argument(parser), degree))
    if name in ("accent", "vector"):
        letter = raw_argument(parser)
        if letter.strip("\\").removesuffix("math") in ("i", "j", "k"):
            return ("sym", "unit " + letter.strip("\\")[0])
        return ("sym", f"{name} {letter}")
    if name == "begin":
        return environment(parser)
    raise Unparsable(f"\\{name} is out of place")


def raw_argument(parser: Grammar) -> str:
    """The next token or group, as text."""
    if not parser.accept("{"):
        return parser.take()[2]
    pieces, depth = [], 1
    while True:
        kind, value, raw = parser.take()
        if kind == "end":
            raise Unparsable("an unclosed brace")
        depth += {"{": 1, "}": -1}.get(value, 0) if kind == "op" else 0
        if depth == 0:
            return "".join(pieces)
        pieces.append(raw)


def function(parser: Grammar, name: str) -> Node:
    power: Node | None = None
    index: Node | None = None
    while parser.kind() == "op" and parser.value() in ("^", "_"):
        if parser.take()[1] == "^":
            power = ("neg", exponent_value(parser)) if parser.accept("-") else exponent_value(parser)
        else:
            index = digit_argument(parser)
    if power == ("neg", ("num", Fraction(1))) and "a" + name in _INVERSES:
        name, power = "a" + name, None
    if parser.kind() == "rel":  # max = 5
        return ("sym", name)
    arguments = _arguments(parser, name)
    if name == "log" and index is not None:
        arguments = (*arguments, index)
    elif index is not None:
        raise Unsupported(f"{name} with a subscript")
    node: Node = ("fn", name, arguments)
    return ("pow", node, power) if power is not None else node


def _arguments(parser: Grammar, name: str) -> tuple[Node, ...]:
    """A function's arguments: its bracket, or the product up to a sign or function: \\sin 2x \\cos x."""
    if parser.kind() == "op" and (
        parser.value() in ("(", "[", "{") or (parser.value() == "\\{" and name in _OF_SETS)
    ):
        opener = parser.take()[1]
        match node := parser.bracket(opener):
            case ("seq", _, _, items) | ("list", _, items) if items:
                return items
            case ("set", items) if items and opener in ("{", "\\{"):
                return items
        return (node,)
    if parser.accept("-"):
        return (("neg", _arguments(parser, name)[0]),)
    node = parser.power()
    while parser.kind() in _PLAIN_ARGUMENT or (parser.kind() == "op" and parser.value() == "{"):
        if parser.kind() == "cmd" and parser.value() not in ("frac", "sqrt", "binom"):
            break
        node = ("mul", (node, parser.power()))
    return (node,)


def big(parser: Grammar, kind: str) -> Node:
    """\\sum_{k=1}^{n} body, the body up to the next sign."""
    low: Node | None = None
    high: Node | None = None
    for _ in range(2):
        if parser.accept("_"):
            low = parser.atom()
        elif parser.accept("^"):
            high = digit_argument(parser)
    match low:
        case ("rel", ("=",), (("sym" | "const", name) as index, first)) if high is not None:
            parser.descend()
            body = parser.product()
            parser.depth -= 1
            if index == ("const", "i"):  # an index here, not the imaginary unit
                body = replaced(body, ("const", "i"), ("sym", "i"))
            return ("big", kind, name, first, high, body)
    raise Unsupported(f"a {kind} without plain bounds")


def environment(parser: Grammar) -> Node:
    name = raw_argument(parser)
    if name == "array" and parser.value() == "{":
        raw_argument(parser)
    parser.descend()
    rows: list[list[Node]] = [[]]
    while not (parser.kind() == "cmd" and parser.value() == "end"):
        if parser.accept("\\\\"):
            rows.append([])
        elif parser.accept("&") or (parser.kind() == "sep" and parser.take()):
            if parser.kind() == "rel" and rows[-1]:  # x &= 1
                rows[-1].append(parser.relation(rows[-1].pop()))
        elif name in _LINES - {"cases"} and parser.accept(","):
            pass
        elif name == "cases" and (parser.accept(",") or parser.kind() == "text"):
            rows[-1].extend(_spoken_condition(parser))
        elif parser.kind() == "end":
            raise Unparsable(f"{name} is not closed")
        elif len(rows) > 100 or len(rows[-1]) > 100:
            raise TooComplex("a matrix of more than 100 rows or columns")
        else:
            rows[-1].append(parser.relation() if name in _LINES or name == "array" else parser.setop())
    parser.take()
    if raw_argument(parser) != name:
        raise Unparsable(f"{name} is not closed")
    parser.depth -= 1
    rows = [row for row in rows if row]
    is_system = all(cell[0] == "rel" for row in rows for cell in row)
    if (name in _LINES or is_system) and rows and all(len(row) == 1 for row in rows):
        return ("list", "and", tuple(row[0] for row in rows)) if len(rows) > 1 else rows[0][0]
    if name == "cases" and rows and all(len(row) == 2 for row in rows):
        return ("cases", tuple((value, condition) for value, condition in rows))
    if not rows or len({len(row) for row in rows}) != 1:
        raise Unparsable("rows of different lengths")
    if name == "vmatrix":
        return ("fn", "det", (("matrix", tuple(tuple(row) for row in rows)),))
    if name not in _MATRICES:
        raise Unsupported(f"\\begin{{{name[:20]}}}")
    return ("matrix", tuple(tuple(row) for row in rows))


def _spoken_condition(parser: Grammar) -> list[Node]:
    """No node for "if", which a condition follows; "otherwise" is itself a condition."""
    words = parser.take()[2].strip(" ,.").casefold() if parser.kind() == "text" else ""
    if words in _OTHERWISE:
        return [("text", "otherwise")]
    if words and words not in _IF:
        raise Unparsable(f"{words[:20]!r} in a case")
    return []


def exponent(parser: Grammar, base: Node) -> Node:
    braced = parser.value() == "{" and parser.peek(1)[0] == "circ" and parser.peek(2)[1] == "}"
    if braced or parser.kind() == "circ" or (base[0] == "num" and parser.peek()[2] == "o"):
        parser.at += 3 if braced else 1
        is_temperature = parser.peek()[1] in ("C", "F") and parser.peek(1)[0] == "end"
        return ("unit", base, parse_unit("°" + parser.take()[1])) if is_temperature else ("deg", base)
    if parser.value() == "'" or (parser.value() == "{" and parser.peek(1)[1] == "'"):
        primes = raw_argument(parser)
        match base:
            case ("sym", name):
                return ("sym", name + "'" * max(1, primes.count("prime") or primes.count("'")))
            case ("call", name, arguments):
                return ("call", name + "'" * max(1, primes.count("prime") or primes.count("'")), arguments)
        raise Unsupported("primes on a number")
    mark = parser.peek(1)[2] if parser.value() == "{" else parser.peek()[2]
    match base:
        case ("domain", name):
            return _marked_domain(name, raw_argument(parser))
        case ("num", _) if "".join(parser.peek(ahead)[2] for ahead in range(4)) in _ORDINALS:
            raw_argument(parser)  # 5^{th}
            return base
        case ("sym", "f" | "g" | "h" as name) if [parser.peek(ahead)[2] for ahead in range(5)] == _INVERSE:
            parser.at += 4  # f^{-1}(x): the inverse of f
            return parser.named(name + "^{-1}")
        case ("matrix", _) | ("seq", _, _, ()) if mark in _TRANSPOSED:
            raw_argument(parser)
            return ("transpose", base)
        case ("seq", _, _, row) if mark in _TRANSPOSED:
            raw_argument(parser)
            return ("matrix", tuple((entry,) for entry in row))
        case ("sym", name) if parser.kind() == "op" and parser.value() in ("*", "+"):
            return ("sym", f"{name}^{raw_argument(parser)}")
    if parser.kind() == "op" and parser.value() in ("*", "+"):
        raise Unparsable("a mark on a value")
    parser.descend()
    power = ("neg", exponent_value(parser)) if parser.accept("-") else exponent_value(parser)
    parser.depth -= 1
    if base[0] == "sym" and base[1][1:2] == "_" and (chosen := _chosen(base[1][0], base[1][2:], power)):
        return chosen
    return ("pow", base, power)


def _chosen(letter: str, total: str, picked: Node) -> Node | None:
    """The node of C_8^3 or A_8^3 (Chinese: combinations, permutations of 3 out of 8); None for others."""
    name = {"C": "binom", "A": "perm"}.get(letter)
    match picked:
        case ("sym" | "num", _) if name and (found := _TOTAL.fullmatch(total)):  # C_{2n}^n
            return ("fn", name, (("mul", (("num", Fraction(found[1] or 1)), ("sym", found[2]))), picked))
        case ("num", value) if name and total.isascii() and total.isdigit() and value <= int(total[:9]):
            return ("fn", name, (("num", Fraction(int(total[:9]))), picked))
    return None


def _marked_domain(name: str, mark: str) -> Node:
    """R^+, N^*, Z_+: the positive numbers of a domain."""
    if mark in ("+", "*", "{+}", "{*}", ">0") and (mark[-1] in "+0" or name != "R"):
        return ("domain", "Z+" if name in "NZ" else f"{name}+")
    if name == "R" and mark.replace("{", "") in ("\\ge0", "\\geq0", "\\geqslant0"):
        return ("seq", "[", ")", (("num", Fraction(0)), ("const", "inf")))
    return ("sym", f"{name}^{mark}")


def exponent_value(parser: Grammar) -> Node:
    """The exponent after ^: all of the 10 in x^10, though TeX raises only the 1; 2^3^2 is 2^(3^2)."""
    node = parser.atom()
    if node[0] == "digits":  # x^2_i: the index belongs to x
        node = ("num", node[2])
    if parser.accept("^"):
        parser.descend()
        node = exponent(parser, node)
        parser.depth -= 1
    if parser.accept("!"):
        node = ("fact", node)
    return node


def subscript(parser: Grammar, node: Node) -> Node:
    index = raw_argument(parser)
    match node:
        case ("num", value) if value >= 0 and value.denominator == 1:  # (1101)_2
            node = ("digits", str(int(value)), value)
    match node:
        case ("digits", raw, value):
            base = _BASES.get(index.strip(), int(index) if index.isdigit() and len(index) < 3 else 0)
            if not 2 <= base <= 36:
                raise Unparsable(f"the base {index[:20]!r}")
            return ("base", raw, base) if base != 10 else ("num", value)
        case ("pow", ("sym", name), power):  # x^2_i
            return _chosen(name, index, power) or ("pow", ("sym", f"{name}_{index}"), power)
        case ("domain", name):
            return _marked_domain(name, index)
        case ("sym" | "text", name) | ("fn" | "call", name, _) | ("mul", name):
            return ("sym", f"{name}_{index}")
    raise Unparsable("a subscript on a value")


def read_mixed(parser: Grammar, factors: list[Node]) -> Node:
    """Reads the fraction of a mixed number such as 2 1/3."""
    match factors, parser.peek(), parser.peek(1), parser.peek(2):
        case [("num", whole)], ("num", top, _), (_, "/", _), ("num", bottom, _) if 0 < top < bottom:
            parser.at += 3
            return ("num", whole + top / bottom)
    raise Unparsable("two numbers without an operator")


def as_mixed(node: Node, right: Node) -> Node:
    """2\\frac{1}{3} is 7/3 if the fraction is proper and of integers; otherwise it is a product."""
    match right:
        case ("percent" | "deg" as mark, inner):
            return (mark, as_mixed(node, inner))
        case ("div", ("num", above), ("num", below)) if 0 < above < below:
            match node:
                case ("num", whole) if whole.denominator == 1:
                    return ("num", whole + above / below)
                case ("neg", ("num", whole)) if whole.denominator == 1:
                    return ("neg", ("num", whole + above / below))
    return ("mul", (node, right))
