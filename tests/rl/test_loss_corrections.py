import math

import pytest
import torch
from beartype import beartype
from jaxtyping import TypeCheckError, jaxtyped
from loss_cases import F64, column, config_of, inputs_of, loss_and_gradient

from rl import losses
from rl.config import SamplerCorrectionConfig
from rl.losses import KL_ESTIMATORS, LossInputs, policy_loss, sampler_weights


def test_kl_estimators_by_hand():
    # policy 1/2, reference 1/4: d = -log 2. k1 = log 2; k2 = log(2)^2 / 2; k3 = 1/2 + log 2 - 1.
    p, q = column(math.log(0.5)), column(math.log(0.25))
    assert KL_ESTIMATORS["k1"](p, q).item() == pytest.approx(0.6931471805599453, rel=1e-14)
    assert KL_ESTIMATORS["k2"](p, q).item() == pytest.approx(0.2402265069591007, rel=1e-14)
    assert KL_ESTIMATORS["k3"](p, q).item() == pytest.approx(0.1931471805599453, rel=1e-14)


def test_k3_keeps_its_digits_for_close_policies_in_fp32():
    # d = 2^-13: d^2/2 + d^3/6 = 7.4509e-9, while exp(d) - d - 1 in fp32 is 0.
    p, q = torch.zeros(1), torch.full((1,), 2.0**-13)
    assert KL_ESTIMATORS["k3"](p, q).item() == pytest.approx(7.450883e-09, rel=1e-3)


def expected_gradient(estimator, *, bias_correction=False):
    """E_policy[gradient of the estimator as a loss], over all four tokens, and those of both true KLs."""
    logits = column(0.5, -0.3, 0.1, 1.0).requires_grad_()
    reference = torch.log_softmax(column(0.0, 0.4, -0.2, 0.3), 0)
    logprobs = torch.log_softmax(logits, 0)
    inputs = LossInputs(
        logprobs_N=logprobs,
        advantages_N=torch.zeros(4, dtype=F64),
        mask_N=torch.ones(4, dtype=torch.bool),
        sequence_ids_N=torch.arange(4),
        num_sequences=4,
        weights_N=logprobs.detach().exp(),
        token_mean_weight=0.25,
        reference_logprobs_N=reference,
    )
    config = config_of(kl_coef=1.0, kl_estimator=estimator, kl_bias_correction=bias_correction)
    (mean_gradient,) = torch.autograd.grad(policy_loss(inputs, config=config).loss, logits, retain_graph=True)
    (reverse,) = torch.autograd.grad(
        (logprobs.exp() * (logprobs - reference)).sum(), logits, retain_graph=True
    )
    (forward,) = torch.autograd.grad((reference.exp() * (reference - logprobs)).sum(), logits)
    return mean_gradient, reverse, forward


@pytest.mark.parametrize(
    ("estimator", "bias_correction", "which"),
    [
        ("k1", False, "zero"),
        ("k2", False, "reverse"),
        ("k3", False, "forward"),
        ("k1", True, "reverse"),
        ("k3", True, "reverse"),
    ],
)
def test_mean_gradient_of_each_kl_estimator(estimator, bias_correction, which):
    gradient, reverse, forward = expected_gradient(estimator, bias_correction=bias_correction)
    expected = {"zero": torch.zeros(4, dtype=F64), "reverse": reverse, "forward": forward}[which]
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-14)
    assert (reverse - forward).abs().max() > 1e-3


def test_kl_is_added_after_the_sampler_correction():
    # One token, ratio 1, A = 1, sampler ratio e^-1 (old -1, behavior 0), truncated to nothing: weight e^-1.
    # d = reference - policy = -1: k3 = e^-1 + 1 - 1 = e^-1. Loss = e^-1 * (-1) + 0.5 * e^-1.
    inputs = inputs_of([0.0], [1.0], behavior_logprobs_N=column(0.0), reference_logprobs_N=column(-2.0))
    config = config_of(kl_coef=0.5, sampler_correction=SamplerCorrectionConfig())
    value, _ = loss_and_gradient(inputs, config)
    assert value == pytest.approx(-0.5 * math.exp(-1), rel=1e-14)


@pytest.mark.parametrize("fn", [losses.kl_k1, losses.kl_k2, losses.kl_k3])
def test_shapes_are_what_the_annotations_say(fn):
    checked = jaxtyped(typechecker=beartype)(fn)
    assert checked(torch.zeros(3), torch.zeros(3)).shape == (3,)
    with pytest.raises(TypeCheckError):
        checked(torch.zeros(3), torch.zeros(4))


@pytest.mark.parametrize(
    ("level", "mode", "weights"),
    [
        # Log ratios old - behavior: sequence 0 has 0.5, 0.25, -1 (the last one masked), sequence 1 has -1.
        # Bounds [0.5, 1.5].
        ("token", "truncate", [1.5, math.exp(0.25), 0.5]),
        ("token", "mask", [0.0, math.exp(0.25), 0.0]),
        ("sequence", "truncate", [1.5, 1.5, 0.5]),  # e^0.75 = 2.117
        ("sequence", "mask", [0.0, 0.0, 0.0]),
        ("geometric", "truncate", [math.exp(0.375), math.exp(0.375), 0.5]),  # e^0.375 = 1.455
        ("geometric", "mask", [math.exp(0.375), math.exp(0.375), 0.0]),
    ],
)
def test_sampler_correction_by_hand(level, mode, weights):
    inputs = inputs_of(
        [0.0] * 4,
        [1.0] * 4,
        sequence_ids=[0, 0, 0, 1],
        mask=[True, True, False, True],
        behavior_logprobs_N=column(-1.5, -1.25, 0.0, 0.0),
    )
    correction = SamplerCorrectionConfig(level=level, mode=mode, low=0.5, high=1.5)
    value, gradient = loss_and_gradient(inputs, config_of(sampler_correction=correction))
    # At ratio 1 the gradient of a token is -A * weight.
    a, b, c = weights
    assert gradient == pytest.approx([-a, -b, 0.0, -c], rel=1e-14)
    assert value == pytest.approx(-(a + b + c), rel=1e-14)


def test_sampler_bounds_are_inclusive():
    ratio = column(0.5, 1.5, 1.5000001)
    correction = SamplerCorrectionConfig(mode="mask", low=0.5, high=1.5)
    assert sampler_weights(ratio, correction).tolist() == [0.5, 1.5, 0.0]


@pytest.mark.parametrize("level", ["token", "sequence", "geometric"])
def test_unknown_behavior_logprobs_correct_nothing(level):
    inputs = inputs_of([0.0, 0.0], [1.0, 1.0], behavior_logprobs_N=column(math.nan, math.nan))
    config = config_of(sampler_correction=SamplerCorrectionConfig(level=level))
    assert loss_and_gradient(inputs, config) == (-2.0, [-1.0, -1.0])


def test_sampler_ratio_is_taken_before_the_first_update():
    # Policy / old is e^0.1, old / behavior e^0.2: the weight is the latter and carries no gradient.
    inputs = inputs_of([0.1], [1.0], behavior_logprobs_N=column(-1.2))
    value, (gradient,) = loss_and_gradient(inputs, config_of(sampler_correction=SamplerCorrectionConfig()))
    assert value == gradient == pytest.approx(-math.exp(0.1) * math.exp(0.2), rel=1e-14)
