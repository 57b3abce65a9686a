"""Prompts are consumed in one seeded order, whatever the processes, rounds and restarts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import pytest
from on_policy import OnPolicySource
from protocol_engine import ProtocolEngine
from tiny_llama import Stream, make_model, make_prompts, make_tokenizer, save

from rl.types import Completion, Group, Prompt, Reward, SamplingParams, ScoredGroup, VersionSpan
from rollout.engine import Engine, EngineError
from rollout.in_flight import GroupSampling
from rollout.prompts import PromptStream, sampling_seed
from rollout.source import Admission, DynamicSampling, RolloutSource, sample_and_score
from rollout.transformers import TransformersEngine

PROMPTS = [Prompt(f"p{i}", "", (i,)) for i in range(5)]
SAMPLING = SamplingParams(max_completion_length=4)


class EchoEngine:
    """A small real engine: one completion token, the seed's last digit."""

    name, version, tensors = "echo", 0, {}
    runs_alone = held_while_training = sleeps_while_training = False

    def __init__(self):
        self.seen: list[tuple[str, int]] = []
        self._finished: list[Group] = []

    @property
    def in_flight(self):
        return sum(len(group.completions) for group in self._finished)

    def submit(self, call):
        self._finished += self.generate(call)

    def collect(self, *, timeout_s):
        finished, self._finished = self._finished, []
        return finished

    def generate(self, call):
        asked = list(zip(call.prompts, call.seeds, strict=True))
        self.seen += [(p.id.split(" (")[0], s) for p, s in asked]
        spans = [VersionSpan(0, 1)]
        return [
            Group(
                p, [Completion([s % 10], [0.0], [True], "stop", spans) for _ in range(call.num_completions)]
            )
            for p, s in asked
        ]

    def close(self):
        pass


class ParityScorer:
    """Rewards the first completion of a group with an even token by 1: such groups have spread."""

    def submit(self, group):
        graded = Future()
        graded.set_result(self.score([group])[0])
        return graded

    def score(self, groups):
        return [ScoredGroup(g, [self._reward(i, c) for i, c in enumerate(g.completions)]) for g in groups]

    def close(self):
        pass

    def _reward(self, index, completion):
        if not completion.token_ids:
            return Reward(None)
        return Reward(float(index == 0 and completion.token_ids[0] % 2 == 0))


def source(**options) -> RolloutSource:
    stream = PromptStream(PROMPTS, seed=3)
    return RolloutSource(EchoEngine(), ParityScorer(), stream, GroupSampling(SAMPLING, 2, 3), **options)


@dataclass(frozen=True)
class Pair:
    """One of two processes; the other one gives `gather(mine)[1 - rank]`."""

    rank: int
    gather: Callable[[Any], list[Any]]
    size: int = 2


def test_every_epoch_holds_each_prompt_once_in_a_new_order():
    stream = PromptStream(PROMPTS, seed=3)
    epochs = [[stream.at(n).id for n in range(e * 5, e * 5 + 5)] for e in range(4)]
    assert all(sorted(epoch) == [p.id for p in PROMPTS] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    assert PromptStream(PROMPTS, seed=3).at(13) is stream.at(13)
    assert [PromptStream(PROMPTS, seed=3, shuffle=False).at(n).id for n in (0, 6)] == ["p0", "p1"]


def test_two_processes_consume_together_what_one_consumes_alone():
    alone = source()
    list(alone.groups(4))
    halves = []
    for rank in (0, 1):
        half = source(team=Pair(rank, lambda mine: [mine, mine]))
        list(half.groups(4))
        assert half.cursor == alone.cursor == 4
        halves.append(half.engine.seen)
    merged = [pair for pairs in zip(*halves, strict=True) for pair in pairs]
    assert merged == alone.engine.seen


def test_uneven_needs_are_dealt_without_a_gap_or_a_double():
    """Process 0 wants 3 and process 1 wants 1: ordinals 0, 2, 3 and 1."""
    seen = []
    for rank, wanted in ((0, 3), (1, 1)):
        one = source(team=Pair(rank, lambda mine: [mine, mine]))
        one._deal([3, 1])
        one._take(wanted)
        assert one._next == 4
        assert len(one.engine.seen) == wanted
        seen += [seed for _, seed in one.engine.seen]
    assert Counter(seen) == Counter(sampling_seed(3, n) for n in range(4))


def test_dynamic_sampling_replaces_groups_without_spread_up_to_its_cap():
    def has_spread(group):
        return len({r.score for r in group.rewards}) > 1

    capped = source(dynamic=DynamicSampling(has_spread, max_rounds=1))
    plain = source()
    assert [g.prompt.id for g in plain.groups(4)] == [g.prompt.id for g in sorted_like(capped, plain)]
    patient = source(dynamic=DynamicSampling(has_spread, max_rounds=50))
    groups = list(patient.groups(4))
    assert len(groups) == 4 and all(has_spread(g) for g in groups)
    assert patient.cursor == 4 + patient.last_counts["replaced"] == 4 + len(patient.last_rejected)
    assert patient.last_counts["rounds"] > 1


def sorted_like(capped: RolloutSource, plain: RolloutSource) -> list[ScoredGroup]:
    """With a cap of one round the same prompts are returned, those with spread first."""
    order = [prompt_id for prompt_id, _ in plain.engine.seen]
    return sorted(capped.groups(4), key=lambda g: order.index(g.prompt.id))


def test_evaluation_moves_no_cursor_and_shares_no_seed_with_training():
    one = source()
    list(one.groups(4))
    before = one.cursor
    groups = sample_and_score(
        one.engine, one.scorer, PROMPTS, SAMPLING, num_samples=1, seed=3, first=1, stride=2
    )
    assert [g.prompt.id for g in groups] == ["p1", "p3"]
    assert one.cursor == before
    seeds = [seed for _, seed in one.engine.seen]
    assert len(set(seeds)) == len(seeds)


def test_an_engine_that_has_only_the_protocols_methods_is_enough(tmp_path):
    """The groups, counts and cursor of the plain way, with another engine and the proof of every sync."""
    policy, folder = make_model(1), save(make_model(0), tmp_path)
    prompts, found = make_prompts(4, 9, 6), []
    options = {"dynamic": DynamicSampling(lambda group: group.rewards[0].score == 1.0, max_rounds=2)}
    for kind, wrapped in ((RolloutSource, ProtocolEngine), (OnPolicySource, lambda engine: engine)):
        engine = wrapped(TransformersEngine(folder, make_tokenizer()))
        sampling = GroupSampling(SamplingParams(max_completion_length=6), 2, 3)
        one = kind(engine, ParityScorer(), PromptStream(prompts, seed=3), sampling, **options)
        for version in (1, 2):
            assert one.publish(Stream(policy), version=version)["sync/canary_gap_max"] < 1e-5
            found.append((list(one.groups(4)), one.last_rejected, one.last_counts, one.cursor))
    assert found[:2] == found[2:]
    members = {name for name in vars(Engine) | Engine.__annotations__ if not name.startswith("_")}
    assert {name for name in dir(ProtocolEngine(engine)) if not name.startswith("_")} == members


@pytest.mark.parametrize("max_staleness", [0, 1])
def test_an_engine_that_fails_for_a_whole_batch_says_why(tmp_path, max_staleness):
    engine = TransformersEngine(save(make_model(0), tmp_path), make_tokenizer())
    stream = PromptStream(make_prompts(125, 126), seed=3)
    sampling = GroupSampling(SamplingParams(max_completion_length=6), 2, 3)
    one = RolloutSource(engine, ParityScorer(), stream, sampling, admission=Admission(max_staleness))
    with pytest.raises(
        EngineError, match=r"all completions of 2 prompts failed.*12[56] tokens.*128 positions"
    ):
        list(one.groups(2))
