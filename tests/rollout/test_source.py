"""Prompts are consumed in one seeded order, whatever the processes, rounds and restarts."""

from __future__ import annotations

from collections import Counter

from rl.types import Completion, Group, Prompt, Reward, SamplingParams, ScoredGroup, VersionSpan
from rollout.source import OnPolicySource, PromptStream, sample_and_score, sampling_seed

PROMPTS = [Prompt(f"p{i}", "", (i,)) for i in range(5)]
SAMPLING = SamplingParams(max_completion_length=4)


class EchoEngine:
    """A small real engine: one completion token, the seed's last digit."""

    name, version, tensors = "echo", 0, {}

    def __init__(self):
        self.seen: list[tuple[str, int]] = []

    def generate(self, prompts, *, num_completions, sampling, seeds, with_logprobs=True):
        self.seen += [(p.id, s) for p, s in zip(prompts, seeds, strict=True)]
        spans = [VersionSpan(0, 1)]
        return [
            Group(p, [Completion([s % 10], [0.0], [True], "stop", spans) for _ in range(num_completions)])
            for p, s in zip(prompts, seeds, strict=True)
        ]

    def close(self):
        pass


class ParityScorer:
    """Rewards the first completion of a group with an even token by 1: such groups have spread."""

    def score(self, groups):
        return [
            ScoredGroup(
                g, [Reward(float(i == 0 and c.token_ids[0] % 2 == 0)) for i, c in enumerate(g.completions)]
            )
            for g in groups
        ]

    def close(self):
        pass


def source(**options) -> OnPolicySource:
    stream = PromptStream(PROMPTS, seed=3)
    return OnPolicySource(EchoEngine(), ParityScorer(), stream, SAMPLING, group_size=2, seed=3, **options)


def test_every_epoch_holds_each_prompt_once_in_a_new_order():
    stream = PromptStream(PROMPTS, seed=3)
    epochs = [[stream.at(n).id for n in range(e * 5, e * 5 + 5)] for e in range(4)]
    assert all(sorted(epoch) == [p.id for p in PROMPTS] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    assert PromptStream(PROMPTS, seed=3).at(13) is stream.at(13)
    assert [PromptStream(PROMPTS, seed=3, shuffle=False).at(n).id for n in (0, 6)] == ["p0", "p1"]


def test_two_processes_consume_together_what_one_consumes_alone():
    alone = source()
    alone.next_groups(4)
    halves = []
    for rank in (0, 1):
        half = source(process=(rank, 2), gather_ints=lambda n: [n, n])
        half.next_groups(4)
        assert half.cursor == alone.cursor == 4
        halves.append(half.engine.seen)
    merged = [pair for pairs in zip(*halves, strict=True) for pair in pairs]
    assert merged == alone.engine.seen


def test_uneven_needs_are_dealt_without_a_gap_or_a_double():
    """Process 0 wants 3 and process 1 wants 1: ordinals 0, 2, 3 and 1."""
    seen = []
    for rank, wanted in ((0, 3), (1, 1)):
        one = source(process=(rank, 2), gather_ints=lambda n: [3, 1])
        one._sample([3, 1])
        assert one.cursor == 4
        assert len(one.engine.seen) == wanted
        seen += [seed for _, seed in one.engine.seen]
    assert Counter(seen) == Counter(sampling_seed(3, n) for n in range(4))


def test_dynamic_sampling_replaces_groups_without_spread_up_to_its_cap():
    def has_spread(group):
        return len({r.score for r in group.rewards}) > 1

    capped = source(keep_fn=has_spread, max_rounds=1)
    plain = source()
    assert [g.prompt.id for g in plain.next_groups(4)] == [g.prompt.id for g in sorted_like(capped, plain)]
    patient = source(keep_fn=has_spread, max_rounds=50)
    groups = patient.next_groups(4)
    assert len(groups) == 4 and all(has_spread(g) for g in groups)
    assert patient.cursor == 4 + patient.last_counts["replaced"] == 4 + len(patient.last_rejected)
    assert patient.last_counts["rounds"] > 1


def sorted_like(capped: OnPolicySource, plain: OnPolicySource) -> list[ScoredGroup]:
    """With a cap of one round the same prompts are returned, those with spread first."""
    order = [prompt_id for prompt_id, _ in plain.engine.seen]
    return sorted(capped.next_groups(4), key=lambda g: order.index(g.prompt.id))


def test_evaluation_moves_no_cursor_and_shares_no_seed_with_training():
    one = source()
    one.next_groups(4)
    before = one.cursor
    groups = sample_and_score(
        one.engine, one.scorer, PROMPTS, SAMPLING, num_samples=1, seed=3, first=1, stride=2
    )
    assert [g.prompt.id for g in groups] == ["p1", "p3"]
    assert one.cursor == before
    seeds = [seed for _, seed in one.engine.seen]
    assert len(set(seeds)) == len(seeds)
