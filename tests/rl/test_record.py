"""The numbers of a step: what dynamic sampling threw away counts, graders that fail are told apart."""

from __future__ import annotations

import pytest
from accelerate import Accelerator

from rl.config import AdvantageConfig
from rl.record import check_faults, group_metrics
from rl.report.verdict import Watch, judge
from rl.types import Completion, Group, Prompt, Reason, Reward, ScoredGroup, VersionSpan
from rl.world import World


def scored(*rewards: Reward | float, num_tokens: int = 2, reason="stop") -> ScoredGroup:
    given = [r if isinstance(r, Reward) else Reward(r, parts={"math": r}) for r in rewards]
    completions = [
        Completion([7] * num_tokens, [], [True] * num_tokens, reason, [VersionSpan(0, num_tokens)])
        for _ in given
    ]
    return ScoredGroup(Group(Prompt("p", "", (1,)), completions), given)


def metrics(groups, rejected=()):
    return group_metrics(
        groups,
        rejected=rejected,
        step=0,
        config=AdvantageConfig(),
        weights={"math": 1.0},
        world=World(Accelerator(cpu=True)),
        counts={},
    )


def test_replaced_groups_count_as_all_right_or_all_wrong_and_in_nothing_else():
    kept = [scored(1.0, 0.0), scored(0.0, 1.0)]
    rejected = [scored(1.0, 1.0, num_tokens=5), scored(0.0, 0.0, num_tokens=3)]
    alone, both = metrics(kept), metrics(kept, rejected)
    assert (alone["groups/all_right"], alone["groups/without_spread"]) == (0.0, 0.0)
    assert (both["groups/all_right"], both["groups/all_wrong"]) == (0.25, 0.25)
    assert both["groups/without_spread"] == 0.5
    assert alone["tokens/completion"] == 8 and both["tokens/completion"] == 8 + 10 + 6
    changed = {name for name in both if both[name] != alone[name]}
    assert changed == {"groups/all_right", "groups/all_wrong", "groups/without_spread", "tokens/completion"}
    assert both["reward/std"] == 0.5 and both["completion/length_max"] == 2


def test_what_the_engine_did_not_finish_is_neither_short_nor_blamed_on_graders():
    lost = scored(Reward(None, Reason.NOT_APPLICABLE), Reward(None, Reason.NOT_APPLICABLE), reason="abort")
    values = metrics([scored(1.0, 0.0, Reward(None, Reason.BAD_GOLD), 0.0), lost])
    assert values["reward/abstained"] == 1 / 4 and values["completion/aborted"] == 2 / 6
    assert values["completion/length_min"] == 2
    assert not {"completion/length_min", "reward/abstained"} & metrics([lost]).keys()


FAULT = Reward(None, Reason.INFRA_ERROR, "raised: KeyError")


@pytest.mark.parametrize(
    ("groups", "max_share", "said"),
    [
        ([scored(1.0, 0.0)], 0.05, ""),
        ([scored(*[1.0] * 9, FAULT)], 0.05, "graders failed on 1 of 10 completions"),
        ([scored(*[1.0] * 38, FAULT, FAULT)], 0.05, "graders failed on 2 of 40 completions"),
        ([scored(Reward(None, Reason.BAD_GOLD), Reward(None, Reason.NOT_APPLICABLE))], 0.05, ""),
        ([scored(FAULT, FAULT, reason="abort")], 0.05, ""),
    ],
)
def test_failing_graders_are_named_and_tolerated_up_to_a_share(groups, max_share, said):
    sentence = check_faults(groups, max_share, list)
    assert sentence.startswith(said) and bool(sentence) == bool(said)
    assert not said or "raised: KeyError" in sentence


@pytest.mark.parametrize(
    ("groups", "max_share"), [([scored(*[1.0] * 37, *[FAULT] * 3)], 0.05), ([scored(1.0, FAULT)], 0.0)]
)
def test_too_many_failures_stop_the_run(groups, max_share):
    with pytest.raises(RuntimeError, match=r"more than rewards.max_fault_share=.*raised: KeyError"):
        check_faults(groups, max_share, list)


def test_a_watch_names_what_is_broken_and_not_what_is_unusual():
    """Five values in a row decide: truncation is unusual above 30 % and broken above 95 %."""
    watch = Watch()
    assert not any(watch.broken(step, {"completion/truncated_share": 0.5}) for step in range(10))
    found = [watch.broken(step, {"completion/truncated_share": 1.0}) for step in range(10, 15)]
    assert not any(found[:4])
    (finding,) = found[4]
    assert str(finding).startswith(
        "completion/truncated_share is 100.0 %, healthy is at most 30 %, since step 10"
    )
    assert "raise sampling.max_completion_length" in str(finding)


def test_the_spread_of_a_part_is_0_to_the_last_bit_where_all_its_scores_are_equal():
    """Over 0.1 ten times, the mean of squares less the square of the mean is 1.7e-18, not 0."""
    values = metrics([scored(*[Reward(0.1, parts={"math": 0.1}) for _ in range(10)])])
    assert values["reward/math/std"] == values["reward/std"] == 0.0
    values = metrics([scored(1.0, 0.0), scored(1.0, 0.0)])
    assert values["reward/math/std"] == values["reward/std"] == 0.5
    assert "reward/math/std" not in metrics([scored(Reward(None, parts={"math": None}))])


def test_a_reward_part_that_never_varied_is_named_once_and_one_that_is_learnt_is_not():
    """Five steps decide. `learnt` varied in the first step, more than a watch's window of 20 steps ago."""
    rows = [
        {"step": s, "reward/math/std": 0.5, "reward/my:fn/std": 0.0, "reward/my:fn/mean": 1.0}
        for s in range(1, 31)
    ]
    rows = [{**row, "reward/learnt/std": 0.5 if row["step"] == 1 else 0.0} for row in rows]
    (finding,) = judge(rows).findings
    assert (finding.level, finding.metric, finding.since) == ("Warning", "reward/my:fn/std", 1)
    assert finding.text == "reward part my:fn gives all completions of a step the same score, 1"
    assert "a completion of a chat is a list of messages" in finding.hint
    assert judge(rows[:4]).findings == ()

    watch = Watch()
    watch.recall(rows[:3])
    found = [watch.broken(row["step"], {k: v for k, v in row.items() if k != "step"}) for row in rows[3:]]
    assert [[f.metric for f in step] for step in found] == [[]] + [["reward/my:fn/std"]] * 26


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
        counts={"rounds": 2.0, "replaced": 3.0, "in_flight": 24.0},
    )
    assert values["staleness/mean"] == 1.2 and values["staleness/max"] == 2.0
    assert values["rollout/replaced"] == 3.0 and values["rollout/in_flight"] == 24.0


def test_metrics_of_episodes_count_each_episode_once_and_sum_the_seconds_of_a_tool():
    group = scored(1.0, 0.0, 0.0)
    group.completions[0].facts = {
        "rewards": [None, 1.0],
        "counts": {"calls": 3, "malformed": 1, "seconds/python": 1.5, "seconds/f": 0.25},
    }
    group.completions[1].facts = {
        "rewards": [0.0],
        "counts": {"calls": 1, "tool_errors": 1, "seconds/f": 0.5},
    }
    group.completions[2].facts = {"rewards": [None, None, 0.0], "counts": {"turns": 9}}  # a name of its own
    group.completions[0].facts["seconds"], group.completions[2].facts["seconds"] = (3.0, 0.25), (1.0, 0.25)
    values = metrics([group])
    assert values["episode/turns"] == (2 + 1 + 3) / 3 and values["episode/wait_share"] == 0.5 / 4
    assert values["tools/calls"] == 4 / 3 and values["tools/failed"] == 2 / 4
    assert values["tools/python/seconds"] == 1.5 and values["tools/f/seconds"] == 0.75
    for completion in group.completions:  # nobody called one of the tools that there are
        completion.facts = {"rewards": [0.0], "counts": {}, "tools": "a hash"}
    values = metrics([group])
    assert values["tools/calls"] == 0.0 and not {"tools/failed", "episode/wait_share"} & values.keys()
    assert not [name for name in metrics([scored(1.0, 0.0)]) if name.startswith(("tools/", "episode/"))]
