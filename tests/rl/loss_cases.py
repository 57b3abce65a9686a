"""Inputs of `rl.losses` for its tests."""

import math
from dataclasses import replace

import torch

from rl.config import LossConfig, SamplerCorrectionConfig
from rl.losses import LossInputs, policy_loss

F64 = torch.float64
LOG2 = math.log(2.0)


def column(*values):
    return torch.tensor(values, dtype=F64)


def config_of(name="grpo", **changes):
    """Nothing on but the loss itself, with a clip range of [0.8, 1.2] unless the test says otherwise."""
    plain = {"name": name, "clip_low": 0.2, "clip_high": 0.2, "kl_coef": 0.0, "sampler_correction": None}
    return LossConfig(**(plain | changes))


def inputs_of(log_ratios, advantages, *, sequence_ids=None, weights=None, mask=None, **others):
    """Tokens whose policy / old ratio is exp(log_ratios), of weight 1 each, old log-probs -1."""
    n = len(log_ratios)
    old = torch.full((n,), -1.0, dtype=F64)
    ids = torch.tensor(sequence_ids or [0] * n)
    return LossInputs(
        logprobs_N=(old + column(*log_ratios)).requires_grad_(),
        advantages_N=column(*advantages),
        mask_N=torch.tensor(mask if mask is not None else [True] * n),
        sequence_ids_N=ids,
        num_sequences=int(ids.max()) + 1,
        weights_N=column(*(weights or [1.0] * n)),
        token_mean_weight=1 / n,
        old_logprobs_N=old,
        **others,
    )


def loss_and_gradient(inputs, config):
    output = policy_loss(inputs, config=config)
    (gradient,) = torch.autograd.grad(output.loss, inputs.logprobs_N)
    return output.loss.item(), gradient.tolist()


def mean(output, name):
    total, count = output.metrics[name]
    return (total / count).item()


def ragged(lengths=(3, 5, 1, 4), *, seed=0, **changes):
    """Random ragged sequences in fp64: every input present, sequence-mean weights, some tokens masked."""
    g = torch.Generator().manual_seed(seed)
    n = sum(lengths)
    ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    mask = torch.rand(n, generator=g) > 0.25
    counts = torch.zeros(len(lengths), dtype=F64).index_add(0, ids, mask.to(F64))
    weights = torch.where(mask, 1 / (len(lengths) * counts.clamp(min=1))[ids], 0.0)

    def near(base, spread):
        return base + spread * torch.randn(n, generator=g, dtype=F64)

    old = near(-2.0, 0.5)
    inputs = LossInputs(
        logprobs_N=near(old, 0.3).requires_grad_(),
        advantages_N=torch.randn(len(lengths), generator=g, dtype=F64)[ids],
        mask_N=mask,
        sequence_ids_N=ids,
        num_sequences=len(lengths),
        weights_N=weights,
        token_mean_weight=1 / mask.sum().item(),
        old_logprobs_N=old,
        behavior_logprobs_N=near(old, 0.2),
        reference_logprobs_N=near(old, 0.4),
        entropy_N=torch.rand(n, generator=g, dtype=F64),
    )
    return replace(inputs, **changes)


EVERYTHING = {
    "clip_low": 0.1,
    "clip_high": 0.1,
    "kl_coef": 0.3,
    "entropy_coef": 0.01,
    "sampler_correction": SamplerCorrectionConfig(level="sequence", low=0.5),
}
