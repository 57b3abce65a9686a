"""`RolloutSource` on real vLLM: on-policy at staleness 0, ages and spans beyond, and overlap."""

from __future__ import annotations

import time

import pytest
import torch
from on_policy import OnPolicySource
from tick_engine import ThreadScorer
from tiny_llama import (
    Stream,
    largest_gap,
    make_model,
    make_prompts,
    make_tokenizer,
    save,
    token_logprobs,
)

from rl.types import SamplingParams
from rollout.engine import EngineError
from rollout.in_flight import GroupSampling
from rollout.prompts import PromptStream
from rollout.source import Admission, DynamicSampling, RolloutSource
from tests.calling import call
from tests.vllm_engines import needs_vllm, start_vllm

pytestmark = needs_vllm
PROMPTS = make_prompts(4, 9, 17, 5, 12)
SAMPLING = SamplingParams(40, stop_token_ids=tuple(range(2, 300, 12)))  # about 12 tokens, at most 40
B, G, SEED = 3, 2, 5


@pytest.fixture(scope="module")
def models():
    return make_model(0), make_model(1)


@pytest.fixture(scope="module")
def folder(models, tmp_path_factory):
    return save(models[0], tmp_path_factory.mktemp("model"))


def start(folder, **options):
    options |= {"max_model_len": 128, "max_num_seqs": 6, "kv_cache_gib": 0.03}
    return start_vllm(folder, make_tokenizer(), dtype=torch.float32, **options)


@pytest.fixture(scope="module")
def engine(folder):
    engine = start(folder)
    yield engine
    engine.close()


def make(kind, engine, **options):
    stream = PromptStream(PROMPTS, seed=SEED)
    return kind(engine, ThreadScorer(), stream, GroupSampling(SAMPLING, G, SEED), **options)


def has_spread(group):
    return len({reward.score for reward in group.rewards}) > 1


def run(source, models, steps):
    batches = []
    for step in range(steps):
        source.publish(Stream(models[step % 2]), version=step)
        batches.append(list(source.groups(B)))
    return batches


def test_without_staleness_it_is_the_on_policy_source(engine, models):
    dynamic = DynamicSampling(has_spread, max_rounds=2)
    expected = run(make(OnPolicySource, engine, dynamic=dynamic), models, 4)
    assert run(make(RolloutSource, engine, dynamic=dynamic), models, 4) == expected
    assert engine.in_flight == 0


def test_one_step_ahead_the_order_is_the_streams_and_every_token_knows_its_version(engine, models):
    source = make(RolloutSource, engine, admission=Admission(max_staleness=1, num_steps=8))
    batches = run(source, models, 8)
    ids = [g.prompt.id for batch in batches for g in batch]
    assert ids == [source.stream.at(n).id for n in range(8 * B)]
    several = 0
    for step, batch in enumerate(batches):
        for group in batch:
            for c in group.completions:
                assert sum(span.num_tokens for span in c.version_spans) == len(c.token_ids)
                assert all(0 <= step - span.policy_version <= 1 for span in c.version_spans)
                several += len(c.version_spans) > 1
                first = c.version_spans[0]
                alone = token_logprobs(
                    models[first.policy_version % 2], [*group.prompt.token_ids, *c.token_ids]
                )
                start = len(group.prompt.token_ids) - 1
                expected = alone[start : start + first.num_tokens]
                assert largest_gap(c.behavior_logprobs[: first.num_tokens], expected) < 2e-5
    assert several > 0 and engine.in_flight == 0


def test_an_engine_of_its_own_process_goes_on_while_the_trainer_computes(folder, models):
    source = make(RolloutSource, start(folder, process="own"), admission=Admission(max_staleness=1))
    graded = []
    source.scorer.on_submit = lambda: graded.append(1)
    try:
        for step in range(3):
            source.publish(Stream(models[step % 2]), version=step)
            list(source.groups(B))
            count, deadline = (step + 2) * B, time.monotonic() + 60
            while (source.engine.in_flight or len(graded) < count) and time.monotonic() < deadline:
                time.sleep(0.01)  # the trainer computes, and does not call the source
            assert source.engine.in_flight == 0 and len(graded) == count
    finally:
        source.close()


def test_an_engine_on_the_trainers_device_is_held_while_that_computes(folder, models):
    """Its completions stay where they are, go on after the update, and note which version sampled what."""
    engine = start(folder, process="own", sample_while_training=False)
    source = make(RolloutSource, engine, admission=Admission(max_staleness=1, num_steps=6))
    batches, waiting = [], []
    try:
        for step in range(6):
            source.publish(Stream(models[step % 2]), version=step)
            batches.append(list(source.groups(B)))
            assert not engine._is_held  # while groups are packed, nothing else needs the device
            source.yield_device()
            assert engine._is_held or not engine.in_flight
            time.sleep(0.3)  # the trainer computes; what is left would be sampled three times over
            waiting.append(engine.in_flight)
            assert engine._core.answers(timeout_s=0.2, waiting_for="anything") == []
        assert [g.prompt.id for batch in batches for g in batch] == [
            source.stream.at(n).id for n in range(6 * B)
        ]
        assert sum(number > 0 for number in waiting[:5]) >= 2 and waiting[5] == 0
        spans = [(step, c.version_spans) for step, b in enumerate(batches) for g in b for c in g.completions]
        assert all(0 <= step - span.policy_version <= 1 for step, of in spans for span in of)
        assert any(len(of) == 2 for _, of in spans)
    finally:
        source.close()


def test_a_held_engine_goes_on_when_it_is_asked_for_more(folder, models):
    engine = start(folder, process="own", sample_while_training=False)
    try:
        expected = engine.generate(call(PROMPTS[:2], num_completions=4, sampling=SAMPLING, seeds=[1, 2]))
        engine.submit(call(PROMPTS[:2], num_completions=4, sampling=SAMPLING, seeds=[1, 2]))
        engine.hold()
        engine.hold()
        assert engine.collect(timeout_s=0.0) == []
        before = engine.prompt_logprobs(list(range(5, 25)))
        engine.hold()
        groups = []
        while engine.in_flight:
            groups += engine.collect(timeout_s=60.0)
        ids = {g.prompt.id: [c.token_ids for c in g.completions] for g in groups}
        assert ids == {g.prompt.id: [c.token_ids for c in g.completions] for g in expected}
        assert all(len(c.version_spans) == 1 for g in groups for c in g.completions)
        engine.hold()
        again = engine.generate(call(PROMPTS[:2], num_completions=4, sampling=SAMPLING, seeds=[1, 2]))
        assert [g.completions for g in again] == [g.completions for g in expected]
        assert largest_gap(before, engine.prompt_logprobs(list(range(5, 25)))) == 0
        engine.submit(call(PROMPTS[:2], num_completions=4, sampling=SAMPLING, seeds=[1, 2]))
        engine.prompt_logprobs([5, 6])  # answered after the first tokens of these
        engine.hold()
        with pytest.raises(ValueError, match="has no weight nothing"):
            engine.update_weights([*Stream(models[1]), ("nothing", torch.zeros(2))], version=1)
        for waits in (lambda: engine.collect(timeout_s=5.0), lambda: engine.prompt_logprobs([5, 6])):
            with pytest.raises(EngineError, match="weights of engine vllm are unknown"):
                waits()
        engine.update_weights(Stream(models[1]), version=2)
        groups = []
        while engine.in_flight:
            groups += engine.collect(timeout_s=60.0)
        assert {s.policy_version for g in groups for c in g.completions for s in c.version_spans} == {0, 2}
    finally:
        engine.close()
