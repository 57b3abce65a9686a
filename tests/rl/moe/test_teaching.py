"""The teaching layer against routers of transformers, and against the papers' formulas by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import linear, one_hot, silu
from transformers import NllbMoeConfig, SwitchTransformersConfig
from transformers.models.nllb_moe.modeling_nllb_moe import NllbMoeTop2Router
from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersTop1Router

from rl.moe.teaching import TeachingMoE, expert_capacity, noisy_logits, second_is_drawn, within_capacity

T, D = 24, 16


def layer_of(**options) -> TeachingMoE:
    torch.manual_seed(0)
    return TeachingMoE(D, 8, **{"num_experts": 4} | options)


def tokens() -> torch.Tensor:
    return torch.randn(T, D, generator=torch.Generator().manual_seed(1))


def served_mask(routed, num_experts: int) -> torch.Tensor:
    return (one_hot(routed.experts_TK, num_experts) * routed.served_TK[..., None]).sum(1)


def test_switch_serves_the_tokens_that_transformers_switch_router_serves():
    # capacity 1.0 x 24 tokens / 4 experts = 6
    layer, x = layer_of(rule="switch", top_k=1, capacity_factor=1.0), tokens()
    config = SwitchTransformersConfig(d_model=D, num_experts=4, expert_capacity=6, router_jitter_noise=0.0)
    theirs = SwitchTransformersTop1Router(config)
    theirs.classifier.weight.data = layer.router.data
    mask, gates, _ = theirs(x[None])
    y, routed = layer(x)
    assert torch.equal(served_mask(routed, 4), mask[0])
    torch.testing.assert_close(routed.gates_TK, gates[0])
    assert 0 < routed.drop_rate.item() == (T - mask.sum().item()) / T
    assert torch.equal(y[mask[0].sum(-1) == 0], torch.zeros(T - mask.sum(), D))  # the residual carries them


def test_gshard_fills_experts_as_the_top_2_router_of_nllb_does():
    layer, x = layer_of(rule="gshard", capacity_factor=0.75).eval(), tokens()
    config = NllbMoeConfig(
        d_model=D,
        num_experts=4,
        expert_capacity=9,  # ceil(0.75 x 24 x 2 / 4)
        second_expert_policy="all",
        normalize_router_prob_before_dropping=True,
        moe_eval_capacity_token_fraction=-1.0,
    )
    theirs = NllbMoeTop2Router(config).eval()
    theirs.classifier.weight.data = layer.router.data
    _, combine, _ = theirs(x)
    routed = layer.route(x)
    ours = (one_hot(routed.experts_TK, 4) * (routed.gates_TK * routed.served_TK)[..., None]).sum(1)
    torch.testing.assert_close(ours, combine)
    assert routed.drop_rate > 0


def test_gshard_draws_the_second_expert_with_twice_its_gate():
    gates = torch.tensor([[0.9, 0.1], [0.7, 0.3], [0.55, 0.45], [1.0, 0.0]]).repeat(4000, 1)
    drawn = second_is_drawn(gates, torch.Generator().manual_seed(0)).float().reshape(-1, 4, 2).mean(0)
    assert drawn[:, 0].tolist() == [1, 1, 1, 1]
    # min(1, 2 g); the standard error of 4,000 draws is below 0.008
    torch.testing.assert_close(drawn[:, 1], torch.tensor([0.2, 0.6, 0.9, 0.0]), atol=0.03, rtol=0)


def test_second_choices_queue_behind_all_first_choices():
    experts = torch.tensor([[0, 1], [1, 0], [0, 1]])
    # expert 0: first choices of tokens 0 and 2, then token 1's second; expert 1: token 1, then 0, then 2
    served = within_capacity(experts, torch.ones(3, 2, dtype=torch.bool), 2, 2)
    assert served.tolist() == [[True, True], [True, False], [True, False]]
    not_drawn = torch.tensor([[True, False], [True, True], [True, True]])
    served = within_capacity(experts, not_drawn, 2, 2)
    assert served.tolist() == [[True, False], [True, False], [True, True]]


def test_capacity_is_rounded_up():
    assert expert_capacity(10, 2, 8, 1.25) == 4  # 1.25 x 10 x 2 / 8 = 3.125


def test_noise_is_normal_with_softplus_as_its_spread_and_absent_in_evaluation():
    zeros, generator = torch.zeros(20_000, 2), torch.Generator().manual_seed(0)
    spread = torch.tensor([0.0, 3.0]).expand(20_000, 2)
    noise = noisy_logits(zeros, spread, generator)
    expected = torch.tensor([math.log(2), math.log(1 + math.e**3)])  # softplus(0) and softplus(3)
    torch.testing.assert_close(noise.std(0), expected, rtol=0.03, atol=0)
    layer, x = layer_of(rule="noisy", generator=generator), tokens()
    assert not torch.equal(layer.route(x).gates_TK, layer.route(x).gates_TK)
    assert torch.equal(layer.eval().route(x).gates_TK, layer.route(x).gates_TK)


def test_without_capacity_nothing_is_dropped_and_the_sum_is_the_formula():
    layer, x = layer_of(), tokens()
    y, routed = layer(x)
    assert routed.drop_rate == 0 and routed.served_TK.all()
    p = linear(x[5], layer.router).softmax(-1)
    (first, second), (i, j) = p.topk(2)
    expert = lambda e: layer.down[e] @ (silu(layer.gate_up[e, :8] @ x[5]) * (layer.gate_up[e, 8:] @ x[5]))  # noqa: E731
    torch.testing.assert_close(y[5], (first * expert(i) + second * expert(j)) / (first + second))


def test_experts_without_weights_give_nothing_the_token_and_a_mix():
    layer, x = layer_of(num_zero=1, num_copy=1, num_constant=1), tokens()
    layer.constant.data.fill_(2.0)
    assert torch.equal(layer.expert(4, x), torch.zeros(T, D))
    assert torch.equal(layer.expert(5, x), x)
    a, b = linear(x, layer.mix[0]).softmax(-1).split(1, -1)
    torch.testing.assert_close(layer.expert(6, x), a * x + b * 2.0)
    chosen = layer.route(x).experts_TK
    assert chosen.max() > 3 and layer(x)[0].isfinite().all()


def test_the_fp32_router_keeps_choices_that_bf16_logits_lose():
    x, ours = torch.randn(512, D).bfloat16(), {}
    for fp32 in (True, False):
        layer = layer_of(router_fp32=fp32, num_experts=32).bfloat16()
        exact = linear(x.double(), layer.router.double()).topk(2).indices
        ours[fp32] = (layer.route(x).experts_TK == exact).float().mean().item()
        assert layer(x)[0].dtype == torch.bfloat16
    assert ours[True] == 1.0 > ours[False]


def test_a_rule_names_its_number_of_experts():
    with pytest.raises(ValueError, match="rule=switch means top_k=1, not 2"):
        layer_of(rule="switch")
