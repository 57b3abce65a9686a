"""Log-likelihoods, choices and bounds of given text, and the requests of lm-eval.

The tests against the real lm-eval are skipped without it: `pip install -e '.[lm-eval]'` brings it and 25
packages that it needs (300 MB), and puts python-dateutil back to 2.9.
"""

from __future__ import annotations

import math
import sys
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from rl.diffusion.harness import DiffusionHarness, harness_model
from rl.diffusion.likelihood import Bound, bound, bound_log, choose, log_likelihoods
from rl.diffusion.model import DiffusionScorer, load_diffusion_model, to_diffusion
from rl.diffusion.objectives import Example, step_generator
from tests.diffusion.conftest import MASK, SMALL, VOCABULARY, randomised
from tests.diffusion.exact_bound import by_size, logprob_table
from tests.diffusion.lm_eval_tasks import write_lm_eval_tasks


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
    log = bound_log(tmp_path)
    for step, value in ((0, 3.0), (5, 2.5), (5, 2.25), (10, 2.0)):
        log.write(step, Bound(value, 0.1, 100, 10))
    assert [(s, b.nats_per_token) for s, b in log.read().items()] == [(0, 3.0), (5, 2.25), (10, 2.0)]
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

    def generate(prompts, settings):
        return [f"{harness.tokenizer.decode(ids)} {settings['max_gen_toks']}\nmore" for ids in prompts]

    sampling = DiffusionHarness(scorer, harness.tokenizer, mask_token_id=MASK, generate=generate)
    assert sampling.generate_until([request("w1", {"until": ["\n"], "max_gen_toks": 4})]) == ["w1 4"]
    assert sampling.generate_until([request("w1", {"until": "4", "max_gen_toks": 4})]) == ["w1 "]


def test_lm_eval_samples_of_equal_settings_share_a_call_and_keep_their_order(harness, scorer):
    """5 requests of two settings: two calls. Room for prompts is 8 - 5 tokens; two are longer."""
    calls = []

    def generate(prompts, settings):
        calls.append((len(prompts), settings["max_gen_toks"]))
        return [harness.tokenizer.decode(ids) for ids in prompts]

    sampling = DiffusionHarness(
        scorer, harness.tokenizer, mask_token_id=MASK, max_length=8, generate=generate, gen_length=5
    )
    one, other = {"until": [], "max_gen_toks": 4}, {"until": [], "max_gen_toks": 9}
    texts = ["w1", "w2 w3", "w4 w5 w6 w7", "w8", "w9 w10 w11 w12 w13"]
    settings = [one, other, dict(reversed(one.items())), other, one]
    with pytest.warns(UserWarning, match="2 of 5 requests do not fit into 8 tokens") as told:
        found = sampling.generate_until([request(t, s) for t, s in zip(texts, settings, strict=True)])
    assert found == ["w1", "w2w3", "w5w6w7", "w8", "w11w12w13"]
    assert (calls, len(told)) == ([(3, 4), (2, 9)], 1)


def test_examples_beyond_the_context_are_refused(scorer):
    """The model has 256 positions; its rotary embedding would go on silently."""
    longest, longer = example(2, 254, 0), example(3, 254, 0)
    log_likelihoods(scorer, [longest], mask_token_id=MASK, num_draws=1)
    said = "example 1 has 257 tokens, but the model has 256 positions; shorten it to 256 tokens"
    with pytest.raises(ValueError, match=said):
        log_likelihoods(scorer, [longest, longer], mask_token_id=MASK, num_draws=1)
    with pytest.raises(ValueError, match=said):
        bound(scorer, [longest, longer], step_generator(0), mask_token_id=MASK, num_draws=1)


@pytest.mark.parametrize("scheme", ["count", "bernoulli"])
def test_an_empty_mask_adds_nothing(scorer, exact, scheme):
    """A draw over 2 tokens masks none of them with probability 1/3 in both schemes."""
    found = log_likelihoods(scorer, [CASES[3]] * 900, mask_token_id=MASK, num_draws=1, scheme=scheme).numpy()
    assert 0.25 < (found == 0).mean() < 0.42
    assert abs(found.mean() - exact[3]) < 4 * found.std() / 900**0.5
    (alone,) = (found == 0).nonzero()[0][:1]
    settings: dict[str, Any] = {"mask_token_id": MASK, "num_draws": 1, "scheme": scheme}
    assert log_likelihoods(scorer, [CASES[3]] * (alone + 1), **settings)[alone] == 0


def test_no_examples_have_no_log_likelihoods_and_no_bound(scorer):
    assert log_likelihoods(scorer, [], mask_token_id=MASK).shape == (0,)
    with pytest.raises(ValueError, match="there are no examples"):
        bound(scorer, [], step_generator(0), mask_token_id=MASK, num_draws=1)


def test_lm_eval_requests_are_as_long_as_the_model_has_positions(harness, scorer):
    """A context is cut on the left, once told; a continuation never is."""
    whole = DiffusionHarness(scorer, harness.tokenizer, mask_token_id=MASK, num_draws=2)
    assert whole.max_length == 256
    with pytest.raises(ValueError, match="max_length=257: the model has 256 positions; use 1 to 256"):
        DiffusionHarness(scorer, harness.tokenizer, mask_token_id=MASK, max_length=257)
    with pytest.raises(ValueError, match="gen_length=256 leaves no room for a prompt within 256 tokens"):
        DiffusionHarness(scorer, harness.tokenizer, mask_token_id=MASK, gen_length=256)
    kept = "w7 " * 254
    with pytest.warns(UserWarning, match="2 of 3 requests do not fit into 256 tokens") as told:
        found = whole.loglikelihood(
            [request("w8 " * 99 + kept, "w1 w2"), request("w9 " + kept, "w1 w2"), request(kept, "w1 w2")]
        )
    assert len(told) == 1
    # The same tokens are left of all three; only their masks differ.
    same = [whole.loglikelihood([request(context + kept, "w1 w2")]) for context in ("w8 " * 99, "w9 ", "")]
    assert same[0] == same[1] == same[2]
    assert same[0][0][0] == pytest.approx(found[0][0], rel=1e-5)
    with pytest.raises(ValueError, match="request 1: the continuation has 257 tokens"):
        whole.loglikelihood([request("w1", " w2"), request("w1", " w2" * 257)])
    with pytest.raises(ValueError, match="request 0: the continuation has 0 tokens"):
        whole.loglikelihood([request("w1", "")])
    with pytest.raises(ValueError, match=r"request 1 contains the mask token \(id 3\)"):
        whole.loglikelihood([request("w1", " w2"), request("<user>", " w2")])
    assert whole.loglikelihood_rolling([request("")]) == [0.0]


def test_a_shifted_model_predicts_no_first_token(tiny_model_dir):
    """Its first token has no left neighbour, so an end-of-text token comes before it."""
    model = randomised(LlamaForCausalLM(LlamaConfig(**SMALL)), std=0.4)
    shifted = DiffusionScorer(to_diffusion(model, mask_token_id=MASK, shift=True))  # type: ignore[arg-type]
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    harness = DiffusionHarness(shifted, tokenizer, mask_token_id=MASK, max_length=3, num_draws=600)
    piece = lambda ids: Example(torch.tensor(ids), torch.tensor([False] + [True] * (len(ids) - 1)))  # noqa: E731
    w1, w2, w3 = tokenizer("w1 w2 w3")["input_ids"]
    expected = [by_size(logprob_table(shifted, piece(ids), MASK)) for ids in ([1, w1, w2], [1, w3])]
    (found,) = harness.loglikelihood_rolling([request("w1 w2 w3")])
    assert found == pytest.approx(sum(expected), rel=0.02)
    ((found, _),) = harness.loglikelihood([request("", "w1 w2")])
    assert found == pytest.approx(expected[0], rel=0.02)


def test_without_lm_eval_its_model_class_cannot_be_made(harness, scorer, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # makes the import fail
    with pytest.raises(ValueError, match=r"lm-eval cannot be imported .*; pip install lm-eval==0.4.13"):
        harness_model(scorer, harness.tokenizer, mask_token_id=MASK)


def test_lm_eval_itself_evaluates_its_three_kinds_of_tasks(tiny_model_dir, tmp_path):
    """Choices and perplexity as `log_likelihoods` has them; samples as the task wants them."""
    lm_eval = pytest.importorskip("lm_eval")
    pytest.importorskip("sacrebleu")
    from lm_eval.tasks import TaskManager

    rows = write_lm_eval_tasks(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    scorer = DiffusionScorer(load_diffusion_model(str(tiny_model_dir), mask_token_id=2))
    calls = []

    def generate(prompts, settings):
        calls.append(list(prompts))
        return [f"w9 w{i}\nw8" for i in range(len(prompts))]

    model = harness_model(
        scorer, tokenizer, mask_token_id=2, generate=generate, gen_length=8, num_draws=32, seed=5
    )
    manager = TaskManager(include_path=str(tmp_path))
    evaluate = partial(lm_eval.simple_evaluate, model=model, task_manager=manager, bootstrap_iters=0)
    found = evaluate(tasks=["tiny_choices", "tiny_texts", "tiny_samples"])["results"]

    def score(pairs):
        examples = [
            Example(torch.tensor(ids := [*a, *b]), torch.arange(len(ids)) >= len(a)) for a, b in pairs
        ]
        return log_likelihoods(scorer, examples, mask_token_id=2, num_draws=32, seed=5).tolist()

    ids = lambda text: tokenizer(text)["input_ids"]  # noqa: E731
    values = score([(ids(row["prompt"]), ids(c)) for row in rows for c in row["choices"]])
    right = [choose(values[2 * i : 2 * i + 2]) == row["answer"] for i, row in enumerate(rows)]
    assert found["tiny_choices"]["acc,none"] == pytest.approx(sum(right) / len(rows))
    assert 0 < sum(right) < len(rows)
    texts = [row["prompt"] for row in rows]
    nats = -sum(score([([], ids(text)) for text in texts]))
    words = sum(len(text.split()) for text in texts)
    assert found["tiny_texts"]["word_perplexity,none"] == pytest.approx(math.exp(nats / words))
    # Row i asks for the word w{i}; the sample is cut at the line break, and its last word is compared.
    assert calls == [[ids(text) for text in texts]]
    assert found["tiny_samples"]["exact_match,last"] == 1.0
    assert evaluate(tasks=["tiny_samples"], apply_chat_template=True)["results"]
    assert calls[1] == [ids(f"<user> {text} <eos> <assistant> ") for text in texts]
    assert (model.rank, model.world_size) == (0, 1)
    assert model.chat_template(True) == tokenizer.chat_template
    assert "/" not in model.tokenizer_name
