"""An engine that drops weights and cache while the trainer computes: real vLLM, whose CPU build keeps them.

So the test drops them itself, by NaN in every weight and in the cache; `tests/gpu/test_sleep.py` looks at the
memory.
"""

from __future__ import annotations

import pytest
import torch
from tick_engine import ThreadScorer
from tiny_llama import (
    CANARY,
    Stream,
    largest_gap,
    make_model,
    make_prompts,
    make_tokenizer,
    save,
    token_logprobs,
)

from rl.types import SamplingParams, VersionSpan
from rollout.engine import EngineError
from rollout.in_flight import GroupSampling
from rollout.prompts import PromptStream
from rollout.source import Admission, RolloutSource
from rollout.weight_sync import publish
from tests.calling import call
from tests.vllm_engines import needs_vllm, start_vllm

pytestmark = needs_vllm
LONG = SamplingParams(60)
OPTIONS = {"max_model_len": 128, "max_num_seqs": 8, "kv_cache_gib": 0.03, "dtype": torch.float32}


@pytest.fixture(scope="module")
def models():
    return make_model(0), make_model(1)


@pytest.fixture(scope="module")
def engine(models, tmp_path_factory):
    folder = save(models[0], tmp_path_factory.mktemp("model"))
    engine = start_vllm(folder, make_tokenizer(), sleeps=True, process="inside", **OPTIONS)
    yield engine
    engine.close()


@pytest.fixture
def awake(engine, models):
    engine.update_weights(Stream(models[0]), version=0)
    return engine


@torch.no_grad()
def drop_memory(engine) -> int:
    """NaN where a GPU would unmap; the number of tensors."""
    runner = engine._core.engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    dropped = [*runner.get_model().parameters(), *runner.kv_caches]
    for tensor in dropped:
        tensor.fill_(torch.nan)
    return len([tensor for tensor in dropped if tensor.numel()])


def collected(engine):
    groups = []
    while engine.in_flight:
        groups += engine.collect(timeout_s=60.0)
    return groups


def test_what_is_in_flight_goes_on_with_the_new_weights_and_a_new_cache(awake, models):
    prompt = make_prompts(40)[0]
    awake.submit(call([prompt], num_completions=3, sampling=LONG, seeds=[1]))
    for _ in range(10):
        awake.collect(timeout_s=0.0)
    awake.hold(release=True)
    assert drop_memory(awake) > 2
    publish(awake, Stream(models[1]), version=1, tolerance=1e-4)
    for c in collected(awake)[0].completions:
        first, second = c.version_spans
        k = first.num_tokens
        assert (first.policy_version, second.policy_version, len(c.token_ids)) == (0, 1, 60) and 0 < k < 60
        ids = [*prompt.token_ids, *c.token_ids]
        assert largest_gap(c.behavior_logprobs[:k], token_logprobs(models[0], ids)[39 : 39 + k]) < 2e-5
        assert largest_gap(c.behavior_logprobs[k:], token_logprobs(models[1], ids)[39 + k :]) < 2e-5


def test_after_a_sleep_it_samples_as_if_it_had_not_slept(awake, models):
    asked = call(make_prompts(9, 33, 17), num_completions=2, sampling=LONG, seeds=[3, 4, 5])
    expected = awake.generate(asked)
    for version in (1, 2):
        awake.hold(release=True)
        drop_memory(awake)
        publish(awake, Stream(models[0]), version=version, tolerance=1e-4)
        again = awake.generate(asked)
        assert [[c.token_ids for c in g.completions] for g in again] == [
            [c.token_ids for c in g.completions] for g in expected
        ]
        spans = [c.version_spans for g in again for c in g.completions]
        assert spans == [[VersionSpan(version, 60)]] * 6
    assert largest_gap(awake.prompt_logprobs(CANARY), token_logprobs(models[0], CANARY)) < 2e-5


def test_asleep_it_takes_weights_alone(awake, models):
    (prompt,) = make_prompts(9)
    asked = call([prompt], num_completions=1, sampling=LONG, seeds=[1])
    awake.hold(release=True)
    refused = {
        "sample": lambda: awake.generate(asked),
        "sample ": lambda: awake.submit(asked),
        "hand out completions": lambda: awake.collect(timeout_s=0.0),
        "give up completions": lambda: awake.abort([prompt]),
        "score tokens": lambda: awake.prompt_logprobs(CANARY),
        "read its weights": awake.fingerprints,
        "adopt weights": lambda: awake.adopt(1),
        "be held": awake.hold,
    }
    for what, ask in refused.items():
        with pytest.raises(
            EngineError, match=f"sleeps and cannot {what.strip()}: .*takes update_weights alone"
        ):
            ask()
    assert awake.version == 0
    broken = [*[*Stream(models[1])][:5], ("wrong", torch.zeros(1))]
    with pytest.raises(ValueError, match="no weight wrong"):
        awake.update_weights(broken, version=1)
    with pytest.raises(EngineError, match="sleeps and cannot sample"):
        awake.generate(asked)
    publish(awake, Stream(models[1]), version=2, tolerance=1e-4)
    assert awake.generate(asked)[0].completions[0].version_spans == [VersionSpan(2, 60)]


@pytest.mark.parametrize("staleness", [0, 1])
def test_a_source_lets_it_sleep_from_its_training_to_the_next_weights(awake, models, staleness):
    """The same groups, tokens and spans as of an engine that is only held."""

    def steps() -> list:
        stream = PromptStream(make_prompts(4, 9, 17, 5, 12), seed=5)
        ends = SamplingParams(40, stop_token_ids=tuple(range(2, 300, 12)))
        admission = Admission(max_staleness=staleness, num_steps=5)
        source = RolloutSource(awake, ThreadScorer(), stream, GroupSampling(ends, 2, 5), admission=admission)
        source.cursor = 0  # as a run that goes on: what comes may be training on recorded groups
        batches = []
        for step in range(5):
            assert awake._is_asleep == awake.sleeps_while_training
            source.publish(Stream(models[step % 2]), version=step)
            assert not awake._is_asleep
            batches.append(list(source.groups(3)))
            assert not awake._is_asleep and not awake._is_held  # until the trainer wants the device
            source.yield_device()
            if awake._is_asleep:
                drop_memory(awake)
        return batches

    slept = steps()
    awake.update_weights(Stream(models[0]), version=0)
    awake.sleeps_while_training = False
    try:
        held = steps()
    finally:
        awake.sleeps_while_training = True
    assert [g.prompt.id for batch in slept for g in batch] == [g.prompt.id for batch in held for g in batch]
    if staleness == 0:
        assert slept == held
    completions = [(step, c) for step, batch in enumerate(slept) for g in batch for c in g.completions]
    assert all(0 <= step - s.policy_version <= staleness for step, c in completions for s in c.version_spans)
    assert all(c.behavior_logprobs and max(c.behavior_logprobs) <= 0 for _, c in completions)
    assert any(len(c.version_spans) == 2 for _, c in completions) == bool(staleness)
