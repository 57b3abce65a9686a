"""What an environment paid for an episode, as a reward of the run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rl.types import Reason, Reward


def environment_reward(
    completions: Sequence[Any], completion_facts: Sequence[Mapping[str, Any]] | None
) -> list[Reward]:
    """The sum of the rewards of an episode's turns, and each of them; 0 where no turn had one.

    An episode that failed does not come here. A completion without an episode has no such reward.
    """
    return [_reward(facts) for facts in completion_facts or [{} for _ in completions]]


def _reward(facts: Mapping[str, Any]) -> Reward:
    turns = facts.get("rewards")
    if turns is None:
        return Reward(None, Reason.NOT_APPLICABLE, "the completion is not an episode")
    reason = Reason.TRUNCATED if facts.get("limit") else Reason.SCORED
    detail = f"cut by its limit of {facts['limit']}" if facts.get("limit") else ""
    return Reward(math.fsum(r for r in turns if r is not None), reason, detail, turns=tuple(turns))
