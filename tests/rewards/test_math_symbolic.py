"""The sympy process: what it decides, and that neither its death nor its silence harms anybody."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from rewards.math import symbolic as math_symbolic
from rewards.math.grader import MathOptions, grade
from rewards.math.symbolic import SymbolicTimeout, SymbolicWorker
from rl.types import Reason

ROOT = Path(__file__).parents[2]
PATIENT = MathOptions(symbolic_timeout_s=20.0)
# sympy searches for an antiderivative of this for minutes
SLOW = "\\int \\frac{\\sin(x^3) e^{x^2}}{\\sqrt{1 + x^7 + x^9}} \\log(1 + x^5) dx"


@pytest.fixture
def worker():
    owner = SymbolicWorker()
    yield owner
    owner.close()


@pytest.mark.parametrize(
    ("gold", "answer", "score"),
    [
        ("\\int_0^1 x dx", "\\int_0^1 y dy", 1.0),  # both 1/2
        ("\\int_0^1 x dx", "\\frac{1}{2}", 1.0),
        ("\\int_0^1 x dx", "\\frac{1}{3}", 0.0),
        ("\\lim_{x \\to 0} \\frac{\\sin x}{x}", "1", 1.0),
    ],
)
def test_a_gold_outside_the_grammar_is_worked_out(gold, answer, score):
    assert grade(f"\\boxed{{{answer}}}", gold, options=PATIENT).score == score


def test_a_prediction_may_not_leave_the_calculus_to_the_grader():
    assert grade("\\boxed{\\int_0^7 1 dx}", "7", options=PATIENT).score == 0.0


def test_no_sympy_means_text_only():
    never = MathOptions(symbolic_timeout_s=0.0)
    assert grade("\\boxed{\\int_0^1 y dy}", "\\int_0^1 x dx", options=never).score == 0.0
    assert grade("\\boxed{\\int_0^1 x dx}", "\\int_0^1 x dx", options=never).score == 1.0


def test_a_late_verdict_is_a_timeout_and_the_next_question_is_answered(worker):
    assert worker.equal("x + x", "2x", timeout_s=20.0) is True
    late = worker._process
    with pytest.raises(SymbolicTimeout) as caught:
        worker.equal("x", SLOW, timeout_s=2.0)
    assert not caught.value.on_gold
    assert late.poll() is not None
    assert worker.equal("x + x", "3x", timeout_s=20.0) is False


@pytest.mark.parametrize("gold", ["x + x", "\\int_0^1 2x dx \\cdot x + x"])
def test_a_process_that_gets_no_processor_is_waited_for(worker, gold):
    """As where graders share few cores: the limit is of its work, and the clock's is five times as long."""
    assert worker.equal("x", "x", timeout_s=20.0) is True
    pid = worker._process.pid
    os.kill(pid, signal.SIGSTOP)
    timer = threading.Timer(3.0, os.kill, (pid, signal.SIGCONT))
    timer.start()
    assert worker.equal(gold, "2x", timeout_s=2.0) is True
    assert worker._process.pid == pid and not worker._slow_golds
    timer.join(10)


def test_a_process_that_never_gets_a_processor_is_given_up(worker):
    assert worker.equal("x", "x", timeout_s=20.0) is True
    os.kill(worker._process.pid, signal.SIGSTOP)
    began = time.monotonic()
    with pytest.raises(SymbolicTimeout):
        worker.equal("x + x", "2x", timeout_s=0.2)
    assert 1.0 <= time.monotonic() - began < 10.0


def test_a_gold_that_is_too_slow_is_no_fault_of_the_prediction_and_asked_about_twice_only(worker):
    assert worker.equal("x + x", "2x", timeout_s=20.0) is True
    for _ in range(math_symbolic.MAX_TRIES_OF_A_GOLD):
        with pytest.raises(SymbolicTimeout) as caught:
            worker.equal(SLOW, "x", timeout_s=0.5)
        assert caught.value.on_gold
        worker.equal("x", "x", timeout_s=20.0)  # the replacement has started
    began = time.monotonic()
    with pytest.raises(SymbolicTimeout):
        worker.equal(SLOW, "x", timeout_s=20.0)
    assert time.monotonic() - began < 10.0


def test_a_killed_process_is_replaced_within_the_question(worker):
    assert worker.equal("x", "x", timeout_s=20.0) is True
    os.kill(worker._process.pid, signal.SIGKILL)
    worker._process.wait(60)
    assert worker.equal("x + x", "2x", timeout_s=20.0) is True


def test_a_process_that_dies_under_a_question_is_asked_again(worker):
    assert worker.equal("x", "x", timeout_s=20.0) is True
    timer = threading.Timer(0.5, os.kill, (worker._process.pid, signal.SIGKILL))
    timer.start()
    with pytest.raises(SymbolicTimeout):  # from the second process; a second death would be a SymbolicFault
        worker.equal("x", SLOW, timeout_s=2.0)
    timer.join(10)


def test_what_sympy_cannot_read_is_no_verdict(worker):
    assert worker.equal("x", "\\frac{", timeout_s=20.0) is None


@pytest.mark.parametrize(
    "text", ["__import__('os')", '"7"', "9999999999999999", "2^{2^{2^{2^{2}}}}", "9999!", "x" * 301]
)
def test_large_or_strange_text_is_not_handed_over(text):
    assert not math_symbolic.is_askable(text)


def test_threads_share_one_process(worker):
    worker.equal("x", "x", timeout_s=20.0)
    process, verdicts = worker._process, []
    threads = [
        threading.Thread(target=lambda n=n: verdicts.append((n, worker.equal("2x", f"{n}x", timeout_s=20.0))))
        for n in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert sorted(verdicts) == [(n, n == 2) for n in range(6)]
    assert worker._process is process


def test_the_process_ends_with_its_owner_and_a_forked_child_starts_its_own():
    code = """
import os, sys
from rewards.math.symbolic import worker
assert worker.equal("x", "x", 20.0) is True
mine = worker._process.pid
worker._lock.acquire()  # as another thread of the parent might hold it
child = os.fork()
if child == 0:
    equal = worker.equal("x + x", "2x", 20.0) and worker._process.pid != mine
    worker.close()
    os._exit(0 if equal else 1)
worker._lock.release()
assert os.waitpid(child, 0)[1] == 0
assert worker.equal("x", "y", 20.0) is False and worker._process.pid == mine
print(mine)
"""
    pid = int(subprocess.check_output([sys.executable, "-c", code], text=True, cwd=ROOT))
    assert not Path(f"/proc/{pid}").exists()


def test_a_process_that_cannot_start_is_an_abstention(monkeypatch):
    broken = SymbolicWorker()
    monkeypatch.setattr(math_symbolic, "_WORKER", ROOT / "no_such_file.py")
    monkeypatch.setattr(math_symbolic, "worker", broken)
    reward = grade("\\boxed{\\int_0^5 y dy}", "\\int_0^5 x dx", options=PATIENT)
    assert (reward.score, reward.reason) == (None, Reason.INFRA_ERROR)
    monkeypatch.undo()
    assert grade("\\boxed{\\int_0^5 y dy}", "\\int_0^5 x dx", options=PATIENT).score == 1.0
