"""The transformers engine samples exactly, from its own seeds, and gives back what it sampled from."""

import random

import numpy as np
import pytest
import torch
from tiny_llama import (
    END,
    largest_gap,
    make_model,
    make_prompts,
    make_tokenizer,
    save,
    token_logprobs,
)
from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from rl.types import Prompt, SamplingParams, VersionSpan
from rollout.engine import EngineError
from rollout.sampler import completion_seed, draw, sampling_logprobs
from rollout.transformers import TransformersEngine
from tests.calling import call

ALL_IDS = tuple(range(300))


@pytest.fixture(scope="module")
def model():
    return make_model(0)


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    return save(model, tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def engine(folder):
    return TransformersEngine(folder, make_tokenizer(), max_num_seqs=5)


def completions(groups):
    return [c for group in groups for c in group.completions]


def test_equal_seeds_give_bitwise_equal_completions_and_other_seeds_others(engine):
    options = {"num_completions": 3, "sampling": SamplingParams(12, stop_token_ids=(END,))}
    first, again, other = (
        engine.generate(call(make_prompts(4, 9, 1), seeds=seeds, **options))
        for seeds in ([1, 2, 3], [1, 2, 3], [4, 5, 6])
    )
    assert first == again
    assert [c.token_ids for c in completions(first)] != [c.token_ids for c in completions(other)]
    assert len({tuple(c.token_ids) for c in first[0].completions}) == 3


def test_neighbouring_seeds_of_one_prompt_share_no_completion(engine):
    prompt = make_prompts(4)[0]
    groups = engine.generate(call([prompt] * 2, num_completions=4, sampling=SamplingParams(8), seeds=[7, 8]))
    assert len({tuple(c.token_ids) for c in completions(groups)}) == 8
    assert len({completion_seed(s, g) for s in range(50) for g in range(50)}) == 2500


def test_a_completion_does_not_depend_on_what_else_is_sampled(engine):
    prompts, sampling = make_prompts(4, 9, 1, 17), SamplingParams(10)
    together = engine.generate(call(prompts, num_completions=3, sampling=sampling, seeds=[1, 2, 3, 4]))
    for k, prompt in enumerate(prompts):
        alone = engine.generate(call([prompt], num_completions=2, sampling=sampling, seeds=[k + 1]))[0]
        for a, b in zip(alone.completions, together[k].completions, strict=False):
            assert a.token_ids == b.token_ids
            assert largest_gap(a.behavior_logprobs, b.behavior_logprobs) < 1e-5


def test_sampling_leaves_every_global_generator_alone(folder):
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    engine = TransformersEngine(folder, make_tokenizer())
    engine.generate(call(make_prompts(3), num_completions=2, sampling=SamplingParams(4), seeds=[1]))
    assert before[0] == random.getstate()
    assert before[1] == np.random.get_state()[1].tolist()
    assert torch.equal(before[2], torch.get_rng_state())


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_pairs_of_tokens_follow_the_exact_distribution(tmp_path, temperature):
    """All 36 pairs of a vocabulary of 6 are enumerated with transformers; 3,000 samples; seeds are fixed.

    Pearson's statistic has 35 degrees of freedom; its 99.9 % quantile is 66.6 (tables of chi-square).
    """
    model = make_model(3, vocab_size=6, layers=1)
    engine = TransformersEngine(save(model, tmp_path), make_tokenizer(6), max_num_seqs=1000)
    prompt = Prompt("p", "", (1, 4, 2))
    with torch.no_grad():
        logits = model(torch.tensor([[1, 4, 2, t] for t in range(6)])).logits / temperature
    expected_66 = logits[0, 2].softmax(-1)[:, None] * logits[:, 3].softmax(-1)
    sampling = SamplingParams(2, temperature=temperature)
    group = engine.generate(call([prompt], num_completions=3000, sampling=sampling, seeds=[1]))[0]
    counts_66 = torch.zeros(6, 6)
    for c in group.completions:
        counts_66[c.token_ids[0], c.token_ids[1]] += 1
    assert ((counts_66 - 3000 * expected_66) ** 2 / (3000 * expected_66)).sum() < 66.6
    # The test has power: against the distribution at another temperature the statistic is far outside.
    wrong_66 = (logits[0, 2] * 0.8).softmax(-1)[:, None] * (logits[:, 3] * 0.8).softmax(-1)
    assert ((counts_66 - 3000 * wrong_66) ** 2 / (3000 * wrong_66)).sum() > 66.6


def test_a_cut_token_is_never_drawn_and_the_whole_range_of_the_uniform_is_covered():
    logprobs = torch.tensor([-torch.inf, 0.25, 0.75, -torch.inf]).log().nan_to_num(nan=-torch.inf)[None]
    uniform = torch.tensor([0.0, 0.2499, 0.2501, 1 - 2**-53], dtype=torch.float64)
    assert [draw(logprobs, u[None]).item() for u in uniform] == [1, 1, 2, 2]


@pytest.mark.parametrize(
    ("cut", "warper"),
    [
        ({"top_k": 7}, TopKLogitsWarper(7)),
        ({"top_p": 0.6}, TopPLogitsWarper(0.6)),
        ({"min_p": 0.2}, MinPLogitsWarper(0.2)),
    ],
)
def test_cuts_are_those_of_transformers(cut, warper):
    logits = torch.randn(40, 50, generator=torch.Generator().manual_seed(0)) * 2
    expected = warper(None, logits / 0.8).log_softmax(-1)
    actual = sampling_logprobs(logits, SamplingParams(1, temperature=0.8, **cut))
    assert 40 <= actual.isfinite().sum() < 40 * 50
    assert torch.equal(actual.isfinite(), expected.isfinite())
    torch.testing.assert_close(actual, expected)


def test_behavior_logprobs_are_those_of_the_tempered_distribution_of_ragged_prompts(engine, model):
    prompts = make_prompts(4, 9, 1, 17)
    sampling = SamplingParams(12, temperature=0.7)
    for group in engine.generate(call(prompts, num_completions=3, sampling=sampling, seeds=[1, 2, 3, 4])):
        prompt = list(group.prompt.token_ids)
        for c in group.completions:
            expected = token_logprobs(model, prompt + c.token_ids, 0.7)[len(prompt) - 1 :]
            assert largest_gap(c.behavior_logprobs, expected) < 2e-5


def test_temperature_zero_is_greedy_decoding_with_logprobs_at_temperature_one(engine, model):
    prompt = make_prompts(9)[0]
    sampling = SamplingParams(10, temperature=0.0, top_k=1)
    c = engine.generate(call([prompt], num_completions=1, sampling=sampling, seeds=[1]))[0].completions[0]
    ids = torch.tensor([prompt.token_ids])
    expected = model.generate(
        ids, do_sample=False, max_new_tokens=10, pad_token_id=0, attention_mask=ids.ne(-1)
    )
    assert c.token_ids == expected[0, 9:].tolist()
    logprobs = token_logprobs(model, [*prompt.token_ids, *c.token_ids])[8:]
    assert largest_gap(c.behavior_logprobs, logprobs) < 2e-5


def test_a_completion_ends_at_a_stop_id_or_at_the_length(engine):
    prompts = make_prompts(4, 6)
    free = engine.generate(call(prompts, num_completions=4, sampling=SamplingParams(10), seeds=[1, 2]))
    assert {(c.finish_reason, len(c.token_ids)) for c in completions(free)} == {("length", 10)}
    stop = free[0].completions[1].token_ids[3]
    sampling = SamplingParams(10, stop_token_ids=(END, stop))
    ended = engine.generate(call(prompts, num_completions=4, sampling=sampling, seeds=[1, 2]))
    for a, b in zip(completions(free), completions(ended), strict=True):
        length = next((t + 1 for t, token in enumerate(a.token_ids) if token in (END, stop)), 10)
        assert b.token_ids == a.token_ids[:length]
        assert b.finish_reason == ("stop" if a.token_ids[length - 1] in (END, stop) else "length")
        assert b.loss_mask == [True] * length and len(b.behavior_logprobs) == length
        assert b.version_spans == [VersionSpan(0, length)]
    assert ended[0].completions[1].finish_reason == "stop"


def test_an_immediate_end_is_a_completion_of_one_token(engine):
    sampling = SamplingParams(10, stop_token_ids=ALL_IDS)
    group = engine.generate(call(make_prompts(4), num_completions=3, sampling=sampling, seeds=[1]))[0]
    assert [(len(c.token_ids), c.finish_reason) for c in group.completions] == [(1, "stop")] * 3


def test_text_is_decoded_without_special_tokens(engine):
    sampling = SamplingParams(3, stop_token_ids=(END,))
    groups = engine.generate(
        call(make_prompts(*[5] * 8), num_completions=8, sampling=sampling, seeds=list(range(8)))
    )
    for c in completions(groups):
        assert c.text.split() == [f"w{t}" for t in c.token_ids if t != END]


def test_logprobs_can_be_left_out(engine):
    options = {"num_completions": 2, "sampling": SamplingParams(6), "seeds": [3]}
    without = engine.generate(call(make_prompts(5), with_logprobs=False, **options))[0]
    with_them = engine.generate(call(make_prompts(5), **options))[0]
    assert [c.token_ids for c in without.completions] == [c.token_ids for c in with_them.completions]
    assert [c.behavior_logprobs for c in without.completions] == [[], []]


def test_prompts_that_cannot_be_sampled_abort_alone(engine):
    good, long = make_prompts(4, 125)
    prompts = [Prompt("bad-id", "", (1, 300)), good, Prompt("empty", "", ()), long]
    groups = engine.generate(call(prompts, num_completions=2, sampling=SamplingParams(4), seeds=[1, 2, 3, 4]))
    assert [{c.finish_reason for c in g.completions} for g in groups] == [
        {"abort"},
        {"length"},
        {"abort"},
        {"abort"},
    ]
    assert groups[0].completions[0].token_ids == []
    with pytest.raises(EngineError, match=r"all completions of 1 prompts failed.*125 tokens.*128 positions"):
        engine.generate(call([long], num_completions=2, sampling=SamplingParams(4), seeds=[1]))


def test_a_row_with_logits_that_are_not_finite_aborts_alone(tmp_path):
    model = make_model(0, tie=False)
    with torch.no_grad():
        model.model.embed_tokens.weight[250] = torch.nan
    engine = TransformersEngine(save(model, tmp_path), make_tokenizer())
    poisoned, healthy = Prompt("poisoned", "", (5, 250, 6)), Prompt("healthy", "", (5, 6, 7, 8))
    options = {"num_completions": 2, "sampling": SamplingParams(1)}
    groups = engine.generate(call([poisoned, healthy], seeds=[1, 2], **options))
    assert [[c.finish_reason for c in g.completions] for g in groups] == [["abort"] * 2, ["length"] * 2]
    with pytest.raises(EngineError, match="logits are not finite"):
        engine.generate(call([poisoned], seeds=[1], **options))


def test_a_call_that_runs_out_of_time_says_so_and_keeps_what_is_finished(folder):
    late = TransformersEngine(folder, make_tokenizer(), timeout_s=0.0)
    with pytest.raises(EngineError, match=r"no completion of 2 prompts was finished within timeout_s=0;"):
        late.generate(call(make_prompts(3, 4), num_completions=2, sampling=SamplingParams(50), seeds=[1, 2]))
    # One step is always done, so that completions of one token are finished even then.
    groups = late.generate(call(make_prompts(3), num_completions=2, sampling=SamplingParams(1), seeds=[1]))
    assert [c.finish_reason for c in completions(groups)] == ["length"] * 2


def test_updated_weights_are_the_ones_that_sample(folder):
    engine, new = TransformersEngine(folder, make_tokenizer()), make_model(1)
    ids = list(range(20, 40))
    engine.update_weights(dict(new.named_parameters()).items(), version=4)
    assert engine.version == 4
    assert largest_gap(engine.prompt_logprobs(ids), token_logprobs(new, ids)) < 1e-5
    options = {"num_completions": 2, "sampling": SamplingParams(3), "seeds": [1]}
    assert engine.generate(call(make_prompts(4), **options))[0].completions[0].version_spans == [
        VersionSpan(4, 3)
    ]


def test_after_an_update_that_broke_off_nothing_is_sampled(folder):
    engine = TransformersEngine(folder, make_tokenizer())
    with pytest.raises(ValueError, match=r"no weight model\.norm\.bias of shape \(64,\)"):
        engine.update_weights([("model.norm.bias", torch.zeros(64))], version=1)
    with pytest.raises(ValueError, match=r"no weight model\.norm\.weight of shape \(1,\)"):
        engine.update_weights([("model.norm.weight", torch.zeros(1))], version=1)
    with pytest.raises(EngineError, match="weights of engine transformers are unknown"):
        engine.generate(call(make_prompts(4), num_completions=1, sampling=SamplingParams(2), seeds=[1]))


def test_one_seed_per_prompt_is_asked_for(engine):
    with pytest.raises(ValueError, match="1 seeds for 2 prompts; give one per prompt"):
        engine.generate(call(make_prompts(4, 5), num_completions=1, sampling=SamplingParams(2), seeds=[1]))
