"""Gold text x answer texts -> verdict: the cascade, cheapest step first.

1. the same text; 2. two plain numbers; 3. choice letters; 4. shapes of the parsed texts, under the readings
that their punctuation allows; 5. sympy in its own process, for what the grammar does not cover.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from fractions import Fraction
from functools import lru_cache

from rewards.math import symbolic as math_symbolic
from rewards.math.boxes import boxes
from rewards.math.compare import is_multiple, same
from rewards.math.conditions import split_conditions
from rewards.math.extract import extract, is_blank
from rewards.math.options import MathOptions
from rewards.math.parse import parse
from rewards.math.probe import constant
from rewards.math.shape import shape
from rewards.math.text import clean, text_key
from rewards.math.tree import MathError, Node, Shape, TooComplex, Undefined, Unsupported, symbols
from rl.types import Reason

Verdict = tuple[Reason, str]
Texts = tuple[str, ...]

MAX_GOLD_CHARS = 20_000
_PROSE_CHARS = 150
_ESCAPED = re.compile(
    r"(?<!\\)\\\\(?=(?:boxed|text|[dt]?frac|leq?|geq?|sqrt|q?quad|pi|cdot|times|left|right|in|infty|pm|cup|circ)(?![a-z]))"
)
_PLAIN = re.compile(
    r"(-?)(?:(\d+|[1-9]\d{0,2}(?:,\d{3})+)(?:\.(\d+))?|\\[dt]?frac\{(-?\d+)\}\{(\d+)\}|(\d+)/(\d+))\.?",
    re.ASCII,
)
_THOUSANDS = re.compile(r"\d(?:,|\\,| )\d{3}")
_SCIENTIFIC = re.compile(r"\de-?\d")
_ONLY_SCIENTIFIC = re.compile(r"-?[\d.]+[eE][-+]?\d+")
_HAS_A_POLE = re.compile(
    r"frac|over|div|[/÷^!∕⁄∞]|inf|nan|log|ln|lg|tan|cot|sec|csc|binom|zeta|Gamma|root|sqrt\["
)
_DECIMAL_COMMA = re.compile(r"-?(?:0|[1-9]\d*),(\d+)")
# A zero, written or made by a subtraction, or an infinity.
_CAN_BE_UNDEFINED = re.compile(r"(?<![.\d])0|-|inf|∞")
_WORD = re.compile(r"(?<![\\A-Za-z{])[A-Za-z]{2,}(?=[\s,.;])")
_UNUSABLE = frozenset(("?", "n/a", "na", "nan", "\\text{nan}", "null", "-", "--", "..."))
_CHOICE = re.compile(
    r"(?:(?:the\s+)?(?:answer|option|choice)\s*(?:is)?\s*:?\s*|(?:故?选项?|答案)\s*[为是:]?\s*)?"
    r"([(\[]?)([A-J])(?:([)\].:]+)\s*(.*)|\s*)",
    re.IGNORECASE,
)
_MARK = "[A-J①-⑳]"
_MARKS = re.compile(rf"I{{2,}}|{_MARK}")  # II is one mark
_CHOSEN = rf"(?:\({_MARK}\)|{_MARK}\)?)"
_CHOICES = re.compile(rf"{_CHOSEN}(?:[\s,;&和]*(?:and)?[\s,;&]*{_CHOSEN})+|[①-⑳]")
_OTHER_CHOICE = re.compile(r"(?:^|[^A-Za-z])[A-J][).\]:]|\bor\b|\band\b|或")
# A lone letter: not part of a word, product or name, nor the constant of an integral or a degree.
_LONE = re.compile(r"(?<![A-Za-z\\0-9_^'])([A-J])(?![A-Za-z0-9'\\]|\s*[\^_(/*+\\-])")
_CONSTANT = re.compile(r"(?<=[\w)}\]])\s*\+\s*[A-J](?![A-Za-z])|(?:°|\\circ)\s*[CF](?![A-Za-z])")
_STYLE = re.compile(
    r"\\(?:text(?:bf|it|rm|sf)?|mathrm|mathbf|mbox|boldsymbol)\s*\{([^{}]*)\}"
    r"|\\[ ,;:!]|\\q?quad(?![a-z])|[{}]"
)


class _UnreadableGold(Exception):
    """The gold cannot be read, which is not a fault of the prediction."""


@lru_cache(maxsize=8192)
def gold_texts(answer: str) -> Texts:
    """The answer texts of a gold: after ####, in its boxes, or the whole text. Empty if it is unusable."""
    text = answer.strip()
    if len(text) > MAX_GOLD_CHARS:
        return ()
    if "####" in text:
        text = text[text.rfind("####") + 4 :].strip()
    if "\\\\" in text:
        text = _ESCAPED.sub(r"\\", text)
    if "\\boxed" in text or "\\fbox" in text:
        found, _ = boxes(text, loose=True)
        if found is None:  # cut off inside its box: the rest of the text is the answer
            text = text[text.rfind("\\boxed") + 6 :].strip().removeprefix("{")
        elif found:
            return tuple(item for item in found if item.strip())
    elif len(text) > _PROSE_CHARS and len(_WORD.findall(text)) > 12:
        return extract(text, "any").answers or (text,)
    is_unusable = len(text) < 40 and (text.strip(" \t\n.,;:$").casefold() in _UNUSABLE or is_blank(text))
    return () if is_unusable else (text,)


@lru_cache(maxsize=8192)
def plain_number(text: str) -> tuple[Fraction, bool] | None:
    """The value of an integer, a decimal or a fraction, and whether it is a decimal; else None."""
    match = _PLAIN.fullmatch(text.strip(" $\n"))
    if match is None or len(text) > 200:
        return None
    sign, whole, decimals, top, bottom, over, under = match.groups()
    if whole is not None:
        digits = whole.replace(",", "")
        value = Fraction(int(digits + decimals), 10 ** len(decimals)) if decimals else Fraction(int(digits))
    elif int(bottom or under) == 0:
        return None
    else:
        value = Fraction(int(top or over), int(bottom or under))
    return (-value if sign else value), decimals is not None


@lru_cache(maxsize=8192)
def _undefined(gold: Texts) -> str | None:
    """Why a gold that is one number has no value (1/0, 0^0); None for any other gold."""
    may_be = len(gold) == 1 and _CAN_BE_UNDEFINED.search(gold[0]) and _HAS_A_POLE.search(gold[0])
    if not may_be or plain_number(gold[0]) is not None:
        return None
    found = _gold_shape(gold, True, True)
    if isinstance(found, MathError) or found[0] != "scalar" or symbols(found[1]):
        return None
    try:
        constant(found[1])
    except Undefined as error:
        return f"the gold is undefined: {error}"
    except MathError:
        pass
    return None


def judge(answer: str, texts: Texts, options: MathOptions) -> Verdict:
    """Whether `texts`, which together are one answer, give the gold."""
    gold = gold_texts(answer)
    if not gold:
        return Reason.BAD_GOLD, "the gold holds no answer"
    if any("\\\\" in text for text in texts):
        texts = tuple(_ESCAPED.sub(r"\\", text) for text in texts)
    try:
        if (problem := _undefined(gold)) is not None:
            return Reason.BAD_GOLD, problem
    except Exception as error:
        return Reason.BAD_GOLD, f"the gold cannot be read: {type(error).__name__}"
    if gold == texts or (len(gold) == len(texts) == 1 and gold[0].strip(" $.\n") == texts[0].strip(" $.\n")):
        return Reason.CORRECT, ""
    if (size := sum(map(len, texts))) > options.max_chars:
        return Reason.TOO_COMPLEX, f"an answer of {size} characters"
    if len(gold) == len(texts) == 1 and (left := plain_number(gold[0])) and (right := plain_number(texts[0])):
        is_decimal = left[1] or right[1]
        tolerance = Fraction(options.decimal_rtol) * max(abs(left[0]), abs(right[0])) if is_decimal else 0
        if abs(left[0] - right[0]) <= tolerance:
            return Reason.CORRECT, ""
        if "," not in gold[0] + texts[0]:
            return Reason.WRONG_ANSWER, ""
    try:
        return _judge_shapes(gold, texts, options)
    except _UnreadableGold as error:
        return Reason.BAD_GOLD, str(error)
    except (RecursionError, MemoryError):
        return Reason.TOO_COMPLEX, "an answer nested too deeply"
    except Exception as error:  # the gold was read, so the prediction is at fault
        return Reason.PARSE_ERROR, f"unreadable: {type(error).__name__}"


def _judge_shapes(gold: Texts, texts: Texts, options: MathOptions) -> Verdict:
    if len(gold) == len(texts) == 1 and (letters := choice_letters(gold[0], texts[0])) is not None:
        return (Reason.CORRECT, "") if letters else (Reason.WRONG_ANSWER, "another choice")
    verdict: Verdict | None = None
    problem: MathError | None = None
    for gold_reading, reading, thousands, scientific in _readings(gold, texts, options):
        expected = _gold_shape(gold_reading, thousands, scientific)
        if isinstance(expected, MathError):
            problem = problem or expected
            continue
        found, error = _compare(
            expected, reading, thousands=thousands, scientific=scientific, options=options
        )
        if found[0] is Reason.CORRECT:
            return found
        verdict, problem = verdict or found, problem or error
    if len(gold) == len(texts) == 1:
        if verdict is None and text_key(gold[0]) == text_key(texts[0]):
            return Reason.CORRECT, ""
        if isinstance(problem, Unsupported) and (verdict is None or problem.evaluates):
            found = _judge_symbolically(gold[0], texts[0], options)
            return found or verdict or (Reason.PARSE_ERROR, str(problem))
    return verdict or (Reason.PARSE_ERROR, f"the gold is compared as text: {problem}")


def _compare(
    gold: Shape, texts: Texts, *, thousands: bool, scientific: bool, options: MathOptions
) -> tuple[Verdict, MathError | None]:
    try:
        prediction = _shape(texts, thousands, scientific)
        if same(gold, prediction, options):
            return (Reason.CORRECT, ""), None
    except TooComplex as error:
        return (Reason.TOO_COMPLEX, str(error)), None
    except Undefined as error:
        return (Reason.BAD_VALUE, str(error)), None
    except MathError as error:
        return (Reason.PARSE_ERROR, str(error)), error
    if is_multiple(prediction) and not is_multiple(gold):
        return (Reason.HEDGE, "more than one value where the gold is one"), None
    return (Reason.WRONG_ANSWER, ""), None


def _shape(texts: Texts, thousands: bool, scientific: bool) -> Shape:
    answers = [split_conditions(clean(text)) for text in texts]
    trees = [_tree(answer, thousands, scientific) for answer, _ in answers]
    found = shape(trees[0] if len(trees) == 1 else ("list", ",", tuple(trees)))
    members = tuple(member for _, conditions in answers for member in conditions.members)
    relations = [text for _, conditions in answers for text in conditions.relations]
    if members or relations:
        return ("given", found, members, tuple(shape(parse(relation)) for relation in relations))
    return found


def _tree(text: str, thousands: bool, scientific: bool) -> Node:
    """The tree of a text. An unsupported left side of an equals sign becomes a name of the right side."""
    try:
        return parse(text, thousands=thousands, scientific=scientific)
    except Unsupported:
        name, value = _at_equals_sign(text)
        if not value:
            raise
        return ("rel", ("=",), (("sym", text_key(name)), _tree(value, thousands, scientific)))


def _at_equals_sign(text: str) -> tuple[str, str]:
    """The texts before and after the first equals sign outside of brackets."""
    depth = 0
    for at, character in enumerate(text):
        depth += (character in "({[") - (character in ")}]")
        if character == "=" and not depth:
            return text[:at], text[at + 1 :]
    return text, ""


@lru_cache(maxsize=8192)
def _gold_shape(texts: Texts, thousands: bool, scientific: bool) -> Shape | MathError:
    try:
        return _shape(texts, thousands, scientific)
    except MathError as error:
        return error
    except Exception as error:
        raise _UnreadableGold(f"the gold cannot be read: {type(error).__name__}") from None


def _readings(gold: Texts, texts: Texts, options: MathOptions) -> Iterator[tuple[Texts, Texts, bool, bool]]:
    """(gold, prediction, thousands, scientific): "1,234" and "2e-3" as numbers, then 1, 234 and 2e - 3."""
    yield gold, texts, True, True
    everything = " ".join((*gold, *texts))
    if _THOUSANDS.search(everything):
        yield gold, texts, False, True
    if _SCIENTIFIC.search(everything) and not _ONLY_SCIENTIFIC.fullmatch(gold[0].strip(" $")):
        yield gold, texts, True, False
    if any("+-" in text for text in texts):  # 4+-2 is 4 - 2, if it is not 4 ± 2
        yield gold, tuple(text.replace("+-", "-") for text in texts), True, True
    if options.decimal_comma and len(gold) == len(texts) == 1:
        number = plain_number(gold[0])
        is_fraction = "." in gold[0] or (number is not None and number[0].denominator > 1)
        if is_fraction and (point := _with_point(texts[0], 1)):
            yield gold, (point,), True, True
        elif (point := _with_point(gold[0], 2)) and "." in texts[0]:
            yield (point,), texts, True, True


def _with_point(text: str, least_decimals: int) -> str | None:
    """1,22 as 1.22. A gold needs two decimals, because 0,1 is more likely a list."""
    stripped = clean(text).replace("{,}", ",")
    match = _DECIMAL_COMMA.fullmatch(stripped)
    if match is None or len(match.group(1)) < least_decimals or not match.group(1).strip("0"):
        return None
    if len(match.group(1)) == 3 and not stripped.lstrip("-").startswith("0"):  # 1,234 is a thousand
        return None
    return stripped.replace(",", ".")


def _judge_symbolically(gold: str, text: str, options: MathOptions) -> Verdict | None:
    """Sympy's verdict, or None if it has none."""
    gold, text = clean(gold), clean(text)
    if options.symbolic_timeout_s <= 0 or not all(map(math_symbolic.is_askable, (gold, text))):
        return None
    try:
        equal = math_symbolic.worker.equal(gold, text, options.symbolic_timeout_s)
    except math_symbolic.SymbolicTimeout as error:
        on_gold = (Reason.INFRA_ERROR, f"{error} to read the gold")
        return on_gold if error.on_gold else (Reason.TIMEOUT, str(error))
    except math_symbolic.SymbolicFault as error:
        return Reason.INFRA_ERROR, str(error)
    return None if equal is None else (Reason.CORRECT, "") if equal else (Reason.WRONG_ANSWER, "")


# Multiple choice: (B), B. 12, A and C; lists of numbered statements, ①③④ -----------------------------------


def choice_letters(gold: str, text: str) -> bool | None:
    """Whether two multiple-choice answers name the same letters; None if they are not such answers."""
    if len(gold) > 60 or len(text) > 400 or _MARKS.search(gold) is None:
        return None
    expected, given = (
        _STYLE.sub(lambda match: match.group(1) or " ", clean(each)).strip(" .") for each in (gold, text)
    )
    if _CHOICES.fullmatch(expected) and _CHOICES.fullmatch(given):
        return sorted(_MARKS.findall(expected)) == sorted(_MARKS.findall(given)) or None
    choice = _CHOICE.fullmatch(expected)
    if choice is None or not choice.group(2).isupper():
        return None
    wanted = choice.group(4)
    if wanted and (choice.group(3)[0] not in ").]" or _OTHER_CHOICE.search(wanted)):
        return None
    letters = _CONSTANT.sub("", given)
    letters = letters.upper() if choice.group(1) and re.match(r"\W*[a-j]\W", letters) else letters
    if any(letter != choice.group(2) for letter in _LONE.findall(letters)):
        return False
    answer = _CHOICE.fullmatch(given)
    if answer is None or (not answer.group(2).isupper() and not (choice.group(1) or choice.group(3))):
        return None
    if (rest := answer.group(4)) and _OTHER_CHOICE.search(rest):
        return None
    if rest and not answer.group(1) and len(rest.split()) > 12:
        return None
    if rest and wanted and text_key(rest) != text_key(wanted):
        return None
    return answer.group(2).upper() == choice.group(2) or None
