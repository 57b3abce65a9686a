"""Grader processes never outlive their owner, however it ends, and a pool that cannot start leaves none."""

import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import psutil
import pytest

from rewards.compose import RewardSpec
from rewards.pool.pool import RewardPool
from rl.types import Completion, Group, Prompt
from tests.waiting import wait_until

HERE = "rewards_for_tests:"


def score(pool, text):
    (scored,) = pool.score([group(text)])
    return scored.rewards[0].score


def group(text):
    return Group(Prompt("p/0", "question", (1,)), [Completion([1], [], [True], "stop", [], text=text)])


def gone(pid):
    """Whether the process has ended (a zombie has), waiting for it at most thirty seconds."""
    for _ in range(600):
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("matth", "no reward 'matth'; did you mean math"),
        (RewardSpec(HERE + "exact", options={"bonsu": 1}), "did you mean 'bonus'"),
        (HERE + "make_scaled", "needs the option 'factor'"),
    ],
)
def test_a_reward_that_cannot_be_loaded_is_an_error_at_once_and_leaves_no_process(spec, message):
    before = set(psutil.Process().children())
    with pytest.raises(ValueError, match=message):
        RewardPool([spec], workers=2)
    assert all(gone(child.pid) for child in set(psutil.Process().children()) - before)


def test_workers_that_cannot_work_are_refused():
    with pytest.raises(ValueError, match="workers=0"):
        RewardPool([HERE + "length"], workers=0)


def test_close_ends_every_process_and_its_children_and_answers_what_is_in_flight(tmp_path):
    pool = RewardPool([HERE + "parent_and_child"], workers=2, deadline_s=100)
    pids = pool.pids()
    future = pool.submit(group(str(tmp_path / "pids")))
    there = tmp_path / "pids"
    wait_until(lambda: there.exists() and len(there.read_text().split()) == 2, "the call is under way")
    pids += map(int, (tmp_path / "pids").read_text().split())
    pool.close()
    pool.close()
    (reward,) = future.result(timeout=60).rewards
    assert (reward.score, reward.detail) == (None, "crash: the reward pool is closed")
    assert all(gone(pid) for pid in pids)
    assert score(pool, "a") is None


def test_no_grader_outlives_a_trainer_that_is_killed(tmp_path):
    script = f"""
        import sys, time
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from rewards.pool.pool import RewardPool
        from rl.types import Completion, Group, Prompt
        pool = RewardPool([{HERE + "length"!r}], workers=2, deadline_s=1000)
        busy = Completion([1], [], [True], "stop", [], text="spin")
        pool.submit(Group(Prompt("p", "", ()), [busy]))
        time.sleep(0.5)
        print(*pool.pids(), flush=True)
        time.sleep(1000)
    """
    trainer = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, text=True
    )
    assert trainer.stdout is not None
    pids = [int(pid) for pid in trainer.stdout.readline().split()]
    trainer.kill()
    trainer.wait(timeout=60)
    trainer.stdout.close()
    assert len(pids) == 2
    assert all(gone(pid) for pid in pids)


def test_a_pool_made_in_a_thread_that_ends_goes_on_working():
    made = []
    thread = threading.Thread(target=lambda: made.append(RewardPool([HERE + "length"])))
    thread.start()
    thread.join(timeout=60)
    try:
        time.sleep(0.2)
        assert score(made[0], "ab") == 2.0
        assert made[0].faults.num_faulty == 0
    finally:
        made[0].close()
