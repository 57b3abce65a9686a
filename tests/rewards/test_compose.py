"""Several rewards become one: weights, gates, clipping, abstaining."""

import json

import pytest

from rewards.answers import read_answer
from rewards.compose import RewardSpec, check_specs, compose
from rewards.pool.worker import _answer
from rl.types import Reason, Reward

NOT_APPLICABLE = Reward(None, Reason.NOT_APPLICABLE)
FAILED = Reward(None, Reason.INFRA_ERROR, "timeout: no answer")


def total(specs, **scores):
    parts = {name: score if isinstance(score, Reward) else Reward(score) for name, score in scores.items()}
    return compose(specs, parts).score


def test_the_sum_is_weighted_and_every_part_stays_visible():
    specs = [RewardSpec("math", 2.0), RewardSpec("format", 0.5), RewardSpec("length", 0.0)]
    reward = compose(specs, {"math": Reward(1.0), "format": Reward(1.0), "length": Reward(-7.0)})
    assert reward.score == 2.5  # 2 * 1 + 0.5 * 1 + 0 * -7
    assert reward.parts == {"math": 1.0, "format": 1.0, "length": -7.0}


@pytest.mark.parametrize(("held", "expected"), [(1.0, 1.25), (0.0, 0.0), (-1.0, -0.25)])
def test_a_part_counts_only_if_the_reward_that_it_requires_is_positive(held, expected):
    specs = [RewardSpec("math", requires="format"), RewardSpec("format", 0.25)]
    assert total(specs, math=1.0, format=held) == expected  # 1 + 0.25 | 0 + 0 | 0 - 0.25


def test_gates_are_chained():
    specs = [RewardSpec("a", requires="b"), RewardSpec("b", requires="c"), RewardSpec("c")]
    assert total(specs, a=1.0, b=1.0, c=0.0) == 0.0
    assert total(specs, a=1.0, b=1.0, c=1.0) == 3.0


def test_a_gate_that_does_not_apply_is_open():
    assert (
        total([RewardSpec("math", requires="format"), RewardSpec("format")], math=1.0, format=NOT_APPLICABLE)
        == 1.0
    )


def test_clipping_bounds_the_score_before_its_weight_and_parts_show_it_unclipped():
    specs = [RewardSpec("length", 2.0, clip=(-1.0, 1.0))]
    reward = compose(specs, {"length": Reward(-5.0)})
    assert (reward.score, reward.parts) == (-2.0, {"length": -5.0})


def test_parts_that_do_not_apply_are_left_out_and_if_none_applies_the_whole_abstains():
    specs = [RewardSpec("a"), RewardSpec("b")]
    assert total(specs, a=1.0, b=NOT_APPLICABLE) == 1.0
    reward = compose(specs, {"a": NOT_APPLICABLE, "b": NOT_APPLICABLE})
    assert (reward.score, reward.reason) == (None, Reason.NOT_APPLICABLE)


def test_a_part_that_failed_makes_the_whole_abstain_and_is_named():
    specs = [RewardSpec("math"), RewardSpec("judge")]
    reward = compose(specs, {"math": Reward(1.0, Reason.CORRECT), "judge": FAILED})
    assert (reward.score, reward.reason, reward.detail) == (
        None,
        Reason.INFRA_ERROR,
        "judge: timeout: no answer",
    )
    assert reward.parts == {"math": 1.0, "judge": None}


def test_a_metric_of_weight_zero_may_fail_but_a_gate_of_weight_zero_may_not():
    assert total([RewardSpec("math"), RewardSpec("metric", 0.0)], math=1.0, metric=FAILED) == 1.0
    assert (
        total([RewardSpec("math", requires="gate"), RewardSpec("gate", 0.0)], math=1.0, gate=FAILED) is None
    )


def test_reason_and_extracted_answer_are_those_of_the_first_part_with_a_weight():
    specs = [RewardSpec("metric", 0.0), RewardSpec("math"), RewardSpec("format")]
    math = Reward(0.0, Reason.WRONG_ANSWER, "3 is not 4", "3", elapsed_ms=2.0)
    reward = compose(specs, {"metric": Reward(1.0), "math": math, "format": Reward(1.0, elapsed_ms=1.0)})
    assert (reward.reason, reward.extracted, reward.elapsed_ms) == (Reason.WRONG_ANSWER, "3", 3.0)
    assert reward.detail == "math: 3 is not 4"


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        ([], "at least one reward"),
        ([RewardSpec("a"), RewardSpec("a")], "'a' is listed twice"),
        ([RewardSpec("a", requires="b")], "requires 'b', which is not among"),
        ([RewardSpec("a", requires="b"), RewardSpec("b", requires="a")], "in a circle: a -> b -> a"),
        ([RewardSpec("a", requires="a")], "in a circle: a -> a"),
        ([RewardSpec("a", float("nan"))], "weight=nan"),
        ([RewardSpec("a", float("inf"))], "weight=inf"),
        ([RewardSpec("a", clip=(1.0, 0.0))], r"clip=\(1.0, 0.0\)"),
    ],
)
def test_specs_that_make_no_sense_are_refused(specs, message):
    with pytest.raises(ValueError, match=message):
        check_specs(specs)


def test_rewards_per_turn_come_from_the_only_part_times_its_weight():
    game = Reward(1.5, turns=(1.0, None, 0.5))
    assert compose([RewardSpec("game", 2.0)], {"game": game}).turns == (2.0, None, 1.0)
    both = [RewardSpec("game"), RewardSpec("format")]
    assert compose(both, {"game": game, "format": Reward(1.0)}).turns == ()


@pytest.mark.parametrize("turn", ["x", float("nan"), 1e300])
def test_rewards_per_turn_reach_the_run_from_a_worker_and_are_checked(turn):
    sent = json.loads(json.dumps(_answer("game", [Reward(1.5, turns=(1.0, None, 0.5))], 1, 0.0)))
    [(reward, fault)] = read_answer(sent, 1).items
    assert (reward.turns, fault) == ((1.0, None, 0.5), None)
    sent = _answer("game", [Reward(1.5, turns=(turn,))], 1, 0.0)
    [(reward, fault)] = read_answer(sent, 1).items
    assert reward.score is None and fault is not None and "game gave a turn" in fault[1]
