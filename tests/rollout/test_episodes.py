"""The engine of episodes: seeds, budgets, failures, abort, the journal, and many episodes at once."""

from __future__ import annotations

import random
import threading
import time
from concurrent.futures import wait
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from script_engine import NoJournal, ScriptEngine, byte_tokenizer

import rollout.episodes
from rl.types import Completion, Prompt, SamplingParams, VersionSpan
from rollout.engine import EngineError
from rollout.environment import EnvironmentFault, Reply, ToolCall, checked_reply
from rollout.episodes import EpisodeEngine, EpisodeRules
from rollout.play import Row
from rollout.sampler import completion_seed
from rollout.turns import TurnRenderer
from tests.calling import call
from tests.waiting import wait_until

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TOKENIZER = byte_tokenizer(TEMPLATE, extra=["<|user|>", "<|tool|>", "<|assistant|>"])
(END,) = TOKENIZER("<|end|>", add_special_tokens=False)["input_ids"]


class Counting:
    """Ends after `last` turns with a reward of 1; `answer` may raise or wait. State: turns so far."""

    tools = ()

    def __init__(self, last: int = 2, answer=lambda turn: "go on", *, repeatable=True, keeps_state=True):
        self.last, self.answer, self.repeatable, self.keeps_state = last, answer, repeatable, keeps_state
        self.opened: list[tuple[int, object]] = []
        self.steps: list[tuple[int, str]] = []
        self.closed = 0

    def open(self, row, seed, state=None):
        self.opened.append((seed, state))
        return Opened(self)

    def close(self):
        pass


class Opened:
    def __init__(self, owner: Counting) -> None:
        self.owner = owner

    def step(self, turn):
        self.owner.steps.append((turn.number, turn.text))
        content = self.owner.answer(turn)
        done = turn.number + 1 == self.owner.last
        state = {"turns": turn.number + 1} if self.owner.keeps_state else None
        return Reply(({"role": "user", "content": content},), float(done), done, {"n": 1}, state)

    def close(self):
        self.owner.closed += 1


class Notes:
    """A journal in memory that a second engine can go on with."""

    def __init__(self) -> None:
        self.entries: dict[str, dict] = {}
        self.order: list[dict] = []
        self.versions: list[int] = []

    def find(self, key):
        return self.entries.get(key)

    def append(self, entries):
        self.order += entries
        self.entries |= {entry["key"]: entry for entry in entries}

    def begin(self, version):
        self.versions.append(version)


class Clock:
    """What the engine reads for the time. It moves only by what answers and turns say that they took."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.engine_waits = 0.0, threading.Event()
        monkeypatch.setattr(rollout.episodes, "time", SimpleNamespace(monotonic=lambda: self.now))
        monkeypatch.setattr(rollout.episodes, "wait", self.wait)

    def wait(self, *given):
        """As `concurrent.futures.wait`, and answers know of it."""
        self.engine_waits.set()
        try:
            return wait(*given)
        finally:
            self.engine_waits.clear()

    def turn(self, seconds: float) -> None:
        self.now += seconds

    def answer(self, seconds: float) -> None:
        """Takes the seconds when the engine has nothing else to do."""
        assert self.engine_waits.wait(60)
        self.now += seconds


def make(environment, say=lambda seed: f"t{seed % 1000}", *, journal=None, fails=(), **rules):
    engine = ScriptEngine(TOKENIZER, say, fails=fails)
    journal = NoJournal() if journal is None else journal
    rules = EpisodeRules(**{"max_turns": 5, **rules})
    return engine, EpisodeEngine(engine, environment, TurnRenderer(TOKENIZER), journal, rules=rules)


def asked(num_prompts: int = 2, *, num_completions: int = 2, most: int = 500):
    text = "<|user|>Hi<|end|><|assistant|>"
    ids = tuple(TOKENIZER(text, add_special_tokens=False)["input_ids"])
    prompts = [Prompt(f"p{i}", text, ids, ({"role": "user", "content": "Hi"},)) for i in range(num_prompts)]
    sampling = SamplingParams(most, stop_token_ids=(END,))
    return call(
        prompts, num_completions=num_completions, sampling=sampling, seeds=range(10, 10 + num_prompts)
    )


def collected(episodes, number: int, patience_s: float = 60.0):
    groups, deadline = [], time.monotonic() + patience_s
    while len(groups) < number and time.monotonic() < deadline:
        groups += episodes.collect(timeout_s=0.5)
    assert len(groups) == number
    return timeless(groups)


def timeless(groups):
    """The groups without the seconds that were measured."""
    for completion in [c for group in groups for c in group.completions]:
        completion.facts = {name: fact for name, fact in completion.facts.items() if name != "seconds"}
    return groups


def test_seeds_are_by_prompt_completion_and_turn_and_the_environment_begins_alike():
    environment = Counting(last=2)
    engine, episodes = make(environment)
    groups = episodes.generate(asked())
    expected = {completion_seed(completion_seed(s, g), t) for s in (10, 11) for g in (0, 1) for t in (0, 1)}
    assert set(engine.seeds) == expected and len(engine.seeds) == 8
    assert sorted(environment.opened) == [(10, None), (10, None), (11, None), (11, None)]
    assert [c.facts["rewards"] for g in groups for c in g.completions] == [[0.0, 1.0]] * 4
    assert groups[0].completions[0].facts["counts"] == {"n": 2}
    assert [group.prompt.id for group in groups] == ["p0", "p1"] and episodes.in_flight == 0
    episodes.close()
    assert environment.closed == 4


def test_an_episode_samples_no_more_than_a_completion_may_and_says_what_cut_it():
    """A turn is "0123456789" and its end: 11 tokens. A reply adds <|user|>, 5 letters, <|end|> and
    <|assistant|>: 8. With 45 tokens: turns end at 11, 30, and the third has 45 - 38 = 7 left.
    """
    _, episodes = make(Counting(last=9), lambda seed: "0123456789")
    (completion,) = episodes.generate(asked(1, num_completions=1, most=45))[0].completions
    assert (completion.finish_reason, completion.facts["limit"]) == ("length", "tokens")
    assert len(completion.token_ids) == 45 and completion.num_sampled == 11 + 11 + 7
    assert completion.facts["rewards"] == [0.0, 0.0, None]
    assert [(s.origin, s.num_tokens) for s in completion.segments] == [
        ("sampled", 11),
        *[("scaffold", 1), ("user", 5), ("scaffold", 2), ("sampled", 11)],
        *[("scaffold", 1), ("user", 5), ("scaffold", 2), ("sampled", 7)],
    ]
    (completion,) = episodes.generate(asked(1, num_completions=1, most=19))[0].completions
    assert completion.facts["limit"] == "tokens" and len(completion.token_ids) == 11
    _, episodes = make(Counting(last=9), lambda seed: "0123456789", max_turn_length=10)
    (completion,) = episodes.generate(asked(1, num_completions=1))[0].completions
    assert (completion.finish_reason, completion.facts["limit"]) == ("length", "turn_tokens")
    assert completion.facts["rewards"] == [None]  # half a call is not made
    _, episodes = make(Counting(last=9), max_turns=3)
    (completion,) = episodes.generate(asked(1, num_completions=1))[0].completions
    assert (completion.finish_reason, completion.facts["limit"]) == ("length", "turns")
    assert completion.facts["rewards"] == [0.0, 0.0, 0.0]


def test_a_failure_is_an_abort_with_its_reason_and_no_reward():
    def answer(turn):
        if turn.text == "bad" and turn.number == 1:
            raise EnvironmentFault("the server is down")
        return "go on"

    draw = {completion_seed(completion_seed(10, 1), 1): "bad"}
    _, episodes = make(Counting(answer=answer), lambda seed: draw.get(seed, "good"))
    good, failed = episodes.generate(asked(1))[0].completions
    assert good.finish_reason == "stop" and good.facts["rewards"] == [0.0, 1.0]
    assert failed.finish_reason == "abort" and failed.token_ids == []
    assert failed.facts["fault"] == "the server is down" and "rewards" not in failed.facts
    _, episodes = make(Counting(), fails=["completion 0, turn 1"])
    aborted, _ = episodes.generate(asked(1))[0].completions
    assert aborted.finish_reason == "abort" and "fault" not in aborted.facts  # the engine's, not a tool's
    _, episodes = make(Counting(answer=lambda turn: 1 / 0))
    with pytest.raises(EngineError, match=r"all episodes of 2 prompts failed.*ZeroDivisionError"):
        episodes.generate(asked())


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        ("text", "answered str instead of a Reply"),
        (Reply(({"role": "assistant", "content": "x"},)), "role 'assistant'"),
        (Reply(({"role": "user", "content": None},)), "content NoneType"),
        (Reply(({"role": "user", "content": "x"},), float("nan")), "a reward of nan"),
        (Reply(), "answered nothing, but the episode is not over"),
        (Reply((), 1.0, True, {"x": object()}), "must be JSON values"),
    ],
)
def test_a_malformed_reply_is_the_environments_fault(reply, message):
    environment = Counting()
    environment.open = lambda row, seed, state=None: type(
        "E", (), {"step": lambda s, t: reply, "close": lambda s: 0}
    )()
    _, episodes = make(environment)
    with pytest.raises(EngineError, match=message):
        episodes.generate(asked(1))


def test_turns_and_answers_are_noted_before_they_are_used_and_asked_for_once():
    notes, environment = Notes(), Counting(last=3)
    first_engine, episodes = make(environment, journal=notes)
    episodes.submit(asked(1))
    expected = collected(episodes, 1)
    kinds = [("ids" in e, "reply" in e) for e in notes.order]
    assert kinds == [(True, False), (True, False), (False, True), (False, True)] * 3
    assert len(environment.steps) == 6
    again, episodes = make(unasked := Counting(last=3), journal=notes)
    episodes.submit(asked(1))
    assert collected(episodes, 1) == expected
    assert unasked.steps == [] == unasked.opened
    assert again.sent == first_engine.sent
    _, episodes = make(unasked, journal=notes)
    episodes.generate(asked(1))  # an evaluation is not a step of training
    assert len(unasked.steps) == 6
    episodes.update_weights([], version=4)
    assert notes.versions == [4]


@pytest.mark.parametrize(
    ("repeatable", "keeps_state", "fault"),
    [
        (True, True, None),
        (False, True, "a call was under way when the run was killed, and it may not be made again"),
        (True, False, "the run was killed, and the environment has no state to go on from"),
    ],
)
def test_a_call_that_was_under_way_is_made_again_where_that_is_allowed(repeatable, keeps_state, fault):
    options = {"repeatable": repeatable, "keeps_state": keeps_state}
    notes = Notes()
    _, episodes = make(Counting(last=3, **options), journal=notes)
    episodes.submit(asked(1, num_completions=1))
    (expected,) = collected(episodes, 1)[0].completions
    killed = Notes()
    killed.append(notes.order[:3])  # asked, answered, asked: killed under the second call
    _, episodes = make(environment := Counting(last=3, **options), journal=killed)
    episodes.submit(asked(1, num_completions=1))
    (found,) = collected(episodes, 1)[0].completions
    if fault is None:
        assert found == expected
        assert environment.opened == [(10, {"turns": 1})]  # it goes on from the state of the answer
        assert [number for number, _ in environment.steps] == [1, 2]
    else:
        assert (found.finish_reason, found.facts["interrupted"]) == ("abort", fault)
        assert environment.steps == []


def test_what_is_aborted_is_handed_out_never_and_its_late_answer_is_thrown_away():
    released, begun = threading.Event(), threading.Event()

    def answer(turn):
        begun.set()
        assert released.wait(60)
        return "late"

    environment = Counting(answer=answer)
    engine, episodes = make(environment)
    engine.runs_alone = episodes.runs_alone = True
    whole = asked(2, num_completions=1)
    episodes.submit(whole)
    assert episodes.collect(timeout_s=0.1) == [] and episodes.in_flight == 2
    assert begun.wait(60)
    episodes.abort([whole.prompts[0]])
    assert episodes.in_flight == 1
    released.set()
    (group,) = collected(episodes, 1)
    assert group.prompt.id == "p1"
    assert episodes.collect(timeout_s=0.1) == [] and episodes.in_flight == 0
    engine.submit = lambda call: engine._calls.append(call)
    episodes.submit(whole)
    episodes._sample()
    episodes.abort(whole.prompts)
    assert engine.aborted == ["p0, completion 0, turn 0", "p1, completion 0, turn 0"]
    episodes.close()
    assert environment.closed == 2


def test_two_hundred_episodes_with_random_delays_are_all_played():
    """No more calls at a time than `parallel`; what one is told does not depend on when."""
    running, most, lock = 0, 0, threading.Lock()

    def answer(turn):
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(random.random() / 50)
        with lock:
            running -= 1
        return turn.text

    engine, episodes = make(Counting(last=4, answer=answer), parallel=8)
    engine.runs_alone = episodes.runs_alone = True
    episodes.submit(asked(50, num_completions=4))
    groups = collected(episodes, 50)
    assert 1 < most <= 8
    _, plain = make(Counting(last=4, answer=lambda turn: turn.text))
    by_id = {group.prompt.id: group for group in groups}
    again = timeless(plain.generate(asked(50, num_completions=4)))
    assert [by_id[group.prompt.id] for group in again] == [by_id[f"p{i}"] for i in range(50)]
    for group in again:
        assert group == by_id[group.prompt.id]


def test_an_engine_that_is_only_called_gets_all_turns_of_a_round_together():
    """So which turns share a batch, and round alike, does not depend on how long tools take."""

    def answer(turn):
        time.sleep(random.random() / 50)
        return "go on"

    engine, episodes = make(Counting(last=3, answer=answer), max_turn_length=20)
    episodes.submit(asked(5, num_completions=4))
    collected(episodes, 5)
    assert engine.waves == [20, 20, 20]


@pytest.mark.parametrize("others", [0, 1])
def test_only_time_without_any_turn_to_sample_counts_as_waiting_for_the_environment(others, monkeypatch):
    """The first answer takes 6 s. Another episode fills that time with six turns of 1 s each."""
    clock, slow = Clock(monkeypatch), iter([6.0])

    def answer(turn):
        if seconds := next(slow, 0.0):
            if others:
                wait_until(lambda: clock.now >= 1.0 + seconds, "the other episode has had its turns", 60)
            else:
                clock.answer(seconds)
        return "go on"

    engine, episodes = make(Counting(last=7, answer=answer), max_turns=9)
    engine.runs_alone, collect = True, engine.collect
    engine.collect = lambda timeout_s: clock.turn(1.0) or collect(timeout_s=timeout_s)
    (group,) = episodes.generate(asked(1, num_completions=1 + others))
    sampling, idle = (sum(c.facts["seconds"][i] for c in group.completions) for i in (0, 1))
    # One alone: seven turns and the answer. Two share the first turn; one takes its other six while the
    # answer is waited for, and the other takes its own six after that.
    assert (sampling, idle, clock.now) == (13.0, 0.0 if others else 6.0, 13.0)


@pytest.mark.parametrize("end", ["answer", "cut"])
def test_what_ends_an_episode_counts_in_its_seconds(end, monkeypatch):
    """The last answer takes 3 s, or the turn that is cut: waiting is a part of all, and nothing is left."""
    clock = Clock(monkeypatch)
    environment = Counting(last=1, answer=lambda turn: clock.answer(3.0) or "over")
    engine, episodes = make(
        environment, lambda seed: "0123456789", max_turn_length=10 if end == "cut" else 99
    )
    collect, slow = engine.collect, 3.0 if end == "cut" else 0.0
    engine.collect = lambda timeout_s: clock.turn(slow) or collect(timeout_s=timeout_s)
    for _ in range(2):
        (group,) = episodes.generate(asked(1, num_completions=1))
        assert group.completions[0].facts["seconds"] == [3.0, 3.0 if end == "answer" else 0.0]


def test_waits_are_bounded():
    released = threading.Event()
    _, episodes = make(Counting(answer=lambda turn: released.wait(60)), timeout_s=0.3)
    began = time.monotonic()
    with pytest.raises(EngineError, match=r"no turn and no answer for 0.3 s.*episodes of prompt p0"):
        episodes.generate(asked(1))
    assert time.monotonic() - began < 30
    assert episodes.in_flight == 0
    released.set()


@pytest.mark.parametrize("history", ["append", "template"])
def test_no_row_is_longer_than_a_completion_may_be(history):
    """Also where an answer is longer than what is left: it is not appended to the last turn."""
    _, episodes = make(Counting(last=9), lambda seed: "0123456789")
    episodes.render.history = history
    for most in range(1, 60):
        one = asked(1, num_completions=1, most=most)
        episodes.submit(replace(one, prompts=(replace(one.prompts[0], id=str(most)),)))
    for group in collected(episodes, 59):
        (completion,) = group.completions
        assert len(completion.token_ids) <= int(group.prompt.id)
        assert completion.loss_mask[-1] and completion.segments[-1].origin == "sampled"


def test_routes_of_a_turn_may_need_more_bits_than_those_of_the_first():
    row = Row((1, 2))
    for expert, kind in ((100, np.int8), (300, np.int16)):
        turn = Completion([5], [0.0], [True], "stop", [VersionSpan(0, 1)])
        turn.routes = np.full((1, 2, 1), expert, kind)
        row.add_turn(turn)
        row.add_others([(7, "tool")], with_logprobs=True)
    assert row.completion("stop", "").routes[:, 0, 0].tolist() == [100, -1, 300, -1]


def test_texts_of_a_reply_can_be_encoded():
    (message,) = checked_reply(Reply(({"role": "tool", "name": "f\ud800", "content": "\udfff"},))).messages
    assert message == {"role": "tool", "name": "f?", "content": "?"}


def test_answers_of_tools_have_the_names_of_their_calls():
    """Some templates put it into the header of the answer, and environments of others leave it out."""
    calls = [ToolCall("f", {}), ToolCall("g", {})]
    tool, user = {"role": "tool", "content": "1"}, {"role": "user", "content": "2"}
    found = checked_reply(Reply((tool, user, {**tool, "name": "h"}, tool), state={}), calls)
    assert [m.get("name") for m in found.messages] == ["f", None, "h", None]
