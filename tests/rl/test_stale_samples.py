"""How a sample of an older policy is weighed: by min(policy / sampler, high), and what that is worth."""

from __future__ import annotations

import math

import pytest
import torch
from accelerate import Accelerator
from loss_cases import F64, column, config_of, loss_and_gradient
from transformers import AutoModelForCausalLM, AutoTokenizer

from rl.advantages import compute_advantages
from rl.causal import CausalPolicy
from rl.config import SamplerCorrectionConfig
from rl.config.read import load_config
from rl.losses import LossInputs, policy_loss
from rl.types import Prompt, Reward, SamplingParams, ScoredGroup
from rl.world import World
from rollout.transformers import TransformersEngine
from tests.calling import call


def one_token(now: float, then: float, advantage: float, **changes) -> LossInputs:
    """A token of probability `now`, drawn by a policy that gave it `then`; no update on this batch yet."""
    inputs = LossInputs(
        logprobs_N=column(math.log(now)).requires_grad_(),
        advantages_N=column(advantage),
        mask_N=torch.ones(1, dtype=torch.bool),
        sequence_ids_N=torch.zeros(1, dtype=torch.long),
        num_sequences=1,
        weights_N=column(1.0),
        token_mean_weight=1.0,
        behavior_logprobs_N=column(math.log(then)),
    )
    for name, value in changes.items():
        object.__setattr__(inputs, name, value)
    return inputs


@pytest.mark.parametrize(
    ("now", "then", "advantage", "gradient"),
    [
        (0.6, 0.4, 2.0, -3.0),  # 0.6 / 0.4 = 1.5, times A = 2
        (0.6, 0.2, 2.0, -4.0),  # ratio 3, truncated at 2
        (0.1, 0.4, -1.0, 0.25),  # what the policy moved away from counts a quarter
        (0.8, 0.1, -1.0, 2.0),  # ratio 8, truncated at 2
    ],
)
def test_the_gradient_of_a_stale_token_by_hand(now, then, advantage, gradient):
    config = config_of(sampler_correction=SamplerCorrectionConfig())
    _, (found,) = loss_and_gradient(one_token(now, then, advantage), config)
    assert found == pytest.approx(gradient, rel=1e-12)


def test_clipping_against_the_sampler_would_give_no_gradient_to_what_moved_the_right_way():
    """The other choice, old = sampler: 0.6 / 0.4 is above 1 + 0.2, so a token with A > 0 is clipped."""
    inputs = one_token(0.6, 0.4, 2.0, old_logprobs_N=column(math.log(0.4)))
    assert loss_and_gradient(inputs, config_of())[1] == [0.0]


def exact(now, then, advantages, *, high):
    """Gradients by logits over all 4 tokens: ours on average over the sampler, by hand, and on-policy."""
    logits = torch.log(column(*now)).requires_grad_()
    logprobs = torch.log_softmax(logits, 0)
    inputs = LossInputs(
        logprobs_N=logprobs,
        advantages_N=column(*advantages),
        mask_N=torch.ones(4, dtype=torch.bool),
        sequence_ids_N=torch.arange(4),
        num_sequences=4,
        weights_N=column(*then),
        token_mean_weight=0.25,
        behavior_logprobs_N=torch.log(column(*then)),
    )
    config = config_of(sampler_correction=SamplerCorrectionConfig(high=high))
    (found,) = torch.autograd.grad(policy_loss(inputs, config=config).loss, logits, retain_graph=True)
    weights = column(*(t * min(n / t, high) for n, t in zip(now, then, strict=True)))
    by_hand = -(torch.eye(4, dtype=F64) - column(*now)).T @ (weights * column(*advantages))
    (on_policy,) = torch.autograd.grad(-(logprobs.exp() * column(*advantages)).sum(), logits)
    return found, by_hand, on_policy


def test_in_the_mean_over_the_sampler_it_is_the_current_policys_gradient():
    now, then, advantages = [0.4, 0.3, 0.2, 0.1], [0.3, 0.2, 0.2, 0.3], [1.0, -1.0, 0.5, -2.0]
    found, by_hand, on_policy = exact(now, then, advantages, high=2.0)
    torch.testing.assert_close(found, by_hand, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(found, on_policy, rtol=1e-12, atol=1e-14)
    found, by_hand, on_policy = exact(now, then, advantages, high=1.4)  # 0.3 / 0.2 = 1.5 is truncated
    torch.testing.assert_close(found, by_hand, rtol=1e-12, atol=1e-14)
    assert (found - on_policy).abs().max() > 0.01


def test_a_batch_of_an_older_policy_gets_that_gradient(tiny_model_dir, gradients):
    """Sampled by one policy, trained by another: the packed update against plain autograd, token by token."""
    config = load_config(
        None, [f"model.name={tiny_model_dir}", "model.dtype=fp32", "loss.kl_coef=0", "train.max_staleness=1"]
    )
    world = World(Accelerator(cpu=True))
    engine = TransformersEngine(tiny_model_dir, AutoTokenizer.from_pretrained(tiny_model_dir))
    prompts = [Prompt(f"p{i}", "", (7 + i, 9, 11)[: 1 + i % 3]) for i in range(4)]
    sampling = SamplingParams(max_completion_length=12, stop_token_ids=(1,))
    sampled = engine.generate(call(prompts, num_completions=3, sampling=sampling, seeds=[5, 6, 7, 8]))
    groups = [ScoredGroup(g, [Reward(0.0), Reward(1.0), Reward(0.25)]) for g in sampled]
    advantages = compute_advantages(groups, config=config.advantage, weights={"math": 1.0})

    policy = CausalPolicy(config.model, world.accelerator, temperature=1.0)
    policy.settle_attention()
    torch.manual_seed(0)
    with torch.no_grad():  # the step that made the samples stale
        for _, parameter in policy.trainable():
            parameter += 0.3 * parameter.std().nan_to_num(0.0) * torch.randn_like(parameter)
    found = gradients(policy, config, groups, advantages)

    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    current = dict(policy.trainable())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(current[name])
    loss, weights = torch.zeros(()), []
    for group, row in zip(groups, advantages, strict=True):
        for completion, advantage in zip(group.completions, row, strict=True):
            ids, start = [*group.prompt.token_ids, *completion.token_ids], len(group.prompt.token_ids)
            logprobs = model(torch.tensor([ids])).logits[0, start - 1 : -1].log_softmax(-1)
            chosen = logprobs.gather(-1, torch.tensor(ids[start:])[:, None]).squeeze(-1)
            weight = (chosen.detach() - torch.tensor(completion.behavior_logprobs)).exp().clamp(max=2.0)
            loss = loss - (weight * advantage * chosen).mean() / 12
            weights += weight.tolist()
    loss.backward()
    assert min(weights) < 0.6 and weights.count(2.0) > 3  # stale enough to tell the weights from 1
    assert found.keys() == {name for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-6)
