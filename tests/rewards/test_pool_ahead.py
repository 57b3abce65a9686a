"""Short calls are sent to a grader ahead of their turn: their clocks, faults and number stay right."""

import time

import pytest
from pool_parts import both_ready

from rewards.compose import RewardSpec
from rewards.pool.grader import AHEAD_S
from rewards.pool.pool import RewardPool
from rl.types import Completion, Group, Prompt, Reason
from tests.waiting import wait_until


def scores(pool, texts):
    completions = [Completion([1], [], [True], "stop", [], text=text) for text in texts]
    (scored,) = pool.score([Group(Prompt("p/0", "question", (1,)), completions)])
    return [reward.score for reward in scored.rewards]


def both_slow(pool):
    return all(grader.usual_s > AHEAD_S for grader in pool._graders._graders)


@pytest.fixture
def pool():
    """One process that has proved to be quick."""
    made = RewardPool(["rewards_for_tests:nap"], workers=1, deadline_s=2.0, memory_bytes=200 << 20)

    def is_quick():
        scores(made, ["short"] * 300)
        return made._graders._graders[0].usual_s < AHEAD_S / 4

    wait_until(is_quick, "it is quick", 120)
    yield made
    made.close()


def test_the_clock_of_a_call_starts_when_its_turn_comes(pool):
    began, pids = time.monotonic(), pool.pids()
    assert None not in scores(pool, ["nap 0.5"] * 6)  # 3 s together, each within its two
    assert time.monotonic() - began > 2.9
    assert pool.take_faults().num_faulty == 0
    assert pool.pids() == pids  # nobody was killed and tried again


@pytest.mark.parametrize(
    ("fault", "kind"),
    [("hang", "timeout"), ("segfault", "crash"), ("raise", "raised"), ("hog", "memory")],
)
def test_a_call_that_fails_costs_none_of_those_behind_it(pool, fault, kind):
    pool.take_faults()
    found = scores(pool, ["short", fault, *["short"] * 6])
    assert [score is None for score in found] == [False, True, *[False] * 6]
    assert pool.take_faults().counts == {kind: 1}


def test_each_call_is_made_once(pool):
    (before,) = scores(pool, ["short"])
    assert scores(pool, ["short"] * 50) == [before + 1 + n for n in range(50)]


def test_a_reward_with_a_longer_deadline_of_its_own_keeps_it():
    pool = RewardPool(["rewards_for_tests:patient"], deadline_s=0.3)
    try:
        assert None not in scores(pool, ["nap 0.8"])
        assert scores(pool, ["hang"]) == [None]
    finally:
        pool.close()


def test_a_program_that_is_late_scores_0_though_the_pool_is_less_patient_than_its_limit():
    pool = RewardPool([RewardSpec("code", options={"timeout_s": 1.0})], deadline_s=0.3)
    try:
        tests = {"type": "stdio", "cases": [{"input": "", "output": "1"}]}
        group = Group(Prompt("p/0", "", (1,), (), {"tests": tests}), [])
        group.completions.append(
            Completion([1], [], [True], "stop", [], text="import time\ntime.sleep(9)\nprint(1)")
        )
        (reward,) = pool.score([group])[0].rewards
        assert (reward.score, reward.reason) == (0.0, Reason.TIMEOUT)
    finally:
        pool.close()


def test_a_slow_call_is_not_queued_behind_another_while_a_process_is_free(tmp_path):
    """Each waits until its pair is under way in the other process."""
    pool = RewardPool(["rewards_for_tests:nap"], workers=2, deadline_s=20.0)
    try:
        wait_until(lambda: both_ready(pool), "both graders are ready")
        scores(pool, ["short"] * 300)
        wait_until(lambda: scores(pool, ["nap 0.1"] * 4) and both_slow(pool), "both are known to be slow")
        assert None not in scores(pool, [f"pair {number} {tmp_path}" for number in range(4)])
    finally:
        pool.close()
