"""The boxes of a completion, and the text that connects neighbouring answers."""

from __future__ import annotations

import re

from rewards.math.text import ascii_math
from rewards.math.words import split

MAX_BOXES = 32
MAX_BRACES = 20_000
BOX = re.compile(r"\\(?:boxed|fbox|framebox)(?![A-Za-z])\s*")
_BRACES = re.compile(r"\\[^A-Za-z]|[{}]", re.DOTALL)
_BARE_BOX = re.compile(r"-?\d+(?:\.\d+)?|[A-Za-z](?![A-Za-z])")
TEXT_WRAPPER = re.compile(r"\\(?:text|mathrm|textbf|mbox)\s*\{([^{}]*)\}")
BETWEEN_SPACE = re.compile(r"\\q?quad(?![a-zA-Z])|\\[,;:!\s()\[\]]|[\s$~*_]|\\\\")
# Separators, "and", "2.", and the name that the next answer gets: ", y ="
CONNECTED = re.compile(
    r"(?:[,;/|•-]|and|or|&|及|和|或|、|与|oder|und|ou|et|или|и|또는|または|أو|\\&|\\lor|\\land|\(?[A-Za-z\d]{1,2}[.)])*"
    r"(?:(?<=[,;dr和])(?:[A-Za-z]\{?\w{0,3}\}?(?:\([a-z]\))?=))?"
)
_HEDGES = split("maybe perhaps possibly alternatively either also could might or 或者 也可能 可能")
_FALLBACKS = split("if otherwise else failing 如果 否则")
_FIXES = split("wait no not wrong actually instead sorry mistake correct correction correcting oops 不 错")
_CONNECTED_WORDS = re.compile(r"[^.!?:=\\{}]{0,40}(?:\b(?:and|or)\b|和|或)\s*")


def boxes(text: str, *, loose: bool = False) -> tuple[tuple[str, ...] | None, int]:
    """The contents of the last box and of the boxes connected with it, and where the last one ends.

    The contents are None if a box is not closed. A box inside a box is part of it. `loose`, for golds, also
    connects boxes with a few words between them.
    """
    start = len(text)
    names = [name for name in ("\\boxed", "\\fbox", "\\framebox") if name in text]
    for _ in range(MAX_BOXES):
        found = max((text.rfind(name, 0, start) for name in names), default=-1)
        if found < 0:
            break
        start = found
    closed: list[tuple[int, int, str]] = []
    while (box := BOX.search(text, start)) is not None:
        start = box.end()
        if text[start : start + 1] == "{":
            end = closing_brace(text, start)
            if end is None:
                return None, len(text)
            closed.append((box.start(), end + 1, text[start + 1 : end]))
            start = end + 1
        elif (bare := _BARE_BOX.match(text, start)) is not None:  # \boxed 7
            closed.append((box.start(), bare.end(), bare.group()))
    if not closed:
        return (), 0
    if len(closed) == 1:
        return (_unwrapped(closed[0][2]),), closed[0][1]
    contents = [closed[-1][2]]
    for before, after in zip(closed[-2::-1], closed[:0:-1], strict=False):
        if not are_connected(text[before[1] : after[0]], loose=loose):
            break
        contents.append(before[2])
    return tuple(_unwrapped(content) for content in reversed(contents)), closed[-1][1]


def closing_brace(text: str, opening: int) -> int | None:
    """Where the brace at `opening` is closed; None if nowhere, or after too many braces."""
    depth = 0
    for number, match in enumerate(_BRACES.finditer(text, opening)):
        token = match.group()
        depth += (token == "{") - (token == "}")
        if not depth:
            return match.start()
        if number > MAX_BRACES:
            return None
    return None


def _unwrapped(content: str) -> str:
    """The innermost content of boxes that hold only a box: \\boxed{\\boxed{7}}."""
    for _ in range(4 if "box" in content else 0):
        match = BOX.match(content.strip())
        if match is None or not content.strip().endswith("}"):
            break
        content = content.strip()[match.end() + 1 : -1]
    return content


def are_connected(between: str, *, loose: bool = False) -> bool:
    """Whether the text between two answers joins them: "and", a comma, a few words before these, a hedge."""
    if len(between) > 120:
        return False
    between = ascii_math(between) if not between.isascii() else between
    plain = BETWEEN_SPACE.sub("", TEXT_WRAPPER.sub(r" \1 ", between))
    if CONNECTED.fullmatch(plain):
        return True
    spoken = BETWEEN_SPACE.sub(" ", TEXT_WRAPPER.sub(r" \1 ", between)).casefold()
    words = spoken.replace(",", " ").replace(":", " ").strip(" ()").split()
    if len(words) > (6 if loose else 5):
        return False
    if not _FALLBACKS.isdisjoint(words):  # "If that is wrong:"
        return True
    if not _HEDGES.isdisjoint(words) and _FIXES.isdisjoint(words):
        return True
    return _CONNECTED_WORDS.fullmatch(" ".join(words) + " ") is not None
