"""The numbers of a step from its groups."""

from __future__ import annotations

from accelerate import Accelerator

from rl.config import AdvantageConfig
from rl.record import group_metrics
from rl.types import Completion, Group, Prompt, Reward, ScoredGroup, VersionSpan
from rl.world import World


def completion(*spans: tuple[int, int]) -> Completion:
    n = sum(count for _, count in spans)
    versions = [VersionSpan(version, count) for version, count in spans]
    return Completion([5] * n, [-1.0] * n, [True] * n, "stop", versions)


def test_ages_are_those_of_tokens_and_the_counts_of_the_source_are_metrics():
    """At step 5: two tokens of age 2, six of age 1 and two of age 1: (2 * 2 + 8 * 1) / 10."""
    group = Group(Prompt("p", "", (1,)), [completion((3, 2), (4, 6)), completion((4, 2))])
    values = group_metrics(
        [ScoredGroup(group, [Reward(0.0), Reward(1.0)])],
        step=5,
        config=AdvantageConfig(),
        weights={},
        world=World(Accelerator(cpu=True)),
        counts={"rounds": 2.0, "replaced": 3.0, "over_age": 1.0, "in_flight": 24.0},
    )
    assert values["staleness/mean"] == 1.2 and values["staleness/max"] == 2.0
    assert values["rollout/replaced"] == 3.0 and values["rollout/in_flight"] == 24.0
    assert values["staleness/over_age"] == 1.0
