import math

import pytest

from rl.advantages import ADVANTAGES, compute_advantages, group_outcome, sample_std
from rl.config import AdvantageConfig
from rl.config.read import load_config
from rl.types import Completion, Group, Prompt, Reason, Reward, ScoredGroup

EPS = 1e-4


def scored(scores, *, aborted=(), parts=None):
    """A group with these scores (None: abstained); completions of indices `aborted` were never finished."""
    completions = [
        Completion([7], [-1.0], [True], "abort" if i in aborted else "stop", []) for i in range(len(scores))
    ]
    rewards = [
        Reward(
            score, Reason.SCORED if score is not None else Reason.INFRA_ERROR, parts=parts[i] if parts else {}
        )
        for i, score in enumerate(scores)
    ]
    return ScoredGroup(Group(Prompt("train/7", "?", (1, 2)), completions), rewards)


def advantages_of(groups, name="grpo", aggregate="sum", weights=None, **kwargs):
    config = AdvantageConfig(name=name, aggregate=aggregate)
    return compute_advantages(groups, config=config, weights=weights or {}, **kwargs)


def test_grpo_divides_by_the_sample_deviation_plus_epsilon():
    # mean 0.25, squared deviations 9/16 + 3/16 = 3/4, over G - 1 = 3: variance 1/4, deviation 1/2.
    assert ADVANTAGES["grpo"]([1, 0, 0, 0]) == pytest.approx(
        [0.75 / (0.5 + EPS), *[-0.25 / (0.5 + EPS)] * 3], rel=1e-14
    )


def test_centered_only_subtracts_the_mean():
    assert ADVANTAGES["centered"]([1, 0, 0, 0]) == [0.75, -0.25, -0.25, -0.25]


def test_rloo_subtracts_the_mean_of_the_others():
    # others of 4: (1 + 1) / 2 = 1; others of each 1: (4 + 1) / 2 = 2.5.
    assert ADVANTAGES["rloo"]([4, 1, 1]) == pytest.approx([3.0, -1.5, -1.5], rel=1e-14)


def test_max_rl_divides_the_centered_reward_by_the_mean():
    # mean 1/4: (1 - 1/4) / (1/4) = 3 and (0 - 1/4) / (1/4) = -1.
    assert ADVANTAGES["max_rl"]([1, 0, 0, 0]) == pytest.approx([3.0, -1.0, -1.0, -1.0], rel=1e-14)
    assert ADVANTAGES["max_rl"]([0, 0]) == [0.0, 0.0]


def test_max_rl_refuses_negative_rewards():
    with pytest.raises(
        ValueError, match=r"advantage\.name=max_rl .* must be >= 0, not -0\.5; use rewards in \[0, 1\]"
    ):
        ADVANTAGES["max_rl"]([1.0, -0.5])


def test_batch_divides_by_the_deviation_over_all_groups():
    # rewards 1 0 | 4 0 3: mean 8/5, squares 0.36 + 2.56 + 5.76 + 2.56 + 1.96 = 13.2, over 4: 3.3.
    std = math.sqrt(3.3)
    first, second = advantages_of([scored([1.0, 0.0]), scored([4.0, 0.0, 3.0])], name="batch")
    assert first == pytest.approx([0.5 / (std + EPS), -0.5 / (std + EPS)], rel=1e-14)
    assert second == pytest.approx([x / (std + EPS) for x in (5 / 3, -7 / 3, 2 / 3)], rel=1e-14)


def test_gdpo_normalises_each_part_then_the_sum_over_the_step():
    # Part a: 1 0 0 0 in group 1 as in the grpo test; 0 0 in group 2 gives 0.
    # Part b: 1 1 0 0: mean 1/2, variance (4 / 4) / 3, deviation sqrt(1/3); group 2: 1 0, deviation sqrt(1/2).
    parts = [{"a": 1.0, "b": 1.0}, {"a": 0.0, "b": 1.0}, {"a": 0.0, "b": 0.0}, {"a": 0.0, "b": 0.0}]
    other = [{"a": 0.0, "b": 1.0}, {"a": 0.0, "b": 0.0}]
    groups = [scored([3.0, 1.0, 0.0, 0.0], parts=parts), scored([1.0, 0.0], parts=other)]
    b, b2 = 0.5 / (math.sqrt(1 / 3) + EPS), 0.5 / (math.sqrt(1 / 2) + EPS)
    high, low = 0.75 / (0.5 + EPS), -0.25 / (0.5 + EPS)
    sums = [2 * high + b, 2 * low + b, 2 * low - b, 2 * low - b, b2, -b2]
    std = math.sqrt(sum(x * x for x in sums) / 5)  # their mean is 0
    first, second = advantages_of(groups, aggregate="gdpo", weights={"a": 2.0, "b": 1.0})
    assert first + second == pytest.approx([x / (std + EPS) for x in sums], rel=1e-12)


def test_gdpo_part_that_abstains_adds_nothing_and_leaves_the_others_baseline():
    parts = [{"a": 1.0, "b": None}, {"a": 0.0, "b": 5.0}, {"a": 0.0, "b": 3.0}]
    (with_abstained,) = advantages_of(
        [scored([1.0, 5.0, 3.0], parts=parts)], aggregate="gdpo", weights={"a": 1.0, "b": 1.0}
    )
    # a: mean 1/3, deviation sqrt(1/3): 2/3, -1/3, -1/3; b over the last two: +-1 over sqrt(2).
    a, b = 1 / (math.sqrt(1 / 3) + EPS), 1 / (math.sqrt(2) + EPS)
    sums = [2 / 3 * a, -1 / 3 * a + b, -1 / 3 * a - b]
    std = math.sqrt(sum(x * x for x in sums) / 2)
    assert with_abstained == pytest.approx([x / (std + EPS) for x in sums], rel=1e-12)


def test_gdpo_wants_a_weight_for_every_part():
    groups = [scored([1.0, 0.0], parts=[{"math": 1.0}, {"math": 0.0}])]
    with pytest.raises(ValueError, match=r"train/7 has parts \['math'\] without a weight; .* \['length'\]"):
        advantages_of(groups, aggregate="gdpo", weights={"length": 1.0})
    with pytest.raises(ValueError, match=r"train/7 has no parts in Reward\.parts"):
        advantages_of([scored([1.0, 0.0])], aggregate="gdpo", weights={"math": 1.0})


@pytest.mark.parametrize("name", ADVANTAGES)
def test_abstained_and_aborted_completions_do_not_shift_the_others(name):
    (bare,) = advantages_of([scored([1.0, 0.0, 0.5])], name=name)
    (mixed,) = advantages_of([scored([1.0, None, 0.0, 100.0, 0.5], aborted=[3])], name=name)
    assert mixed == [bare[0], 0.0, bare[1], 0.0, bare[2]]
    assert any(bare)


@pytest.mark.parametrize("name", ADVANTAGES)
def test_groups_without_spread_get_exactly_zero(name):
    # 0.1 three times has a floating-point mean that is not 0.1; 0.1 + 0.2 and 0.3 are equal up to rounding.
    groups = [
        scored([0.1] * 3),
        scored([0.1 + 0.2, 0.3]),
        scored([5.0]),
        scored([None, 2.0]),
        scored([]),
        scored([1.0, 0.0]),
    ]
    *flat, spread = advantages_of(groups, name=name)
    assert flat == [[0.0] * 3, [0.0] * 2, [0.0], [0.0, 0.0], []]
    assert all(spread)


def test_every_process_gets_the_advantages_of_the_whole_step():
    groups = [scored([1.0, 0.0, 0.0]), scored([5.0, 2.0]), scored([None, 1.0, 0.25, 0.0])]
    whole = advantages_of(groups, name="batch")
    shares = [groups[:2], groups[2:]]
    # The sums over both processes, recorded by a first pass in which each process sees only its own numbers.
    seen = [[], []]
    for rank, share in enumerate(shares):
        advantages_of(share, name="batch", reduce_moments=lambda m, r=rank: seen[r].append(m) or m)
    counts = [sum(c) for c in zip(seen[0][0], seen[1][0], strict=True)]
    mean = counts[1] / counts[0]
    squares = [
        sum((r.score - mean) ** 2 for g in share for r in g.rewards if r.score is not None)
        for share in shares
    ]
    parts = []
    for share in shares:
        totals = iter([counts, [sum(squares)]])
        parts += advantages_of(share, name="batch", reduce_moments=lambda m, t=totals: next(t))
    for mine, expected in zip(parts, whole, strict=True):
        assert mine == pytest.approx(expected, rel=1e-14)


def test_the_deviation_survives_a_large_mean():
    # 1e9 + {1, 2, 3}: deviation 1; the sum of squares minus n mean^2 would lose all its digits.
    assert sample_std([1e9 + 1, 1e9 + 2, 1e9 + 3]) == 1.0


def test_a_score_that_is_no_number_is_named():
    with pytest.raises(
        ValueError, match=r"completion 1 of prompt train/7 has reward nan; .* finite number, or None"
    ):
        advantages_of([scored([1.0, math.nan])])


@pytest.mark.parametrize(
    ("scores", "aborted", "outcome"),
    [
        ([1.0, 0.0], [], "mixed"),
        ([1.0, 1.0], [], "all_right"),
        ([0.0, 0.0], [], "all_wrong"),
        ([-1.0, -1.0], [], "all_wrong"),
        ([None, None], [], "unscored"),
        ([1.0, None], [], "all_right"),
        ([1.0, 0.0], [0], "all_wrong"),
        ([1.0, 1.0], [0, 1], "unscored"),
        ([], [], "unscored"),
    ],
)
def test_outcome_of_a_group(scores, aborted, outcome):
    assert group_outcome(scored(scores, aborted=aborted), config=AdvantageConfig(), weights={}) == outcome


def test_gdpo_group_with_equal_sums_is_mixed_where_a_weighted_part_has_spread():
    group = scored([1.0, 1.0, 1.0], parts=[{"a": 1.0, "b": 0.0}, {"a": 0.0, "b": 1.0}, {"a": 0.0, "b": 1.0}])
    gdpo = AdvantageConfig(aggregate="gdpo")
    assert group_outcome(group, config=AdvantageConfig(), weights={"a": 1.0, "b": 1.0}) == "all_right"
    assert group_outcome(group, config=gdpo, weights={"a": 1.0, "b": 1.0}) == "mixed"
    assert group_outcome(group, config=gdpo, weights={"a": 0.0, "b": 0.0}) == "all_right"


def test_gdpo_with_another_advantage_is_refused():
    with pytest.raises(ValueError, match=r"would ignore advantage\.name=rloo; use advantage\.name=grpo"):
        AdvantageConfig(name="rloo", aggregate="gdpo")


CLIPPED = "rewards.functions=[{name: environment, clip: [0, 1]}, {name: math, weight: 0}]"
GATED = "rewards.functions=[{name: math}, {name: tag_format, weight: 0.1, requires: math}]"
BY_TURN = ["advantage={name: rloo, credit: turns}", "environment={name: guess_number}"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["advantage.aggregate=gdpo", GATED],
            r"gdpo compares scores before clip and requires.* of reward tag_f",
        ),
        ([*BY_TURN, CLIPPED], r"credit=turns compares scores before.* those of reward environment"),
        ([*BY_TURN, "loss.name=gspo"], "gspo has one ratio per sequence.* and those by turn, differ in it"),
    ],
)
def test_keys_that_an_advantage_would_ignore_are_refused_with_it(overrides, message):
    """A closed gate pays 0 by `requires`; gdpo normalises the part behind it as if it were open."""
    with pytest.raises(ValueError, match=message):
        load_config(None, overrides)
    assert load_config(None, [*overrides, "rewards.control=random", "loss.name=grpo"])  # pays its own reward


def test_a_group_that_only_earns_the_format_bonus_is_all_wrong():
    """0.1 for a box and 0.9 for the answer: 0.1 each is wrong, 1.0 each is right."""
    weights = {"boxed_format": 0.1, "math": 0.9}
    for score, outcome in ((0.1, "all_wrong"), (1.0, "all_right")):
        assert group_outcome(scored([score] * 2), config=AdvantageConfig(), weights=weights) == outcome
