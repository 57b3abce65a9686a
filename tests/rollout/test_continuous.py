"""Sampling across training steps: order, age, lengths, waves, restarts."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import pytest
from on_policy import OnPolicySource
from tick_engine import AloneEngine, OneWeight, ThreadScorer, TickEngine, length_of

from rl.types import ALONE, Prompt, SamplingParams, ScoredGroup
from rollout.engine import EngineError
from rollout.in_flight import GroupSampling
from rollout.prompts import PromptStream, sampling_seed
from rollout.source import Admission, DynamicSampling, RolloutSource, WeightSync
from rollout.weight_sync import WeightSyncError
from tests.waiting import wait_until

PROMPTS = [Prompt(f"p{i}", "", (i,)) for i in range(30)]
SAMPLING = SamplingParams(max_completion_length=200)
B, G, SEED = 6, 4, 3


def make(
    kind=RolloutSource, *, engine=None, scorer=None, keep_fn=None, max_rounds=1, team=ALONE, **admission
):
    dynamic = DynamicSampling(keep_fn, max_rounds) if keep_fn else DynamicSampling()
    return kind(
        engine or TickEngine(),
        scorer or ThreadScorer(),
        PromptStream(PROMPTS, seed=SEED),
        GroupSampling(SAMPLING, G, SEED),
        admission=Admission(**admission),
        dynamic=dynamic,
        sync=WeightSync(verify=False),
        team=team,
    )


def make_on_policy(keep_fn, max_rounds):
    dynamic = DynamicSampling(keep_fn, max_rounds) if keep_fn else DynamicSampling()
    stream, sampling = PromptStream(PROMPTS, seed=SEED), GroupSampling(SAMPLING, G, SEED)
    return OnPolicySource(TickEngine(), ThreadScorer(), stream, sampling, dynamic=dynamic, verify=False)


def train(source, steps: int, *, first: int = 0, training_ticks: int = 0) -> list[list[ScoredGroup]]:
    """What a run of `steps` steps trains on, when the engine samples `training_ticks` tokens per update."""
    batches = []
    source.publish(OneWeight(), version=first)
    for step in range(first, first + steps):
        batches.append(list(source.groups(B)))
        source.engine.run(training_ticks)
        source.publish(OneWeight(), version=step + 1)
    return batches


def lengths(groups) -> list[list[int]]:
    return [[len(c.token_ids) for c in group.completions] for group in groups]


def sampled_lengths(num_groups: int) -> list[list[int]]:
    """Lengths of the first `num_groups` prompts as they come, whoever samples them and however fast."""
    return [[length_of(sampling_seed(SEED, n), i) for i in range(G)] for n in range(num_groups)]


class FirstFinishedSource(RolloutSource):
    """The naive way: a step takes what finishes first, and what gets too old meanwhile is dropped."""

    def _take(self, count):
        queue, taken = self._in_flight.queue, []
        while len(taken) < count:
            self._in_flight.pump(1.0)
            for request in [r for r in queue if r.scored is not None]:
                (group,) = self._in_flight.wait_for_graders([request])
                if self._age(group) > self.admission.max_staleness:
                    queue.remove(request)
                elif len(taken) < count:
                    queue.remove(request)
                    taken.append(group)
            self._deal([self._room(count - len(taken))])
        return taken


@pytest.mark.parametrize("max_staleness", [1, 3])
@pytest.mark.parametrize("training_ticks", [0, 25, 400])
def test_the_lengths_that_are_trained_are_those_that_are_sampled(max_staleness, training_ticks):
    steps = 12
    batches = train(make(max_staleness=max_staleness), steps, training_ticks=training_ticks)
    assert lengths([g for batch in batches for g in batch]) == sampled_lengths(steps * B)


def test_taking_what_finishes_first_fails_that_test_and_prefers_short_completions():
    steps = 60
    batches = train(make(FirstFinishedSource, max_staleness=1), steps, training_ticks=25)
    trained, sampled = lengths([g for batch in batches for g in batch]), sampled_lengths(steps * B)
    assert len(trained) == len(sampled) and sorted(trained) != sorted(sampled)
    means = [sum(map(sum, groups)) / len(groups) for groups in (trained, sampled)]
    assert means[0] < 0.8 * means[1]


@pytest.mark.parametrize("in_flight", [None, G, 3 * G + 1, 10 * G])
@pytest.mark.parametrize("max_staleness", [0, 1, 2, 5])
def test_no_token_is_older_than_max_staleness_and_no_work_is_thrown_away(max_staleness, in_flight):
    draw = random.Random(max_staleness)
    oldest = 0
    engine = TickEngine(concurrency=20)
    source = make(engine=engine, max_staleness=max_staleness, in_flight=in_flight)
    source.publish(OneWeight(), version=0)
    for step in range(15):
        ages = [
            step - span.policy_version
            for group in source.groups(B)
            for completion in group.completions
            for span in completion.version_spans
        ]
        oldest = max(oldest, *ages)
        assert min(ages) >= 0 and max(ages) <= max_staleness
        assert source.last_rejected == []
        assert source.cursor == (step + 1) * B
        engine.run(draw.choice([0, 0, 10, 500]))
        source.publish(OneWeight(), version=step + 1)
    assert oldest == max_staleness or in_flight is not None  # the bound is reached
    assert in_flight is None or engine.most_in_flight <= in_flight


def test_weights_change_under_running_completions_and_each_token_keeps_its_version():
    batches = train(make(max_staleness=2), 8, training_ticks=10)
    completions = [c for batch in batches for group in batch for c in group.completions]
    assert all(sum(s.num_tokens for s in c.version_spans) == len(c.token_ids) for c in completions)
    assert Counter(len(c.version_spans) for c in completions)[3] > 0


def test_refills_go_out_in_waves():
    """8 groups may be in flight: a refill has 2 or more, except for the last that a version admits."""
    engine = TickEngine()
    train(make(engine=engine, max_staleness=3, in_flight=8 * G, num_steps=20), 20)
    assert sum(engine.waves) == 20 * B and max(engine.waves) <= 8
    assert engine.waves.count(1) <= 20 < len(engine.waves) < 60


def test_the_tail_of_a_step_is_filled_with_the_next_steps():
    """Ticks for 20 steps with an instant trainer, when a tick costs the same however many completions run."""
    ticks = {}
    for max_staleness in (0, 1, 2):
        engine = TickEngine(concurrency=2 * B * G)
        train(make(engine=engine, max_staleness=max_staleness, num_steps=20), 20)
        ticks[max_staleness] = engine.ticks
    assert ticks[1] < 0.65 * ticks[0] and ticks[2] < 0.85 * ticks[1]


def test_nothing_is_started_that_no_step_would_train_on():
    engine = TickEngine()
    batches = train(make(engine=engine, max_staleness=3, num_steps=5), 5, training_ticks=20)
    assert sum(engine.waves) == sum(map(len, batches)) == 5 * B and engine.in_flight == 0


def has_spread(group):
    return len({reward.score for reward in group.rewards}) > 1


@pytest.mark.parametrize("keep_fn", [None, has_spread, lambda group: False])
def test_without_staleness_it_is_the_on_policy_source(keep_fn):
    options = {"keep_fn": keep_fn, "max_rounds": 3}
    sources = make_on_policy(**options), make(max_staleness=0, **options)
    for step in range(8):
        results = []
        for source in sources:
            source.publish(OneWeight(), version=step)
            results.append((list(source.groups(B)), source.last_rejected, source.last_counts, source.cursor))
        assert results[0] == results[1]
    assert sources[0].engine.seeds == [
        (prompt_id.split(" (")[0], seed) for prompt_id, seed in sources[1].engine.seeds
    ]


@pytest.mark.parametrize("max_staleness", [1, 2])
def test_dynamic_sampling_takes_replacements_from_the_queue(max_staleness):
    source = make(max_staleness=max_staleness, keep_fn=has_spread, max_rounds=20)
    consumed = []
    source.publish(OneWeight(), version=0)
    for step in range(10):
        groups = list(source.groups(B))
        assert len(groups) == B and all(has_spread(group) for group in groups)
        assert all(step - c.policy_version <= max_staleness for g in groups for c in g.completions)
        assert not any(has_spread(group) for group in source.last_rejected)
        consumed += [g.prompt.id for g in (*groups, *source.last_rejected)]
        assert source.cursor == len(consumed)
        source.publish(OneWeight(), version=step + 1)
    assert len(consumed) > 10 * B
    assert Counter(consumed) == Counter(source.stream.at(n).id for n in range(len(consumed)))


def test_an_engine_that_samples_ahead_with_old_weights_stops_the_run():
    """It goes on with version 0, so its groups of step 2 are too old."""
    engine = TickEngine()
    source = make(engine=engine, max_staleness=1)
    source.publish(OneWeight(), version=0)
    for step in (1, 2):
        list(source.groups(B))
        engine.lag = 1
        source.publish(OneWeight(), version=step)
        engine.run(500)
    engine.lag = 0
    with pytest.raises(EngineError, match="sampled with weights 2 versions behind version 2, which it was"):
        list(source.groups(B))
    assert source.cursor == 2 * B


def test_an_engine_that_keeps_old_weights_stops_the_run():
    source = make(engine=TickEngine(lag=2), max_staleness=1)
    source.publish(OneWeight(), version=2)
    with pytest.raises(EngineError, match="2 versions behind version 2") as caught:
        list(source.groups(B))
    assert "train.max_staleness=1" in str(caught.value)


@pytest.mark.parametrize("max_staleness", [0, 1, 3])
def test_a_restart_at_any_step_consumes_every_prompt_once(max_staleness):
    options = {"max_staleness": max_staleness, "keep_fn": has_spread, "max_rounds": 2}
    source, cursor, consumed = make(**options), 0, []
    source.publish(OneWeight(), version=0)
    for step in range(12):
        groups = list(source.groups(B))
        consumed += [g.prompt.id for g in (*groups, *source.last_rejected)]
        cursor = source.cursor
        source.engine.run(step * 13 % 50)
        source.publish(OneWeight(), version=step + 1)
        if step % 3 == 2:  # killed: a new process, with nothing but the cursor
            source = make(**options)
            source.cursor = cursor
            source.publish(OneWeight(), version=step + 1)
    expected = [source.stream.at(n).id for n in range(len(consumed))]
    assert Counter(consumed) == Counter(expected)


class Exchange:
    """`gather` of two sources in two threads."""

    def __init__(self) -> None:
        self.barrier, self.values = threading.Barrier(2, timeout=60), [None, None]

    def of(self, rank: int):
        def gather(mine):
            self.values[rank] = mine
            self.barrier.wait()
            both = list(self.values)
            self.barrier.wait()
            return both

        return gather


@dataclass(frozen=True)
class Pair:
    """One of two processes."""

    rank: int
    gather: Callable[[Any], list[Any]]
    size: int = 2


def run_two(work) -> list:
    exchange, results = Exchange(), [None, None]

    def one(rank):
        results[rank] = work(rank, exchange.of(rank))

    threads = [threading.Thread(target=one, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert None not in results
    return results


@pytest.mark.parametrize("keep_fn", [None, has_spread])
def test_two_processes_consume_every_prompt_once_across_a_restart(keep_fn):
    options = {"max_staleness": 2, "keep_fn": keep_fn, "max_rounds": 4}

    def work(rank, gather):
        source = make(team=Pair(rank, gather), **options)
        consumed, cursors = [], []
        source.publish(OneWeight(), version=0)
        for step in range(9):
            groups = list(source.groups(B))
            assert len(groups) == B // 2
            consumed += [g.prompt.id for g in (*groups, *source.last_rejected)]
            cursors.append(source.cursor)
            source.publish(OneWeight(), version=step + 1)
            if step == 4:
                source = make(team=Pair(rank, gather), **options)
                source.cursor = cursors[-1]
                source.publish(OneWeight(), version=step + 1)
        return consumed, cursors

    (consumed, cursors), (others, their_cursors) = run_two(work)
    assert cursors == their_cursors
    pending = cursors[-1]["pending"] if isinstance(cursors[-1], dict) else []
    end = cursors[-1]["next"] if pending else cursors[-1]
    stream = PromptStream(PROMPTS, seed=SEED)
    expected = [stream.at(n).id for n in range(end) if n not in pending]
    assert Counter(consumed + others) == Counter(expected)
    assert any(isinstance(cursor, dict) for cursor in cursors) == (keep_fn is not None)


def test_groups_are_graded_while_the_rest_is_still_sampled():
    source = make(max_staleness=1)
    source.publish(OneWeight(), version=0)
    in_flight = []
    source.scorer.on_submit = lambda: in_flight.append(source.engine.in_flight // G)
    list(source.groups(B))
    assert len(in_flight) > B and in_flight[0] > B
    assert len(in_flight) == 2 * B - source.engine.in_flight // G


def test_sampling_and_grading_go_on_while_the_trainer_computes():
    engine, graded = AloneEngine(), []
    source = make(engine=engine, max_staleness=1)
    source.scorer.on_submit = lambda: graded.append(1)
    try:
        source.publish(OneWeight(), version=0)
        list(source.groups(B))
        for step in (1, 2, 3):
            source.publish(OneWeight(), version=step)
            groups = list(source.groups(B))
            assert {c.policy_version for g in groups for c in g.completions} == {step - 1}
            count, deadline = (step + 2) * B, time.monotonic() + 30
            while (engine.in_flight or len(graded) < count) and time.monotonic() < deadline:
                time.sleep(0.01)  # the trainer computes
            assert engine.in_flight == 0 and len(graded) == count
    finally:
        source.close()


def test_an_engine_that_was_drained_while_the_trainer_computes_is_filled_again():
    """`train.in_flight` lets one group run at a time, and the others wait for its place."""
    engine, graded = AloneEngine(), []
    source = make(engine=engine, max_staleness=1, in_flight=G)
    source.scorer.on_submit = lambda: graded.append(1)
    try:
        source.publish(OneWeight(), version=0)
        list(source.groups(B))
        wait_until(lambda: len(graded) >= 2 * B, "all are graded")
        assert len(graded) == 2 * B
    finally:
        source.close()


def test_an_engine_that_dies_while_the_trainer_computes_stops_the_run_at_the_next_sync():
    engine = AloneEngine()
    source = make(engine=engine, max_staleness=1)
    source.publish(OneWeight(), version=0)
    list(source.groups(B))
    engine.is_broken = True
    time.sleep(0.1)
    with pytest.raises((EngineError, WeightSyncError), match="process is dead"):
        source.publish(OneWeight(), version=1)
    source.close()


class Stuck(TickEngine):
    def collect(self, *, timeout_s):
        return []


def test_a_wait_for_the_engine_is_bounded_and_names_what_it_waits_for():
    source = make(engine=Stuck(), max_staleness=1, timeout_s=0.2)
    source.publish(OneWeight(), version=0)
    with pytest.raises(EngineError, match=r"finished no group for 0.2 s, with 48 completions in flight") as e:
        list(source.groups(B))
    assert source.stream.at(0).id in str(e.value) and "engine.timeout_s" in str(e.value)


class Hanging(ThreadScorer):
    def submit(self, group):
        return Future()


def test_a_wait_for_the_graders_is_bounded_and_names_what_it_waits_for():
    source = make(scorer=Hanging(), max_staleness=1, timeout_s=0.2)
    source.publish(OneWeight(), version=0)
    with pytest.raises(RuntimeError, match=r"graders finished no group for 0\.2 s") as caught:
        list(source.groups(B))
    assert source.stream.at(0).id in str(caught.value) and "rewards.deadline_s" in str(caught.value)


def test_an_engine_that_fails_for_a_whole_batch_stops_the_run():
    class Failing(TickEngine):
        def collect(self, *, timeout_s):
            groups = super().collect(timeout_s=timeout_s)
            for group in groups:
                for completion in group.completions:
                    completion.finish_reason = "abort"
            return groups

    source = make(engine=Failing(), max_staleness=1)
    source.publish(OneWeight(), version=0)
    with pytest.raises(EngineError, match="failed for all completions of 6 prompts"):
        list(source.groups(B))


class OneNever(TickEngine):
    """Never finishes the third prompt."""

    def collect(self, *, timeout_s):
        for running in (*self._running, *self._waiting):
            if running.started.prompt.id.startswith(f"{self.never} "):
                running.length = 10**9
        return super().collect(timeout_s=0.0) or (self.run(200) or super().collect(timeout_s=0.0))


def test_a_group_that_is_not_finished_in_time_counts_as_aborted_where_others_are():
    engine = OneNever()
    source = make(engine=engine, timeout_s=0.2)
    engine.never = source.stream.at(2).id
    source.publish(OneWeight(), version=0)
    groups = list(source.groups(B))
    aborted = [all(c.finish_reason == "abort" for c in group.completions) for group in groups]
    assert aborted == [False, False, True, False, False, False]
    assert engine.in_flight == 0 and source.cursor == B


def test_groups_that_the_engine_has_no_room_for_are_given_up_with_the_one_that_takes_it():
    engine = OneNever()
    source = make(engine=engine, timeout_s=0.2, in_flight=G)
    engine.never = source.stream.at(1).id
    source.publish(OneWeight(), version=0)
    groups = list(source.groups(B))
    aborted = [all(c.finish_reason == "abort" for c in group.completions) for group in groups]
    assert aborted == [False, True, True, True, True, True]
    assert (engine.waves, engine.in_flight, source.cursor) == ([1, 1], 0, B)


def test_a_cursor_that_is_set_ends_what_was_in_flight():
    source = make(max_staleness=1)
    source.publish(OneWeight(), version=0)
    list(source.groups(B))
    source.publish(OneWeight(), version=1)
    assert source.engine.in_flight > 0
    source.cursor = 3
    assert source.engine.in_flight == 0
