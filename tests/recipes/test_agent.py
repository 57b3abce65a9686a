"""A user's own program is an environment: it asks an endpoint by OpenAI's client, and the policy answers."""

from __future__ import annotations

import contextlib
import json
import socket
import sys
import threading
import time
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))
sys.path.append(str(Path(__file__).parents[1] / "rollout"))

from played_agents import TOOLS
from script_engine import NoJournal, ScriptEngine, byte_tokenizer

from recipes.environments import load
from recipes.environments.workers import Workers
from rl.types import Prompt, SamplingParams
from rollout.environment import EnvironmentFault, ToolCall, Turn
from rollout.episodes import EpisodeEngine
from rollout.turns import TurnRenderer
from tests.calling import call
from tests.waiting import wait_until

pytest.importorskip("openai")
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
ROW = {"prompt": [{"role": "user", "content": "Hi"}], "word": "then"}


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def agent(name: str, **options):
    return load("agent", {"agent": f"played_agents:{name}", "timeout_s": 60.0, **options})


def test_what_is_sampled_for_a_program_is_recorded_token_for_token():
    tokenizer = byte_tokenizer(TEMPLATE, extra=["<|user|>", "<|assistant|>"])
    (end,) = tokenizer("<|end|>", add_special_tokens=False)["input_ids"]
    says = ["one 日本", "threee"]
    engine = ScriptEngine(tokenizer, lambda seed: says[(len(engine.sent) - 1) // 2 % 2])
    environment = agent("two_turns")
    episodes = EpisodeEngine(engine, environment, TurnRenderer(tokenizer), NoJournal())
    text = "<|user|>Hi<|end|><|assistant|>"
    ids = tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
    prompt = Prompt("p", text, ids, tuple(ROW["prompt"]), {"word": "then"})
    sampling = SamplingParams(256, stop_token_ids=(end,))
    (group,) = episodes.generate(call([prompt], num_completions=2, sampling=sampling, seeds=[7]))
    episodes.close()
    wanted = f"{says[0]}<|end|><|user|>and then 7?<|end|><|assistant|>{says[1]}<|end|>"
    for completion in group.completions:
        assert tokenizer.decode(completion.token_ids) == wanted
        assert [s.origin for s in completion.segments] == [
            "sampled",
            "scaffold",
            "user",
            "scaffold",
            "sampled",
        ]
        assert completion.num_sampled == len(says[0].encode()) + len(says[1]) + 2
        assert completion.facts["rewards"] == [None, 6.0] and completion.finish_reason == "stop"
    last = [ids for name, ids in engine.sent if name.endswith("turn 1")]
    assert [tokenizer.decode(i) for i in last] == [text + wanted.removesuffix(f"{says[1]}<|end|>")] * 2


def test_tools_are_called_by_the_program_and_its_call_has_an_id():
    environment = agent("calls_a_tool", tools=TOOLS)
    episode = environment.open(ROW, 0)
    reply = episode.step(Turn(0, '<tool_call>{"name": "double", "arguments": {"x": 4}}</tool_call>'))
    assert reply.messages == ({"role": "tool", "content": "8"},)
    last = episode.step(Turn(1, "8"))
    assert last.done and last.reward == 1.0
    environment.close()


def test_a_repeatable_program_is_run_again_after_a_kill():
    environment = agent("two_turns", repeatable=True)
    reply = environment.open(ROW, 3).step(Turn(0, "one"))
    assert (
        reply.state == {"said": [{"number": 0, "text": "one", "calls": None}]}
        and reply.messages[0]["content"] == "and then 3?"
    )
    assert environment.open(ROW, 3, reply.state).step(Turn(1, "four")).reward == 4.0
    environment.close()
    environment = agent("calls_a_tool", tools=TOOLS, repeatable=True)
    called = Turn(0, "in a form of its own", (ToolCall("double", {"x": 4}),))
    reply = environment.open(ROW, 0).step(called)
    state = json.loads(json.dumps(reply.state))
    assert environment.open(ROW, 0, state).step(Turn(1, "8")).reward == 1.0
    environment.close()
    other = agent("two_turns")
    assert other.open(ROW, 3).step(Turn(0, "one")).state is None
    other.close()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("rewrites", "an agent that rewrites its history cannot be trained here"),
        ("asks_otherwise", r"the first one must be row\['prompt'\]"),
        ("streams", "BadRequestError.*stream, n above 1"),
        ("guesses_a_token", "AuthenticationError.*no episode has this token"),
        ("raises", "the agent raised KeyError: 'no such key'"),
        ("sleeps", "the agent sent no request for 0.5 s"),
    ],
)
def test_a_program_that_fails_is_a_fault(name, message):
    environment = agent(name, timeout_s=0.5 if name == "sleeps" else 60.0)
    began = time.monotonic()
    with pytest.raises(EnvironmentFault, match=message):
        environment.open(ROW, 0).step(Turn(0, "one"))
    assert time.monotonic() - began < 40
    environment.close()


def test_an_end_without_a_number_pays_nothing_and_a_closed_episode_frees_its_program():
    environment = agent("pays_nothing")
    last = environment.open(ROW, 0).step(Turn(0, "one"))
    assert last.done and last.reward is None
    waiting = environment.open(ROW, 0)
    before = threading.active_count()
    waiting.close()
    wait_until(lambda: threading.active_count() < before, "its thread ends")
    assert waiting.token not in environment.talks
    environment.close()


@pytest.mark.parametrize("name", ["asks_otherwise", "streams", "asks_twice_at_once", "pays_nothing"])
def test_an_episode_leaves_no_thread_however_it_ends(name):
    before = threading.active_count()
    environment = agent(name)
    for number in range(3):
        episode = None
        with contextlib.suppress(EnvironmentFault):
            episode = environment.open(ROW, number)
            episode.step(Turn(0, "one"))
        if episode is not None:
            episode.close()
    wait_until(lambda: threading.active_count() <= before + 1, "only the server's thread is left")
    assert not environment.talks
    environment.close()


@pytest.mark.parametrize("length", ["abc", "-5", "99999999999", "2"])
def test_a_request_that_makes_no_sense_is_answered(length, capfd):
    environment = agent("two_turns")
    episode = environment.open(ROW, 0)
    with socket.create_connection(("127.0.0.1", environment.server.server_port), timeout=60) as client:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nAuthorization: Bearer {episode.token}\r\n"
        client.sendall(f"{head}Content-Length: {length}\r\n\r\n[]".encode())
        assert client.recv(100).startswith(b"HTTP/1.0 400 Bad Request")
    assert capfd.readouterr().err == ""
    episode.close()
    environment.close()


def test_programs_run_in_workers():
    options = {"agent": "played_agents:two_turns", "timeout_s": 60.0}
    environment = Workers("agent", options, deadline_s=100)
    episodes = [environment.open(ROW, seed) for seed in range(3)]
    assert [e.step(Turn(0, "one")).messages[0]["content"][-2:] for e in episodes] == ["0?", "1?", "2?"]
    assert [e.step(Turn(1, "x" * n)).reward for n, e in enumerate(episodes)] == [0.0, 1.0, 2.0]
    environment.close()
