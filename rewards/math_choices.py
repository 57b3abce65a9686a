"""Multiple choice: (B), B. 12, A and C; and lists of numbered statements, ①③④."""

from __future__ import annotations

import re

from rewards.math_text import clean, text_key

_CHOICE = re.compile(
    r"(?:(?:the\s+)?(?:answer|option|choice)\s*(?:is)?\s*:?\s*)?([(\[]?)([A-J])(?:([)\].:]+)\s*(.*)|\s*)",
    re.IGNORECASE,
)
_MARK = "[A-J①-⑳]"
_MARKS = re.compile(_MARK)
_CHOICES = re.compile(rf"{_MARK}(?:[\s,;&]*(?:and)?[\s,;&]*{_MARK})+|[①-⑳]")
_OTHER_CHOICE = re.compile(r"(?:^|[^A-Za-z])[A-J][).\]:]|\bor\b|\band\b|或")
_MAX_WORDS = 12


def choice_letters(gold: str, text: str) -> bool | None:
    """Whether two multiple-choice answers name the same letters; None if they are not such answers."""
    if len(gold) > 60 or len(text) > 400 or _MARKS.search(gold) is None:
        return None
    expected, given = (_unstyled(each) for each in (gold, text))
    choice = _CHOICE.fullmatch(expected)
    if choice is None or not choice.group(2).isupper():
        if _CHOICES.fullmatch(expected) and _CHOICES.fullmatch(given):
            return set(_MARKS.findall(expected)) == set(_MARKS.findall(given)) or None
        return None
    if (wanted := choice.group(4)) and (")" not in choice.group(3) or _OTHER_CHOICE.search(wanted)):
        return None
    answer = _CHOICE.fullmatch(given)
    if answer is None or (not answer.group(2).isupper() and not (choice.group(1) or choice.group(3))):
        return None
    if (rest := answer.group(4)) and _OTHER_CHOICE.search(rest):
        return None
    if rest and not answer.group(1) and len(rest.split()) > _MAX_WORDS:
        return None
    if rest and wanted and text_key(rest) != text_key(wanted):
        return None
    return answer.group(2).upper() == choice.group(2) or None


_STYLE = re.compile(
    r"\\(?:text(?:bf|it|rm|sf)?|mathrm|mathbf|mbox|boldsymbol)\s*\{([^{}]*)\}"
    r"|\\[ ,;:!]|\\q?quad(?![a-z])|[{}]"
)


def _unstyled(text: str) -> str:
    return _STYLE.sub(lambda match: match.group(1) or " ", clean(text)).strip(" .")
