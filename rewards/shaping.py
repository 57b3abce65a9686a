"""Rewards for length and repetition. They count tokens, never characters, and every formula is clamped.

Each is a frozen dataclass, so that wrong options raise when the reward is loaded, before anything is sampled.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rewards.plugins import RewardFunction, load_reward
from rewards.pool.calling import arguments, grade
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


@dataclass(frozen=True)
class Correctness:
    """Grades with another reward: length pays differently for correct (score >= 1) and wrong completions."""

    accuracy: str = "math"
    accuracy_options: Mapping[str, Any] = field(default_factory=dict)
    inner: RewardFunction = field(init=False, repr=False)

    def __post_init__(self) -> None:
        inner = load_reward(self.accuracy, self.accuracy_options)
        if inner.is_async:
            raise ValueError(f"accuracy={self.accuracy!r} must not be async; 'math' is usual")
        object.__setattr__(self, "inner", inner)

    def rewards(
        self, prompts: Sequence[Any], completions: Sequence[Any], ids: Ids, columns: Mapping[str, Any]
    ) -> list[Reward]:
        return grade(
            self.inner,
            arguments(self.inner, prompts, completions=completions, completion_ids=ids, columns=columns),
            len(completions),
        )


def _shaped(verdict: Reward, score: float) -> Reward:
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
        self.correctness = Correctness(accuracy, accuracy_options or {})
        self.groupwise = self.correctness.inner.groupwise
        self.required_columns = self.correctness.inner.required
        self.time_limit_s = self.correctness.inner.time_limit_s
        self.takes_any_column = True

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], completion_ids: Ids, **columns: Any
    ) -> list[Reward]:
        verdicts = self.correctness.rewards(prompts, completions, completion_ids, columns)
        return [
            verdict if verdict.score is None else _shaped(verdict, self._score(verdict.score >= 1, len(ids)))
            for verdict, ids in zip(verdicts, completion_ids, strict=True)
        ]

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
        self.correctness = Correctness(accuracy, accuracy_options or {})
        self.required_columns = self.correctness.inner.required
        self.time_limit_s = self.correctness.inner.time_limit_s
        self.takes_any_column = True

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], completion_ids: Ids, **columns: Any
    ) -> list[Reward]:
        verdicts = self.correctness.rewards(prompts, completions, completion_ids, columns)
        lengths = [len(ids) for ids in completion_ids]
        shortest, spread = min(lengths), max(lengths) - min(lengths)
        scores = [0.5 - (length - shortest) / spread if spread else 0.0 for length in lengths]
        return [
            verdict
            if verdict.score is None
            else _shaped(verdict, lam if verdict.score >= 1 else min(0.0, lam))
            for verdict, lam in zip(verdicts, scores, strict=True)
        ]
