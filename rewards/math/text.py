"""Unicode, currency, styling and spoken words -> plain ASCII LaTeX (plus CJK text) for the lexer.

Everything here is a single pass of a compiled pattern over the text, so the time is linear in its length.
"""

from __future__ import annotations

import re
from fractions import Fraction
from functools import lru_cache

from rewards.math.tree import Node
from rewards.math.units import is_unit_word
from rewards.math.words import INTRODUCTIONS, NUMBER_WORDS, TRANSLATION, WORDS

_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ⁽⁾", "0123456789+-n()")
_SUBSCRIPTS = str.maketrans("₀₁₂₃₄₅₆₇₈₉₊₋ₙ", "0123456789+-n")
_SUPERSCRIPT_RUN = re.compile("[⁰¹²³⁴-⁹⁺⁻ⁿ⁽⁾]+")
_SUBSCRIPT_RUN = re.compile("[₀-₉₊₋ₙ]+")
_MIXED_UNICODE = re.compile("(?<=[0-9])(?=[½⅓⅔¼¾⅕⅛])")
_BARE_ROOT = re.compile(r"√\s*(\d+)")
_DISPLAY = re.compile(r"(?<!\\)\\[\[\]()]")
_INVISIBLE_COMMANDS = re.compile(r"\\[hv]?(?:phantom|tag|label|space|color)")
_INVISIBLE = re.compile(r"\\(?:[hv]?phantom|tag\*?|label|[hv]space\*?|color)\s*\{[^{}]*\}")
_TIMES_X = re.compile(r"(?<=\d)\s*[xX]\s*(?=10\s*\^)")
_CUP_U = re.compile(r"(?<=[)\]}])\s*U\s*(?=[(\[\\])")
_RARE = re.compile(r"implies|Right|Longright|mod|\{:\}|prime|\. ?[mM]")
_IMPLIES = ("\\implies", "\\Rightarrow", "\\Longrightarrow")
_MODULO = re.compile(r"\(\s*(?:\\text\s*\{\s*|\\[bp]?)?mod(?:ulo)?\s*\}?\s*(\w{1,9})\s*\)")
_PRIMES = re.compile(r"\^\s*(?:\\prime(?![a-z])|\{\s*(?:\\prime\s*){1,3}\})")
_MERIDIEM = re.compile(r"(?<![A-Za-z])([apAP])\. ?[mM](?![A-Za-z])\.?")
_GLUED_OR = re.compile(r"(?<=[\d)}])\s*(or|and)(?=\s*[A-Za-z]\s*[=(<>])")
_DOLLAR_AMOUNT = re.compile(r"\\?\$\s*(?=[\d.])|(?<=\d)\s*\\?\$")
_FEET = re.compile(r"(?<=\d)'\s*(\d+)\s*\"")
_GLUED_COMMAND = re.compile(r"\\(q?quad)(?=[a-z])")
_TAIL = " \t\r\n.,;:!\\~"


def ascii_math(text: str) -> str:
    """`text` with its Unicode mathematics spelled in LaTeX. CJK characters stay."""
    if text.isascii():
        return text
    text = _MIXED_UNICODE.sub(" ", text)
    text = _BARE_ROOT.sub(r"\\sqrt{\1}", text)
    text = _SUPERSCRIPT_RUN.sub(lambda match: "^{" + match.group().translate(_SUPERSCRIPTS) + "}", text)
    text = _SUBSCRIPT_RUN.sub(lambda match: "_{" + match.group().translate(_SUBSCRIPTS) + "}", text)
    return text.translate(TRANSLATION)


@lru_cache(maxsize=4096)
def clean(text: str) -> str:
    """One answer without delimiters, styling, invisible content and a final full stop.

    Paired dollar signs are delimiters; a single one beside a number is the currency.
    """
    text = ascii_math(text)
    if '"' in text:
        text = _FEET.sub(r"'\1''", text).replace('\\"', " ").replace('"', " ")
    if "\\" in text:
        if "\\(" in text or "\\[" in text or "\\)" in text or "\\]" in text:
            text = _DISPLAY.sub(" ", text)
        if "{" in text and _INVISIBLE_COMMANDS.search(text):
            text = _INVISIBLE.sub("", text)
        if "quad" in text:
            text = _GLUED_COMMAND.sub(r"\\\1 ", text)
    if "$" in text:
        text = _without_delimiters(text)
    if "x" in text or "X" in text:
        text = _TIMES_X.sub(r"\\times ", text)
    if "U" in text:
        text = _CUP_U.sub(r"\\cup ", text)
    if _RARE.search(text):
        for sign in _IMPLIES:  # of a => b, b is the answer
            text = text.rpartition(sign)[2]
        text = _MODULO.sub(r"\\pmod{\1}", text.replace("{:}", ":"))
        text = _PRIMES.sub(lambda match: "'" * match.group().count("prime"), text)
        text = _MERIDIEM.sub(r"\1m", text)
    if "or" in text or "and" in text:
        text = _GLUED_OR.sub(lambda match: r" \lor " if match.group(1) == "or" else r" \land ", text)
    return respelled(_strip(text))


def _without_delimiters(text: str) -> str:
    delimiters = text.count("$") - text.count("\\$")
    if delimiters % 2 == 0 and delimiters:
        text = text.replace("\\$", "\0").replace("$", " ").replace("\0", "\\$")
    if "$" in text:
        text = _DOLLAR_AMOUNT.sub(r"\\$", text)
        if "\\$" not in text:
            text = text.replace("$", " ")
    return text


_FACTORIAL_END = re.compile(r"(?:[\d)}]|(?<![A-Za-z])[A-Za-z])$")


def _strip(text: str) -> str:
    text = text.strip().strip("`").lstrip("*").lstrip(" \t\r\n,;:~")
    if text[-1:] == "*" and text[-2:-1] != "^":
        text = text.rstrip("*")
    if text[:1] == text[-1:] == "'":
        text = text.strip("'")
    stripped = text.rstrip(_TAIL)
    tail = text[len(stripped) :]
    if tail.startswith("...") or (tail.startswith("!") and _FACTORIAL_END.search(stripped)):
        return stripped + (tail[:3] if tail[0] == "." else "!!" if tail[:2] == "!!" else "!")
    return stripped


_STYLE = re.compile(
    r"\\(?:text(?:bf|it|rm|sf|tt|normal|up|md)?|mathrm|mathbf|mathit|mathsf|mathtt|mbox|hbox|operatorname|boldsymbol|bm|emph)"
    r"\s*\*?\{([^{}]*)\}"
)
_SPACES = re.compile(r"(?:\\[,;:!> ]|[\s~]|\\q?quad(?![a-zA-Z]))+")
_ARTICLE = re.compile(r"^(?:an?|the|on|in|at) (?=[a-z]{3})")
_NOUN = re.compile(r"(?<=[a-z]) (?:conditions?|triangles?)$")
_ORDINAL = re.compile(r"(?<=\d)(?:st|nd|rd|th)(?![a-z])")
_SYNONYMS = {"dne": "does not exist", "infinitely many solutions": "infinitely many"}
_FILLING = re.compile(r"^(?:there (?:is|are)|the limit) ")
_LOOSE_SPACE = re.compile(r"(?<!\w) | (?!\w)")


def text_key(text: str) -> str:
    """The key for comparing text: without styling, case, repeated blanks and surrounding punctuation.

    A single letter keeps its case: `x` and `X` are different variables.
    """
    text = clean(text)
    for _ in range(3):
        text, count = _STYLE.subn(r"\1", text)
        if not count:
            break
    text = _SPACES.sub(" ", text).strip(_TAIL + "\"'")
    text = _NOUN.sub("", _LOOSE_SPACE.sub("", text))
    if len(text) < 2:
        return text
    key = _ARTICLE.sub("", _FILLING.sub("", _ORDINAL.sub("", text.casefold())))
    return _SYNONYMS.get(key, key)


def introduces(words: str) -> bool:
    """Whether a text only introduces the value after it: "the answer is", "approximately", "答案是"."""
    key = text_key(words)
    if key.endswith(("是", "为", "等于", "：", "约", "共有", "共")) and not any(
        no in key for no in ("不", "非", "或", "没")
    ):
        return True
    return all(word in INTRODUCTIONS for word in key.replace(":", " ").split())


# Answers written as people speak: dates, numbers in words, USD 100, 1 h 30 min, 5'4", base 2, noon ----------

_TEXT = re.compile(r"\\(?:text(?:bf|rm|it)?|mathrm|mbox)\s*\{([^{}]*)\}")
_GAP = r"(?:\s|~|\\[,;:! ])*"
_STYLED = r"(?:\\(?:text|mathrm)\s*\{\s*)?"
_BUT = r"(?:all|any|every) real(?:s| numbers?)?,? (?:x )?(?:except(?: for)?|but|other than)"
_HOURS = re.compile(rf"(?<=\d){_GAP}h(?:rs?)?{_GAP}(\d+){_GAP}m(?:ins?)?(?![A-Za-z])")
_NEXT = r"(?=[-+]?(?:\d|\\pm|\\[dt]?frac|\\sqrt|\(|[A-Za-z]\w?\s*(?:_\{?\w\}?)?\s*(?:=|<|>|\\in|\\[lg]e)))"
# Required substring :: pattern => replacement. Patterns with ^ match the whole answer, without styles.
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
overset :: \\overset\s*\{\s*(?:\\[a-z]+|[^{}\w\\]+)\s*\} => 
\math :: \\math(?:bf|rm)\{(\d)\}(?=\d) => \1
bb :: \\(?:mathbb|Bbb)\s*\{?\s*([RZNQC])(?![A-Za-z])\s*\}? => \\mathbb{\1}
m/s :: (?<=\d)(?:[\s~]|\\[,;:! ])+m/s(\^)?\{?(2)?\}?$ => \\text{ m/s\1\2}
/_ :: ^\^\{?(\w)\}?/_\{?(\w)\}?$ => \\frac{\1}{\2}
out of :: ^(\d+)\s+out of\s+(\d+)$ => \\frac{\1}{\2}
in :: ^(\d+)\s+in\s+(\d+)$ => \\frac{\1}{\2}
the year :: ^the year (\d{1,4})$ => \1
D :: ^(\d{1,4}) ?A\.? ?D\.?$ => \1
# :: ^\\?#\s*(\w+)\s*= => |\1|=
real :: ^BUT (?:x ?= ?)?(.+)$ => \\mathbb{R}\\setminus\\{\1\\}
I :: ^(X?(?:I[VX]|V?I{2,3}|VI)|XI|XV)(?: only)?$ => \\text{\1}
only :: ^([IV]) only$ => \1
mapsto :: ^(?:\w *: *)?([a-zA-Z]) *\\mapsto *(.+)$ => f(\1)=\2
> :: ^<([^<>=]+,[^<>=]+)>$ => \\langle \1\\rangle 
\begin :: \\left\s*\\\{\s*(\\begin(?s:.*)\\end\{\w+\*?\})\s*\\right\s*\.? => \1
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
    """A cleaned answer with its spoken parts spelled as LaTeX."""
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
    """Whether an answer is several words, at least one of them neither mathematics nor a unit."""
    words = text.casefold().split() if _PROSE.fullmatch(text) else []
    long = (word for word in words if len(word) > 3 and word not in WORDS and not is_unit_word(word))
    return _CONNECTIVES.isdisjoint(words) and any(long)


def number_in_base(text: str) -> Node | None:
    """2A_{16}, \\text{2A}_{16}, 1011_{(2)}, 61_{eight}, 1101 (base 2): a whole answer in a base."""
    found = _BASED.fullmatch(_WRAPPING.sub("", text))
    if found is None:
        return None
    digits, index = found.groups()
    base = NUMBER_WORDS.get(index) or (int(index) if index.isdigit() else 0)
    if not 2 <= base <= 36 or any(int(digit, 36) >= base for digit in digits):
        return None
    is_number = digits[0].isdigit() or len(digits) > 1
    value: Node = ("num", Fraction(int(digits))) if base == 10 else ("base", digits, base)
    return value if is_number else None
