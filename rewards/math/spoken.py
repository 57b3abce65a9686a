"""Answers written as people speak -> LaTeX: dates, numbers in words, USD 100, 1 h 30 min, 5'4", base 2, noon.

Every rule is one pass of a compiled pattern over a short text.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any

from rewards.math.units import is_unit_word
from rewards.math.words import NUMBER_WORDS, WORDS

_TEXT = re.compile(r"\\(?:text(?:bf|rm|it)?|mathrm|mbox)\s*\{([^{}]*)\}")
_GAP = r"(?:\s|~|\\[,;:! ])*"
_STYLED = r"(?:\\(?:text|mathrm)\s*\{\s*)?"
_BUT = r"(?:all|any|every) real(?:s| numbers?)?,? (?:x )?(?:except(?: for)?|but|other than)"
_HOURS = re.compile(rf"(?<=\d){_GAP}h(?:rs?)?{_GAP}(\d+){_GAP}m(?:ins?)?(?![A-Za-z])")
_NEXT = r"(?=[-+]?(?:\d|\\pm|\\[dt]?frac|\\sqrt|\(|[A-Za-z]\w?\s*(?:_\{?\w\}?)?\s*(?:=|<|>|\\in|\\[lg]e)))"
# What a text has to hold :: pattern => what it becomes. From ^ on: about the whole answer, without styles.
_TABLE = r"""
&lt; :: &lt; => <
&gt; :: &gt; => >
quad :: (?<=[\w)}\]])\s*\\q?quad\s*NEXT => , 
'' :: (?<=\d)'\s*(\d+)\s*'' => \\text{ ft }\1\\text{ in}
circ :: (\d+)\s*\^\s*\{?\\circ\s*\}?GAP(\d+)\s*(?:'|\^\s*\{?\\prime\s*\}?)(?!') => (\1+\\frac{\2}{60})^\\circ 
\mu :: \\muGAPSTYLED([mgslLFCAVWJNTΩ])\}?(?![A-Za-z]) => \\text{µ\1}
Omega :: (?<=\d)GAPSTYLED([kM]?)\}?GAP\\Omega\b\s*(?=$|[,;.}]) => \\text{ \1Ω}
C :: (?:\{\s*\}|(?<![\w)}\]'\s|]))[_^]\s*\{?(\w+)\}?\s*\\?(?:mathrm)?\{?C\}?_\{?(\w+)\}? => \\binom{\1}{\2}
angle :: (?<=\d)\s*\\angle\s*(?=-?(?:\d|\\[dt]?frac|\\pi)) => \\operatorname{cis}
underbrace :: \\underbrace\s*(\{.*\})_\s*\{(?:[^{}]|\{[^{}]*\})*\} => \1
overset :: \\overset\s*\{[^{}]*\} => 
\math :: \\math(?:bf|rm)\{(\d)\}(?=\d) => \1
/_ :: ^\^\{?(\w)\}?/_\{?(\w)\}?$ => \\frac{\1}{\2}
out of :: ^(\d+) out of (\d+)$ => \\frac{\1}{\2}
in :: ^(\d+) in (\d+)$ => \\frac{\1}{\2}
the year :: ^the year (\d{1,4})$ => \1
D :: ^(\d{1,4}) ?A\.? ?D\.?$ => \1
# :: ^\\?#\s*(\w+)\s*= => |\1|=
real :: ^BUT (?:x ?= ?)?(.+)$ => \\mathbb{R}\\setminus\\{\1\\}
only :: ^([IV]+) only$ => \1
noon :: ^(?:12 )?noon$ => 12:00\\text{ pm}
midnight :: ^(?:12 )?midnight$ => 12:00\\text{ am}
. :: ^(\d{1,3})\.(\d{3})\.(\d{3})$ => \1\2\3
: :: ^(\d{1,2})\s*:\s*(0[1-9])$ => \1:\2\\text{ time}
0b :: ^0b([01]+)$ => \1_2
"""
_RULES: list[tuple[str, re.Pattern[str], str]] = []
_PLACES = {"GAP": _GAP, "STYLED": _STYLED, "NEXT": _NEXT, "BUT": _BUT}
for _line in re.sub("GAP|STYLED|NEXT|BUT", lambda match: _PLACES[match.group()], _TABLE).strip().split("\n"):
    _key, _pattern, _replacement = re.split(" :: | => ?", _line)
    _RULES.append((_key, re.compile(_pattern), _replacement))
_CODE = re.compile(rf"^(USD|EUR|GBP|INR|CNY|RMB|Rs|US\s*\\?\$)\.?{_GAP}(?=[\d.])(.*)$")
_BASED = re.compile(r"([0-9A-Z]{1,400})(?:_(?:base-?)?|(?:in)?base-?)(\d\d?|[a-z]+)")
_WRAPPING = re.compile(r"\\(?:text|mathrm)(?=\{)|\\[,;! ]|[{}()\s]")
_PROSE = re.compile(r"[A-Za-z]+(?: [A-Za-z]+)+")
_CONNECTIVES = frozenset(("or", "and", "equals", "to", "maybe"))
_NAMES = "january february march april may june july august september october november december"
_MONTHS = {key: n for n, m in enumerate(_NAMES.split(), 1) for key in (m, m[:3], m[:4], f"{n:02}")}
_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_DATE = re.compile(
    r"^(?:([A-Z][a-z]{2,8})\.? (\d{1,2})(?:st|nd|rd|th)?(?:,? (\d{4}))?"
    r"|(\d{1,2})(?:st|nd|rd|th)?(?: of)? ([A-Z][a-z]{2,8})\.?(?:,? (\d{4}))?|(\d{4})-([01]\d)-([0-3]\d))$"
)
_LETTERS = str.maketrans("0123456789", "abcdefghij")  # a date is a word to the lexer
_TEN_NAMES = "twenty thirty forty fifty sixty seventy eighty ninety"
_TENS = {name: 10 * ten for ten, name in enumerate(_TEN_NAMES.split(), 2)}
_SMALL = {**NUMBER_WORDS, **_TENS, "a": 1, "an": 1}
_AND = re.compile(r"\b(hundred|thousand|million) and\b")
_SCALES = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9}
_PARTS = {"half": 2, "third": 3, "quarter": 4, "fourth": 4, "fifth": 5, "sixth": 6, "seventh": 7, "eighth": 8}
_PARTS |= {"ninth": 9, "tenth": 10, "hundredth": 100, "halve": 2}
_CJK_DIGITS, _CJK_SCALES = "零一二三四五六七八九", {"十": 10, "百": 100, "千": 1000}
_CJK_NUMBER = re.compile("^(?:([零一二三四五六七八九十百千]+)分之)?([零一二三四五六七八九十百千]+)$")


def respelled(text: str) -> str:
    """A cleaned answer with what is spoken in it spelled as LaTeX."""
    if len(text) > 200 or text.isdigit():
        return text
    is_formula = "\\" in text and "\\text" not in text and "\\m" not in text
    words = text if is_formula else _TEXT.sub(r"\1", text).strip(" .")
    if "h" in text and "m" in text:
        text = _HOURS.sub(r"\\text{ h }\1\\text{ min}", text)
    for key, pattern, replacement in _RULES:
        if key in text:
            is_whole = pattern.pattern[0] == "^"
            found, count = pattern.subn(replacement, words if is_whole else text)
            if count and is_whole:
                return found
            text = found if count else text
    if not text.isascii() and (number := _cjk_number(words)):
        return number
    if words[:1].isupper() and (code := _CODE.match(words)):
        return f"{code[2]}\\text{{ {code[1].replace('US$', '$')} }}"
    if is_formula:
        return text
    if words.replace(" ", "").replace("-", "").isalpha() and (number := _number_in_words(words)):
        return number
    return (_date(words) if words[-1:].isalnum() and len(words) > 2 else None) or text


def _number_in_words(words: str) -> str | None:
    """one hundred and five -> 105; three quarters -> \\frac{3}{4}."""
    pieces = _AND.sub(r"\1", words.casefold()).replace("-", " ").split()
    bottom = _PARTS.get(pieces[-1].rstrip("s")) if len(pieces) > 1 else None
    if bottom is not None:
        pieces = pieces[:-1]
    total = current = 0
    if pieces in (["a"], ["an"]) and bottom is None:
        return None
    for piece in pieces:
        small, rest = _SMALL.get(piece), current % 100
        if small is not None and (rest == 0 or (small < 10 < rest and rest % 10 == 0)):
            current += small
        elif piece in _SCALES and current:
            current *= _SCALES[piece]
            if _SCALES[piece] > 100:
                total, current = total + current, 0
        else:
            return None
    return str(total + current) if bottom is None else f"\\frac{{{total + current}}}{{{bottom}}}"


def _cjk_number(words: str) -> str | None:
    """四十五 -> 45; 二分之一 -> \\frac{1}{2}; 百分之五 -> 5\\%."""
    found = _CJK_NUMBER.match(words.replace("两", "二").replace("〇", "零"))
    if found is None:
        return None
    bottom, top = (_cjk_value(group) if group else 1 for group in found.groups())
    return f"{top}\\%" if found[1] == "百" else f"\\frac{{{top}}}{{{bottom}}}" if found[1] else str(top)


def _cjk_value(words: str) -> int:
    total = digit = 0
    for character in words:
        if scale := _CJK_SCALES.get(character):
            total, digit = total + max(digit, 1) * scale, 0
        else:
            digit = 10 * digit + _CJK_DIGITS.index(character)  # 二零二四 is 2024
    return total + digit


def _date(words: str) -> str | None:
    """July 4 and 4th of July as one text; Mon as Monday."""
    if (found := _DATE.match(words)) is None:
        days = [day for day in _DAYS if words.rstrip(".") in (day[:3], day[:4])]
        return f"\\text{{{days[0]}}}" if days else None
    group = found.groups(default="")
    month, day = _MONTHS.get((group[0] + group[4] + group[7]).casefold()), int(group[1] + group[3] + group[8])
    date = f"{group[2] + group[5] + group[6]} {month} {day}".translate(_LETTERS)
    return f"\\text{{date {date}}}" if month else None


def is_prose(text: str) -> bool:
    """Whether an answer is several words, one of them at least neither mathematics nor a unit."""
    words = text.casefold().split() if _PROSE.fullmatch(text) else []
    long = (word for word in words if len(word) > 3 and word not in WORDS and not is_unit_word(word))
    return _CONNECTIVES.isdisjoint(words) and any(long)


def number_in_base(text: str) -> Any:
    """2A_{16}, \\text{2A}_{16}, 1011_{(2)}, 61_{eight}, 1101 (base 2): a whole answer in a base."""
    found = _BASED.fullmatch(_WRAPPING.sub("", text))
    if found is None:
        return None
    digits, index = found.groups()
    base = NUMBER_WORDS.get(index) or (int(index) if index.isdigit() else 0)
    if not 2 <= base <= 36 or any(int(digit, 36) >= base for digit in digits):
        return None
    is_number = digits[0].isdigit() or len(digits) > 1
    value = ("num", Fraction(int(digits))) if base == 10 else ("base", digits, base)
    return value if is_number else None
