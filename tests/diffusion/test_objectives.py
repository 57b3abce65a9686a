"""Every estimator is unbiased: against the exact bound of sequences short enough to mask in every way."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rl.diffusion.elbo import first_fit, masked_elbo, pack_plan
from rl.diffusion.model import DiffusionScorer, to_diffusion
from rl.diffusion.objectives import (
    MIN_RATE,
    Example,
    make_plan,
    normalisers,
    random_lengths,
    reference_likelihood_plan,
    step_generator,
)
from rl.model.bidirectional import Documents
from tests.diffusion.conftest import MASK, SMALL, VOCABULARY, randomised
from tests.diffusion.exact_bound import TableScorer, by_order, by_size, by_time, logprob_table

SCHEMES = [
    (s, systematic) for s in ("coupled", "count", "subset", "bernoulli") for systematic in (True, False)
]


def example(prompt: int, answer: int, seed: int = 0) -> Example:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, VOCABULARY, (prompt + answer,), generator=generator)
    return Example(ids, torch.arange(prompt + answer) >= prompt)


@pytest.fixture(scope="module")
def scorer() -> DiffusionScorer:
    """A tiny fp64 model whose log-probs depend much on what is masked."""
    model = randomised(LlamaForCausalLM(LlamaConfig(**SMALL)), std=0.5).double()
    return DiffusionScorer(to_diffusion(model, mask_token_id=MASK))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def tables(scorer) -> dict[int, tuple[Example, np.ndarray]]:
    found = {}
    for m in (1, 2, 5, 8):
        case = example(3, m, seed=m)
        found[m] = (case, logprob_table(scorer, case, MASK))
    return found


def test_three_routes_to_the_exact_bound_agree(tables):
    for m, (_, table) in tables.items():
        exact = by_size(table)
        assert by_time(table) == pytest.approx(exact, abs=1e-9)
        assert by_order(table) == pytest.approx(exact, abs=1e-9)
        full = table[-1].sum()
        assert m == 1 or abs(full - exact) > 0.1  # the toy tells one-step scores from the bound


@pytest.mark.parametrize("m", [1, 5, 8])
@pytest.mark.parametrize(("scheme", "systematic"), SCHEMES)
def test_the_mean_of_an_estimator_is_the_exact_bound(tables, scheme, systematic, m):
    """600 batches of 6 copies of the example, 2 draws each: means of the batches are independent."""
    case, table = tables[m]
    generator, lookup = step_generator(m, systematic), TableScorer(case, table, MASK)
    means = []
    for _ in range(600):
        plan = make_plan(
            [case] * 6, generator, mask_token_id=MASK, scheme=scheme, systematic=systematic, num_draws=2
        )
        elbos = masked_elbo(lookup, pack_plan(plan, 10_000), 6)[0] if plan else torch.zeros(6)
        means.append(elbos.mean().item())
    exact = by_time(table, low=MIN_RATE) if scheme == "bernoulli" else by_size(table)
    error = np.std(means) / len(means) ** 0.5
    assert abs(np.mean(means) - exact) <= 4 * error + 1e-6
    if scheme == "coupled" and m == 1:
        assert error < 1e-7  # one token: the estimate is exact


def test_the_floor_of_the_mask_rate_costs_six_parts_in_ten_thousand(tables):
    """Bias of Algorithm 2 with p >= 1e-3: what the count weights do without."""
    _, table = tables[8]
    assert by_time(table, low=MIN_RATE) / by_size(table) - 1 == pytest.approx(0, abs=1e-3)
    assert by_time(table, low=MIN_RATE) != pytest.approx(by_size(table), rel=1e-5)


def test_the_reference_rounding_is_reproduced_and_is_biased(tables):
    """L = 4 in batches of 8: sizes 1 to 4 come with 1/8, 3/8, 1/8, 3/8, so the value is off; where the batch
    divides L it is right.
    """
    case = example(2, 4)
    sizes = Counter()
    for seed in range(200):
        plan = reference_likelihood_plan(
            case, step_generator(seed), mask_token_id=MASK, num_draws=8, batch_size=8
        )
        sizes.update(len(copy.columns_K) for copy in plan)
    assert [sizes[size] / 1600 for size in (1, 2, 3, 4)] == [0.125, 0.375, 0.125, 0.375]
    ours = Counter()
    for seed in range(200):
        plan = make_plan([case], step_generator(seed), mask_token_id=MASK, scheme="subset", num_draws=8)
        ours.update(len(copy.columns_K) for copy in plan)
    assert [ours[size] / 1600 for size in (1, 2, 3, 4)] == [0.25] * 4
    case, table = tables[8]
    lookup, values = TableScorer(case, table, MASK), {4: [], 16: []}
    for seed in range(1500):
        for batch in values:
            plan = reference_likelihood_plan(
                case, step_generator(seed, batch), mask_token_id=MASK, num_draws=batch, batch_size=batch
            )
            values[batch].append(masked_elbo(lookup, pack_plan(plan, 1000), 1)[0].item())
    gaps = {b: (np.mean(v) - by_size(table)) / (np.std(v) / len(v) ** 0.5) for b, v in values.items()}
    assert abs(gaps[4]) < 4 < abs(gaps[16])


def test_plans_mask_only_answers_and_score_what_is_masked():
    cases = [example(3, 5, 1), example(0, 9, 2), example(7, 1, 3)]
    for scheme, systematic in SCHEMES:
        plan = make_plan(
            cases, step_generator(1), mask_token_id=MASK, scheme=scheme, systematic=systematic, num_draws=3
        )
        for copy in plan:
            clean = cases[copy.example]
            hidden = copy.token_ids_T == MASK
            assert hidden.nonzero().squeeze(-1).tolist() == copy.columns_K.tolist() != []
            assert not (hidden & ~clean.maskable_T).any()
            assert (copy.token_ids_T[~hidden] == clean.token_ids_T[~hidden]).all()
            assert (copy.targets_K == clean.token_ids_T[hidden]).all()
            assert (copy.weights_K > 0).all()


def test_coupled_masks_score_every_token_once_a_draw():
    case = example(2, 11)
    plan = make_plan([case], step_generator(5), mask_token_id=MASK, num_draws=7)
    seen = Counter(column for copy in plan for column in copy.columns_K.tolist())
    assert seen == dict.fromkeys(range(2, 13), 7)


@pytest.mark.parametrize("scheme", ["count", "subset", "coupled"])
def test_mask_sizes_are_uniform_over_a_systematic_batch(scheme):
    """With m + 1 (or m) times 10 copies every size comes equally often, whatever the offset: a grid of levels
    meets each of its cells 10 times.
    """
    m = 6
    copies = {"count": 70, "subset": 60, "coupled": 70}[scheme]
    plan = make_plan([example(1, m)] * copies, step_generator(2), mask_token_id=MASK, scheme=scheme)
    sizes = Counter(len(copy.columns_K) for copy in plan)
    # Coupled pairs hold sizes k and m - k: every size from 1 to 5 twice as often as one of 7 in 70, and so 6.
    each = {"count": 10, "subset": 10, "coupled": 20}[scheme]
    assert sizes == dict.fromkeys(range(1, m + 1), each)


def test_bernoulli_draws_are_the_reference_codes_own(scorer):
    """GUIDELINES.md: t = rand(b), p = (1 - eps) t + eps, masked = rand(b, l) < p on rows padded to the
    longest, prompts put back; loss = sum over masked of CE / p / answer length, over b.
    """
    cases = [example(3, 5, 1), example(2, 9, 2), example(6, 2, 3)]
    torch.manual_seed(11)
    t = torch.rand(3)
    p = (1 - 1e-3) * t + 1e-3
    masked = torch.rand((3, 11)) < p[:, None].repeat(1, 11)
    generator = torch.Generator().manual_seed(11)
    plan = make_plan(cases, generator, mask_token_id=MASK, scheme="bernoulli", systematic=False)
    expected, total = {}, torch.zeros(())
    for b, case in enumerate(cases):
        hit = masked[b, : len(case.token_ids_T)] & case.maskable_T
        if hit.any():
            expected[b] = hit.nonzero().squeeze(-1).tolist()
            noisy = torch.where(hit, MASK, case.token_ids_T)
            ce = -scorer(noisy, Documents.of([len(noisy)]), hit.nonzero().squeeze(-1), case.token_ids_T[hit])[
                0
            ]
            total = total + (ce / p[b]).sum() / case.num_maskable
    assert {copy.example: copy.columns_K.tolist() for copy in plan} == expected
    elbos = masked_elbo(scorer, pack_plan(plan, 1000), 3)[0]
    ours = -(elbos * torch.tensor(normalisers(cases, "sequence"))).sum()
    torch.testing.assert_close(ours, total / 3, rtol=1e-6, atol=1e-9)


def test_normalisers_are_those_of_the_whole_step():
    cases = [example(3, 5), example(0, 15)]
    assert normalisers(cases, "sequence") == [1 / 10, 1 / 30]
    assert normalisers(cases, "token") == [1 / 20, 1 / 20]


def test_random_lengths_cut_one_example_in_a_hundred():
    cases = [example(0, 40, seed) for seed in range(5)] * 1000
    cut = random_lengths(cases, step_generator(0))
    lengths = [len(e.token_ids_T) for e in cut if len(e.token_ids_T) < 40]
    assert 25 <= len(lengths) <= 80  # 50 expected, of which 1 in 40 keeps its length
    assert min(lengths) >= 1 and max(lengths) > 30
    whole = [random_lengths(cases[:4], step_generator(s), whole_batch=True) for s in range(2000)]
    widths = [{len(e.token_ids_T) for e in batch} for batch in whole]
    assert all(len(w) == 1 for w in widths)
    assert 5 <= sum(w != {40} for w in widths) <= 40


@pytest.mark.parametrize("whole_batch", [False, True])
def test_a_random_length_leaves_something_to_mask(whole_batch):
    """Algorithm 1 knows no prompts; a cut within one keeps the token after it."""
    cases = [example(6, 2, seed) for seed in range(8)]
    for seed in range(20):
        cut = random_lengths(cases, step_generator(seed), share=1.0, whole_batch=whole_batch)
        assert {e.num_maskable for e in cut} <= {1, 2}
        make_plan(cut, step_generator(seed), mask_token_id=MASK)


def test_the_estimate_of_a_shifted_model_is_its_exact_bound(scorer):
    """Against enumeration with the unshifted model of the same weights, asked at the column to the left; as
    in `encode_rows` the first token of a text is given.
    """
    shifted = DiffusionScorer(
        to_diffusion(
            randomised(LlamaForCausalLM(LlamaConfig(**SMALL)), std=0.5).double(),  # type: ignore[arg-type]
            mask_token_id=MASK,
            shift=True,
        )
    )
    case = example(1, 4, seed=4)
    left = lambda ids, documents, columns, targets: scorer(ids, documents, columns - 1, targets)  # noqa: E731
    table = logprob_table(left, case, MASK)  # type: ignore[arg-type]
    lookup, exact, means = TableScorer(case, table, MASK), by_order(table), []
    assert abs(exact - by_order(logprob_table(scorer, case, MASK))) > 1
    for seed in range(300):
        plan = make_plan([case] * 10, step_generator(seed), mask_token_id=MASK)
        means.append(masked_elbo(lookup, pack_plan(plan, 10_000), 10)[0].mean().item())
        if seed < 3:
            with torch.no_grad():
                found = masked_elbo(shifted, pack_plan(plan, 10_000), 10)[0].mean().item()
            assert found == pytest.approx(means[-1], rel=1e-6)
    assert abs(np.mean(means) - exact) <= 4 * np.std(means) / len(means) ** 0.5


def test_what_cannot_be_planned_gets_a_sentence():
    empty = Example(torch.tensor([5, 6]), torch.tensor([False, False]))
    plan = lambda *cases: make_plan(list(cases), step_generator(0), mask_token_id=MASK)  # noqa: E731
    with pytest.raises(
        ValueError, match=r"example 1 of 2 tokens has none that may be masked.*mean over nothing"
    ):
        plan(example(1, 2), empty)
    with pytest.raises(ValueError, match=r"example 0 contains the mask token \(id 3\)"):
        plan(Example(torch.tensor([MASK, 6]), torch.tensor([False, True])))
    with pytest.raises(ValueError, match="12 draws do not split into batches of 8"):
        reference_likelihood_plan(
            example(1, 2), step_generator(0), mask_token_id=MASK, num_draws=12, batch_size=8
        )


def test_rows_hold_the_budget_and_every_copy_once():
    assert first_fit([3, 9, 4, 2, 12], 10) == [[4], [1], [2, 0, 3]]
    cases = [example(s % 4, 2 + s, s) for s in range(12)]
    plan = make_plan(cases, step_generator(3), mask_token_id=MASK)
    rows = pack_plan(plan, 30)
    assert all(len(row.token_ids_N) <= 30 for row in rows) and len(rows) > 4
    found = Counter(
        tuple(piece.tolist()) for row in rows for piece in row.token_ids_N.split(row.documents.lengths)
    )
    assert found == Counter(tuple(copy.token_ids_T.tolist()) for copy in plan)


def test_the_estimate_does_not_depend_on_the_packing(scorer):
    cases = [example(s % 4, 2 + s, s) for s in range(6)]
    plan = make_plan(cases, step_generator(3), mask_token_id=MASK)
    with torch.no_grad():
        one, many = (masked_elbo(scorer, pack_plan(plan, budget), 6)[0] for budget in (10_000, 20))
    torch.testing.assert_close(one, many, rtol=1e-9, atol=1e-9)
