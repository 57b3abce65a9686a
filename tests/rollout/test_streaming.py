"""Completions in flight: submitted, collected as they finish, and under new weights while they run."""

import pytest
import torch
from tiny_llama import (
    END,
    Stream,
    collect_all,
    largest_gap,
    make_model,
    make_prompts,
    make_tokenizer,
    save,
    token_logprobs,
)

from rl.types import Prompt, SamplingParams, VersionSpan
from rollout.calls import version_spans
from rollout.engine import EngineError
from rollout.transformers import TransformersEngine
from rollout.weight_sync import publish
from tests.calling import call
from tests.vllm_engines import needs_vllm, start_vllm

LONG = 40


@pytest.fixture(scope="module")
def models():
    return make_model(0), make_model(1)


@pytest.fixture(scope="module")
def folder(models, tmp_path_factory):
    return save(models[0], tmp_path_factory.mktemp("model"))


AT_A_TIME = pytest.param("one step at a time", marks=pytest.mark.rotation("one step at a time"))


@pytest.fixture(scope="module", params=[AT_A_TIME, "one step in flight"])
def vllm(folder, request):
    """On a GPU vLLM schedules a step while another runs. It can on a CPU too, and has no use for it there."""
    from vllm.platforms import current_platform

    in_flight = request.param == "one step in flight"
    stock = current_platform.check_and_update_config

    def asynchronous(config):
        stock(config)
        config.scheduler_config.async_scheduling = in_flight

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(current_platform), "check_and_update_config", staticmethod(asynchronous))
        engine = start_vllm(
            folder,
            make_tokenizer(),
            dtype=torch.float32,
            max_model_len=128,
            process="inside",
            max_num_seqs=6,
            kv_cache_gib=0.03,
        )
    assert engine._core.engine.vllm_config.scheduler_config.async_scheduling == in_flight
    yield engine
    engine.close()


@pytest.fixture
def engine(vllm, models, monkeypatch):
    """The engine with the weights of the first model; KV is kept unless a test says otherwise."""
    assert vllm.in_flight == 0
    vllm.update_weights(Stream(models[0]), version=0)
    return vllm


def submit(engine, prompts, seeds, length=LONG, num_completions=2, **kwargs):
    engine.submit(
        call(prompts, num_completions=num_completions, sampling=SamplingParams(length), seeds=seeds, **kwargs)
    )


def steps(engine, number):
    """An engine in this process takes one step each time that nothing is waited for."""
    for _ in range(number):
        assert engine.collect(timeout_s=0.0) == []


@torch.no_grad()
def mixed_logprobs(old, new, prompt, token_ids, num_old):
    """Log-probs of the tokens from `num_old` on, by `new`, with the keys and values that `old` left behind.

    When the weights change, all tokens but the newest one have keys and values.
    """
    ids = [*prompt, *token_ids]
    split = len(prompt) + num_old - 1
    cache = old(torch.tensor([ids[:split]]), use_cache=True).past_key_values
    logits = new(torch.tensor([ids[split:-1]]), past_key_values=cache).logits[0]
    chosen = torch.tensor(token_ids[num_old:])[:, None]
    return logits.log_softmax(-1).gather(-1, chosen)[:, 0].tolist()


def test_transformers_samples_at_collect_what_generate_samples(folder):
    engine = TransformersEngine(folder, make_tokenizer(), max_num_seqs=5)
    prompts, sampling = make_prompts(4, 9, 1), SamplingParams(12, stop_token_ids=(END,))
    options = {"num_completions": 3, "sampling": sampling}
    expected = engine.generate(call(prompts, seeds=[1, 2, 3], **options))
    engine.submit(call(prompts, seeds=[1, 2, 3], **options))
    assert engine.in_flight == 9
    assert engine.generate(call(prompts, seeds=[1, 2, 3], **options)) == expected
    groups = engine.collect(timeout_s=0.0)
    assert groups == expected and all(g.prompt is p for g, p in zip(groups, prompts, strict=True))
    assert (engine.in_flight, engine.collect(timeout_s=0.0)) == (0, [])


def test_transformers_samples_with_the_weights_of_the_moment_of_collect(folder, models):
    engine = TransformersEngine(folder, make_tokenizer())
    submit(engine, make_prompts(4), [1], length=3)
    engine.update_weights(Stream(models[1]), version=5)
    assert [c.version_spans for c in engine.collect(timeout_s=9.0)[0].completions] == [
        [VersionSpan(5, 3)]
    ] * 2
    submit(engine, make_prompts(4), [1], length=3)
    with pytest.raises(ValueError, match="no weight wrong"):
        engine.update_weights([("wrong", torch.zeros(1))], version=6)
    with pytest.raises(EngineError, match="weights of engine transformers are unknown"):
        engine.collect(timeout_s=9.0)


def test_spans_are_cut_where_the_weights_changed_and_equal_neighbours_are_one():
    assert version_spans([3], [9]) == [VersionSpan(3, 9)]
    assert version_spans([3, 4, 6], [2, 8, 9]) == [VersionSpan(3, 2), VersionSpan(4, 6), VersionSpan(6, 1)]
    assert version_spans([3, 4, 4, 5], [0, 2, 9, 9]) == [VersionSpan(4, 9)]
    assert version_spans([3, 4], [0, 0]) == []


@needs_vllm
def test_what_is_collected_is_what_generate_samples(engine):
    prompts = make_prompts(4, 9, 17)
    expected = engine.generate(call(prompts, num_completions=2, sampling=SamplingParams(8), seeds=[1, 2, 3]))
    submit(engine, prompts, [1, 2, 3], length=8)
    assert engine.in_flight == 6
    groups = collect_all(engine)
    by_id = {g.prompt.id: g for g in groups}
    for group, prompt in zip(expected, prompts, strict=True):
        found = by_id[prompt.id]
        assert found.prompt is prompt
        for a, b in zip(found.completions, group.completions, strict=True):
            assert (a.token_ids, a.text, a.finish_reason) == (b.token_ids, b.text, b.finish_reason)
            assert largest_gap(a.behavior_logprobs, b.behavior_logprobs) < 1e-5


@needs_vllm
def test_groups_come_when_they_finish_and_others_stay_in_flight(engine):
    long, short = make_prompts(5, 6)
    submit(engine, [long], [1])
    submit(engine, [short], [2], length=3)
    assert [g.prompt.id for g in engine.collect(timeout_s=60.0)] == [short.id]
    assert engine.in_flight == 2
    between = engine.generate(call([short], num_completions=1, sampling=SamplingParams(3), seeds=[2]))
    assert between[0].completions[0].finish_reason == "length"
    assert [g.prompt.id for g in collect_all(engine)] == [long.id]


@needs_vllm
def test_prompts_that_cannot_be_sampled_are_collected_as_aborts(engine):
    submit(engine, [Prompt("empty", "", ())], [1], length=4)
    group = engine.collect(timeout_s=0.0)[0]
    assert [(c.finish_reason, c.token_ids) for c in group.completions] == [("abort", [])] * 2
    assert engine.in_flight == 0


@needs_vllm
@pytest.mark.parametrize("recompute_kv", [False, True])
def test_an_update_under_running_completions_switches_where_the_spans_say(
    engine, models, monkeypatch, recompute_kv
):
    """Tokens 0-9 have the log-probs of the old model, the others those of the new one: over the old keys and
    values if these are kept, else over new ones.
    """
    old, new = models
    monkeypatch.setattr(engine._core, "recompute_kv", recompute_kv)
    prompt = make_prompts(40)[0]
    submit(engine, [prompt], [1], num_completions=3)
    steps(engine, 10)
    publish(engine, Stream(new), version=1, tolerance=1e-4)
    for c in collect_all(engine)[0].completions:
        assert c.version_spans == [VersionSpan(0, 10), VersionSpan(1, LONG - 10)]
        before = token_logprobs(old, [*prompt.token_ids, *c.token_ids])[39:49]
        fresh = token_logprobs(new, [*prompt.token_ids, *c.token_ids])[49:]
        mixed = mixed_logprobs(old, new, prompt.token_ids, c.token_ids, 10)
        assert largest_gap(c.behavior_logprobs[:10], before) < 2e-5
        assert largest_gap(c.behavior_logprobs[10:], fresh if recompute_kv else mixed) < 2e-5
        assert largest_gap(fresh, mixed) > 0.1


@needs_vllm
def test_prompts_that_wait_or_come_after_an_update_see_no_old_keys_and_values(engine, models):
    """64 of 70 prompt tokens fill two cached blocks; 6 completions run, 2 wait, 2 come afterwards."""
    new = models[1]
    prompt = make_prompts(70)[0]
    submit(engine, [prompt], [1], num_completions=8)
    steps(engine, 5)
    engine.update_weights(Stream(new), version=1)
    submit(engine, [prompt], [2], num_completions=2)
    groups = sorted(collect_all(engine), key=lambda g: -len(g.completions))
    running, waiting = groups[0].completions[:6], groups[0].completions[6:]
    assert all(c.version_spans == [VersionSpan(0, 5), VersionSpan(1, LONG - 5)] for c in running)
    for c in waiting + groups[1].completions:
        assert c.version_spans == [VersionSpan(1, LONG)]
        expected = token_logprobs(new, [*prompt.token_ids, *c.token_ids])[69:]
        assert largest_gap(c.behavior_logprobs, expected) < 2e-5


@needs_vllm
def test_two_updates_leave_three_spans_and_an_update_that_breaks_off_keeps_what_runs(engine, models):
    submit(engine, make_prompts(8), [1])
    steps(engine, 4)
    engine.update_weights(Stream(models[1]), version=1)
    steps(engine, 3)
    with pytest.raises(ValueError, match="no weight wrong"):
        engine.update_weights([*[*Stream(models[0])][:5], ("wrong", torch.zeros(1))], version=2)
    with pytest.raises(EngineError, match="weights of engine vllm are unknown"):
        engine.collect(timeout_s=1.0)
    engine.update_weights(Stream(models[0]), version=3)
    for c in collect_all(engine)[0].completions:
        assert c.version_spans == [VersionSpan(0, 4), VersionSpan(1, 3), VersionSpan(3, LONG - 7)]
    publish(engine, Stream(models[0]), version=4, tolerance=1e-4)
