"""Estimators of log-probs for RL against exact enumeration, numbers by hand, and their laws."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rl.batch import MicroBatch, PackRules, pack
from rl.config.diffusion_rl import EstimatorConfig
from rl.diffusion.estimators import Scored, draw_plan, sandwiched, score, summed
from rl.diffusion.model import DiffusionScorer, hidden_states, logits_at, to_diffusion
from rl.diffusion.objectives import Example
from rl.model.bidirectional import Documents
from rl.types import Completion, Group, Prompt, Reward, SamplingParams, ScoredGroup, VersionSpan
from rollout.diffusion.engine import DiffusionEngine
from rollout.diffusion.steps import DenoisingParams
from tests.calling import call, trace_of
from tests.diffusion.conftest import MASK, SMALL, VOCABULARY, randomised
from tests.diffusion.exact_bound import by_size, logprob_table

PROMPT = (10, 11, 12)


def make_scorer(seed: int = 0, **changes) -> DiffusionScorer:
    model = randomised(LlamaForCausalLM(LlamaConfig(**SMALL | changes)), seed, std=0.3)
    return DiffusionScorer(to_diffusion(model.double(), mask_token_id=MASK))


@pytest.fixture(scope="module")
def scorer() -> DiffusionScorer:
    return make_scorer()


def completion(ids, *, version=0, steps=None, tail=(), logprobs=()) -> Completion:
    facts = {} if steps is None else {"trace": trace_of(list(steps), list(tail), max(steps) + 1)}
    spans = [VersionSpan(version, len(ids))]
    return Completion(list(ids), list(logprobs), [True] * len(ids), "stop", spans, facts=facts)


def batch_of(completions, advantages=None, prompt=PROMPT) -> MicroBatch:
    """All completions of one prompt in one micro-batch, in order."""
    group = ScoredGroup(Group(Prompt("p", "", prompt), list(completions)), [Reward(0.0)] * len(completions))
    rules = PackRules(1 << 20, row_weight=lambda *_: 1.0, skip_without_signal=False)
    advantages = advantages or [1.0] * len(completions)
    (batch,) = pack([group], [advantages], rules)
    (micro_batch,) = batch.micro_batches
    return micro_batch


def estimate(scorer, batch, config, *, draw=0, seed=0, token_budget=1 << 20, temperature=1.0):
    plan = draw_plan(batch, config, draw=draw, mask_token_id=MASK, seed=seed, token_budget=token_budget)
    return score(scorer, plan, batch, config, temperature=temperature)[0]


def direct_logprobs(scorer, canvas, columns, targets) -> list[float]:
    """From a whole pass over one canvas and its full logits."""
    with torch.no_grad():
        documents = Documents.of([len(canvas)])
        hidden = hidden_states(scorer.model, torch.tensor(canvas), documents)
        logits = logits_at(scorer.model, hidden, torch.tensor(columns), documents)
    return logits.log_softmax(-1).gather(-1, torch.tensor(targets)[:, None])[:, 0].tolist()


IDS, TAIL = [20, 21, 22, 23, 24], [30, MASK]
MASKABLE = (torch.arange(10) >= 3) & (torch.arange(10) < 8)
CANVAS = torch.tensor([*PROMPT, *IDS, MASK, MASK])


@pytest.mark.parametrize("num_draws", [1, 2])
def test_the_mean_of_elbo_is_the_exact_bound(scorer, num_draws):
    """2,000 copies of a sequence, whose masks differ by their policy version, against all 2^5 masks. The
    canvas goes on for two columns after the end, which are masked. The same number stands at each token.
    """
    n = 2000
    batch = batch_of([completion(IDS, version=v, steps=[0] * 7, tail=TAIL) for v in range(n)])
    with torch.no_grad():
        found = estimate(scorer, batch, EstimatorConfig(name="elbo", num_draws=num_draws)).view(n, 5)
    assert torch.equal(found, found[:, :1].expand(-1, 5))
    exact = by_size(logprob_table(scorer, Example(CANVAS, MASKABLE), MASK)) / 5
    error = (found[:, 0].std() / n**0.5).item()
    assert error < 0.02 * abs(exact)
    assert abs(found[:, 0].mean().item() - exact) < 4 * error


def test_one_step_is_the_fully_masked_canvas_and_no_bound(scorer):
    """Exactly what one pass says; far from the bound, which is why no test calls it an estimate of it."""
    batch = batch_of([completion(IDS, steps=[0] * 7, tail=TAIL)])
    found = estimate(scorer, batch, EstimatorConfig(name="one_step")).tolist()
    expected = direct_logprobs(scorer, [*PROMPT, *[MASK] * 7], range(3, 8), IDS)
    assert found == pytest.approx(expected, abs=1e-9)
    exact = by_size(logprob_table(scorer, Example(CANVAS, MASKABLE), MASK))
    assert abs(sum(found) - exact) > 1.0  # nats; neither has noise


def test_prompt_masks_hit_the_share_that_was_asked_for():
    batch = batch_of([completion(IDS, version=v) for v in range(2000)])
    config = EstimatorConfig(name="one_step", prompt_mask=0.15)
    plan = draw_plan(batch, config, draw=0, mask_token_id=MASK, seed=0, token_budget=1 << 20)
    rows = plan.rows[0].token_ids_N.view(2000, 8)
    assert ((rows[:, :3] == MASK).double().mean() - 0.15).abs() < 4 * (0.15 * 0.85 / 6000) ** 0.5
    assert (rows[:, 3:] == MASK).all()
    assert len(plan.rows[0].columns_L) == 2000 * 5


def test_sandwich_by_hand():
    """One token scored twice with weight 1/2, p = 0.2 and 0.8, beta = 2, mix = 1/4.

    Lower: (ln 0.2 + ln 0.8) / 2 = -0.916291. Upper: ln((0.04 + 0.64) / 2) / 2 = -0.539405.
    Mixed: -0.916291 + 0.376886 / 4 = -0.822069. Slopes of log p: 1/2 each below; above, 0.04 / 0.68 and
    0.64 / 0.68; mixed 0.75 * 0.5 + 0.25 * 0.058824 = 0.389706 and 0.610294.
    """
    config = EstimatorConfig(name="sandwich", beta=2.0, mix=0.25)
    for advantage, value, slopes in ((1.0, -0.916291, (0.5, 0.5)), (-1.0, -0.822069, (0.389706, 0.610294))):
        batch = batch_of([completion([20])], [advantage])
        logprobs = torch.tensor([0.2, 0.8], dtype=torch.float64).log().requires_grad_()
        zeros = torch.zeros(2, dtype=torch.int64)
        scored = Scored(logprobs, torch.zeros(2), torch.full((2,), 0.5), zeros)
        found = sandwiched(scored, batch, config)
        found.sum().backward()
        assert found.item() == pytest.approx(value, abs=1e-6)
        assert logprobs.grad is not None and logprobs.grad.tolist() == pytest.approx(slopes, abs=1e-6)


def test_the_upper_bound_of_the_sandwich_is_above_the_lower():
    """With weights that add up to 1 for each token, whatever the log-probs."""
    generator = torch.Generator().manual_seed(0)
    logprobs = torch.randn(40, generator=generator, dtype=torch.float64) * 3 - 4
    scored = Scored(logprobs, torch.zeros(40), torch.full((40,), 0.25), torch.arange(10).repeat(4))
    up, down = (batch_of([completion(range(20, 30))], [sign]) for sign in (-1.0, 1.0))
    config = EstimatorConfig(name="sandwich", mix=1.0)
    assert (sandwiched(scored, up, config) >= sandwiched(scored, down, config)).all()
    torch.testing.assert_close(sandwiched(scored, down, config), summed(scored, down, config))


STEPS = [2, 0, 1, 0, 3, 2, 4]  # of five tokens and a tail of two, the last never committed


def test_trace_scores_each_token_on_the_canvas_of_its_step(scorer):
    batch = batch_of([completion(IDS, steps=STEPS, tail=TAIL)])
    found = estimate(scorer, batch, EstimatorConfig(name="trace")).tolist()
    expected = {}
    for step in range(4):
        columns = [i for i in range(5) if STEPS[i] == step]
        canvas = [t if STEPS[i] < step else MASK for i, t in enumerate([*IDS, *TAIL])]
        targets = [IDS[i] for i in columns]
        values = direct_logprobs(scorer, [*PROMPT, *canvas], [3 + i for i in columns], targets)
        expected |= dict(zip(columns, values, strict=True))
    assert found == pytest.approx([expected[i] for i in range(5)], abs=1e-9)


def test_merged_steps_share_the_canvas_of_the_first(scorer):
    batch = batch_of([completion(IDS, steps=STEPS, tail=TAIL)])
    config = EstimatorConfig(name="trace", merge=2)
    plan = draw_plan(batch, config, draw=0, mask_token_id=MASK, seed=0, token_budget=1 << 20)
    assert plan.rows[0].documents.lengths == (10, 10)
    found = score(scorer, plan, batch, config)[0].tolist()
    first = direct_logprobs(scorer, [*PROMPT, *[MASK] * 7], [4, 5, 6], [21, 22, 23])
    second = direct_logprobs(scorer, [*PROMPT, MASK, 21, 22, 23, MASK, MASK, MASK], [3, 7], [20, 24])
    assert found == pytest.approx([second[0], *first, second[1]], abs=1e-9)


def barred(scorer):
    """The scorer without the mask token among its answers, which is what the sampler draws from."""

    def call(token_ids_N, documents, columns_L, targets_L, temperature=1.0):
        hidden = hidden_states(scorer.model, token_ids_N, documents)
        logits = logits_at(scorer.model, hidden, columns_L, documents) / temperature
        logits = logits.index_fill(1, torch.tensor([MASK]), -torch.inf)
        return logits.log_softmax(-1).gather(-1, targets_L[:, None])[:, 0], torch.zeros(len(targets_L))

    return call


class Words:
    all_special_ids, added_tokens_decoder = (), {}
    eos_token_id = pad_token_id = None

    def decode(self, ids, **_):
        return " ".join(map(str, ids))

    def batch_decode(self, rows, **_):
        return [self.decode(row) for row in rows]


def test_trace_is_what_the_engine_drew_from():
    """Sampled with a temperature, several tokens a step, ends and tails: the engine's log-probs come back."""
    scorer = make_scorer()
    engine = DiffusionEngine(scorer.model, Words(), DenoisingParams(12, block_length=6, steps=6))
    prompts = [Prompt(f"p{i}", "", tuple(range(10, 13 + i))) for i in range(3)]
    sampling = SamplingParams(12, temperature=0.7, stop_token_ids=(40, 41, 42))
    groups = engine.generate(call(prompts, num_completions=4, sampling=sampling, seeds=[1, 2, 3]))
    assert {c.finish_reason for g in groups for c in g.completions} == {"stop", "length"}
    for group in groups:
        batch = batch_of(group.completions, prompt=group.prompt.token_ids)
        with torch.no_grad():
            found = estimate(barred(scorer), batch, EstimatorConfig(name="trace"), temperature=0.7)
        torch.testing.assert_close(found, batch.behavior_logprobs_L.double(), rtol=0, atol=1e-5)


def test_left_to_right_traces_are_exact_likelihoods():
    """All 4^3 completions of three tokens have probabilities that add up to 1."""
    scorer = make_scorer(1, vocab_size=5, pad_token_id=None, eos_token_id=None)
    words = [0, 1, 2, 4]
    every = [completion(ids, steps=[0, 1, 2]) for ids in itertools.product(words, repeat=3)]
    batch = batch_of(every, prompt=(0, 4))
    with torch.no_grad():
        found = estimate(barred(scorer), batch, EstimatorConfig(name="trace")).view(64, 3).sum(1)
    assert found.exp().sum().item() == pytest.approx(1.0, abs=1e-9)
    assert found.exp().max() > 2 / 64  # and not because all are alike


def test_drawn_canvases_have_the_gradient_of_all_on_average(scorer):
    """Each of 4 canvases alone weighs 4: the mean of the four gradients is that of all four together."""
    weight = scorer.model.model.layers[0].mlp.up_proj.weight

    def gradient(batch, config):
        values = estimate(scorer, batch, config)
        (found,) = torch.autograd.grad((values * torch.arange(1.0, 6.0)).sum(), weight)
        return found, values.detach()

    by_canvas, one = {}, EstimatorConfig(name="trace", max_canvases=1)
    for version in range(60):
        sequence = completion(IDS, version=version, steps=STEPS, tail=TAIL, logprobs=[-9.0] * 5)
        found, values = gradient(batch_of([sequence]), one)
        by_canvas[tuple((values != -9.0).tolist())] = found
    assert len(by_canvas) == 4
    whole, _ = gradient(batch_of([completion(IDS, steps=STEPS, tail=TAIL)]), EstimatorConfig(name="trace"))
    torch.testing.assert_close(torch.stack(list(by_canvas.values())).mean(0), whole)


def test_tokens_that_the_policy_did_not_choose_are_seen_and_not_scored():
    """loss_mask False (what a tool answered): never masked, in no copy's scored columns."""
    c = completion(IDS, steps=[0, 1, 2, 3, 4])
    c.loss_mask = [True, False, True, True, False]
    for name in ("one_step", "elbo", "trace"):
        batch = batch_of([c])
        plan = draw_plan(
            batch, EstimatorConfig(name=name), draw=0, mask_token_id=MASK, seed=0, token_budget=1 << 20
        )
        row = plan.rows[0]
        assert sorted(plan.slots[0].unique().tolist()) == [0, 1, 2]
        assert set(row.targets_L.tolist()) == {20, 22, 23}
        if name != "trace":
            copies = row.token_ids_N.view(-1, 8)
            assert (copies[:, 4] == 21).all() and (copies[:, 7] == 24).all()
        assert torch.equal(batch.targets_L[plan.slots[0]], row.targets_L)


@pytest.mark.parametrize("name", ["one_step", "elbo", "sandwich", "trace"])
def test_masks_belong_to_the_sequence_alone(scorer, name):
    """Whatever it is packed with and however small the rows: the same estimates; another seed, others."""
    config = EstimatorConfig(name=name, num_draws=2, prompt_mask=0.3 if name == "one_step" else 0.0)
    sequences = [completion([20 + i, 30, 31 + i], version=i, steps=[1, 0, 2]) for i in range(4)]
    with torch.no_grad():
        together = estimate(scorer, batch_of(sequences), config).view(4, 3)
        tight = estimate(scorer, batch_of(sequences), config, token_budget=10).view(4, 3)
        alone = torch.stack([estimate(scorer, batch_of([s]), config) for s in sequences])
        other = estimate(scorer, batch_of(sequences), config, seed=1).view(4, 3)
    torch.testing.assert_close(together, tight, rtol=0, atol=1e-9)
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-9)
    assert torch.equal(together, other) == (name == "trace")


def test_equal_completions_and_other_draws_have_masks_of_their_own(scorer):
    config = EstimatorConfig(name="elbo")
    batch = batch_of([completion(IDS), completion(IDS)])
    with torch.no_grad():
        first, second = estimate(scorer, batch, config).view(2, 5)[:, 0].tolist()
        others = estimate(scorer, batch, config, draw=1).view(2, 5)[:, 0].tolist()
        alone = estimate(scorer, batch_of([completion(IDS)]), config)[0].item()
    assert len({first, second, *others}) == 4
    assert alone == pytest.approx(first, abs=1e-9)


def test_the_upper_side_of_many_draws_is_above_the_bound(scorer):
    """512 draws against 1/beta log of the exact mean over all masks."""
    config = EstimatorConfig(name="sandwich", num_draws=512, mix=1.0)
    example = Example(torch.tensor([*PROMPT, *IDS]), MASKABLE[:8])
    table = logprob_table(scorer, example, MASK)
    expected = []
    for i in range(5):
        # Subsets with i in it: 1/l over the number of subsets of size l, as the ELBO weighs their log p.
        terms = [
            math.exp(config.beta * table[bits, i]) / (bits.bit_count() * math.comb(5, bits.bit_count()))
            for bits in range(1, 32)
            if bits >> i & 1
        ]
        expected.append(math.log(sum(terms)) / config.beta)
    with torch.no_grad():
        found = estimate(scorer, batch_of([completion(IDS)], [-1.0]), config)
        lower = estimate(scorer, batch_of([completion(IDS)], [1.0]), config)
    assert found.tolist() == pytest.approx(expected, abs=0.1)
    assert (found > lower + 0.05).all()


def test_many_rows_have_the_gradient_of_one(scorer):
    """They are computed again in the backward pass instead of kept."""
    weight = scorer.model.model.layers[0].mlp.up_proj.weight
    config = EstimatorConfig(name="elbo", num_draws=3)
    batch = batch_of([completion([20 + i, 30, 31], version=i) for i in range(4)])
    found = []
    for budget in (1 << 20, 10):
        plan = draw_plan(batch, config, draw=0, mask_token_id=MASK, seed=0, token_budget=budget)
        values = score(scorer, plan, batch, config)[0]
        found.append(torch.autograd.grad(values.square().sum(), weight)[0])
    assert len(plan.rows) > 4
    torch.testing.assert_close(*found, rtol=0, atol=1e-9)


def test_a_trace_that_is_missing_is_said(scorer):
    with pytest.raises(ValueError, match="completion of prompt p has none; sample with the diffusion engine"):
        estimate(scorer, batch_of([completion(IDS)]), EstimatorConfig(name="trace"))


def test_the_vocabulary_of_these_tests_is_far_from_certain(scorer):
    """Otherwise log-probs near 0 would hide errors."""
    values = direct_logprobs(scorer, [*PROMPT, *[MASK] * 5], range(3, 8), IDS)
    assert all(-3 * math.log(VOCABULARY) < v < -0.5 for v in values)
