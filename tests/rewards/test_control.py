"""Control arms: the random one cannot see the text, the format one cannot see the answer."""

from __future__ import annotations

import pytest

from recipes.sources import make_scorer
from rewards.compose import RewardSpec
from rewards.pool.pool import RewardPool
from rl.config.read import load_config
from rl.types import Completion, Group, Prompt, VersionSpan

MATH = "rewards.functions=[{name: boxed_format, weight: 0.1}, {name: math, weight: 0.9}]"


def group(texts: list[str], *, step: int = 0, question: str = "6 * 7?", answer: str = "42") -> Group:
    made = [Completion([5], [], [True], "stop", [VersionSpan(step, 1)], text=text) for text in texts]
    return Group(Prompt("p", question, (1,), (), {"answer": answer}), made)


@pytest.fixture
def scores(tmp_path):
    """What each completion of some groups is paid under an arm, and the parts that are logged."""

    def of(arm: str, *groups: Group, seed: int = 0) -> list[tuple[list, list]]:
        overrides = [MATH, f"rewards.control={arm}", f"train.seed={seed}", f"run_dir={tmp_path}"]
        scorer = make_scorer(load_config(None, overrides))
        try:
            found = scorer.score(groups)
        finally:
            scorer.close()
        return [([r.score for r in one.rewards], [r.parts for r in one.rewards]) for one in found]

    return of


def test_the_random_arm_pays_the_same_whatever_is_said_and_logs_what_is_right(scores):
    right, wrong = ["\\boxed{42}"] * 64, ["nothing"] * 64
    (paid, parts), (blind, _) = scores("random", group(right), group(wrong))
    assert paid == blind and set(paid) == {0.0, 1.0}
    assert all(part["math"] == part["boxed_format"] == 1.0 for part in parts)
    (again, _), (later, _), (other, _) = scores(
        "random", group(right), group(right, step=3), group(right, question="another?")
    )
    assert again == paid and later != paid and other != paid
    assert scores("random", group(right), seed=1)[0][0] != paid


def test_the_random_arm_draws_evenly(scores):
    """800 draws: a mean within four standard errors, 4 sqrt(1 / 4 / 800) = 0.071, of 0.5."""
    found = scores("random", *[group(["x"] * 8, step=step) for step in range(100)])
    paid = [score for one, _ in found for score in one]
    assert len(paid) == 800 and abs(sum(paid) / 800 - 0.5) < 0.071
    firsts = [one[0] for one, _ in found]
    assert 0.3 < sum(firsts) / 100 < 0.7  # the place in the group alone says nothing


def test_the_format_arm_pays_an_answer_right_or_wrong_and_none_else(scores):
    texts = ["so \\boxed{42}", "so \\boxed{41}", "I do not know", "so \\boxed{4"]
    for answer in ("42", "41", "7"):
        ((paid, parts),) = scores("format", group(texts, answer=answer))
        assert paid == [1.0, 1.0, 0.0, 0.0]
    assert [part["math"] for part in parts] == [0.0, 0.0, 0.0, 0.0]


def test_the_format_arm_refuses_a_reward_that_names_no_answer():
    options = {"reward": "tests.rewards.rewards_for_tests:length"}
    pool = RewardPool([RewardSpec("format_control", options=options)])
    try:
        (found,) = pool.score([group(["x"])])
    finally:
        pool.close()
    assert found.rewards[0].score is None and "names no extracted answer" in found.rewards[0].detail


def test_the_format_arm_of_code_pays_a_program_that_fails_its_tests():
    pool = RewardPool([RewardSpec("format_control", options={"reward": "code"})], deadline_s=30.0)
    asked = group(["```python\ndef f(x): return x + 2\n```", ""])
    asked.prompt.columns["tests"] = {"type": "asserts", "code": "assert f(1) == 2"}  # type: ignore[index]
    try:
        (found,) = pool.score([asked])
    finally:
        pool.close()
    assert found.rewards[0].score == 1.0, found.rewards


def test_without_an_arm_the_rewards_are_the_given_ones():
    config = load_config(None, [MATH])
    assert config.paid_rewards is config.rewards.functions
    arm = load_config(None, [MATH, "rewards.control=format"])
    assert [(s.name, s.weight) for s in arm.paid_rewards] == [
        ("format_control", 1.0),
        ("boxed_format", 0.0),
        ("math", 0.0),
    ]


def test_the_format_arm_of_code_pays_no_text_that_is_not_a_program():
    """The code grader takes a text without fences for a program."""
    pool = RewardPool([RewardSpec("format_control", options={"reward": "code"})], deadline_s=0.01)
    asked = group(["I do not know how.", "def f(x): return x", "Sure! def f(x): return x + 1"])
    asked.prompt.columns["tests"] = {"type": "asserts", "code": "assert f(1) == 2"}  # type: ignore[index]
    try:
        (found,) = pool.score([asked])  # within the time that the code grader gives to a program
    finally:
        pool.close()
    assert [reward.score for reward in found.rewards] == [0.0, 1.0, 0.0], found.rewards
