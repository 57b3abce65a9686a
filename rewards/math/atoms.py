"""Grammar rules that start with a token of their own: brackets, roots, functions, sums, matrices, sets."""

from __future__ import annotations

from rewards.math.constructs import big, command, function, raw_argument
from rewards.math.cursor import Grammar
from rewards.math.tree import Applied, Named, Node, Nodes, Unparsable

_CLOSERS = {"(": (")", "]"), "[": (")", "]", "["), "<<": (">>",), "]": ("[", ")", "]")}
# `a(b + c)` is a product, `f(x)` an application.
_FUNCTION_LETTERS = frozenset("fgh")
_CHOICES = {"C": "binom", "P": "perm"}
_PAIR = (["op", "num", "op", "num", "op"], ["op", "sym", "op", "sym", "op"])


def atom(parser: Grammar) -> Node:
    kind, value, raw = parser.take()
    if kind == "num":
        return ("num", value) if parser.value() != "_" else ("digits", raw, value)
    if kind == "dec":
        return ("dec", value)
    if kind == "const" or kind == "domain":
        return ("const", value) if kind == "const" else ("domain", value)
    if kind == "sym":
        return symbol(parser, value)
    if kind == "fn":
        return function(parser, value)
    if kind == "cmd":
        return command(parser, value)
    if kind == "open":
        return _rounded(parser, value)
    if kind == "op":
        return bracket(parser, value)
    if kind == "big":
        return big(parser, value)
    if kind == "set0":
        return ("set", ())
    if kind == "cur":
        parser.currency = raw
        return parser.atom()
    if kind == "prefix":
        return _named_figure(parser, value)
    if kind == "dots":
        return ("dots",)
    raise Unparsable(f"{raw[:20]!r} where a value should be" if raw else "the answer ends too early")


def bracket(parser: Grammar, opener: str) -> Node:
    if opener == "|":
        return _absolute(parser)
    if opener == "\\{":
        return _set(parser, "\\}")
    if opener == "{" and _is_builder(parser):
        return _set(parser, "}")
    if opener not in ("(", "[", "{", "<<", "]"):
        raise Unparsable(f"{opener!r} where a value should be")
    parser.descend()
    bars, parser.bars = parser.bars, 0
    builder, parser.in_builder = parser.in_builder, False
    if opener == "{":
        node = _group(parser)
    else:
        closers = _CLOSERS[opener]
        inside = parser.items(closers)
        closer = parser.take()[1]
        if closer == "" and opener == "(" and inside[0] == "list" and parser.tokens[parser.at - 1][1] != ",":
            closer = ")"  # an unclosed (1, 2 ends with the answer
        if closer not in closers:
            raise Unparsable(f"{opener!r} is not closed")
        opener, closer = ("(", closer) if opener == "]" else (opener, closer)
        closer = ")" if closer == "[" else closer
        if inside[0] == "list":
            node = ("seq", opener, closer, inside[2])
        elif inside[0] == "seq" and opener == "[" and inside[1] == "[":
            node = ("seq", opener, closer, (inside,))
        else:
            node = inside
    parser.depth, parser.bars, parser.in_builder = parser.depth - 1, bars, builder
    return node


def _group(parser: Grammar) -> Node:
    """{...}: a group, {a \\over b}, {n \\choose k}; with commas, a set without its backslashes."""
    if parser.accept("}"):
        return ("text", "") if parser.kind() == "end" else parser.atom()
    node = parser.items(("}",))
    if parser.kind() == "cmd" and parser.value() in ("over", "choose"):
        name = parser.take()[1]
        below = parser.items(("}",))
        node = ("div", node, below) if name == "over" else ("fn", "binom", (node, below))
    parser.expect("}")
    return ("set", node[2]) if node[0] == "list" and node[1] in (",", ";") else node


def _absolute(parser: Grammar) -> Node:
    parser.descend()
    parser.bars += 1
    node = parser.sum()
    parser.bars -= 1
    parser.depth -= 1
    parser.expect("|")
    return ("fn", "abs", (node,))


def _rounded(parser: Grammar, name: str) -> Node:
    parser.descend()
    bars, parser.bars = parser.bars, 0
    node = parser.sum()
    parser.depth, parser.bars = parser.depth - 1, bars
    if parser.take()[:2] != ("close", name):
        raise Unparsable(f"an unclosed {name}")
    return ("fn", name, (node,))


def _is_builder(parser: Grammar) -> bool:
    """Whether braces that lost their backslashes hold a set such as {x | x > 2}."""
    bar = parser.peek(1)[1] in ("|", ":") and not parser.bars and not parser.in_builder
    return bar and parser.kind() == "sym" and parser.peek(2)[0] == "sym" and parser.peek(3)[0] == "rel"


def _set(parser: Grammar, closer: str) -> Node:
    """\\{1, 2\\}, \\{x | x > 2\\}, \\{x \\in \\mathbb{R} : x > 2\\}, \\{\\}."""
    if parser.accept(closer):
        return ("set", ())
    parser.descend()
    outer, parser.in_builder = parser.in_builder, True
    bars, parser.bars = parser.bars, 0
    node = parser.items((closer,))
    parser.in_builder = outer
    if parser.accept("|") or parser.accept(":"):
        conditions = parser.items((closer,))
        node = ("builder", node, conditions)
    else:
        node = ("set", node[2] if node[0] == "list" else (node,))
    parser.depth, parser.bars = parser.depth - 1, bars
    parser.expect(closer)
    return node


def symbol(parser: Grammar, name: str) -> Named | Applied:
    """A variable, a function's value f(2), or a quantity such as P(A | B) before its equals sign."""
    while parser.kind() == "op" and parser.value() in ("_", "'"):
        name += "_" + raw_argument(parser) if parser.take()[1] == "_" else "'"
    if parser.kind() != "op" or parser.value() not in ("(", "["):
        return ("sym", name)
    if name.isupper() and (said := _statement(parser)):
        return ("sym", name + said)
    if name in _CHOICES and [parser.peek(ahead)[0] for ahead in range(5)] in _PAIR:
        is_named = parser.peek(1)[0] == "sym" and (name == "P" or parser.peek(5)[0] == "rel")
        if parser.peek(2)[1] == "," and parser.peek(4)[1] == ")" and not is_named:  # C(8, 3)
            return ("fn", _CHOICES[name], _entries(bracket(parser, parser.take()[1])))
    at_zero = parser.peek(1)[:2] == ("num", 0) and parser.peek(2)[1] == ")"  # I(0) is not a product
    if parser.value() == "(" and (name[0] in _FUNCTION_LETTERS or at_zero or _is_definition(parser)):
        return ("call", name, _entries(bracket(parser, parser.take()[1])))
    return ("sym", name)


def _entries(node: Node) -> Nodes:
    return node[3] if node[0] == "seq" else (node,)


def _statement(parser: Grammar) -> str:
    """The event of a probability, (X = 1), (A | B) or (win), if an equals sign follows; else ""."""
    depth, said = 0, False
    for ahead in range(40):
        kind, value, _ = parser.peek(ahead)
        depth += (value in ("(", "[")) - (value in (")", "]"))
        said = said or kind in ("rel", "text", "setop", "sep") or value == "|"
        if depth == 0:
            if not said or parser.peek(ahead + 1)[0] != "rel":
                return ""
            return "".join(parser.take()[2] for _ in range(ahead + 1))
    return ""


def _is_definition(parser: Grammar) -> bool:
    """Whether W(n) = ... follows: a letter that starts a side, a bracket, and then a relation."""
    if parser.at >= 2 and parser.peek(-2)[0] not in ("sep", "rel") and parser.peek(-2)[1] not in (",", ";"):
        return False
    for ahead in range(1, 12):
        if parser.peek(ahead)[1] == ")":
            return parser.peek(ahead + 1)[0] == "rel" and ahead > 1
    return False


def _named_figure(parser: Grammar, prefix: str) -> Node:
    """Reads \\angle ABC or \\triangle ABC as a name."""
    name = ""
    while parser.kind() == "sym":
        name += symbol(parser, parser.take()[1])[1]
    name = min(name, name[::-1]) if prefix == "angle" and name.isalpha() else name  # ABC is CBA
    return ("sym", f"{prefix} {name}")
