"""math-verify as a reward: its own verdicts, in a killable process."""

from __future__ import annotations

import sys

import pytest

from rewards.compose import RewardSpec
from rewards.pool.pool import RewardPool
from rewards.verify import MathVerify
from rl.types import Completion, Group, Prompt, Reason

CASES = [
    ("so \\boxed{18}", "Janet sells 9 * 2 = 18\n#### 18", 1.0),
    ("so \\boxed{17}", "#### 18", 0.0),
    ("the answer is $\\frac{1}{2}$", "0.5", 1.0),
    ("\\boxed{(3, \\frac{\\pi}{2})}", "\\left( 3, \\frac{\\pi}{2} \\right)", 1.0),
    ("nothing here", "18", 0.0),
    ("\\boxed{2}", ["1", "2"], 1.0),
]


def test_verdicts_are_those_of_math_verify():
    from math_verify import parse, verify

    math_verify = MathVerify()
    for said, gold, score in CASES:
        (found,) = math_verify([said], [gold])
        assert found.score == score, said
        if isinstance(gold, str) and "####" not in gold:
            assert score == float(verify(parse(f"\\boxed{{{gold}}}"), parse(said)))
    assert math_verify(["nothing here"], ["18"])[0].reason is Reason.NO_ANSWER
    for gold in ("", None, {"value": 1}, [None]):
        assert math_verify(["\\boxed{1}"], [gold])[0].score is None


def test_it_grades_in_a_process_that_can_be_killed():
    pool = RewardPool([RewardSpec("math"), RewardSpec("math_verify", weight=0.0)], deadline_s=20.0)
    try:
        made = [Completion([], [], [], "stop", [], text=said) for said, _, _ in CASES[:2]]
        (found,) = pool.score([Group(Prompt("p", "", (), (), {"answer": "#### 18"}), made)])
    finally:
        pool.close()
    assert [dict(reward.parts) for reward in found.rewards] == [
        {"math": 1.0, "math_verify": 1.0},
        {"math": 0.0, "math_verify": 0.0},
    ]


def test_where_it_is_missing_the_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(ValueError, match="needs the package math-verify: pip install math-verify"):
        MathVerify()
