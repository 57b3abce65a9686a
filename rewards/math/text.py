"""Unicode, currency, comments and styling -> plain LaTeX in ASCII (plus CJK text): what the lexer reads.

Everything here is a single pass of a compiled pattern over the text, so the time is linear in its length.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

from rewards.math.spoken import respelled
from rewards.math.words import INTRODUCTIONS, TRANSLATION

Node = Any  # a tuple whose first field names it: `rewards.math.parse`
Shape = Any  # a tuple whose first field names it: `rewards.math.shape`


class MathError(Exception):
    """A text that has no value. Subclasses say why."""


class Unparsable(MathError):
    """Not mathematics, or not well formed."""


class Unsupported(MathError):
    """Mathematics outside this grammar.

    `evaluates` marks a value that sympy can work out where this module cannot; an integral is not one, as it
    restates a problem more often than it answers it.
    """

    def __init__(self, message: str, *, evaluates: bool = False) -> None:
        super().__init__(message)
        self.evaluates = evaluates


class TooComplex(MathError):
    """Over a size bound: characters, nesting, bits of a number, arithmetic steps."""


class Undefined(MathError):
    """No number: 1/0, 0^0, infinity - infinity."""


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

    Dollar signs that come in pairs are delimiters; a single one beside a number is the currency.
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
        text = _without_rarities(text)
    if "or" in text or "and" in text:
        text = _GLUED_OR.sub(lambda match: r" \lor " if match.group(1) == "or" else r" \land ", text)
    return respelled(_strip(text))


def _without_rarities(text: str) -> str:
    """What only few answers hold, in one way of writing it. Of a => b, b is the answer."""
    for sign in _IMPLIES:
        text = text.rpartition(sign)[2]
    text = _MODULO.sub(r"\\pmod{\1}", text.replace("{:}", ":"))
    text = _PRIMES.sub(lambda match: "'" * match.group().count("prime"), text)
    return _MERIDIEM.sub(r"\1m", text)


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
_SYNONYMS = {"dne": "does not exist"}
_LOOSE_SPACE = re.compile(r"(?<!\w) | (?!\w)")


def text_key(text: str) -> str:
    """A text for comparison as text: styling, case, repeated blanks and surrounding punctuation do not count.

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
    key = _ARTICLE.sub("", _ORDINAL.sub("", text.casefold()))
    return _SYNONYMS.get(key, key)


def introduces(words: str) -> bool:
    """Whether a text before a value says no more than that it comes: "the answer is", "approximately",
    "答案是".
    """
    key = text_key(words)
    if key.endswith(("是", "为", "等于", "：", "约", "共有", "共")) and not any(
        no in key for no in ("不", "非", "或", "没")
    ):
        return True
    return all(word in INTRODUCTIONS for word in key.replace(":", " ").split())
