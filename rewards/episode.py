"""The rewards that an environment gave for an episode, as a reward function."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rl.types import Reason, Reward


def environment_reward(
    completions: Sequence[Any], completion_facts: Sequence[Mapping[str, Any]] | None
) -> list[Reward]:
    """The sum of the rewards of an episode's turns, and the rewards per turn; 0 if no turn had a reward.

    Failed episodes are not graded. For a completion without an episode the reward does not apply.
    """
    return [_reward(facts) for facts in completion_facts or [{} for _ in completions]]


def _reward(facts: Mapping[str, Any]) -> Reward:
    """The reward of one completion, from the facts that its environment recorded."""
    turns = facts.get("rewards")
    if turns is None:
        return Reward(None, Reason.NOT_APPLICABLE, "the completion is not an episode")
    reason = Reason.TRUNCATED if facts.get("limit") else Reason.SCORED
    detail = f"cut by its limit of {facts['limit']}" if facts.get("limit") else ""
    return Reward(math.fsum(r for r in turns if r is not None), reason, detail, turns=tuple(turns))
