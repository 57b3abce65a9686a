"""Text -> tokens, in one linear scan. A token is (kind, value, raw text).

Numbers are exact. Outside of brackets "7,425,000" is one number, unless `thousands` is off.
"""

from __future__ import annotations

import re
from fractions import Fraction
from functools import lru_cache
from string import ascii_letters
from typing import Any

from rewards.math.tree import TooComplex, Unparsable, Unsupported
from rewards.math.units import CURRENCIES, is_unit_word, parse_unit
from rewards.math.words import (
    CALCULUS,
    COMMANDS,
    DROPPED,
    FUNCTIONS,
    MATH_STYLES,
    RELATIONS,
    SHORT_WORDS,
    TEXT_STYLES,
    WORDS,
)

Token = tuple[str, Any, str]

MAX_EXPONENT = 5000
_REPEATING = re.compile(
    r"(\d*)\.(\d*)(?:\\(?:overline|bar|dot)\s*(?:\{(\d+)\}|(\d))(?:(\d*)\\dot\s*(?:\{(\d)\}|(\d)))?|\((\d+)\)(?=\s*$))"
)
_TRUNCATED = re.compile(r"(\d*)\.(\d{3,})\s*(?:\\[lc]?dots|\.{3})")
_INSIDE = re.compile(r"(?:[1-9]\d{0,2}(?:(?:\s?\{\s*,\s*\}|,\\!\s*|\\,)\d{3})+(?!\d)|\d+)(\.\d+)?|\.\d+")
_OUTSIDE = re.compile(
    r"(?:[1-9]\d{0,2}(?:(?:\s?\{\s*,\s*\}|,\\!\s*|\\[,;: ]|,|[ ~'])\d{3})+(?!\d)|\d+)(\.\d+)?|\.\d+"
)
_SCIENTIFIC = re.compile(r"[eE]([+-]?\d+)(?![\w.])")
_REST = re.compile(
    r"(?P<space>[\s~]+)|\\(?P<command>[A-Za-z]+)\*?|(?P<word>[A-Za-z]+)|(?P<cjk>[\u3400-\u9fff]+)"
    r"|(?P<relation><=|>=|!=|==|:=|=<|/=|~=|[=<>])|(?P<star>\*\*)|(?P<dots>\.\.\.)|(?P<pm>\+/?-)|(?P<escape>\\.)|(?P<other>.)",
    re.DOTALL,
)
_DIGITS = re.compile(r"[0-9]+")
_CONTINUES = frozenset(",{\\ ~'.eE")
_SEPARATORS = re.compile(r"[^\d.]")
_ESCAPES: dict[str, tuple[str, str]] = {
    **{sign: ("op", sign) for sign in ("\\{", "\\}", "\\\\")},
    **{f"\\{sign}": ("op", sign) for sign in "%_|"},
    **{"\\$": ("cur", "$"), "\\&": ("sep", "and"), "\\#": ("text", "#")},
}
_SINGLE: dict[str, Token] = {sign: ("op", sign, sign) for sign in "()[]{}^_,;|&%'-"}
_SIGNS: dict[str, tuple[str, Any]] = {"star": ("op", "^"), "dots": ("dots", "..."), "pm": ("pm", 1)}
# Signs and letters that stand for themselves unless one of `_GLUED` follows.
_LONE: dict[str, Token] = {
    **{letter: ("sym", letter, letter) for letter in ascii_letters},
    **{letter: ("const", letter, letter) for letter in "ei"},
    **{sign: ("op", sign, sign) for sign in "+*/"},
    **{"=": ("rel", "=", "="), " ": ("space", "", " ")},
}
_GLUED = frozenset(ascii_letters + "/*-<=>")
_OTHERS = frozenset("+-*/^_!',;:|()[]{}&%")
_DEPTH = {"(": 1, "[": 1, "\\{": 1, "<<": 1, ")": -1, "]": -1, "\\}": -1, ">>": -1}
_WORDY = re.compile(r"[A-Za-z]{2,}|[\u3400-\u9fff]")
_BRACED = re.compile(r"\s*\{")
_ARGUMENT = re.compile(r"\s*[\w(\[{\\]")
_SLASH_WORD = re.compile(r"/\s*([A-Za-z]+)")
_THIN_SPACE = re.compile(r"~|\\[,;:! ]|\\cdot(?![a-z])")
_UNIT_GROUP = re.compile(r"(?:\\[,;: ])?([A-Za-z][^{}]{0,40}\^\s*\{-?\d\}[^{}]{0,20})\}")
_LISTED = re.compile(r",\s+(?:and\s+)?|\s+and\s+")  # Alice, Bob and Carol
_JOINED = re.compile(r"([A-Za-z][A-Za-z ]*?),?\s+(and|or)")


def lex(text: str, *, thousands: bool = True, scientific: bool = True, prose: bool = False) -> list[Token]:
    """The tokens of a cleaned text. In `prose`, inside \\text{...}, consecutive letters are one word.

    Raises:
        Unparsable: a character or command cannot be part of an answer.
        TooComplex: a number has more digits or a larger exponent than any answer needs.
    """
    tokens: list[Token] = []
    position, depth, end, modes = 0, 0, len(text), (thousands, scientific)
    while position < end:
        character = text[position]
        if character in _SINGLE:
            tokens.append(_SINGLE[character])
            depth += _DEPTH.get(character, 0)
            position += 1
            continue
        if (lone := _LONE.get(character)) and text[position + 1 : position + 2] not in _GLUED:
            if lone[0] != "space":
                tokens.append(lone)
            position += 1
            continue
        if character in "0123456789.":
            token, after = _number(text, position, thousands and depth == 0, scientific)
            if token is not None:
                tokens.append(token)
                position = after
                continue
        match = _REST.match(text, position)
        assert match is not None
        position = match.end()
        kind, raw = match.lastgroup, match.group()
        if kind == "space":
            continue
        if kind == "command":
            position = _command(match["command"], text, position=position, tokens=tokens, modes=modes)
        elif kind == "word":
            is_last = raw in WORDS and _ARGUMENT.match(text, position) is None
            below = _SLASH_WORD.match(text, position) if len(raw) == 1 and tokens else None
            if below is not None and tokens[-1][0] in ("num", "dec") and is_unit_word(below[1]):  # g/cm^3
                tokens.append(("text", raw, raw))
            else:
                _word(raw, tokens, prose, is_last)
        elif kind == "cjk":
            tokens.append((*WORDS.get(raw, ("text", raw)), raw))
        elif kind == "relation":
            _relation(raw, text, match.start(), tokens)
        elif kind == "escape":
            if raw in _ESCAPES:
                tokens.append((*_ESCAPES[raw], raw))
                depth += _DEPTH.get(raw, 0)
            elif raw not in ("\\,", "\\;", "\\:", "\\!", "\\ ", "\\>", "\\/", "\\-", "\\\n"):
                raise Unparsable(f"{raw!r} is not part of an answer")
        elif kind == "other" and raw in CURRENCIES:
            tokens.append(("cur", raw, raw))
        elif kind == "other" and raw not in _OTHERS:
            raise Unparsable(f"{raw!r} is not part of an answer")
        else:
            depth += _DEPTH.get(raw, 0)
            tokens.append((*_SIGNS.get(kind or "", ("op", raw)), raw))
    return tokens


@lru_cache(maxsize=4096)
def _whole(digits: str) -> Fraction:
    return Fraction(int(digits))


def _number(text: str, position: int, outside: bool, scientific: bool) -> tuple[Token | None, int]:
    plain = _DIGITS.match(text, position)
    if plain is not None and text[plain.end() : plain.end() + 1] not in _CONTINUES:
        raw = plain.group()
        if len(raw) > 4000:
            raise TooComplex(f"a number of {len(raw)} digits")
        return ("num", _whole(raw), raw), plain.end()
    for pattern in (_REPEATING, _TRUNCATED):
        match = pattern.match(text, position)
        if match and (value := _repeating(match) if pattern is _REPEATING else _truncated(match)) is not None:
            return ("num", value, match.group()), match.end()
    match = (_OUTSIDE if outside else _INSIDE).match(text, position)
    if match is None:
        return None, position
    digits, after = _SEPARATORS.sub("", match.group()), match.end()
    if len(digits) > 4000:
        raise TooComplex(f"a number of {len(digits)} digits")
    power = 0
    if scientific and text[after : after + 1] in ("e", "E") and (exponent := _SCIENTIFIC.match(text, after)):
        if len(exponent.group(1)) > 6 or abs(int(exponent.group(1))) > MAX_EXPONENT:
            raise TooComplex(f"the exponent {exponent.group(1)[:20]}")
        power, after = int(exponent.group(1)), exponent.end()
    whole, _, fraction = digits.partition(".")
    power_of_ten = power - len(fraction)
    mantissa = int((whole + fraction) or "0")
    value = Fraction(mantissa * 10 ** max(power_of_ten, 0), 10 ** max(-power_of_ten, 0))
    return ("dec" if fraction or power else "num", value, text[position:after]), after


def _repeating(match: re.Match[str]) -> Fraction | None:
    whole, fixed = match.group(1), match.group(2)
    if match.group(8):  # 0.(3)
        block = match.group(8)
        if not whole or not block:
            return None
    else:  # an overline, or a dot over the first and the last digit of the block
        block = "".join(part or "" for part in match.group(3, 4, 5, 6, 7))
    if len(whole) + len(fixed) + len(block) > 500:
        raise TooComplex("a repeating decimal of more than 500 digits")
    scale = 10 ** len(fixed)
    return Fraction(int((whole + fixed) or "0"), scale) + Fraction(int(block), scale * (10 ** len(block) - 1))


def _truncated(match: re.Match[str]) -> Fraction | None:
    """The number that "0.1666..." stands for: 1/6.

    The repeating block is the shortest that fills the last decimals three times (twice if longer than one).
    """
    digits = match.group(2)
    if len(digits) > 60:
        return None
    for length in range(1, len(digits) // 2 + 1):
        copies = 3 if length == 1 else 2
        for start in range(len(digits) - copies * length + 1):
            tail, block = digits[start:], digits[start : start + length]
            if len(tail) >= copies * length and (block * len(tail))[: len(tail)] == tail:
                scale = 10**start
                whole = int((match.group(1) or "0") + digits[:start])
                return Fraction(whole, scale) + Fraction(int(block), scale * (10**length - 1))
    return None


def _command(name: str, text: str, *, position: int, tokens: list[Token], modes: tuple[bool, bool]) -> int:
    if name in CALCULUS:
        raise Unsupported(f"\\{name} is not worked out")
    if name in COMMANDS:
        tokens.append((*COMMANDS[name], "\\" + name))
        return position
    if name in DROPPED:
        if name in ("left", "right") and text[position : position + 1] == ".":
            return position + 1
        return position
    if name in TEXT_STYLES:
        return _styled(name, text, position=position, tokens=tokens, modes=modes)
    if name == "textcolor":  # \textcolor{red}{7} shows 7
        return text.find("}", position) + 1 or position
    raise Unparsable(f"\\{name[:20]} is not part of an answer")


def _styled(name: str, text: str, *, position: int, tokens: list[Token], modes: tuple[bool, bool]) -> int:
    opening = _BRACED.match(text, position)
    if opening is None:
        return position
    closing = text.find("}", opening.end())
    if closing < 0:
        raise Unparsable("an unclosed brace")
    content = text[opening.end() : closing]
    if "{" in content:  # a style around a formula: read the group alone
        if name.startswith("text"):
            raise Unparsable("a formula inside a text")
        unit = _UNIT_GROUP.match(text, opening.end())
        if unit is None or not tokens or not _ends_value(tokens[-1]) or not _is_unit(unit.group(1)):
            return position
        closing, content = unit.end() - 1, unit.group(1)
    after, word = closing + 1, _THIN_SPACE.sub(" ", content).strip()
    if "\\" in word and name in MATH_STYLES:  # \mathrm{\pi}: read the command alone
        return position
    if name == "mathbb" and word in ("R", "Z", "N", "Q", "C"):
        tokens.append(("domain", word, word))
    elif tokens and _ends_value(tokens[-1]) and text[after : after + 1] != "_" and _is_unit(word):
        tokens.append(("text", word, word))
    elif name in ("mathbf", "boldsymbol", "bm") and word in ("i", "j", "k"):
        tokens.append(("sym", "unit " + word, word))
    elif word in WORDS or (name in ("operatorname", "mathrm") and word in FUNCTIONS):
        kind, value = WORDS.get(word) or ("fn", FUNCTIONS[word])
        tokens.append((kind, value, word))
    elif tokens and _ends_value(tokens[-1]) and (joined := _JOINED.fullmatch(word)):
        tokens.append(("text", joined.group(1), joined.group(1)))
        tokens.append((*WORDS[joined.group(2)], joined.group(2)))
    elif not _WORDY.search(word) or any(character.isdigit() for character in word):
        inside = lex(word, thousands=modes[0], scientific=modes[1], prose=name not in MATH_STYLES)
        tokens.extend(inside if len(inside) < 2 else [("op", "{", "{"), *inside, ("op", "}", "}")])
    elif name == "operatorname":
        tokens.append(("sym", word, word))
    elif word:
        listed = _LISTED.split(word) if not tokens and "{" not in text[after:] else [word]
        for index, each in enumerate(listed):
            tokens.extend([("op", ",", ",")] if index else [])
            tokens.append(("text", each, each))
    return after


def _is_unit(words: str) -> bool:
    return words.lower() in ("am", "pm") or bool(parse_unit(_THIN_SPACE.sub(" ", words)).dimensions)


def _word(word: str, tokens: list[Token], prose: bool = False, is_last: bool = False) -> None:
    """`is_last`: no argument follows, so "min" and "sec" are not functions."""
    if len(word) == 1:
        tokens.append(({"e": "const", "i": "const"}.get(word, "sym"), word, word))
    elif (is_last or word not in WORDS) and tokens and _ends_value(tokens[-1]) and is_unit_word(word):
        tokens.append(("text", word, word))
    elif word in WORDS:
        tokens.append((*WORDS[word], word))
    elif prose or len(word) > 3 or word.lower() in SHORT_WORDS:
        tokens.append(("text", word, word))
    else:
        for letter in word:
            _word(letter, tokens)


def _ends_value(token: Token) -> bool:
    return token[0] in ("num", "dec", "text", "const", "deg") or token[1] in (")", "}", "/")


def _relation(raw: str, text: str, start: int, tokens: list[Token]) -> None:
    if raw == "!=" and start and text[start - 1].isdigit():  # 5!=120
        tokens.append(("op", "!", "!"))
        raw = "="
    tokens.append(("rel", RELATIONS[raw], raw))
