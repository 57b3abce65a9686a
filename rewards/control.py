"""Rewards for control runs: what a model learns from them is not the task (arXiv:2506.10947)."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from rewards.plugins import groupwise, ignores_answer, load_reward, per_completion
from rewards.pool.calling import grade
from rl.types import Reason, Reward

WITHOUT_ANSWER = {Reason.NO_ANSWER, Reason.TRUNCATED, Reason.FORMAT, Reason.PARSE_ERROR}
WITHOUT_FORM = {"code": {Reason.PARSE_ERROR}}  # it takes any text without fences for a program


@groupwise
@ignores_answer
def random_control(
    prompts: Sequence[Any], completions: Sequence[Any], trainer_state: Any, *, seed: int = 0
) -> list[float]:
    """0 or 1 with equal chance, drawn from the seed, prompt, step and the completion's index in its group.

    The text of the completion plays no part. A resumed run draws the same numbers.
    """
    drawn = f"{seed} {getattr(trainer_state, 'global_step', 0)} {prompts[0]!r}"
    return [float(hashlib.sha256(f"{drawn} {i}".encode()).digest()[0] & 1) for i in range(len(completions))]


@per_completion
@ignores_answer
def no_reward(completions: Sequence[Any]) -> list[None]:
    """Never applies: the reward of a run that learns from its teacher alone."""
    return [None] * len(completions)


@per_completion
@ignores_answer
class FormatControl:
    """1 where another reward finds an answer to grade in the completion, right or wrong; 0 where it does not.

    A program that does not parse is not an answer: the code grader takes any text for a program.

    Args:
        reward: name of the other reward, such as math; it must report the answer that it extracted.
        options: its options.
    """

    takes_any_column = True

    def __init__(self, reward: str, options: Mapping[str, Any] | None = None) -> None:
        self.reward = load_reward(reward, options)
        self.required_columns = tuple(self.reward.required)
        self.time_limit_s = self.reward.time_limit_s

    def __call__(self, prompts: Any, completions: Any, completion_ids: Any, **columns: Any) -> list[Reward]:
        given = {"completions": completions, "completion_ids": completion_ids, "columns": columns}
        return [self._form(found) for found in grade(self.reward, prompts, **given)]

    def _form(self, found: Reward) -> Reward:
        if found.extracted is None and found.score is None:
            return found
        if found.extracted is None and found.reason not in WITHOUT_ANSWER:
            raise ValueError(
                f"rewards.control=format pays for an answer, but {self.reward.name} graded one and names no "
                "extracted answer; use rewards.control=random, or return rl.types.Reward with `extracted`"
            )
        has_none = found.extracted is None or found.reason in WITHOUT_FORM.get(self.reward.name, ())
        reason = found.reason if has_none else Reason.SCORED
        return Reward(float(not has_none), reason, extracted=found.extracted)
