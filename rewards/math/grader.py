"""Decides whether a mathematical completion gives the gold answer.

    grade("... so $\\boxed{\\frac{1}{2}}$.", "0.5").score == 1.0

`extract` finds the answer, `lex`, `parse` and `shape` read it, and `judge` compares it: exactly if it is
rational, otherwise numerically at fixed points. What the grammar does not cover goes to sympy in its own
process. No text is evaluated as code and no signal is used. Every step is bounded by a count, not by time, so
`grade` is a pure function that any thread or event loop may call. Only the sympy process has a deadline.

Score 1.0 means the same answer, 0.0 anything else, None an abstention. The score is 0.0 if the answer is
missing, cut off (an unclosed box or <think>), a hedge, unreadable, undefined (1/0), too complex, or too slow
for sympy. It is None for BAD_GOLD (the gold is empty, NaN or undefined) and INFRA_ERROR (the sympy process
failed, or never reached the prediction). A gold outside the grammar is compared as text and by sympy.

The policy, whose decisions are options of `MathOptions`:

Where. The last box, else "the answer is", else the last formula or number; `extraction="boxed"` pays a box
    only, which is right where the prompt asks for one. Boxes with nothing but "and", commas or a few words
    between them are one answer. "Final Answer: The final answer is" after the last box overrides it. Comments
    and \\phantom are not seen.
Hedging. More than one value where the gold is one is a hedge, whatever the values; so are 8 = 7, and ±3 for
    3. A chain of equalities must agree with itself (`chains`). ±1 ± i has four values.
Percent. 20% is 20 and 0.2; two percentages must be equal (`percent`).
Units. One missing unit is not a fault; two must agree: 5 cm is 50 mm, not 5 m; 2 hours 15 minutes are 135
    minutes (`units`). "million" and "dozen" belong to the value: 5 million people are not 5 people. 7 a.m. is
    7:00, 5 pm is 17:00, and 2:15 is not 2/15. 90° is 90 and pi/2; a plain 45 is not pi/4 (`degrees`).
Rounding. None: 3.14 is not pi, 0.333 is not 1/3. `decimal_rtol` passes float noise such as
    0.30000000000000004.
Order. 1, 2 is 2, 1 and {2, 1} (`ordered_lists`). A tuple keeps its order; (0, 1) is not [0, 1].
Shape. x = 5 is 5, f(x) = x^2 is x^2, (1, 2) is x = 1, y = 2, and 0 < x < 1 is (0, 1). `loose_shapes` adds {3}
    for 3, (1, 2) for 1, 2 or for a column, and 1/2 for 1:2. A row is not a column. Equations may differ by a
    factor.
Names. f(2) = 5, P(A) = 5, \\int ... = 5 and x + y = 5 are 5 where a number is asked for; 2x = 5, x^2 = 5
    and a line such as 3x + 4y = 5 are not. 12 (mod 7) is 5.
Conditions. k pi, k in Z is n pi, and n >= 1 may be left unsaid; y = 2x (x > 0) is not y = 2x.
Radicals. sqrt(a / b) is sqrt(a b) / b, as for positive numbers; sqrt(x^2) is |x|, not x.
Numerals. 1,22 is 1.22 where a decimal is expected (`decimal_comma`). 101_2 is 101_2, not 5 and not 101.
Letters. A is (A), A. and (A) 12; (A) = C is neither A nor C. x is neither y nor X; the argument of a function
    may be renamed. A logarithm without a base is natural, as in the LaTeX that sympy prints.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from rewards.completion import last_message_text
from rewards.math.extract import extract
from rewards.math.judge import Verdict, gold_texts, judge
from rewards.math.options import MathOptions
from rl.types import Reason, Reward

__all__ = ["DEFAULTS", "MathOptions", "grade", "math_reward"]

DEFAULTS = MathOptions()
_ABSTAINS = frozenset((Reason.BAD_GOLD, Reason.INFRA_ERROR))
_CACHED_CHARS = 1_000
_OPERATION = re.compile(r"[\w)}\]]\s*(?:[-+*×÷·−]|\\(?:times|cdot|div)(?![a-zA-Z]))\s*[-+]?\s*[\w({\\]")


class _NotToRemember(Exception):
    """Carries a verdict past the cache, because it depends on this process and not on the answer."""

    def __init__(self, verdict: Verdict) -> None:
        super().__init__()
        self.verdict = verdict


def grade(completion: str, answer: str, *, options: MathOptions = DEFAULTS) -> Reward:
    """1.0 if the completion's answer is `answer`, 0.0 if not, None if this cannot be decided.

    `answer` may be a bare answer, a text with a box in it, or a GSM8K solution that ends in "#### 18".
    """
    started = time.perf_counter()
    found = extract(completion, options.extraction)
    is_open = any(_OPERATION.search(text.rpartition("=")[2]) for text in found.answers if options.evaluated)
    if not gold_texts(answer):
        reason, detail = Reason.BAD_GOLD, "the gold holds no answer"
    elif is_open and not _OPERATION.search(answer):
        reason, detail = Reason.WRONG_ANSWER, "the answer is not worked out"
    elif found.answers:
        reason, detail = _verdict(answer, found.answers, options)
    else:
        reason, detail = found.reason, found.detail
    score = 1.0 if reason is Reason.CORRECT else None if reason in _ABSTAINS else 0.0
    extracted = ", ".join(found.answers) if found.answers else None
    return Reward(score, reason, detail, extracted, (time.perf_counter() - started) * 1e3)


def math_reward(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    answer: Sequence[Any],
    *,
    math_options: MathOptions | Mapping[str, Any] = DEFAULTS,
    **columns: Any,
) -> list[Reward]:
    """`grade` for each completion, in TRL's calling convention.

    `completions` are texts or lists of messages; the last message is graded. An answer is a text, a number,
    or a list of accepted alternatives. `prompts` and other columns are not used.

    Raises:
        ValueError: `math_options` has an unknown field or value.
    """
    policy = math_options if isinstance(math_options, MathOptions) else MathOptions.of(math_options)
    pairs = zip(completions, answer, strict=True)
    return [_grade_any(last_message_text(completion), gold, policy) for completion, gold in pairs]


def _grade_any(completion: str, answer: Any, options: MathOptions) -> Reward:
    if not isinstance(answer, (list, tuple)):
        is_none = answer is None or isinstance(answer, Mapping)
        return grade(completion, "" if is_none else str(answer), options=options)
    rewards = [_grade_any(completion, each, options) for each in answer]
    if not rewards:
        return grade(completion, "", options=options)
    return max(rewards, key=_weight)


def _weight(reward: Reward) -> int:
    """The rank of an alternative's reward: a right one first, then one that could not be compared."""
    if reward.score is None:
        return 1 if reward.reason is Reason.INFRA_ERROR else -1
    return 2 if reward.score else 0


def _verdict(answer: str, texts: tuple[str, ...], options: MathOptions) -> Verdict:
    if sum(map(len, texts)) > _CACHED_CHARS:
        return judge(answer, texts, options)
    try:
        return _remembered(answer, texts, options)
    except _NotToRemember as passed:
        return passed.verdict


@lru_cache(maxsize=16384)
def _remembered(answer: str, texts: tuple[str, ...], options: MathOptions) -> Verdict:
    verdict = judge(answer, texts, options)
    if verdict[0] is Reason.INFRA_ERROR:
        raise _NotToRemember(verdict)
    return verdict
