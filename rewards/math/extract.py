"""Completion -> the text of its answer, in time linear in its length.

Only the text after the last </think> counts, without LaTeX and HTML comments. The answer is the last
\\boxed{...}, with other boxes that only "and", commas or a few words separate from it. Without a box, it is a
stated final answer, or else the last formula or number.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from rewards.math.boxes import BETWEEN_SPACE, BOX, CONNECTED, MAX_BOXES, TEXT_WRAPPER, are_connected, boxes
from rewards.math.units import is_unit_word
from rewards.math.words import split
from rl.types import Reason

_TAIL_CHARS = 20_000  # without a box, only this last part of a completion is searched


@dataclass(frozen=True, slots=True)
class Extraction:
    """`answers` holds several texts if several boxes are one answer; if it is empty, `reason` says why."""

    answers: tuple[str, ...]
    reason: Reason = Reason.NO_ANSWER
    detail: str = ""


_CHAT_END = re.compile(
    r"<\|(?:im_end|im_start|endoftext|eot_id|end_of_text|end)\|>|<｜end▁of▁sentence｜>|</s>"
)
_CHAT_START = re.compile(r"^\s*<\|im_start\|>\s*assistant\s*")
_COMMENT_SIGN = re.compile(r"(?<![\\\d])(?<!\d\s)(?<!\d\\)%")
_HIDDEN = re.compile(
    r"\\iffalse(?![A-Za-z]).*?(?:\\fi(?![A-Za-z])|\Z)|\\begin\{comment\}.*?(?:\\end\{comment\}|\Z)", re.DOTALL
)
_HTML_COMMENT = re.compile(r"<!--.*?(?:-->|\Z)", re.DOTALL)
_PHANTOM = re.compile(r"\\[hv]?phantom\s*(\{)|\\[^A-Za-z]|[{}]", re.DOTALL)
_BLANK = re.compile(
    r"(?:[\s.,;:$~{}]|\\(?:text|mathrm|mbox|textbf|left|right|q?quad)(?![A-Za-z])|\\[,;:! ])*"
)
_FINAL = re.compile(
    r"final\s{1,3}answer\s{0,3}:?\**\s{0,3}:?\s{0,3}(?:the\s)?(?:final\s)?answer\s{1,3}is\s{0,3}:?",
    re.IGNORECASE,
)
_LABELS = """
answer result option choice antwort lösung ergebnis réponse résultat respuesta solución resultado risposta
resposta ответ відповідь отговор cevap jawaban svar antwoord 答え 答 정답 답 الجواب الإجابة उत्तर
"""
_LETTER_AFTER = re.compile(r"\n\W*(?:final )?answer\W{0,5}[:：]\W{0,5}([A-J])\W*$", re.IGNORECASE)
_STATED = re.compile(
    rf"(?:{'|'.join(_LABELS.split())})\s{{0,3}}\**\s{{0,3}}(?:(?:is|are|ist|est|es|è|é|はは|は|은|는|هو|هي)(?![a-z])|[=:：≈]|\s[-–—]\s)+"
    r"\s{0,3}(?:approximately|about)?|\bans\.|(?:答案|结果)\s*(?:应?[为是]|[:：=])+|选项?\s?(?:[为是:：]\s?)?(?=[A-J(（])"
    r"|(?:must be|choose|pick|select)\s(?:option\s|choice\s)?(?=\(?(?-i:[A-HJ])\)?(?:[.\s]|$))",
    re.IGNORECASE,
)
_MARKDOWN = re.compile(r"__([^_\n]+)__|^>+\s*", re.MULTILINE)
_HASHES = re.compile(r"####\s*([^\n]+)")
_ANSWER_TAG = re.compile(r"<answer>((?:(?!</?answer>).)*)</answer>", re.DOTALL)
_CONNECTIVE = re.compile(r"^(?:therefore|thus|hence|so|then|finally|also)[,:]?\s+", re.IGNORECASE)
_CLAUSE = re.compile(
    r"\s*[,(]?\s(?:because|since|as|which|so|where|when|given|but|(?:and )?not|I (?:think|believe|guess))"
    r"(?:\s.*|$)",
    re.IGNORECASE | re.DOTALL,
)
_QUALIFIED = re.compile(
    r"(?:(?:less|more|greater|fewer) than|at (?:least|most)|not|between|either|below|above)\s", re.IGNORECASE
)
_HOPE = re.compile(r"I hope (?:it|this) is correct", re.IGNORECASE)
_DELIMITER = re.compile(r"(?<!\\)\$\$?|\\[()\[\]]|\n")
_CLOSES = {"\\(": "\\)", "\\[": "\\]", "$": "$", "$$": "$$"}
_SENTENCE_END = re.compile(r"\n|[。！？]|[.!?](?=\s|$|\*)|(?<=[^\d\s])\.(?=[A-Z])")
_NUMBER = re.compile(
    r"(?<![A-Za-z0-9_.\\^])(?:\d{1,2}:\d{2}(?![\d:])|[-−+]?\s?(?:[$€£¥]\s?)?"
    r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+|(?=\.\d))(?:[.,]\d+)?(?:\s?/\s?\d+)?(?:\s?%|\\%)?)(?![A-Za-z]*\d)"
)


def extract(completion: str, mode: Literal["any", "stated", "boxed"] = "any") -> Extraction:
    """The answer of a completion. `mode` is `MathOptions.extraction`."""
    text = completion
    if "<|" in text or "</s>" in text or "<｜" in text:
        text = _CHAT_START.sub("", text, count=1)
        if (end := _CHAT_END.search(text)) is not None:
            text = text[: end.start()]
    closing = text.rfind("</think>")
    if closing >= 0:
        text = text[closing + len("</think>") :]
    if "<think>" in text:
        return Extraction((), Reason.TRUNCATED, "the answer never left <think>")
    if "<!--" in text:
        text = _HTML_COMMENT.sub("", text)
    if "\\iffalse" in text or "\\begin{comment}" in text:
        text = _HIDDEN.sub("", text)
    if "phantom" in text:
        text = _without_phantoms(text)
    if "%" in text and ("\\boxed" in text or "\\fbox" in text):
        text = "\n".join(_without_comment(line) if "%" in line else line for line in text.split("\n"))
    if "<answer>" in text:
        tags = _ANSWER_TAG.findall(text)
        if not tags:
            return Extraction((), Reason.TRUNCATED, "<answer> is not closed")
        text = tags[-1]
        if mode != "boxed" and not BOX.search(text):
            stated = _last(_STATED, text)
            return _nonempty((text.strip(),) if stated is None else _stated(text[stated.end() :]))
    if "\\boxed" in text or "\\fbox" in text or "\\framebox" in text:
        boxed, end_of_box = boxes(text)
        if boxed is None:
            return Extraction((), Reason.TRUNCATED, "the last box is not closed")
        if boxed:
            tail = text[max(end_of_box, len(text) - _TAIL_CHARS) :]
            if mode != "boxed" and len(tail) > 8 and (letter := _LETTER_AFTER.search(tail)):
                return _nonempty((letter[1],) if len(boxed[0].strip(" ()")) > 1 else (*boxed, letter[1]))
            final = _last(_FINAL, tail) if len(tail) > 20 and mode != "boxed" else None
            return _nonempty(boxed if final is None else _stated(tail[final.end() :]))
    if mode == "boxed":
        return Extraction((), Reason.NO_ANSWER, "no box")
    return _nonempty(_unboxed(text[-_TAIL_CHARS:], mode))


def _without_comment(line: str) -> str:
    """A line up to a % that hides a box. A % after a number, or without a box after it, is a percent sign."""
    last_box = max(line.rfind("\\boxed"), line.rfind("\\fbox"))
    sign = _COMMENT_SIGN.search(line, 0, last_box) if last_box > 0 else None
    return line if sign is None else line[: sign.start()]


def _without_phantoms(text: str) -> str:
    """The text without \\phantom{...}, which is invisible; an unclosed one hides all of the rest."""
    kept, depth, hidden_from, start = [], 0, 0, 0
    for match in _PHANTOM.finditer(text):
        token = match.group()
        if match.group(1) and not hidden_from:
            kept.append(text[start : match.start()])
            hidden_from = depth = depth + 1
        elif match.group(1) or token == "{":
            depth += 1
        elif token == "}":
            if hidden_from and depth == hidden_from:
                hidden_from, start = 0, match.end()
            depth -= 1
    return "".join(kept) + ("" if hidden_from else text[start:])


def is_blank(text: str) -> bool:
    """Whether an answer is empty, such as \\text{ } or $$."""
    return _BLANK.fullmatch(text) is not None


def _nonempty(answers: tuple[str, ...]) -> Extraction:
    kept = tuple(answer.strip() for answer in answers if not is_blank(answer))
    return Extraction(kept, Reason.CORRECT) if kept else Extraction((), Reason.NO_ANSWER, "no answer found")


def _last(pattern: re.Pattern[str], text: str) -> re.Match[str] | None:
    found = None
    for match in pattern.finditer(text):
        found = match
    return found


# Free text -------------------------------------------------------------------------------------------


def _unboxed(text: str, mode: str) -> tuple[str, ...]:
    if (hashes := _last(_HASHES, text)) is not None:
        return (hashes.group(1),)
    if "__" in text or text[:1] == ">":
        text = _MARKDOWN.sub(r"\1", text)
    stated = _last(_STATED, text)
    whole = _CONNECTIVE.sub("", text.strip(), count=1)
    if stated is not None and (answer := _stated(text[stated.end() :])):
        return answer
    if mode == "stated":
        return ()
    if len(whole) <= 200 and "\n" not in whole and _looks_bare(whole):
        return (whole,)
    return _last_formula_or_number(text)


def formulas(text: str) -> list[tuple[int, int, str]]:
    """(start, end, content) of each formula in dollars (of one line, if single) or LaTeX brackets."""
    found: list[tuple[int, int, str]] = []
    opened: re.Match[str] | None = None
    for match in _DELIMITER.finditer(text):
        token = match.group()
        if opened is None:
            opened = match if token in _CLOSES else None
        elif token == _CLOSES[opened.group()]:
            content = text[opened.end() : match.start()]
            if content.strip():
                found.append((opened.start(), match.end(), content))
            opened = None
        elif token in ("\\(", "\\[") or (token in ("\n", "$$") and opened.group() == "$"):
            opened = match if token in _CLOSES else None
    return found


def _looks_bare(text: str) -> bool:
    """Whether a whole text is an answer, not a sentence that contains one."""
    pieces, start = [], 0
    for opening, end, _ in formulas(text):
        pieces.append(text[start:opening])
        start = end
    outside = TEXT_WRAPPER.sub("", " ".join((*pieces, text[start:])))
    words = [word for word in _WORD.findall(outside) if not is_unit_word(word)]
    words = [word for word in words if word.lower() not in _MATH_WORDS]
    return len(words) <= 1 and _LABEL.search(outside) is None and _FOREIGN_WORDS.search(outside) is None


_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}")
_MATH_WORDS = split("and or equals sqrt pi sin cos tan ln log frac")
# Four ideographs, two kana, Cyrillic or other letters, or a row of a table.
_FOREIGN_WORDS = re.compile(
    r"[\u3400-\u9fff]{4}|[\u0400-\u065f\u066e-\u06ef\u0900-\u0963\u3040-\u30ff\uac00-\ud7af]{2}|\|\s.*\s\|\s.*\s\|"
)
_LABEL = re.compile(r"[\w)]\s{0,9}:(?!\d)\s{0,9}\S")


def _stated(rest: str) -> tuple[str, ...]:
    """The answer in the sentence that follows "the answer is"."""
    rest = rest.lstrip(" \t\n*:")
    if rest[:1] in ("$", "\\") and (found := formulas(rest)) and found[0][0] == 0:
        return _connected_formulas(rest, found, 0)
    if (hope := _HOPE.search(rest)) is not None:
        rest = rest[: hope.start()]
    end = _SENTENCE_END.search(rest)
    sentence = (rest[: end.start()] if end else rest).strip(" *_.")
    if not sentence:
        return ()
    sentence = _CLAUSE.sub("", sentence, count=1)
    if len(sentence) <= 200 and (_looks_bare(sentence) or _QUALIFIED.match(sentence)):
        return (sentence,)
    return _last_formula_or_number(sentence) or (sentence,)


def _connected_formulas(text: str, found: list[tuple[int, int, str]], first: int) -> tuple[str, ...]:
    """A formula and those after it that only "and" or commas separate."""
    answers = [found[first][2]]
    last = first
    while last + 1 < len(found) and last - first < MAX_BOXES:
        if not are_connected(text[found[last][1] : found[last + 1][0]]):
            break
        last += 1
        answers.append(found[last][2])
    sign = _PERCENT_AFTER.match(text, found[last][1])
    if sign is not None:
        answers[-1] += sign.group()
    return tuple(answers)


_UNIT_AFTER = re.compile(r"\s?([A-Za-z]+)(?:\^\d)?")
_PERCENT_AFTER = re.compile(r"\s?(?:\\?%|percent|pct)")


def _last_formula_or_number(text: str) -> tuple[str, ...]:
    found = formulas(text)
    number = _last(_NUMBER, text)
    if found and (number is None or number.start() < found[-1][1]):
        at = len(found) - 1
        while at and len(found) - at < MAX_BOXES and are_connected(text[found[at - 1][1] : found[at][0]]):
            at -= 1
        return _connected_formulas(text, found, at)
    return _last_numbers(text) if number is not None else ()


def _last_numbers(text: str) -> tuple[str, ...]:
    """The last number, with those before it that only "and", "or" or a comma separates."""
    found = list(_NUMBER.finditer(text))[-MAX_BOXES:]
    first = len(found) - 1
    qualified = _QUALIFIED.search(text, max(0, found[-1].start() - 12), found[-1].start())
    if qualified is not None and qualified.end() == found[-1].start():  # "at least 7" is not 7
        return (text[qualified.start() : found[-1].end()],)
    after = _UNIT_AFTER.match(text, found[-1].end())
    while first:
        between = text[found[first - 1].end() : found[first].start()]
        unit = _UNIT_AFTER.match(between)
        is_unit = unit is not None and (is_unit_word(unit[1]) or (after is not None and unit[1] == after[1]))
        is_listed = unit is not None and is_unit and are_connected(between[unit.end() :])  # 12 cm or 13 cm
        if not is_listed and not CONNECTED.fullmatch(BETWEEN_SPACE.sub("", between)):
            break
        first -= 1
    return tuple(match.group() for match in found[first:])
