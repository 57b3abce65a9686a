"""Environments in processes: one that hangs, dies, raises or answers too much costs its own call alone."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from recipes.environments.workers import Workers
from rollout.environment import EnvironmentFault, Turn
from tests.waiting import wait_until

HERE = Path(__file__).parent
NAME = "played_environments:Misbehaves"


@pytest.fixture(scope="module")
def path():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [str(HERE), *sys.path])
        yield


@pytest.fixture(scope="module")
def workers(path, tmp_path_factory):
    log = tmp_path_factory.mktemp("log") / "environment.log"
    made = Workers(NAME, deadline_s=60.0, memory_bytes=1 << 30, log=log)
    yield made
    made.close()
    assert made.pids() == []


def said(reply) -> str:
    (message,) = reply.messages
    return message["content"]


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("hang", "did not answer within 1 s"),
        ("die", "died (SIGKILL)"),
        ("exit", "died (exit 7)"),
        ("last words", "died (exit 7: the last words)"),
        ("memory", "MemoryError"),
        ("raise", "KeyError: 'lost'"),
    ],
)
def test_a_call_that_fails_abstains_and_its_neighbour_goes_on_from_its_state(
    workers, text, fault, monkeypatch
):
    neighbour, episode = workers.open({}, 1), workers.open({}, 2)
    assert said(neighbour.step(Turn(0, "go"))).startswith("turn 1 in ")
    episode.step(Turn(0, "go"))
    before = workers.pids()
    began = time.monotonic()
    with pytest.raises(EnvironmentFault) as error, monkeypatch.context() as patch:
        patch.setattr(workers, "deadline_s", 1.0 if text == "hang" else 60.0)
        episode.step(Turn(1, text))
    assert fault in str(error.value)
    assert time.monotonic() - began < 30
    assert said(neighbour.step(Turn(1, "go"))).startswith("turn 2 in ")
    if text != "raise":
        assert workers.pids() != before and not psutil.pid_exists(before[0])
    episode.close()


def test_a_neighbour_without_state_abstains_with_the_reason(path):
    workers = Workers(NAME, {"keeps_state": False}, deadline_s=60.0)
    neighbour, episode = workers.open({}, 1), workers.open({}, 2)
    neighbour.step(Turn(0, "go"))
    with pytest.raises(EnvironmentFault):
        episode.step(Turn(0, "die"))
    with pytest.raises(EnvironmentFault, match="its process died in a call of another episode"):
        neighbour.step(Turn(1, "go"))
    fresh = workers.open({}, 3)
    assert said(fresh.step(Turn(0, "go"))).startswith("turn 1 in ")
    workers.close()
    with pytest.raises(EnvironmentFault, match="the environment is closed"):
        fresh.step(Turn(1, "go"))


def test_what_an_environment_draws_is_its_episodes_and_not_its_processes(path):
    """So that it is the same after a kill, and whatever other episodes do."""
    found = []
    for seeds in ((1,), (2, 1), (3, 2, 1)):
        workers = Workers("played_environments:Draws", deadline_s=60.0)
        episodes = [workers.open({}, seed) for seed in seeds]
        found.append([[said(e.step(Turn(n, "go"))) for e in episodes][-1] for n in range(2)])
        workers.close()
    assert found[0] == found[1] == found[2] and found[0][0].split()[0] != found[0][1].split()[0]


def test_a_reset_that_fails_abstains(workers):
    with pytest.raises(EnvironmentFault, match="no such world"):
        workers.open({"reset": "fails"}, 1).step(Turn(0, "go"))


def test_ten_megabytes_and_nul_bytes_come_back_as_text(workers):
    episode = workers.open({}, 1)
    assert said(episode.step(Turn(0, "huge"))) == "x" * (1 << 18)
    assert said(episode.step(Turn(1, "nul"))) == "a\x00b?c"
    assert said(episode.step(Turn(2, "print"))).startswith("turn 3 in ")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("gess_number", {}, "neither built in (such as guess_number) nor module:callable"),
        ("guess_number", {"low": 5, "high": 4}, "low=5 must not be above high=4"),
        ("guess_number", {"hihg": 4}, "unexpected keyword argument 'hihg'"),
        (
            "json:loads",
            {"s": "{}"},
            "makes a dict; an environment must have open, close, repeatable and tools",
        ),
    ],
)
def test_what_is_no_environment_is_refused_with_a_sentence(name, options, message):
    with pytest.raises(ValueError) as error:
        Workers(name, options)
    assert message in str(error.value)


def test_a_killed_owner_leaves_no_process(path):
    code = (
        "from recipes.environments.workers import Workers; import time\n"
        f"w = Workers({NAME!r}, workers=1); print(w.pids()[0], flush=True); time.sleep(60)"
    )
    environment = os.environ | {"PYTHONPATH": f"{HERE.parents[1]}:{HERE}"}
    owner = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment)
    assert owner.stdout is not None
    pid = int(owner.stdout.readline())
    assert psutil.pid_exists(pid)
    owner.kill()
    owner.wait(60)
    wait_until(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == "zombie", "it is gone")


def test_a_python_session_in_a_process_ends_with_it():
    """The sandbox's own processes too, also when the process is killed under a call."""
    workers = Workers("python", {"timeout_s": 120.0}, deadline_s=60.0)
    call = '<tool_call>{"name": "python", "arguments": {"code": "%s"}}</tool_call>'
    episode = workers.open({}, 1)
    assert said(episode.step(Turn(0, call % "x = 41"))) == "(no output)"
    assert said(episode.step(Turn(1, call % "print(x + 1)"))) == "42\n"
    first = psutil.Process(workers.pids()[0])
    family = [first, *first.children(recursive=True)]
    assert len(family) > 1
    workers.deadline_s = 2.0
    with pytest.raises(EnvironmentFault, match="did not answer within 2 s"):
        episode.step(Turn(2, call % "while True: pass"))
    workers.deadline_s = 60.0
    other = workers.open({}, 1, {"cells": ["x = 1"]})
    assert said(other.step(Turn(1, call % "print(x)"))) == "1\n"
    second = psutil.Process(workers.pids()[0])
    family += [second, *second.children(recursive=True)]
    workers.close()
    assert psutil.wait_procs(family, timeout=60)[1] == []
