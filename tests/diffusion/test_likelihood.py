"""Log-likelihoods, choices and bounds of given text, and the requests of lm-eval."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from rl.diffusion.harness import DiffusionHarness, harness_model
from rl.diffusion.likelihood import Bound, BoundLog, bound, choose, log_likelihoods
from rl.diffusion.model import DiffusionScorer, to_diffusion
from rl.diffusion.objectives import Example, step_generator
from tests.diffusion.conftest import MASK, SMALL, VOCABULARY, randomised
from tests.diffusion.exact_bound import by_size, logprob_table


@pytest.fixture(scope="module")
def scorer() -> DiffusionScorer:
    model = randomised(LlamaForCausalLM(LlamaConfig(**SMALL)), std=0.4)
    return DiffusionScorer(to_diffusion(model, mask_token_id=MASK)).train()  # type: ignore[arg-type]


def example(prompt: int, answer: int, seed: int) -> Example:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, VOCABULARY, (prompt + answer,), generator=generator)
    return Example(ids, torch.arange(prompt + answer) >= prompt)


CASES = [example(3, m, seed) for seed, m in enumerate((1, 4, 6, 2, 5, 1, 7))]


@pytest.fixture(scope="module")
def exact(scorer) -> list[float]:
    return [by_size(logprob_table(scorer, case, MASK)) for case in CASES]


@pytest.mark.parametrize("scheme", ["subset", "coupled"])
def test_log_likelihoods_approach_the_exact_bound(scorer, exact, scheme):
    """Two budgets of rows give the same numbers; one token is exact with one draw."""
    settings = {"mask_token_id": MASK, "num_draws": 2000, "scheme": scheme}
    found = log_likelihoods(scorer, CASES, token_budget=4000, **settings)
    torch.testing.assert_close(
        log_likelihoods(scorer, CASES, token_budget=900, **settings), found, rtol=1e-5, atol=1e-4
    )
    np.testing.assert_allclose(found, exact, rtol=0.02)
    single = [i for i, case in enumerate(CASES) if case.num_maskable == 1]
    one = log_likelihoods(scorer, CASES, mask_token_id=MASK, num_draws=1)
    np.testing.assert_allclose([one[i] for i in single], [exact[i] for i in single], rtol=1e-5)
    assert scorer.training


def test_the_published_rounding_can_be_asked_for(scorer, exact):
    """Batches of 8 over 4 tokens draw even sizes three times as often: another number, whatever the draws."""
    settings = {"mask_token_id": MASK, "num_draws": 4000}
    ours, theirs = (
        log_likelihoods(scorer, [CASES[1]], **settings, reference_batch=batch).item() for batch in (None, 8)
    )
    table = logprob_table(scorer, CASES[1], MASK)
    sums = [
        np.mean([table[bits].sum() for bits in range(16) if bits.bit_count() == size]) * 4 / size
        for size in (1, 2, 3, 4)
    ]
    assert ours == pytest.approx(exact[1], rel=0.01)
    assert theirs == pytest.approx(np.dot(sums, [0.125, 0.375, 0.125, 0.375]), rel=0.01)
    assert abs(theirs - exact[1]) > 3 * abs(ours - exact[1])


def test_a_bound_is_the_mean_over_tokens_with_its_error(scorer, exact):
    counts = [case.num_maskable for case in CASES]
    found = bound(scorer, CASES, step_generator(0), mask_token_id=MASK, num_draws=1000)
    assert found.nats_per_token == pytest.approx(-sum(exact) / sum(counts), rel=0.01)
    assert (found.num_tokens, found.num_examples) == (sum(counts), 7)
    assert found.perplexity == pytest.approx(math.exp(found.nats_per_token))
    residuals = [-e - found.nats_per_token * n for e, n in zip(exact, counts, strict=True)]
    assert found.error == pytest.approx((np.square(residuals).sum() * 7 / 6) ** 0.5 / sum(counts), rel=0.05)
    again = bound(scorer, CASES, step_generator(0), mask_token_id=MASK, num_draws=1000, token_budget=700)
    assert again.nats_per_token == pytest.approx(found.nats_per_token, rel=1e-5)


def test_choices_are_compared_whole_or_per_unit_of_length():
    assert choose([-5.0, -4.0, -9.0]) == 1
    assert choose([-5.0, -4.0, -9.0], [10, 2, 30]) == 2


def test_bounds_are_kept_a_step_at_most_once(tmp_path):
    log = BoundLog(tmp_path)
    for step, value in ((0, 3.0), (5, 2.5), (5, 2.25), (10, 2.0)):
        log.write(step, Bound(value, 0.1, 100, 10))
    assert [(s, b.nats_per_token) for s, b in log.read()] == [(0, 3.0), (5, 2.25), (10, 2.0)]
    log.truncate_after(5)
    assert log.at(10) is None and log.at(5) == Bound(2.25, 0.1, 100, 10)


@pytest.fixture(scope="module")
def harness(scorer, tiny_model_dir) -> DiffusionHarness:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    return DiffusionHarness(scorer, tokenizer, mask_token_id=MASK, max_length=8, num_draws=3000)


def request(*args):
    return SimpleNamespace(args=args)


def test_lm_eval_gets_the_bound_of_a_continuation_given_its_context(harness, scorer):
    requests = [request("w1 w2 ", "w3 w4"), request("", "w5"), request("w6 " * 20, "w7 w8")]
    found = harness.loglikelihood(requests)
    ids = lambda text: torch.tensor(harness.tokenizer(text)["input_ids"])  # noqa: E731
    cases = [
        Example(ids("w1 w2 w3 w4"), torch.tensor([False, False, True, True])),
        Example(ids("w5"), torch.tensor([True])),
        Example(ids("w6 " * 6 + "w7 w8"), torch.tensor([False] * 6 + [True] * 2)),
    ]
    expected = [by_size(logprob_table(scorer, case, MASK)) for case in cases]
    np.testing.assert_allclose([value for value, _ in found], expected, rtol=0.02)
    assert not any(greedy for _, greedy in found)
    assert harness.loglikelihood([]) == []


def test_lm_eval_texts_are_scored_in_pieces(harness, scorer):
    (found,) = harness.loglikelihood_rolling([request("w1 w2 w3 w4 w5 w6 w7 w8 w9 w10")])
    parts = [harness.tokenizer(text)["input_ids"] for text in ("w1 w2 w3 w4 w5 w6 w7 w8", "w9 w10")]
    exact = [
        by_size(
            logprob_table(scorer, Example(torch.tensor(ids), torch.ones(len(ids), dtype=torch.bool)), MASK)
        )
        for ids in parts
    ]
    assert found == pytest.approx(sum(exact), rel=0.02)


def test_lm_eval_samples_are_cut_where_the_task_says(harness, scorer):
    with pytest.raises(ValueError, match="has no sampler; pass generate="):
        harness.generate_until([request("w1", {"until": ["\n"]})])
    generate = lambda prompts, settings: [f"{p} {settings['max_gen_toks']}\nmore" for p in prompts]  # noqa: E731
    sampling = DiffusionHarness(scorer, harness.tokenizer, mask_token_id=MASK, generate=generate)
    assert sampling.generate_until([request("w1", {"until": ["\n"], "max_gen_toks": 4})]) == ["w1 4"]


def test_without_lm_eval_its_model_class_cannot_be_made(harness, scorer):
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        with pytest.raises(ValueError, match="lm-eval is not installed; pip install lm-eval"):
            harness_model(scorer, harness.tokenizer, mask_token_id=MASK)
