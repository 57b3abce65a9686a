import math
from dataclasses import replace

import pytest
import torch
from loss_cases import EVERYTHING, F64, column, config_of, inputs_of, loss_and_gradient, mean, ragged

from rl.config import SamplerCorrectionConfig
from rl.losses import LOSSES, policy_loss


@pytest.mark.parametrize("name", LOSSES)
def test_loss_and_gradient_do_not_depend_on_the_split_into_micro_batches(name):
    config, whole = config_of(name, **EVERYTHING), ragged()
    output = policy_loss(whole, config=config)
    (gradient,) = torch.autograd.grad(output.loss, whole.logprobs_N)
    assert gradient.abs().max() > 1e-3
    losses_of_parts, gradients, metrics = [], torch.zeros_like(gradient), {}
    for sequences in ([2], [0, 3], [1]):
        chosen = torch.isin(whole.sequence_ids_N, torch.tensor(sequences))
        columns = {k: v.detach()[chosen] for k, v in vars(whole).items() if isinstance(v, torch.Tensor)}
        columns["logprobs_N"].requires_grad_()
        columns["sequence_ids_N"] = torch.searchsorted(torch.tensor(sequences), columns["sequence_ids_N"])
        part = replace(whole, **columns, num_sequences=len(sequences))
        part_output = policy_loss(part, config=config)
        losses_of_parts.append(part_output.loss.item())
        gradients[chosen] = torch.autograd.grad(part_output.loss, part.logprobs_N)[0]
        for key, (total, count) in part_output.metrics.items():
            a, b = metrics.get(key, (0, 0))
            metrics[key] = (a + total, b + count)
    assert sum(losses_of_parts) == pytest.approx(output.loss.item(), rel=1e-12)
    torch.testing.assert_close(gradients, gradient, rtol=1e-12, atol=1e-15)
    assert metrics.keys() == output.metrics.keys()
    for key, pair in output.metrics.items():
        torch.testing.assert_close(torch.stack(metrics[key]), torch.stack(pair), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("name", LOSSES)
def test_masked_tokens_give_exactly_zero_gradient_whatever_they_hold(name):
    clean = ragged()
    assert not clean.mask_N.all()
    bad = {}
    for key in (
        "logprobs_N",
        "old_logprobs_N",
        "behavior_logprobs_N",
        "reference_logprobs_N",
        "entropy_N",
        "weights_N",
    ):
        value = math.inf if key == "weights_N" else math.nan
        bad[key] = torch.where(clean.mask_N, getattr(clean, key).detach(), value)
    poisoned = replace(clean, **bad | {"logprobs_N": bad["logprobs_N"].requires_grad_()})
    config = config_of(name, **EVERYTHING)
    value, gradient = loss_and_gradient(poisoned, config)
    assert (value, gradient) == loss_and_gradient(clean, config)
    assert all((g == 0.0) == (not m) for g, m in zip(gradient, clean.mask_N.tolist(), strict=True))


@pytest.mark.parametrize("name", LOSSES)
def test_on_policy_the_ratio_is_exactly_one_and_the_gradient_is_the_policy_gradient(name):
    inputs = replace(ragged(), old_logprobs_N=None)
    output = policy_loss(inputs, config=config_of(name))
    (gradient,) = torch.autograd.grad(output.loss, inputs.logprobs_N)
    assert mean(output, "policy/ratio_mean") == 1.0
    assert output.maxima["policy/ratio_max"].item() == 1.0
    if (
        name == "gspo"
    ):  # the gradient of a sequence is spread evenly, which is what equal weights within it give
        assert torch.equal(inputs.weights_N > 0, inputs.mask_N)
    torch.testing.assert_close(gradient, -inputs.advantages_N * inputs.weights_N, rtol=1e-12, atol=0)


def test_nothing_without_advantage_kl_and_entropy_has_a_gradient():
    inputs = replace(ragged(), advantages_N=torch.zeros(13, dtype=F64))
    for name in LOSSES:
        assert loss_and_gradient(inputs, config_of(name)) == (0.0, [0.0] * 13)


def test_arguments_are_not_written_to():
    inputs = ragged()
    before = {k: v.detach().clone() for k, v in vars(inputs).items() if isinstance(v, torch.Tensor)}
    for name in LOSSES:
        policy_loss(inputs, config=config_of(name, **EVERYTHING)).loss.backward()
    for key, value in before.items():
        assert torch.equal(getattr(inputs, key).detach(), value), key


@pytest.mark.parametrize("name", LOSSES)
def test_fp64_is_kept_and_half_precision_is_computed_in_fp32(name):
    config = config_of(name, **EVERYTHING)
    exact = policy_loss(ragged(), config=config).loss
    assert exact.dtype == F64
    tensors = {k: v.detach() for k, v in vars(ragged()).items() if isinstance(v, torch.Tensor)}
    half = {k: v.bfloat16() for k, v in tensors.items() if v.is_floating_point()}
    same = {k: v.double() for k, v in half.items()}  # the same rounded numbers, computed in fp64
    low = policy_loss(replace(ragged(), **half), config=config).loss
    high = policy_loss(replace(ragged(), **same), config=config).loss
    assert low.dtype == torch.float32
    assert low.item() == pytest.approx(high.item(), rel=1e-5)


@pytest.mark.parametrize("num_tokens", [2, 0])
def test_a_micro_batch_without_loss_tokens_gives_zero(num_tokens):
    inputs = inputs_of([0.1, 0.2], [1.0, 1.0], mask=[False, False], behavior_logprobs_N=column(-1.0, -1.0))
    tensors = {k: v[:num_tokens] for k, v in vars(inputs).items() if isinstance(v, torch.Tensor)}
    config = config_of("gspo", sampler_correction=SamplerCorrectionConfig(level="geometric"))
    output = policy_loss(replace(inputs, **tensors), config=config)
    output.loss.backward()
    assert output.loss.item() == 0.0
    assert output.metrics["policy/ratio_mean"][1].item() == 0
    assert output.maxima["policy/ratio_max"].item() == -math.inf
    assert output.minima["sampler/ratio_min"].item() == math.inf
