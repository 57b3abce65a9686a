"""The sampler against the printed algorithm, and its laws: a row is alone, a cache that is refreshed at each
step is exact, the commit map tells what happened.
"""

from __future__ import annotations

import copy
import itertools
import re

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from rollout.diffusion.canvas import Batch, Row
from rollout.diffusion.denoise import denoise, prompt_canvas
from rollout.diffusion.model import KeyValues, Layout, TransformersDenoiser
from rollout.diffusion.steps import DenoisingParams, counter_uniforms, transfer_schedule
from tests.diffusion.plain_sampler import full_attention_logits, plain_generate

V, MASK, END = 40, 39, 3


@pytest.fixture(scope="module")
def model():
    """float64, weights so large that confidences differ by far more than rounding."""
    config = LlamaConfig(
        vocab_size=V,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation="sdpa",
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(config).double().eval()


@pytest.fixture(scope="module")
def denoiser(model):
    return TransformersDenoiser(model, MASK)


PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [12, 13], [14, 15, 16, 17, 18], [20]]


def completions(denoiser, prompts, params, **options):
    canvases = [prompt_canvas(p, params, denoiser.mask_token_id) for p in prompts]
    options.setdefault("seeds", list(range(len(prompts))))
    return denoise(denoiser, canvases, params, **options)


def texts(denoiser, prompts, params, **options):
    found = completions(denoiser, prompts, params, **options)
    return [d.token_ids[len(p) :] for p, d in zip(prompts, found, strict=True)]


GRID = [(b, s) for b in (2, 4, 12) for s in (5, 6, 9, 12, 24) if s % (12 // b) == 0]


@pytest.mark.parametrize("cfg", [0.0, 1.5])
def test_attention_within_runs_is_left_to_a_kernel_that_serves(model, denoiser, cfg, monkeypatch):
    """What a GPU's flash kernel is asked for, by plain torch: a run for each row, in the packed order."""
    asked = []

    def attend(query, key, value, ends_S, longest, scale):
        ends = ends_S.tolist()
        lengths = [b - a for a, b in itertools.pairwise(ends)]
        assert ends_S.dtype == torch.int32 and ends[-1] == query.shape[2] and max(lengths) == longest
        asked.append(lengths)
        pieces = zip(*(x.split(lengths, dim=2) for x in (query, key, value)), strict=True)
        out = [scaled_dot_product_attention(*p, scale=scale, enable_gqa=True) for p in pieces]
        return torch.cat(out, dim=2)[0].transpose(0, 1)

    params = DenoisingParams(12, block_length=4, steps=6, cfg_scale=cfg)
    expected = texts(denoiser, PROMPTS, params)
    monkeypatch.setattr("rollout.diffusion.model.run_attention", attend)
    assert texts(TransformersDenoiser(model, MASK), PROMPTS, params) == expected
    assert sorted(set(asked[0])) == sorted({len(p) + 12 for p in PROMPTS})


@pytest.mark.parametrize(("block", "steps"), GRID)
@pytest.mark.parametrize("cfg", [0.0, 1.5])
def test_equals_the_printed_algorithm_at_temperature_0(model, denoiser, block, steps, cfg):
    """12 tokens in blocks of 2, 4 and 12, by 5 to 24 steps; prompts of equal and of ragged lengths."""
    params = DenoisingParams(12, block_length=block, steps=steps, cfg_scale=cfg)
    settings = {"mask_id": MASK, "gen_length": 12, "block_length": block, "steps": steps, "cfg_scale": cfg}
    for prompts in ([[5, 6, 7], [12, 13, 14]], PROMPTS):
        expected = plain_generate(model, prompts, **settings).tolist()
        assert texts(denoiser, prompts, params) == expected


VARIANTS = [
    DenoisingParams(8, block_length=4),
    DenoisingParams(8, block_length=4, steps=4, temperature=1.0),
    DenoisingParams(8, block_length=8, temperature=0.7, remasking="random"),
    DenoisingParams(8, block_length=2, temperature=1.0, remasking="margin"),
    DenoisingParams(8, block_length=4, temperature=1.0, remasking="entropy", cfg_scale=0.5),
    DenoisingParams(8, block_length=4, threshold=0.3, temperature=1.0),
    DenoisingParams(8, block_length=4, threshold=0.3, stop_token_ids=(5, 6, 7), temperature=1.0),
    DenoisingParams(8, block_length=4, cache="prefix", temperature=1.0),
    DenoisingParams(8, block_length=4, cache="dual", refresh_every=2, cfg_scale=0.5, temperature=1.0),
    DenoisingParams(8, block_length=4, cache="dual", threshold=0.3, stop_token_ids=(5, 6), temperature=1.0),
]


@pytest.mark.parametrize("params", VARIANTS)
def test_a_row_does_not_depend_on_its_batch_mates(denoiser, params):
    """Together, three at a time with rows that leave and join, and one by one: the same tokens and steps."""
    prompts = [*PROMPTS, [21, 22, 23], [24], [25, 26, 27, 28, 29, 30]]
    seeds = [100 + i for i in range(len(prompts))]
    together = completions(denoiser, prompts, params, seeds=seeds)
    in_threes = completions(denoiser, prompts, params, seeds=seeds, max_rows=3)
    alone = [completions(denoiser, [p], params, seeds=[s])[0] for p, s in zip(prompts, seeds, strict=True)]
    for a, b, c in zip(together, in_threes, alone, strict=True):
        assert a.token_ids == b.token_ids == c.token_ids
        assert a.commit_steps == b.commit_steps == c.commit_steps
        assert a.logprobs == pytest.approx(c.logprobs, abs=1e-9)
    assert len({tuple(d.token_ids[-8:]) for d in together}) > 1


@pytest.mark.parametrize("cache", ["prefix", "dual"])
@pytest.mark.parametrize("extra", [{}, {"cfg_scale": 1.0}, {"threshold": 0.4}])
def test_a_cache_that_is_refreshed_at_every_step_changes_nothing(denoiser, cache, extra):
    settings = {"gen_length": 12, "block_length": 6, "temperature": 1.0, **extra}
    exact = completions(denoiser, PROMPTS, DenoisingParams(**settings))
    cached = completions(denoiser, PROMPTS, DenoisingParams(**settings, cache=cache, refresh_every=1))
    assert cached == exact
    stale = completions(denoiser, PROMPTS, DenoisingParams(**settings, cache=cache))
    assert stale != exact  # so that the test could fail


@pytest.mark.parametrize("computed", [(3, 9), (5, 7), (0, 9)])
def test_kept_keys_give_the_hidden_states_of_a_whole_pass(denoiser, computed):
    """As long as the canvas does not change, columns computed against kept ones are those of a full pass."""
    ids = torch.randint(4, 30, (3, 9), generator=torch.Generator().manual_seed(1))
    lengths, kept = [9, 8, 9], KeyValues()
    with torch.no_grad():
        whole = Layout.of([(0, n) for n in lengths], lengths, device=denoiser.device, kept=kept)
        expected = denoiser.hidden(ids[whole.rows_N, whole.columns_N], whole)
        ranges = [(computed[0], min(computed[1], n)) for n in lengths]
        part = Layout.of(ranges, lengths, device=denoiser.device, kept=kept)
        found = denoiser.hidden(ids[part.rows_N, part.columns_N], part)
    same = whole.offsets_R[part.rows_N] + part.columns_N
    torch.testing.assert_close(found, expected[same], rtol=0, atol=1e-12)


def test_the_commit_map_replays_the_denoising(model, denoiser):
    """At each step, the canvas of what was committed before gives the log-probs that were recorded."""
    params = DenoisingParams(12, block_length=6, steps=6, temperature=0.8, stop_token_ids=(4, 5, 6))
    for prompt, row in zip(PROMPTS, completions(denoiser, PROMPTS, params), strict=True):
        steps, ids = torch.tensor(row.commit_steps), torch.tensor(row.token_ids)
        assert steps[: len(prompt)].tolist() == [-1] * len(prompt)
        for step in range(row.num_steps):
            canvas = torch.where(steps < step, ids, MASK)[None]
            logits = full_attention_logits(model, canvas, torch.ones_like(canvas, dtype=torch.bool))[0]
            logits[:, MASK] = -torch.inf
            logprobs = (logits / 0.8).log_softmax(-1).gather(-1, ids.clamp(max=MASK)[:, None])[:, 0]
            now = steps == step
            assert now.sum() == 2
            torch.testing.assert_close(
                logprobs[now], torch.tensor(row.logprobs, dtype=torch.float64)[now], rtol=0, atol=1e-9
            )
        never = ids == MASK
        assert (steps[never] == row.num_steps).all()
        assert row.stopped == bool(never.any()) or row.end == len(ids)


def test_rows_end_with_the_block_that_completes_their_text(denoiser):
    """Up to and including the end token the text is that of a run without end tokens, at fewer calls."""
    full = DenoisingParams(12, block_length=2, temperature=1.0)
    stop = DenoisingParams(12, block_length=2, temperature=1.0, stop_token_ids=tuple(range(4, 12)))
    prompts = [[5, 6], [7]] * 8
    whole, cut = (completions(denoiser, prompts, p) for p in (full, stop))
    assert {row.stopped for row in cut} == {True, False} or all(row.stopped for row in cut)
    for prompt, a, b in zip(prompts, whole, cut, strict=True):
        assert a.token_ids[: b.end] == b.token_ids[: b.end]
        text = a.token_ids[len(prompt) :]
        first = next((i for i, token in enumerate(text) if token in stop.stop_token_ids), None)
        assert b.stopped == (first is not None)
        if first is not None:
            assert b.end == len(prompt) + first + 1
            assert b.num_steps == first // 2 * 2 + 2 <= a.num_steps == 12


def test_masks_anywhere_are_filled_and_given_tokens_stay(model, denoiser):
    """Infilling equals the printed algorithm on the same canvas; an end token that was given ends nothing."""
    canvas = [5, MASK, 7, MASK, MASK, END, 11, MASK, 13]
    params = DenoisingParams(8, block_length=8, stop_token_ids=(END,))
    (row,) = denoise(denoiser, [canvas], params, seeds=[0])
    assert [t for t, c in zip(row.token_ids, canvas, strict=True) if c != MASK] == [5, 7, END, 11, 13]
    assert MASK not in row.token_ids and not row.stopped and row.end == 9 and row.num_steps == 4
    x = torch.tensor([canvas])
    while (masked := x == MASK).any():
        logits = full_attention_logits(model, x, torch.ones_like(masked))
        logits[..., MASK] = -torch.inf
        p, token = logits.softmax(-1).max(-1)
        best = torch.where(masked, p, -1.0).argmax()
        x[0, best] = token[0, best]
    assert row.token_ids == x[0].tolist()


def test_threshold_commits_all_that_are_sure_and_always_one(model, denoiser):
    for tau in (0.1, 0.2, 1.0):
        params = DenoisingParams(12, block_length=6, threshold=tau)
        (row,) = completions(denoiser, [[5, 6, 7]], params)
        x = torch.tensor([prompt_canvas([5, 6, 7], params, MASK)])
        calls = 0
        for start in (3, 9):
            while (
                masked := (x == MASK) & (torch.arange(15) >= start) & (torch.arange(15) < start + 6)
            ).any():
                logits = full_attention_logits(model, x, torch.ones_like(masked))
                logits[..., MASK] = -torch.inf
                p, token = logits.softmax(-1).max(-1)
                p = torch.where(masked, p, -1.0)
                commit = (p > tau) | (p == p.max())
                x = torch.where(commit & masked, token, x)
                calls += 1
        assert row.token_ids == x[0].tolist() and row.num_steps == calls
        assert (calls == 12) == (tau == 1.0)


def test_shifted_outputs_predict_from_the_left_neighbour(model):
    """Dream's alignment: the first step at temperature 0 commits the argmax of the column before."""
    denoiser = TransformersDenoiser(model, MASK, shift=True)
    for cache in ("none", "prefix", "dual"):
        params = DenoisingParams(6, block_length=3, steps=6, cache=cache, refresh_every=2)
        (row,) = completions(denoiser, [[5, 6, 7]], params)
        x = torch.tensor([[5, 6, 7, *[MASK] * 6]])
        logits = full_attention_logits(model, x, torch.ones_like(x, dtype=torch.bool))[0]
        logits[:, MASK] = -torch.inf
        p, token = logits[2:5].softmax(-1).max(-1)
        best = int(p.argmax())
        assert row.commit_steps[3 + best] == 0
        assert row.token_ids[3 + best] == token[best]
        together = completions(denoiser, PROMPTS, params)
        alone = [completions(denoiser, [p], params)[0].token_ids for p in PROMPTS]
        assert [row.token_ids for row in together] == alone


def test_draws_follow_the_distribution_at_the_temperature(model, denoiser):
    """4,000 rows of one mask: frequencies against softmax(logits / T), chi-squared below its 99.99 %
    quantile.
    """
    prompt = [5, 6, 7]
    params = DenoisingParams(1, block_length=1, temperature=2.0)
    rows = completions(denoiser, [prompt] * 4000, params, max_rows=4000)
    canvas = torch.tensor([prompt_canvas(prompt, params, MASK)])
    logits = full_attention_logits(model, canvas, torch.ones_like(canvas, dtype=torch.bool))[0, -1]
    logits[MASK] = -torch.inf
    p = (logits / 2.0).softmax(-1).detach()
    counts = torch.bincount(torch.tensor([row.token_ids[-1] for row in rows]), minlength=V).double()
    kept = p * 4000 >= 5
    observed = torch.cat([counts[kept], counts[~kept].sum()[None]])
    expected = torch.cat([p[kept], p[~kept].sum()[None]]) * 4000
    degrees = int(kept.sum())
    assert degrees > 8
    statistic = ((observed - expected) ** 2 / expected.clamp(min=1e-9)).sum().item()
    assert statistic < degrees + 4 * (2 * degrees) ** 0.5 + 8  # above the quantile for all these degrees


def test_end_tokens_can_wait_for_all_others(denoiser):
    """`stop_last`: within a block every other candidate is committed before an end token is."""
    ends = tuple(range(0, 20))
    params = DenoisingParams(8, block_length=8, temperature=1.0, stop_token_ids=ends, stop_last=True)
    for row in completions(denoiser, PROMPTS, params):
        by_step = sorted(zip(row.commit_steps, row.token_ids, strict=True))[-8:]
        kinds = [token in ends for _, token in by_step]
        # A column may draw an end token at one step and another at the next, but ends are committed only
        # where nothing else was on offer: never before a step that had another candidate at hand.
        assert not kinds[0] or all(kinds)


def test_suppressed_tokens_are_never_drawn(denoiser):
    banned = tuple(range(0, 38))
    params = DenoisingParams(8, block_length=4, temperature=3.0, suppress_token_ids=banned)
    assert {t for row in texts(denoiser, PROMPTS, params) for t in row} == {38}


def test_time_that_runs_out_leaves_rows_unfinished(denoiser):
    params = DenoisingParams(8, block_length=4)
    assert completions(denoiser, PROMPTS, params, deadline=0.0) == [None] * 4


def test_broken_weights_are_said(model):
    broken = copy.deepcopy(model)
    broken.lm_head.weight.data[7] = torch.nan
    params = DenoisingParams(4, block_length=4)
    rows = completions(TransformersDenoiser(broken, MASK), [[5], [6, 7]], params)
    assert [row.finite for row in rows] == [False, False]
    assert all(row.finite for row in completions(TransformersDenoiser(model, MASK), [[5]], params))


def test_the_models_own_attention_is_back_after_sampling(model, denoiser):
    completions(denoiser, PROMPTS, DenoisingParams(4, block_length=4))
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gen_length": 100, "block_length": 32}, "gen_length=96 or 128, or block_length in [1, 2, 4, 5, 10"),
        ({"gen_length": 64, "block_length": 16, "steps": 30}, "4 blocks .* use steps=28 or 32"),
        ({"gen_length": 64, "block_length": 16, "steps": 3}, "use steps=4"),
        ({"gen_length": 8, "block_length": 8, "threshold": 1.5}, "use 0.9, or None"),
        (
            {"gen_length": 8, "block_length": 8, "remasking": "best"},
            "low_confidence, random, margin, entropy",
        ),
        ({"gen_length": 8, "block_length": 8, "cache": "full"}, "none, prefix, dual"),
        ({"gen_length": 8, "block_length": 8, "temperature": -1}, "must not be negative"),
    ],
)
def test_settings_that_cannot_be_are_refused_with_what_would_work(settings, message):
    pattern = re.escape(message).replace(r"\ \.\*\ ", " .* ")
    with pytest.raises(ValueError, match=pattern):
        DenoisingParams(**settings)


def test_canvases_that_cannot_be_filled_are_refused(model, denoiser):
    params = DenoisingParams(8, block_length=8)
    with pytest.raises(
        ValueError, match=r"canvas 0 has 68 tokens, 60 of them before the first mask.* 64; .* by 4"
    ):
        completions(denoiser, [[5] * 60], params)
    with pytest.raises(ValueError, match="canvas 1 holds no mask token \\(39\\)"):
        denoise(denoiser, [[5, MASK], [5]], params, seeds=[0, 1])
    with pytest.raises(ValueError, match="1 seeds for 2 canvases"):
        denoise(denoiser, [[5, MASK], [5, MASK]], params, seeds=[0])
    with pytest.raises(ValueError, match="a text would end where it has not been written"):
        denoise(denoiser, [[5, MASK]], DenoisingParams(8, block_length=8, stop_token_ids=(MASK,)), seeds=[0])
    with pytest.raises(ValueError, match="begin the prompt with a token"):
        denoise(TransformersDenoiser(model, MASK, shift=True), [[MASK]], params, seeds=[0])
    with pytest.raises(ValueError, match="the model has no mask token"):
        TransformersDenoiser(model)
    with pytest.raises(ValueError, match="mask_token_id=40 has no row in the embedding of 40"):
        TransformersDenoiser(model, 40)


@pytest.mark.parametrize(("masks", "steps"), itertools.product([1, 5, 12, 32], [1, 3, 12, 40]))
def test_the_schedule_spreads_tokens_evenly_larger_steps_first(masks, steps):
    schedule = transfer_schedule(masks, steps)
    assert sum(schedule) == masks and len(schedule) == min(masks, steps)
    assert sorted(schedule, reverse=True) == schedule and max(schedule) - min(schedule) <= 1


def test_counter_uniforms_are_uniform_and_unrelated():
    """65,536 numbers along each argument: chi-squared over 256 cells (mean 255, deviation 22.6), and no
    correlation between neighbours (deviation 1/256).
    """
    zero, run = torch.zeros(65536, dtype=torch.int64), torch.arange(65536)
    for seeds, steps, columns in ((run, zero, zero), (zero, run, zero), (zero, zero, run), (run, run, run)):
        for stream in (0, 1):
            u = counter_uniforms(seeds, steps, columns, stream)
            assert u.min() >= 0 and u.max() < 1
            counts = torch.histc(u, 256, 0, 1)
            assert ((counts - 256) ** 2 / 256).sum() < 255 + 5 * 22.6
            assert torch.corrcoef(torch.stack([u[1:], u[:-1]]))[0, 1].abs() < 5 / 256
    grid = torch.cartesian_prod(torch.arange(30), torch.arange(30), torch.arange(30))
    both = [counter_uniforms(*grid.unbind(1), stream) for stream in (0, 1)]
    assert len(torch.cat(both).unique()) == 2 * 30**3


class Operations(TorchDispatchMode):
    """The names of all operations that tensors go through."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("params", VARIANTS[:5])
def test_within_a_block_nothing_is_read_back_from_the_device(denoiser, params):
    """No operation whose result decides a shape or a branch; tests/gpu asks the driver itself."""
    batch = Batch(denoiser, params)
    for i, prompt in enumerate(PROMPTS):
        batch.rows.append(
            Row.of(i, prompt_canvas(prompt, params, MASK), seed=i, params=params, model=denoiser)
        )
    with torch.no_grad(), Operations() as seen:
        assert batch.step() == []
    assert "index_put" in seen.names or "index_put_" in seen.names
    assert not seen.names & {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "_unique2"}
