import math
from dataclasses import replace

import pytest
import torch
from loss_cases import EVERYTHING, LOG2, column, config_of, inputs_of, loss_and_gradient, mean, ragged

from rl.config import LossConfig, SamplerCorrectionConfig
from rl.losses import LOSSES, aggregation_weight, policy_loss
from rl.store import metrics

CLIPPED = ("grpo", "dr_grpo", "bnpo", "dapo", "gspo")


@pytest.mark.parametrize(
    ("ratio", "advantage", "dual_clip", "loss", "slope"),
    [
        (1.1, 2.0, None, -2.2, -2.2),  # inside: -r A, and d(-r A)/d log p = -r A
        (2.0, 1.0, None, -1.2, 0.0),  # above with A > 0: clipped at 1.2
        (0.5, 1.0, None, -0.5, -0.5),  # below with A > 0: pulled back
        (0.5, -1.0, None, 0.8, 0.0),  # below with A < 0: clipped at 0.8
        (2.0, -1.0, None, 2.0, 2.0),  # above with A < 0: pushed down without bound
        (2.0, -1.0, 3.0, 2.0, 2.0),  # dual clip not reached
        (5.0, -1.0, 3.0, 3.0, 0.0),  # dual clip: -c A
        (5.0, 1.0, 3.0, -1.2, 0.0),  # dual clip does nothing for A > 0
    ],
)
@pytest.mark.parametrize("name", CLIPPED)
def test_clipped_loss_by_hand(name, ratio, advantage, dual_clip, loss, slope):
    inputs = inputs_of([math.log(ratio)], [advantage])
    value, (gradient,) = loss_and_gradient(inputs, config_of(name, dual_clip=dual_clip))
    assert value == pytest.approx(loss, rel=1e-14)
    assert gradient == pytest.approx(slope, rel=1e-14)


@pytest.mark.parametrize(
    ("ratio", "weight"),
    [(0.25, 0.5), (1.5, 1.5), (8.0, 5.0)],  # clip_low 0.5 and clip_high 4: weights in [0.5, 5]
)
def test_cispo_clips_the_weight_and_keeps_the_gradient(ratio, weight):
    inputs = inputs_of([math.log(ratio)], [2.0])
    value, (gradient,) = loss_and_gradient(inputs, config_of("cispo", clip_low=0.5, clip_high=4.0))
    # -w A log p with A = 2, log p = log(ratio) - 1; gradient -w A.
    assert value == pytest.approx(-weight * 2 * (math.log(ratio) - 1), rel=1e-14)
    assert gradient == pytest.approx(-weight * 2, rel=1e-14)


def test_sapo_by_hand():
    # tau 2 for A > 0, 4 otherwise; sigmoid(0) = 1/2 at ratio 1, slope there 4/tau * tau/4 * r A = A.
    config = config_of("sapo", sapo_temperatures=(2.0, 4.0))
    value, (gradient,) = loss_and_gradient(inputs_of([0.0], [3.0]), config)
    assert (value, gradient) == pytest.approx((-4 / 2 * 0.5 * 3, -3.0), rel=1e-14)
    value, _ = loss_and_gradient(inputs_of([LOG2], [-1.0]), config)
    assert value == pytest.approx(4 / 4 / (1 + math.exp(-4.0 * (2 - 1))), rel=1e-14)
    value, _ = loss_and_gradient(inputs_of([LOG2], [1.0]), config)
    assert value == pytest.approx(-4 / 2 / (1 + math.exp(-2.0 * (2 - 1))), rel=1e-14)


def test_sapo_temperatures_keep_fp64():
    # 1.05 is not representable in fp32; at ratio 2 the loss is 4/1.05 sigmoid(1.05) for A = -1.
    value, _ = loss_and_gradient(inputs_of([LOG2], [-1.0]), config_of("sapo"))
    assert value == pytest.approx(4 / 1.05 / (1 + math.exp(-1.05)), rel=1e-14)


def test_reinforce_by_hand():
    value, (gradient,) = loss_and_gradient(inputs_of([LOG2], [3.0]), config_of("reinforce"))
    assert value == pytest.approx(-3 * (LOG2 - 1), rel=1e-14)
    assert gradient == -3.0


def test_gspo_ratio_is_the_geometric_mean_of_its_own_sequence():
    # Sequence 0: log ratios 0.3 and 0.1, mean 0.2, ratio e^0.2 = 1.2214 below 1 + clip_high = 1.25.
    # Sequence 1: log ratio -0.1. Loss with A = 1: -(2 e^0.2 + e^-0.1).
    inputs = inputs_of([0.3, 0.1, -0.1], [1.0] * 3, sequence_ids=[0, 0, 1])
    value, gradient = loss_and_gradient(inputs, config_of("gspo", clip_high=0.25))
    assert value == pytest.approx(-(2 * math.exp(0.2) + math.exp(-0.1)), rel=1e-14)
    # d/d log p of either token of sequence 0: 2 tokens * e^0.2 / 2.
    assert gradient == pytest.approx([-math.exp(0.2), -math.exp(0.2), -math.exp(-0.1)], rel=1e-14)


def test_gspo_ratio_ignores_other_sequences_and_masked_tokens():
    config = config_of("gspo")
    inputs = inputs_of([0.1, 9.0, 0.05], [1.0, 1.0, -1.0], sequence_ids=[0, 0, 1], mask=[True, False, True])
    _, gradient = loss_and_gradient(inputs, config)
    other = inputs_of([0.1, -5.0, 0.15], [1.0, 1.0, -1.0], sequence_ids=[0, 0, 1], mask=[True, False, True])
    _, changed = loss_and_gradient(other, config)
    assert gradient[0] == changed[0] == pytest.approx(-math.exp(0.1), rel=1e-14)
    assert gradient[1] == changed[1] == 0.0


def test_aggregation_weights_by_hand():
    # Two minibatches: this one has sequences of 3, 1 and 0 loss tokens, the other 6 tokens; mean 10 / 2 = 5.
    def weights(aggregation):
        return [
            aggregation_weight(n, 3, 4, 5.0, aggregation=aggregation, max_completion_length=8)
            for n in (3, 1, 0)
        ]

    assert weights("sequence") == [1 / 9, 1 / 3, 0.0]
    assert weights("constant") == [1 / 24, 1 / 24, 0.0]
    assert weights("step_tokens") == [1 / 4, 1 / 4, 0.0]
    assert weights("batch_tokens") == [1 / 5, 1 / 5, 0.0]


def test_every_loss_averages_as_its_paper_says():
    assert {name: loss.aggregation for name, loss in LOSSES.items()} == {
        "grpo": "sequence",
        "dr_grpo": "constant",
        "bnpo": "step_tokens",
        "dapo": "batch_tokens",
        "gspo": "sequence",
        "cispo": "batch_tokens",
        "sapo": "sequence",
        "reinforce": "step_tokens",
    }


def test_entropy_bonus_is_a_token_mean():
    entropy = column(1.0, 3.0, 100.0).requires_grad_()
    inputs = inputs_of([0.0] * 3, [0.0] * 3, mask=[True, True, False], entropy_N=entropy)
    inputs = replace(inputs, token_mean_weight=1 / 2)
    output = policy_loss(inputs, config=config_of(entropy_coef=0.1))
    assert output.loss.item() == pytest.approx(-0.1 * (1 + 3) / 2, rel=1e-14)
    (gradient,) = torch.autograd.grad(output.loss, entropy)
    assert gradient.tolist() == pytest.approx([-0.05, -0.05, 0.0], rel=1e-14)


def test_clip_shares_by_hand():
    # Ratios 2, 0.5, 2, 0.5, 1, 5 with A = 1, 1, -1, -1, 1, -1: high {0}, low {3}; dual clip at 3: {5}.
    inputs = inputs_of([LOG2, -LOG2, LOG2, -LOG2, 0.0, math.log(5)], [1.0, 1.0, -1.0, -1.0, 1.0, -1.0])
    output = policy_loss(inputs, config=config_of())
    shares = [mean(output, f"policy/clip_{key}") for key in ("low", "high", "fraction")]
    assert shares == pytest.approx([1 / 6, 1 / 6, 2 / 6])
    output = policy_loss(inputs, config=config_of(dual_clip=3.0))
    assert mean(output, "policy/clip_fraction") == pytest.approx(3 / 6)
    output = policy_loss(inputs, config=config_of("cispo", clip_low=1.0, clip_high=1.5))
    shares = [mean(output, f"policy/clip_{key}") for key in ("low", "high", "fraction")]
    assert shares == pytest.approx([0, 1 / 6, 1 / 6])  # weights above 2.5, whatever the sign of A
    assert output.maxima["policy/ratio_max"].item() == pytest.approx(5.0)
    assert mean(output, "policy/ratio_mean") == pytest.approx((2 + 0.5 + 2 + 0.5 + 1 + 5) / 6)


def test_clipped_tokens_are_those_without_gradient():
    inputs = ragged((40, 40), seed=3)
    config = config_of(dual_clip=1.5)
    output = policy_loss(inputs, config=config)
    (gradient,) = torch.autograd.grad(output.loss, inputs.logprobs_N)
    without = ((gradient == 0) & inputs.mask_N).sum().item()
    assert output.metrics["policy/clip_fraction"][0].item() == without > 10


def test_sampler_metrics_are_taken_before_the_correction():
    # old - behavior = log 2, -log 4, 0 (and a masked 9): ratios 2, 1/4, 1, bounds [0.5, 1.5].
    inputs = inputs_of(
        [0.0] * 4,
        [1.0] * 4,
        mask=[True, True, True, False],
        behavior_logprobs_N=column(-1 - LOG2, -1 + 2 * LOG2, -1, 8),
    )
    config = config_of(sampler_correction=SamplerCorrectionConfig(mode="mask", low=0.5, high=1.5))
    output = policy_loss(inputs, config=config)
    assert mean(output, "sampler/ratio_mean") == pytest.approx((2 + 0.25 + 1) / 3)
    assert output.maxima["sampler/ratio_max"].item() == pytest.approx(2)
    assert output.minima["sampler/ratio_min"].item() == pytest.approx(0.25)
    assert mean(output, "sampler/share_beyond") == pytest.approx(2 / 3)
    assert mean(output, "sampler/logprob_gap_mean") == pytest.approx((LOG2 + 2 * LOG2) / 3)
    assert output.maxima["sampler/logprob_gap_max"].item() == pytest.approx(2 * LOG2)
    # k3 with r = policy / sampler: r - log r - 1: 2 - log 2 - 1, 1/4 + log 4 - 1, 0.
    assert mean(output, "sampler/mismatch_kl") == pytest.approx(((1 - LOG2) + (2 * LOG2 - 0.75)) / 3)


def test_kl_and_entropy_are_logged_without_their_terms():
    inputs = inputs_of(
        [0.0, 0.0], [1.0, 1.0], reference_logprobs_N=column(-2.0, -1.0), entropy_N=column(0.5, 1.5)
    )
    output = policy_loss(inputs, config=config_of())
    assert output.loss.item() == -2.0
    assert mean(output, "policy/kl") == pytest.approx(math.exp(-1) / 2)  # d = -1: e^-1 + 1 - 1; d = 0: 0
    assert mean(output, "policy/entropy") == 1.0


def test_metrics_carry_no_graph():
    output = policy_loss(ragged(), config=config_of(**EVERYTHING))
    values = [v for pair in output.metrics.values() for v in pair] + [
        *output.maxima.values(),
        *output.minima.values(),
    ]
    assert len(values) == 2 * 10 + 3 + 1
    assert not any(v.requires_grad for v in values)


def test_every_metric_is_known_to_the_metrics_file():
    output = policy_loss(ragged(), config=config_of(**EVERYTHING))
    for name in (*output.metrics, *output.maxima):
        assert metrics.metric_of(name).name == name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"kl_coef": 0.1},
            r"loss\.kl_coef is on but lacks the log-probs of a reference.* set loss\.kl_coef=0",
        ),
        ({"entropy_coef": 0.1}, r"loss\.entropy_coef is on but lacks the policy's entropies"),
        (
            {"sampler_correction": SamplerCorrectionConfig()},
            r"lacks the log-probs that the engine sampled with; .* set loss\.sampler_correction=null",
        ),
    ],
)
def test_a_term_without_its_input_is_an_error(changes, message):
    with pytest.raises(ValueError, match=message):
        policy_loss(inputs_of([0.0], [1.0]), config=config_of(**changes))


def test_clip_range_defaults_to_that_of_the_losses_paper():
    ranges = {name: (LossConfig(name=name).clip_low, LossConfig(name=name).clip_high) for name in LOSSES}
    assert ranges["gspo"] == (3e-4, 4e-4)
    assert ranges["dapo"] == (0.2, 0.28)
    assert ranges["cispo"] == (1.0, 4.0)
    assert ranges["grpo"] == ranges["dr_grpo"] == ranges["bnpo"] == (0.2, 0.2)
    assert LossConfig(name="gspo", clip_high=0.1).clip_high == 0.1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"dual_clip": 1.1},
            r"loss\.dual_clip=1\.1 must be above 1 \+ loss\.clip_high = 1\.2; use loss\.dual_clip=3\.0",
        ),
        ({"name": "sapo", "dual_clip": 3.0}, r"loss\.dual_clip does nothing under loss\.name=sapo"),
    ],
)
def test_dual_clip_that_cannot_work_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        LossConfig(**changes)
