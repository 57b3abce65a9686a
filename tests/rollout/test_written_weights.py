"""Updates that write into vLLM parameters, as on a GPU; CPU kernels are made to use them as they are."""

import pytest
import torch
from sync_faults import FAULTS
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

from rl.types import SamplingParams
from rollout.engine import EngineError
from rollout.vllm.bucket import Bucket
from rollout.weight_sync import WeightSyncError, publish
from tests.calling import call
from tests.vllm_engines import needs_vllm, start_vllm

pytestmark = needs_vllm


def policy(seed):
    return make_model(seed, tie=False)


@pytest.fixture(scope="module")
def patch():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module")
def started(patch, tmp_path_factory):
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod
    from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

    def leave(self, layer):
        layer.cpu_linear = torch.nn.functional.linear

    for kind in (UnquantizedLinearMethod, UnquantizedEmbeddingMethod):
        patch.setattr(kind, "process_weights_after_loading", leave)
    folder = save(policy(0), tmp_path_factory.mktemp("model"))
    options = {"max_model_len": 128, "max_num_seqs": 32, "kv_cache_gib": 0.03}
    engine = start_vllm(folder, make_tokenizer(), dtype=torch.float32, process="inside", **options)
    assert not any(held.sampled for held in engine.tensors.values())
    assert engine.name == "vllm" and "lm_head.weight" in engine.tensors
    publish(engine, Stream(policy(0)), version=0, tolerance=1e-4)  # by vLLM's reload: there is no GPU
    yield engine
    engine.close()


@pytest.fixture
def worker(started):
    return started._core._client.engine_core.model_executor.driver_worker.worker


@pytest.fixture(params=["without a bucket", "through a bucket"])
def engine(request, started, worker, monkeypatch):
    """It writes, and holds version 0. Through a bucket, as from another process, it gets a tensor or two."""
    monkeypatch.setattr("rollout.vllm.weights._AS_THEY_ARE", ("cuda", "cpu"))
    if request.param == "through a bucket":
        monkeypatch.setattr("rollout.vllm.bucket.BUCKET_BYTES", 1)
        monkeypatch.setattr(started._core, "_bucket", Bucket(started.tensors, torch.device("cpu")))
    loads = []
    model = worker.get_model()
    started.update_weights(Stream(policy(3)), version=3)  # the first of them by vLLM's reload
    monkeypatch.setattr(model, "load_weights", lambda *of: loads.append(of), raising=False)
    started.update_weights(Stream(policy(0)), version=0)
    yield started
    assert not loads


def test_the_engine_computes_as_the_policy_does(engine):
    for version in (1, 2, 3):
        publish(engine, Stream(policy(version)), version=version, tolerance=1e-4)
        assert not any(held.sampled for held in engine.tensors.values())  # all bytes are compared
        assert largest_gap(engine.prompt_logprobs(CANARY), token_logprobs(policy(version), CANARY)) < 2e-5
        prompt = make_prompts(11)[0]
        group = engine.generate(
            call([prompt], num_completions=2, sampling=SamplingParams(12), seeds=[version])
        )[0]
        for c in group.completions:
            expected = token_logprobs(policy(version), [*prompt.token_ids, *c.token_ids])[10:]
            assert largest_gap(c.behavior_logprobs, expected) < 2e-5


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.__name__)
def test_a_fault_on_the_way_is_caught_by_name_and_the_next_update_heals(engine, fault):
    with pytest.raises(WeightSyncError, match="does not hold version 1") as caught:
        publish(engine, Stream(policy(1), {2: fault}), version=1, tolerance=1e9)
    assert set(FAULTS[fault]) <= set(str(caught.value).rpartition(": ")[2].split(", "))
    publish(engine, Stream(policy(1)), version=2, tolerance=1e-4)


def test_an_update_that_breaks_off_leaves_nothing_that_samples(engine):
    with pytest.raises(ValueError, match=r"vLLM's model has no weight model\.norm\.bias"):
        weights = [*Stream(policy(1)), ("model.norm.bias", torch.zeros(64))]
        engine.update_weights(weights, version=1)
    with pytest.raises(EngineError, match="weights of engine vllm are unknown"):
        engine.generate(call(make_prompts(4), num_completions=1, sampling=SamplingParams(2), seeds=[1]))
    publish(engine, Stream(policy(2)), version=2, tolerance=1e-4)


def test_completions_go_on_under_new_weights(engine):
    prompt = make_prompts(20)[0]
    engine.submit(call([prompt], num_completions=3, sampling=SamplingParams(60), seeds=[1]))
    for _ in range(9):
        engine._advance(0.0, "a step")
    publish(engine, Stream(policy(4)), version=4, tolerance=1e-4)
    groups = engine.collect(timeout_s=60.0)
    for c in groups[0].completions:
        assert [span.policy_version for span in c.version_spans] == [0, 4] and len(c.token_ids) == 60


def test_where_vllm_makes_more_of_its_weights_its_reload_is_used(started, worker, monkeypatch):
    """Quantised layers, experts and packed columns are such cases."""
    monkeypatch.setattr(worker, "cohort_writes", False)
    publish(started, Stream(policy(5)), version=5, tolerance=1e-4)
    assert not worker.cohort_writes  # there is no GPU
    monkeypatch.setattr("rollout.vllm.weights._AS_THEY_ARE", ("cuda", "cpu"))
    with monkeypatch.context() as patch:
        patch.setattr("rollout.vllm.weights._UNQUANTIZED", ("NoneType",))
        publish(started, Stream(policy(6)), version=6, tolerance=1e-4)
        assert not worker.cohort_writes
    publish(started, Stream(policy(7)), version=7, tolerance=1e-4)
    assert worker.cohort_writes


def test_a_tensor_that_is_looked_for_in_the_wrong_place_is_never_written_there(started, worker, monkeypatch):
    """Written and read back in the same wrong place, its fingerprint would agree."""
    gate, up = (f"model.layers.0.mlp.{kind}_proj.weight" for kind in ("gate", "up"))
    slots = worker.cohort_slots
    monkeypatch.setattr(worker, "cohort_slots", slots | {gate: slots[up], up: slots[gate]})
    monkeypatch.setattr(worker, "cohort_writes", False)
    monkeypatch.setattr("rollout.vllm.weights._AS_THEY_ARE", ("cuda", "cpu"))
    for version in (1, 2, 3):
        with pytest.raises(WeightSyncError, match=r"mlp\.gate_proj\.weight, .*mlp\.up_proj\.weight$"):
            publish(started, Stream(policy(version)), version=version, tolerance=1e9)


def test_what_is_not_proven_on_the_way_is_still_written(started, worker, monkeypatch):
    """engine.verify_sync=false leaves out the proof of arrival; where the tensors are is another matter."""
    monkeypatch.setattr(worker, "cohort_writes", False)
    monkeypatch.setattr("rollout.vllm.weights._AS_THEY_ARE", ("cuda", "cpu"))
    for version in (1, 2):
        publish(started, Stream(policy(version)), version=version, tolerance=None, verify=False)
        assert worker.cohort_writes
    assert largest_gap(started.prompt_logprobs(CANARY), token_logprobs(policy(2), CANARY)) < 2e-5
