"""Our advantages, losses and gradients against those of the installed TRL, run as it is on the same numbers.

`trl_step` drives TRL's own `_generate_and_score_completions` and `_compute_loss`; our side packs the same
tokens without padding, sequences in another order. Everything is fp64; values and gradients agree to 1e-6.

Where we differ on purpose, and how a test maps or shows it:
- cispo: `clip_high` is the distance above 1, as in the paper. TRL's `epsilon_high` is the cap itself, and it
  has no lower bound.
- bnpo: token mean of the optimizer step. TRL's is of each micro-batch and changes with gradient accumulation.
- entropy bonus: token mean of the optimizer step. TRL's is of each micro-batch.
- sampler metrics describe the ratio before it is cut or masked. TRL's `importance_sampling_ratio/*`: after.
- kl_bias_correction is off by default. TRL's `use_bias_correction_kl` is on.
- the clip range defaults to that of each loss's paper and kl_coef to 0.001. TRL: 0.2 and 0.
- clip shares are of tokens and count `dual_clip`. TRL counts sequences under gspo, and leaves `delta` out.
Not in TRL, so not compared: reinforce, k1 and k2, rloo and max_rl, the geometric sampler correction.
"""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from trl_step import F64, MAX_COMPLETION_LENGTH, random_rollout, trl_step

from rl.advantages import compute_advantages
from rl.config import AdvantageConfig, LossConfig, SamplerCorrectionConfig
from rl.losses import LOSSES, LossInputs, aggregation_weight, policy_loss
from rl.types import Completion, Group, Prompt, Reward, ScoredGroup

# TRL's loss_type of our names; gspo is its grpo with ratios of whole sequences. TRL has no reinforce.
TRL_NAMES = {name: name for name in LOSSES if name not in ("gspo", "reinforce")} | {"gspo": "grpo"}
CORRECTIONS = (None, ("token", "truncate"), ("token", "mask"), ("sequence", "truncate"), ("sequence", "mask"))


def scored_groups(rollout):
    """The rewards of a rollout as our graders give them: weighted sum and parts, None where all abstain."""
    rows = []
    for scores in rollout.rewards_BK.tolist():
        known = {f"reward_{k}": None if math.isnan(x) else x for k, x in enumerate(scores)}
        products = [w * x for w, x in zip(rollout.weights_K, known.values(), strict=True) if x is not None]
        rows.append(Reward(sum(products) if products else None, parts=known))
    completion = Completion([5], [-1.0], [True], "stop", [])
    size = rollout.group_size
    return [
        ScoredGroup(Group(Prompt(str(i), "?", (3,)), [completion] * size), rows[i : i + size])
        for i in range(0, len(rows), size)
    ]


def our_advantages(rollout, name="grpo", aggregate="sum"):
    weights = {f"reward_{k}": w for k, w in enumerate(rollout.weights_K)}
    config = AdvantageConfig(name=name, aggregate=aggregate)
    groups = compute_advantages(scored_groups(rollout), config=config, weights=weights)
    return torch.tensor([a for group in groups for a in group], dtype=F64)


def our_step(rollout, config, *, rows=None, num_minibatches=1, with_behavior=False):
    """Loss of the optimizer step that trains on `rows` in one micro-batch, and its gradient as (B, T)."""
    size = len(rollout.mask_BT)
    rows = list(range(size)) if rows is None else rows
    counts = rollout.trained_BT.sum(1).tolist()
    weights = [
        aggregation_weight(
            counts[row],
            len(rows),
            sum(counts[r] for r in rows),
            sum(counts) / num_minibatches,
            aggregation=LOSSES[config.name].aggregation,
            max_completion_length=MAX_COMPLETION_LENGTH,
        )
        for row in rows
    ]
    order = rows[::-1]
    index = [(row, t) for row in order for t in range(int(rollout.mask_BT[row].sum()))]
    row_N, column_N = (torch.tensor(x) for x in zip(*index, strict=True))
    old = None if rollout.old_BT is None else rollout.old_BT[row_N, column_N]
    inputs = LossInputs(
        logprobs_N=rollout.logprobs_BT[row_N, column_N],
        advantages_N=our_advantages(rollout)[row_N],
        mask_N=rollout.trained_BT[row_N, column_N],
        sequence_ids_N=torch.tensor([order.index(row) for row, _ in index]),
        num_sequences=len(rows),
        weights_N=torch.tensor([weights[rows.index(row)] for row, _ in index], dtype=F64),
        token_mean_weight=1 / sum(counts[r] for r in rows),
        old_logprobs_N=old,
        behavior_logprobs_N=rollout.behavior_BT[row_N, column_N] if with_behavior else None,
        reference_logprobs_N=rollout.reference_BT[row_N, column_N],
        entropy_N=rollout.entropy_BT[row_N, column_N],
    )
    output = policy_loss(inputs, config=config)
    return output, torch.autograd.grad(output.loss, rollout.logprobs_BT, retain_graph=True)[0]


def loss_config(name, clip=(0.2, 0.2, None), **changes):
    """cispo: a cap of 1 + clip_high and no lower bound."""
    low, high, dual = clip
    plain = {"clip_low": 1.0 if name == "cispo" else low, "clip_high": high, "dual_clip": dual}
    plain |= {"name": name, "kl_coef": 0.0, "sampler_correction": None}
    return LossConfig(**(plain | changes))


def trl_options(config, level):
    """TRL's settings for the same mathematics."""
    correction = config.sampler_correction
    options = {
        "loss_type": TRL_NAMES[config.name],
        "importance_sampling_level": level,
        "epsilon_low": config.clip_low,
        "epsilon_high": 1 + config.clip_high if config.name == "cispo" else config.clip_high,
        "delta": config.dual_clip,
        "beta": config.kl_coef,
        "use_bias_correction_kl": config.kl_bias_correction,
        "entropy_coef": config.entropy_coef,
        "use_vllm": correction is not None,
    }
    if correction:
        options["vllm_importance_sampling_mode"] = f"{correction.level}_{correction.mode}"
        options["vllm_importance_sampling_clip_min"] = correction.low or None
        options["vllm_importance_sampling_clip_max"] = correction.high
    return options


def assert_same_step(rollout, config, level="token", **cut):
    """TRL's loss and gradient, `cut` as it may be, equal ours in one micro-batch."""
    _, (theirs,), (gradient,), metrics = trl_step(rollout, **trl_options(config, level), **cut)
    ours, our_gradient = our_step(rollout, config, with_behavior=config.sampler_correction is not None)
    torch.testing.assert_close(ours.loss, theirs, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(our_gradient, gradient, rtol=1e-6, atol=1e-6)
    return ours, metrics


def variants(name):
    """Clip ranges that the loss reads x KL x sampler correction, its lower bound off and on in turn."""
    clips = [(0.2, 0.2, None), (0.1, 0.4, None), (0.2, 0.3, 1.5)]
    if name == "cispo":
        clips = [(1.0, 0.3, None), (1.0, 4.0, None)]
    elif name == "sapo":
        clips = clips[:1]
    kls = [{}, {"kl_coef": 0.3}, {"kl_coef": 0.3, "kl_bias_correction": True}]
    for i, (clip, kl, how) in enumerate(itertools.product(clips, kls, CORRECTIONS)):
        low = 0.9 if i % 2 else 0.0
        correction = how and SamplerCorrectionConfig(level=how[0], mode=how[1], low=low, high=1.3)
        yield loss_config(name, clip, **kl, sampler_correction=correction)


@pytest.mark.parametrize("with_old", [True, False])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("name", [name for name in TRL_NAMES if name != "gspo"])
def test_loss_and_gradient_equal_trls(name, level, with_old, monkeypatch):
    monkeypatch.setitem(LOSSES, name, replace(LOSSES[name], ratio_level=level))
    for seed, config in enumerate(variants(name)):
        assert_same_step(random_rollout(seed, with_old=with_old), config, level)


@pytest.mark.parametrize("with_old", [True, False])
def test_gspo_is_trls_grpo_with_sequence_ratios(with_old):
    for seed, config in enumerate(variants("gspo")):
        assert_same_step(random_rollout(seed, with_old=with_old), config, "sequence")


@pytest.mark.parametrize("name", [name for name in TRL_NAMES if name != "bnpo"])
def test_trls_two_micro_batches_equal_ours_in_one(name):
    level = LOSSES[name].ratio_level
    config = loss_config(name, (0.2, 4.0 if name == "cispo" else 0.28, None), kl_coef=0.3)
    for seed in range(3):
        assert_same_step(random_rollout(seed), config, level, num_micro_batches=2)


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "dapo", "cispo", "sapo", "gspo"])
def test_two_optimizer_steps_of_a_batch_equal_trls(name):
    level = LOSSES[name].ratio_level
    config = loss_config(name, (0.2, 4.0 if name == "cispo" else 0.28, None))
    rollout = random_rollout(5)
    tokens = rollout.trained_BT.sum(1)
    assert tokens[:3].sum() != tokens[3:].sum()
    _, losses, gradients, _ = trl_step(rollout, num_minibatches=2, **trl_options(config, level))
    for rows, theirs, gradient in zip(([0, 1, 2], [3, 4, 5]), losses, gradients, strict=True):
        ours, our_gradient = our_step(rollout, config, rows=rows, num_minibatches=2)
        torch.testing.assert_close(ours.loss, theirs, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(our_gradient, gradient, rtol=1e-6, atol=1e-6)


def test_entropy_bonus_equals_trls_in_one_micro_batch():
    config = loss_config("grpo", entropy_coef=0.2)
    rollout = random_rollout(0)
    _, (theirs,), _, _ = trl_step(rollout, **trl_options(config, "token"))
    ours, _ = our_step(rollout, config)
    torch.testing.assert_close(ours.loss, theirs, rtol=1e-6, atol=1e-6)
    (gradient,) = torch.autograd.grad(theirs, rollout.entropy_BT, retain_graph=True)
    (our_gradient,) = torch.autograd.grad(ours.loss, rollout.entropy_BT)
    torch.testing.assert_close(our_gradient, gradient, rtol=1e-6, atol=1e-9)
    assert our_gradient.abs().max() > 1e-3


def test_trls_bnpo_and_entropy_bonus_change_with_gradient_accumulation_and_ours_cannot():
    rollout = random_rollout(5)
    for config in (loss_config("bnpo"), loss_config("grpo", entropy_coef=0.2)):
        whole, halves = (
            trl_step(rollout, num_micro_batches=n, **trl_options(config, "token"))[1][0].item()
            for n in (1, 2)
        )
        assert our_step(rollout, config)[0].loss.item() == pytest.approx(whole, abs=1e-6)
        assert abs(whole - halves) > 1e-3


def test_cispo_of_trl_caps_at_epsilon_high_itself():
    # On-policy every ratio is 1: TRL's default epsilon_high of 0.2 scales the gradient by 0.2, ours by 1.
    rollout = random_rollout(0, with_old=False)
    _, _, (gradient,), _ = trl_step(rollout, loss_type="cispo", epsilon_high=0.2)
    _, our_gradient = our_step(rollout, loss_config("cispo", (1.0, 4.0, None)))
    torch.testing.assert_close(gradient, 0.2 * our_gradient, rtol=1e-6, atol=1e-9)
    assert gradient.abs().max() > 1e-3


def test_metrics_equal_trls():
    config = loss_config("grpo", kl_coef=0.1, sampler_correction=SamplerCorrectionConfig())
    for seed in range(3):
        rollout = random_rollout(seed)
        ours, theirs = assert_same_step(rollout, config)
        means = {name: (total / count).item() for name, (total, count) in ours.metrics.items()}
        assert means["policy/kl"] == pytest.approx(theirs["kl"][0], abs=1e-6)
        assert means["policy/entropy"] == pytest.approx(theirs["entropy"][0], abs=1e-6)
        assert means["policy/clip_low"] == pytest.approx(theirs["clip_ratio/low_mean"][0], abs=1e-6)
        assert means["policy/clip_high"] == pytest.approx(theirs["clip_ratio/high_mean"][0], abs=1e-6)
        assert means["policy/clip_fraction"] == pytest.approx(theirs["clip_ratio/region_mean"][0], abs=1e-6)
        gap = theirs["sampling/sampling_logp_difference/max"][0]
        assert ours.maxima["sampler/logprob_gap_max"].item() == pytest.approx(gap, abs=1e-6)


@pytest.mark.parametrize(
    ("name", "aggregate", "options"),
    [
        ("grpo", "sum", {"scale_rewards": "group"}),
        ("centered", "sum", {"scale_rewards": "none"}),
        ("batch", "sum", {"scale_rewards": "batch"}),
        ("grpo", "gdpo", {"multi_objective_aggregation": "normalize_then_sum"}),
    ],
)
@pytest.mark.parametrize("abstain", [0.0, 0.4])
def test_advantages_equal_trls(name, aggregate, options, abstain):
    abstained = 0
    for seed in range(20):
        rollout = random_rollout(
            seed, num_groups=3, group_size=4, abstain=abstain, num_rewards=2, weights=(2.0, 0.5)
        )
        made, *_ = trl_step(rollout, **options)
        ours = our_advantages(rollout, name, aggregate)
        torch.testing.assert_close(ours, made["advantages"], rtol=1e-6, atol=1e-6)
        abstained += int(rollout.rewards_BK.isnan().all(1).sum())
    assert (abstained > 0) == (abstain > 0)
