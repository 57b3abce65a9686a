"""Rewards for length and repetition. They count tokens, never characters, and every formula is clamped.

Each is a frozen dataclass, so that wrong options raise when the reward is loaded, before anything is sampled.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rewards.plugins import RewardFunction, load_reward
from rewards.pool.calling import grade
from rl.types import Reward

Ids = Sequence[Sequence[int]]


@dataclass(frozen=True)
class SoftOverlong:
    """0 up to max_length - buffer tokens, then linear down to -1 at max_length and beyond (DAPO, eq. 13).

    Beyond max_length it stays at -1 as in the paper; verl's version keeps falling. buffer=0 is a step.
    """

    max_length: int
    buffer: int

    def __post_init__(self) -> None:
        if not 0 <= self.buffer <= self.max_length:
            raise ValueError(
                f"soft_overlong: buffer={self.buffer} must be in 0..max_length={self.max_length}; DAPO uses "
                f"a fifth of max_length, here {self.max_length // 5}"
            )

    def __call__(self, completion_ids: Ids) -> list[float]:
        return [self._score(len(ids)) for ids in completion_ids]

    def _score(self, num_tokens: int) -> float:
        over = num_tokens - (self.max_length - self.buffer)
        if over <= 0:
            return 0.0
        return -min(over / self.buffer, 1.0) if self.buffer else -1.0


@dataclass(frozen=True)
class Repetition:
    """max_penalty * (1 - unique n-grams / n-grams) over token ids (arXiv:2502.03373, appendix C.2)."""

    ngram_size: int = 3
    max_penalty: float = -1.0

    def __post_init__(self) -> None:
        if self.ngram_size < 1 or not self.max_penalty <= 0:
            raise ValueError(
                f"repetition: ngram_size={self.ngram_size} must be >= 1 and max_penalty={self.max_penalty} "
                "<= 0; 3 and -1.0 are usual"
            )

    def __call__(self, completion_ids: Ids) -> list[float]:
        return [self._score(ids) for ids in completion_ids]

    def _score(self, ids: Sequence[int]) -> float:
        num_ngrams = len(ids) - self.ngram_size + 1
        if num_ngrams < 1:
            return 0.0
        unique = len(set(zip(*(ids[i:] for i in range(self.ngram_size)), strict=False)))
        return self.max_penalty * (1 - unique / num_ngrams)


def _accuracy(name: str, options: Mapping[str, Any] | None) -> RewardFunction:
    """The reward by which length pays differently for correct (score >= 1) and wrong completions."""
    inner = load_reward(name, options)
    if inner.is_async:
        raise ValueError(f"accuracy={name!r} must not be async; 'math' is usual")
    return inner


def _shaped(verdict: Reward, score: float) -> Reward:
    """The score with the verdict's reason; an abstention stays one."""
    if verdict.score is None:
        return verdict
    return Reward(score, verdict.reason, verdict.detail, verdict.extracted)


class CosineLength:
    """v_long + (v_short - v_long) / 2 * (1 + cos(pi * min(tokens / max_length, 1))).

    arXiv:2502.03373, appendix C.1.

    A correct completion gets max_correct if it is short, down to min_correct if it is long. A wrong one gets
        min_wrong up to max_wrong, so that longer thought makes a wrong answer cost less. Without the clamp
        the cosine would rise again beyond max_length. If the accuracy reward abstains, so does this one.
    """

    def __init__(
        self,
        max_length: int,
        min_correct: float = 0.5,
        *,
        max_correct: float = 1.0,
        min_wrong: float = -1.0,
        max_wrong: float = -0.5,
        accuracy: str = "math",
        accuracy_options: Mapping[str, Any] | None = None,
    ) -> None:
        if max_length < 1 or not min_wrong <= max_wrong <= min_correct <= max_correct:
            raise ValueError(
                f"cosine_length: max_length={max_length} must be >= 1 and min_wrong={min_wrong} <= "
                f"max_wrong={max_wrong} <= min_correct={min_correct} <= max_correct={max_correct}; "
                "-1.0, -0.5, 0.5, 1.0 are usual"
            )
        self.max_length = max_length
        self.correct, self.wrong = (max_correct, min_correct), (min_wrong, max_wrong)
        self.inner = _accuracy(accuracy, accuracy_options)
        self.groupwise, self.required_columns = self.inner.groupwise, self.inner.required
        self.time_limit_s = self.inner.time_limit_s
        self.takes_any_column = True

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], completion_ids: Ids, **columns: Any
    ) -> list[Reward]:
        given = {"completions": completions, "completion_ids": completion_ids, "columns": columns}
        pairs = zip(grade(self.inner, prompts, **given), completion_ids, strict=True)
        return [_shaped(found, self._score((found.score or 0) >= 1, len(ids))) for found, ids in pairs]

    def _score(self, correct: bool, num_tokens: int) -> float:
        short, long = self.correct if correct else self.wrong
        return long + (short - long) / 2 * (1 + math.cos(math.pi * min(num_tokens / self.max_length, 1.0)))


class KimiLength:
    """lam = 0.5 - (tokens - min) / (max - min) over the completions of a prompt; wrong ones get min(0, lam).

    Kimi k1.5 (arXiv:2501.12599), section 2.3.3. All get 0 if all are equally long. min and max are taken over
    one group; over a batch they would punish prompts that need long answers.
    """

    groupwise = True

    def __init__(self, accuracy: str = "math", accuracy_options: Mapping[str, Any] | None = None) -> None:
        self.inner = _accuracy(accuracy, accuracy_options)
        self.required_columns, self.time_limit_s = self.inner.required, self.inner.time_limit_s
        self.takes_any_column = True

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], completion_ids: Ids, **columns: Any
    ) -> list[Reward]:
        given = {"completions": completions, "completion_ids": completion_ids, "columns": columns}
        verdicts = grade(self.inner, prompts, **given)
        lengths = [len(ids) for ids in completion_ids]
        shortest, spread = min(lengths), max(lengths) - min(lengths)
        scores = [0.5 - (length - shortest) / spread if spread else 0.0 for length in lengths]
        return [
            _shaped(verdict, lam if (verdict.score or 0) >= 1 else min(0.0, lam))
            for verdict, lam in zip(verdicts, scores, strict=True)
        ]
