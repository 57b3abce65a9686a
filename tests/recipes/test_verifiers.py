"""Environments with the interface of verifiers' `load_environment` run as they are."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from recipes.environments import load
from recipes.environments.verifiers import rows
from recipes.environments.workers import Workers
from rollout.environment import EnvironmentFault, Turn

LOAD = "verifiers_environments:load_environment"


@pytest.fixture(autouse=True)
def path(monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path, str(Path(__file__).parent)])


def test_an_episode_goes_on_until_it_is_completed_and_the_rubric_pays():
    environment = Workers("verifiers", {"load": LOAD}, deadline_s=20.0)
    try:
        row = rows(LOAD)[0]
        episode = environment.open(row, seed=1)
        first = episode.step(Turn(0, "abc"))
        assert first.messages == [{"role": "user", "content": "again 1"}] and not first.done
        assert first.reward is None
        resumed = environment.open({"prompt": []}, 1, first.state)  # in another process, after a kill
        assert resumed.step(Turn(1, "no")).messages == [{"role": "user", "content": "again 2"}]
        last = episode.step(Turn(1, " cba"))
        assert (last.done, last.reward, last.messages) == (True, 1.0, [])
        assert last.facts["turns"] == 2.0 and last.facts["solved"] == 1.0  # weight 0 pays nothing
        episode = environment.open(row, seed=1)
        assert [episode.step(Turn(i, "no")).done for i in range(3)] == [False, False, True]
    finally:
        environment.close()


def test_tools_get_their_calls_and_malformed_ones_are_answered():
    environment = load("verifiers", {"load": LOAD, "kind": "tools"})
    assert environment.tools[0]["function"]["name"] == "double"
    episode = environment.open({"prompt": [], "info": '{"text": "7"}'}, 0)
    call = '<tool_call>{"name": "double", "arguments": {"x": 4}}</tool_call>'
    reply = episode.step(Turn(0, call + "<tool_call>{nonsense</tool_call>"))
    assert reply.messages[0]["content"] == "8"
    assert reply.messages[1]["content"].startswith("error: the call is not valid JSON")
    assert reply.facts == {"calls": 2, "malformed": 1}
    assert not episode.step(Turn(1, "<tool_call>{nonsense</tool_call>")).done  # it may try again
    assert json.dumps(reply.state)
    last = episode.step(Turn(2, "8"))
    assert last.done and last.reward == 3.5  # 0.5 x what the parser makes of info, 7
    environment.close()


def test_a_reward_may_have_the_name_of_a_count_or_none():
    environment = load("verifiers", {"load": LOAD, "kind": "strange"})
    last = environment.open({"prompt": [], "answer": "x"}, 0).step(Turn(0, "y"))
    assert last.reward == 2.0 + 6.0 and last.facts["malformed"] == 0 and last.facts["partial"] == 6.0
    with pytest.raises(EnvironmentFault, match=r"needs a chat as its prompt; use data\.chat=true"):
        environment.open({"prompt": "Reverse abc"}, 0)
    environment.close()


@pytest.mark.parametrize(
    ("kind", "what"),
    [("tool_defs", "declares its tools in tool_defs"), ("v1", "has no is_completed, env_response, rubric")],
)
def test_an_environment_of_a_later_release_is_refused_in_a_sentence(kind, what):
    """Else its tools would silently be missing in the prompts."""
    for make in (lambda: load("verifiers", {"load": LOAD, "kind": kind}), lambda: rows(LOAD, kind=kind)):
        with pytest.raises(ValueError, match=f"{what}: it is of a release .* 0\\.1\\.6 to 0\\.1\\.9"):
            make()


def test_what_cannot_be_paid_is_a_fault_and_no_zero():
    with pytest.raises(ValueError, match="a function that scores groups"):
        load("verifiers", {"load": LOAD, "kind": "groups"})
    environment = load("verifiers", {"load": LOAD, "kind": "broken"})
    with pytest.raises(KeyError):
        environment.open({"prompt": [], "answer": "x", "info": {}}, 0).step(Turn(0, "x"))
    environment.close()


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("multiply", "does not say where to look; write module:name"),
        ("no_such_module:f", "is not found: there is no module 'no_such_module'.*beside the config file"),
        ("verifiers_environments:nothing", "is not found: module .* has no attribute 'nothing'"),
    ],
)
def test_a_path_that_leads_nowhere_is_said_with_a_remedy(path, message):
    with pytest.raises(ValueError, match=message):
        load("tools", {"functions": [path]})
