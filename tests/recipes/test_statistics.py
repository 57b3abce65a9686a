"""The statistics of an evaluation against enumeration and simulation."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path
from statistics import fmean

import numpy as np
import pytest

from recipes.evaluation.evaluations import table
from recipes.evaluation.statistics import (
    Sampled,
    maj_at,
    mcnemar,
    paired,
    pass_at_k,
    same_text,
    share_interval,
    summary,
)
from rl.types import Completion, Continuation, Group, Prompt, Reason, Reward, ScoredGroup


@pytest.mark.parametrize("n", range(1, 9))
def test_pass_at_k_is_the_share_of_all_subsets_with_a_right_sample(n):
    for right, k in itertools.product(range(n + 1), range(1, n + 1)):
        samples = [i < right for i in range(n)]
        subsets = [any(subset) for subset in itertools.combinations(samples, k)]
        assert pass_at_k(n, right, k) == pytest.approx(sum(subsets) / len(subsets), abs=1e-12)


def drawn(votes: tuple[str, ...]) -> float:
    """The chance that a majority vote is "right", where "" does not vote and ties are drawn evenly."""
    counts = Counter(vote for vote in votes if vote)
    tied = [vote for vote, count in counts.items() if count == max(counts.values())]
    return tied.count("right") / len(tied) if tied else 0.0


@pytest.mark.parametrize(
    ("right", "others", "blank"),
    [
        (0, [3, 1], 2),
        (1, [], 0),
        (1, [1], 1),
        (2, [2, 1, 1], 2),
        (3, [2, 2, 2], 0),
        (2, [1] * 5, 1),
        (4, [3], 1),
    ],
)
def test_maj_at_k_is_the_mean_vote_over_all_subsets(right, others, blank):
    samples = (
        ["right"] * right + [f"w{i}" for i, size in enumerate(others) for _ in range(size)] + [""] * blank
    )
    ks = range(1, len(samples) + 1)
    for k, found in zip(ks, maj_at(right, others, blank, ks), strict=True):
        expected = fmean(drawn(subset) for subset in itertools.combinations(samples, k))
        assert found == pytest.approx(expected, abs=1e-12)


def test_a_tie_of_two_answers_is_half_right_and_no_vote_is_wrong():
    assert maj_at(2, [2, 1], 0, [5]) == [0.5]
    assert maj_at(1, [1, 1], 3, [6]) == [pytest.approx(1 / 3)]
    assert maj_at(0, [], 4, [4]) == [0.0]


def coverage(prompts: int, samples: int, runs: int, *, a: float, b: float) -> float:
    """Share of simulated evaluations whose interval holds the truth; difficulties are Beta(a, b)."""
    rng, held = np.random.default_rng(7), 0
    for _ in range(runs):
        chances = rng.beta(a, b, prompts)
        means = rng.binomial(samples, chances) / samples
        low, high = share_interval(means.tolist(), prompts * samples)
        held += low <= a / (a + b) <= high
    return held / runs


@pytest.mark.parametrize(
    ("prompts", "samples", "a", "b"),
    [(200, 1, 0.6, 0.9), (200, 8, 0.4, 0.6), (200, 8, 4, 6), (30, 16, 0.3, 1.2), (500, 4, 0.2, 2.0)],
)
def test_intervals_hold_the_truth_in_95_of_100_evaluations(prompts, samples, a, b):
    """Samples of one prompt are alike (Beta(0.4, 0.6)) or nearly independent (Beta(4, 6))."""
    assert 0.93 <= coverage(prompts, samples, 2000, a=a, b=b) <= 0.97


def test_an_interval_that_takes_samples_of_a_prompt_for_independent_would_not_hold():
    """The guard of the one above: 8 alike samples of 200 prompts are not 1,600 prompts."""
    rng, held = np.random.default_rng(7), 0
    for _ in range(500):
        means = rng.binomial(8, rng.beta(0.4, 0.6, 200)) / 8
        low, high = share_interval([means.mean()] * 1600, 1600)
        held += low <= 0.4 <= high
    assert held / 500 < 0.75


def checkpoints(
    rng, prompts: int, samples: int, gain: float, shift: float
) -> tuple[list[float], list[float]]:
    """Accuracies by prompt of two checkpoints: correlated, and `gain` apart on average.

    With one sample and shift 0.075, 10 of 100 prompts are answered right by one of the two alone.
    """
    chances = (rng.random(prompts) < 0.41).astype(float) if samples == 1 else rng.beta(0.5, 0.7, prompts)
    if samples == 1:
        to_right = (chances == 0) & (rng.random(prompts) < (shift + gain) / 2 / 0.59)
        to_wrong = (chances == 1) & (rng.random(prompts) < (shift - gain) / 2 / 0.41)
        return chances.tolist(), np.where(to_right, 1.0, np.where(to_wrong, 0.0, chances)).tolist()
    other, swap = np.clip(chances + rng.normal(0, shift, prompts), 0, 1), rng.random(prompts) < 0.5
    before, after = np.where(swap, other, chances), np.where(swap, chances, other)
    after = after + gain * (1 - after) / (1 - after).mean()
    pair = [rng.binomial(samples, p, prompts) / samples for p in (before, after)]
    return pair[0].tolist(), pair[1].tolist()


def found_share(prompts: int, samples: int, gain: float, shift: float, runs: int) -> tuple[float, float]:
    rng, bootstrap, exact = np.random.default_rng(3), 0, 0
    for i in range(runs):
        a, b = checkpoints(rng, prompts, samples, gain, shift)
        bootstrap += paired(a, b, seed=i, num_resamples=500)["p"] < 0.05
        exact += samples == 1 and mcnemar(a, b)["p"] < 0.05
    return bootstrap / runs, exact / runs


def test_a_difference_of_5_points_is_found_at_400_prompts():
    """One sample each, 10 % of the prompts changing sides (7.5 % to right, 2.5 % to wrong): z is
    20 / sqrt(400 (0.1 - 0.05^2)) = 3.2, so the power is P(N(3.2, 1) > 1.96) = 0.89; McNemar's exact test
    gives away a little. Eight samples each find it nearly always.
    """
    bootstrap, exact = found_share(400, 1, 0.05, 0.10, 200)
    assert bootstrap > 0.83 and exact > 0.78
    assert found_share(400, 8, 0.05, 0.10, 100)[0] > 0.97


def test_no_difference_is_found_where_there_is_none_but_for_5_in_100():
    bootstrap, exact = found_share(400, 1, 0.0, 0.10, 500)
    assert 0.03 < bootstrap < 0.07 and exact < 0.06
    assert 0.03 < found_share(400, 8, 0.0, 0.10, 500)[0] < 0.07


def test_mcnemar_by_hand():
    """b = 1, c = 5: 2 (C(6, 0) + C(6, 1)) / 2^6 = 14 / 64."""
    a = [1, 0, 0, 0, 0, 0, 1, 0]
    b = [0, 1, 1, 1, 1, 1, 1, 0]
    assert mcnemar(a, b) == {"only_first": 1, "only_second": 5, "p": pytest.approx(14 / 64)}
    assert mcnemar(a, a)["p"] == 1.0 and paired(a, a)["p"] == 1.0


HEAD = {
    "model": "m", "step": 0, "data": "d",
    "sampling": {"max_completion_length": 8, "temperature": 1.0, "top_p": 1.0},
    "engine": {"name": "transformers", "version": "5", "dtype": "float32"}, "digest": "", "chat_template": "",
    "prompts": "", "seed": 0, "seconds": {}, "disagreements": 0,
}  # fmt: skip


def sampled(name: str, scores: list, answers: list, by=None) -> Sampled:
    return Sampled(name, scores, answers, [10] * len(scores), [False] * len(scores), by)


def test_a_sample_on_which_the_grader_abstained_is_no_zero_and_is_counted():
    """a: 1 of 1 graded; b: nothing graded; c: 1 of 2. avg = (1 + 1/2) / 2; 3 of 6 abstained."""
    rows = [sampled("a", [1.0, None], ["4", "5"]), sampled("b", [None, None], [None, None])]
    found = summary([*rows, sampled("c", [0.0, 1.0], ["7", "4"])])
    assert found["avg"]["value"] == 0.75 and (found["n"], found["abstained"]) == (2, 0.5)
    assert found["pass"]["2"] == {"value": 1.0, "low": pytest.approx(0.2065, abs=1e-4), "high": 1.0, "n": 1}
    assert found["maj"]["2"]["value"] == 0.5
    with pytest.raises(ValueError, match="abstained on all of 2 samples"):
        summary(rows[1:])


def test_a_table_by_a_column_and_none_for_answers_that_nobody_extracts():
    rows = [sampled(str(i), [float(i % 2)], [None], level) for i, level in enumerate([2, 1, 2, 1, 2, 1])]
    found = summary(rows)
    assert [(key, row["value"], row["n"]) for key, row in found["by"].items()] == [
        ("1", 1.0, 3),
        ("2", 0.0, 3),
    ]
    assert found["maj"] == {} and found["avg"]["value"] == 0.5
    many = summary([sampled(str(i), [float(i < 10)], [None], i / 2) for i in range(40)])["by"]
    assert [row["n"] for row in many.values()] == [10, 10, 10, 10] and many["0 to 4.875"]["value"] == 1.0
    mixed = summary([sampled("a", [1.0], [None], 1), sampled("b", [0.0], [None], "1")])["by"]
    assert {key: row["value"] for key, row in mixed.items()} == {"1": 1.0, "'1'": 0.0}


def test_spellings_of_an_answer_are_one_vote():
    assert same_text(r"\left( 3, \dfrac{\pi}{2} \right)") == same_text(r"(3,\frac{\pi}{2})")
    assert same_text("1,000") == same_text("$1000.0$") == "1000" and same_text("1,2") != same_text("12")
    assert same_text(r"\text{Even}") == same_text("{even}.")


def test_the_samples_of_a_group_are_read_with_their_facts():
    done = [Completion([1, 2], [], [True] * 2, reason, []) for reason in ("stop", "length")]
    rewards = [Reward(2.0, Reason.CORRECT, extracted="4", parts={"m": 2.0}), Reward(None, parts={"m": None})]
    group = ScoredGroup(Group(Prompt("p", "", (1,), (), {"level": 3}), done), rewards)
    assert Sampled.of(group, "m", "level") == Sampled("p", [1.0, None], ["4", None], [2, 2], [False, True], 3)
    assert Sampled.of(group, "m", votes=False).answers == [None, None]  # another grader extracted them
    turns = Completion(
        [1, 2, 7, 7, 7], [], [True, True, False, False, False], "stop", []
    )  # and a tool's answer
    turns.continuations = [Continuation((1, 2), Completion([3], [], [True], "stop", []))]
    group = ScoredGroup(Group(group.prompt, [turns]), rewards[:1])
    assert Sampled.of(group, "m").lengths == [3]


def test_a_table_says_where_a_number_stands_on_fewer_prompts():
    """pass@2 needs two graded samples, and the second prompt has one."""
    found = summary([sampled("a", [1.0, 1.0], ["4", "4"]), sampled("b", [0.0, None], ["5", None])])
    lines = table({"results": {"math": found}, "graders": {"math": {}}} | HEAD, Path("out")).splitlines()
    assert lines[1].split() == ["math"] and "n=" not in lines[2]
    assert [line.split()[0] for line in lines if "n=1" in line] == ["pass@2", "maj@2"]


def test_the_interval_of_pass_at_k_holds_the_truth_too():
    """The truth of pass@4 is 1 - E[(1 - p)^4], for p ~ Beta(0.4, 1.6): 1 - B(0.4, 5.6) / B(0.4, 1.6)
    = 1 - (1.6 * 2.6 * 3.6 * 4.6) / (2 * 3 * 4 * 5) = 0.42592.
    """
    rng, held = np.random.default_rng(5), 0
    table = [pass_at_k(8, right, 4) for right in range(9)]
    for _ in range(1000):
        passes = [table[right] for right in rng.binomial(8, rng.beta(0.4, 1.6, 150))]
        low, high = share_interval(passes, 150 * 8)
        held += low <= 0.42592 <= high
    assert 0.93 <= held / 1000 <= 0.97


@pytest.mark.parametrize(("n", "p"), [(1, 1.0), (3, 0.25), (5, 0.0625)])
def test_a_few_prompts_prove_nothing(n, p):
    """All n signs are the same in 2 of 2^n cases."""
    assert paired([0.0] * n, [1.0] * n)["p"] == p == mcnemar([0.0] * n, [1.0] * n)["p"]


def test_the_paired_p_is_that_of_mcnemar_with_one_sample_each():
    """60 prompts change sides, 40 to 20: 2 P(Binomial(60, 1/2) <= 20) = 0.0135."""
    a, b = [0.0] * 40 + [1.0] * 20 + [1.0] * 40, [1.0] * 40 + [0.0] * 20 + [1.0] * 40
    assert mcnemar(a, b)["p"] == pytest.approx(0.0135, abs=1e-4)
    assert paired(a, b)["p"] == pytest.approx(0.0135, abs=0.003)


def test_a_wrong_number_spelt_in_several_ways_is_one_answer():
    """3 of 7 are right, and 4 say one half: the majority is wrong."""
    halves = ["1/2", "0.5", r"\frac{1}{2}", r"\frac12"]
    assert {same_text(text) for text in halves} == {"1/2"} and same_text("1/0") == "1/0"
    assert same_text("-0.50") == "-1/2" and same_text("1e999999999") == "1e999999999"
    found = summary([sampled("a", [1.0] * 3 + [0.0] * 4, ["3"] * 3 + halves)])
    assert found["maj"]["7"]["value"] == 0.0
