"""A canary that waits: the engine may sample meanwhile, and nothing is trained before it is compared."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from sync_faults import FAULTS, swapped
from tick_engine import ThreadScorer
from tiny_llama import Stream, make_model, make_prompts, make_tokenizer, save

from rl.run import Run
from rl.types import SamplingParams
from rollout.in_flight import GroupSampling
from rollout.prompts import PromptStream
from rollout.source import RolloutSource
from rollout.transformers import TransformersEngine
from rollout.weight_sync import WeightSyncError, publish

POLICY = make_model(1)


class Noted(Stream):
    def __init__(self, *of, events) -> None:
        super().__init__(*of)
        self.events = events

    def canary(self):
        self.events.append("the policy's canary")
        return super().canary()


@pytest.fixture
def events() -> list[str]:
    return []


@pytest.fixture
def source(tmp_path, monkeypatch, events):
    """It has sampled a batch with version 1, by an engine that says it has its own process."""
    engine = TransformersEngine(save(make_model(0), tmp_path), make_tokenizer())

    def note(method, what):
        plain = getattr(engine, method)
        monkeypatch.setattr(engine, method, lambda *of: (events.append(what), plain(*of))[1])

    note("submit", "prompts")
    note("prompt_logprobs", "the engine's canary")
    monkeypatch.setattr(engine, "runs_alone", True)
    sampling = GroupSampling(SamplingParams(max_completion_length=6), 2, 3)
    made = RolloutSource(engine, ThreadScorer(), PromptStream(make_prompts(4, 9, 6), seed=3), sampling)
    made.publish(Noted(make_model(2), events=events), version=1)
    # A run may replay recorded batches from here on, so that the first canary does not wait.
    assert events == ["the policy's canary", "the engine's canary"]
    list(made.groups(2))
    events.clear()
    return made


def test_the_engine_samples_before_its_canary_is_compared(source, events):
    first = source.publish(Noted(POLICY, events=events), version=2)
    assert events == [] and "sync/seconds_fingerprints" in first
    groups = source.groups(2)
    next(groups)
    assert events == ["prompts", "the policy's canary", "the engine's canary"]
    list(groups)
    second = source.publish(Noted(POLICY, events=events), version=3)
    # Each row has the canary of the version that its batch was sampled with.
    gaps = [row["sync/canary_gap_mean"] for row in (first, second)]
    assert 0 <= max(gaps) < 1e-5 and gaps[0] != gaps[1]
    parts = [second[f"sync/seconds_{part}"] for part in ("inspect", "send", "fingerprints")]
    assert sum(parts) == pytest.approx(second["sync/seconds"]) and second["sync/seconds_canary"] > 0


BEFORE_TRAINING: dict[str, Any] = {
    "a batch": lambda source: next(source.groups(2)),
    "a recorded batch": lambda source: setattr(source, "cursor", 2),
    "an evaluation, or the end": lambda source: Run.evaluate(SimpleNamespace(source=source, measure=None), 1),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("what", BEFORE_TRAINING)
def test_weights_that_only_the_canary_tells_apart_end_the_run_before(source, what):
    wrong = Noted(POLICY, {1: swapped, 2: swapped}, events=[])
    source.publish(wrong, version=2)
    with pytest.raises(WeightSyncError, match=r"holds version 2 but computes differently: the canary's"):
        BEFORE_TRAINING[what](source)


def test_weights_are_not_replaced_before_their_canary_is_compared(source):
    for version in (2, 3):
        source.publish(Noted(POLICY, events=[]), version=version)
        if version == 2:
            source.settle()
            source.settle()  # asking again changes nothing
    with pytest.raises(AssertionError, match="replaced before their canary was compared"):
        source.publish(Noted(POLICY, events=[]), version=4)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.__name__)
def test_fingerprints_do_not_wait(source, fault):
    with pytest.raises(WeightSyncError, match="does not hold version 2") as caught:
        publish(source.engine, Stream(POLICY, {2: fault}), version=2, tolerance=100.0, canary_waits=True)
    assert str(caught.value).endswith(": " + ", ".join(FAULTS[fault]))
