"""Signals ask once, a repeated one ends, and the wishes of several launchers are one wish."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from rl import phases
from rl.phases import StopSignal


@pytest.fixture
def stop():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    stop = StopSignal().install()
    yield stop
    stop.restore()
    signal.signal(signal.SIGINT, before)


def test_a_signal_is_a_wish_and_its_number_the_exit_code(stop):
    assert not stop.requested() and stop.exit_code() == 0
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.requested() and stop.exit_code() == 143


def test_the_sigterm_of_a_launcher_after_ctrl_c_is_the_same_wish(stop):
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.requested() and stop.exit_code() == 130


def test_the_same_signal_twice_in_a_moment_is_one_wish(stop):
    """The kernel sends PR_SET_PDEATHSIG's signal once for each thread of the parent that ends."""
    for _ in range(3):
        os.kill(os.getpid(), signal.SIGTERM)
    assert stop.requested() and stop.exit_code() == 143


LONG_CALL = """
import hashlib, time

def hashed(number):
    began = time.thread_time()
    hashlib.pbkdf2_hmac("sha256", b"a", b"b", number)  # lets other threads run, and no handler
    return time.thread_time() - began

def long_call(seconds=2.5, took=hashed(300_000)):
    hashed(int(300_000 * seconds / took))
"""


def test_the_same_signal_twice_in_a_moment_is_one_wish_when_it_is_handled_late():
    """The main thread is in one long call, as in a backward pass, when the second one arrives."""
    code = """
import os, signal, threading
from rl import phases
phases.REPEAT_S = 1.0
stop = phases.StopSignal().install()
os.kill(os.getpid(), signal.SIGTERM)
threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
long_call()
assert stop.requested()
print("saved")
"""
    found = subprocess.run(
        [sys.executable, "-c", LONG_CALL + code], capture_output=True, text=True, timeout=120
    )
    assert (found.returncode, found.stdout) == (0, "saved\n"), found.stderr


def test_the_same_signal_later_ends_at_once(stop, monkeypatch):
    monkeypatch.setattr(phases, "REPEAT_S", 0.0)  # a handler may be late on a busy machine
    os.kill(os.getpid(), signal.SIGINT)
    assert stop.received == signal.SIGINT
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


def test_the_first_signal_is_answered_and_a_second_one_ends_a_call_that_takes_no_signals():
    """A backward pass, or a library's own loop, lets no handler run; the process ends all the same."""
    code = """
import hashlib, os, signal, threading
from rl import phases
phases.REPEAT_S, phases.PATIENCE_S = 0.2, 0.3
stop = phases.StopSignal(may_exit=True).install()
stop.say = lambda text: print(text, flush=True)
for after in (0.1, 0.2, 0.6, 5.0):  # the last one, should the others come as one
    threading.Timer(after, os.kill, (os.getpid(), signal.SIGINT)).start()
hashlib.pbkdf2_hmac("sha256", b"a", b"b", 2_000_000_000)
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert found.returncode == 130, found.stderr
    assert found.stdout.splitlines() == [
        "stopping after this step; Ctrl-C again stops at once",
        "stopped at once; the same command goes on from the newest checkpoint",
    ]


def test_in_a_notebook_a_second_signal_does_not_end_the_process():
    code = """
import os, signal, threading
from rl import phases
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
phases.REPEAT_S, phases.PATIENCE_S = 0.2, 0.1
stop = phases.StopSignal().install()
for after in (0.1, 1.6):  # far enough apart for a thread that starves
    threading.Timer(after, os.kill, (os.getpid(), signal.SIGINT)).start()
try:
    long_call()
except KeyboardInterrupt:
    print("caught")
"""
    found = subprocess.run(
        [sys.executable, "-c", LONG_CALL + code], capture_output=True, text=True, timeout=60
    )
    assert (found.returncode, found.stdout) == (0, "caught\n"), found.stderr


def test_where_nothing_can_be_saved_the_first_signal_ends_the_run(stop):
    with stop.at_once():
        pass
    os.kill(os.getpid(), signal.SIGINT)
    assert stop.requested()  # later it is a wish again


def test_a_first_signal_where_nothing_can_be_saved_is_not_said_to_wait_for_a_step(stop):
    said = []
    stop.say = said.append
    with pytest.raises(KeyboardInterrupt), stop.at_once():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)
    time.sleep(0.2)  # for the thread that speaks
    assert stop.exit_code() == 130 and not said


def test_a_signal_from_before_ends_the_run_where_nothing_can_be_saved(stop):
    os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), stop.at_once():
        pytest.fail("it should not begin")
