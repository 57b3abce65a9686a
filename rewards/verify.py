"""Hugging Face's math-verify as a reward, to compare this library's grader with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rewards.completion import last_message_text
from rewards.math.judge import gold_texts
from rl.types import Reason, Reward

TIMEOUT_S = 3  # whole seconds, by an alarm: a call parses twice and compares once


class MathVerify:
    """1 if math-verify says that the completion's answer is the gold, or one of a list of golds.

    Golds are read as `math` reads them: after ####, inside a box, or the whole text.

    Raises:
        ValueError: math-verify is not installed.
    """

    def __init__(self) -> None:
        try:
            import math_verify
        except ImportError as error:
            raise ValueError("math_verify needs the package math-verify: pip install math-verify") from error
        self.library: Any = math_verify

    def __call__(self, completions: Sequence[Any], answer: Sequence[Any]) -> list[Reward]:
        pairs = zip(completions, answer, strict=True)
        return [self._grade(last_message_text(completion), gold) for completion, gold in pairs]

    def _grade(self, text: str, gold: Any) -> Reward:
        parse, verify = self.library.parse, self.library.verify
        given = gold if isinstance(gold, list) else [gold]
        golds = [
            one for each in given if isinstance(each, str | int | float) for one in gold_texts(str(each))
        ]
        parsed = [parse(f"\\boxed{{{one}}}", parsing_timeout=TIMEOUT_S) for one in golds]
        if not any(parsed):
            return Reward(None, Reason.BAD_GOLD, "math-verify cannot read the gold")
        said = parse(text, parsing_timeout=TIMEOUT_S)
        if not said:
            return Reward(0.0, Reason.NO_ANSWER)
        is_right = any(verify(one, said, timeout_seconds=TIMEOUT_S) for one in parsed if one)
        reason = Reason.CORRECT if is_right else Reason.WRONG_ANSWER
        return Reward(float(is_right), reason, f"read {said[-1]}", str(said[-1]))
