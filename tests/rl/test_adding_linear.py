"""Linear layers that add their weights' gradients in a product have autograd's values, however cut."""

from __future__ import annotations

import copy

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from rl.batch import pack
from rl.causal import CausalPolicy
from rl.config.read import load_config
from rl.model import linear
from rl.model.linear import AddingLinear, add_gradients_in_products, adding
from rl.update import pack_rules
from tests.scoring import relative_error


@pytest.fixture(scope="module")
def folder(tiny_model_dir, tmp_path_factory):
    """A Qwen2, whose queries, keys and values have biases, with a head tied to its embedding."""
    folder = tmp_path_factory.mktemp("adding")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        initializer_range=0.2,
        eos_token_id=tokenizer.eos_token_id,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    return folder


def settings(folder, *overrides: str):
    base = [f"model.name={folder}", "model.dtype=fp32", "sampling.max_completion_length=20"]
    return load_config(None, [*base, "loss.clip_high=4.0", "loss.kl_coef=0", *overrides])


@pytest.mark.parametrize("checkpointing", ["false", "true"])
@pytest.mark.parametrize("budget", [40, 100000])
def test_a_steps_gradient_is_autograds(folder, ragged_groups, gradients, monkeypatch, budget, checkpointing):
    groups, advantages = ragged_groups(vocabulary=30)
    config = settings(folder, f"train.token_budget={budget}", f"model.gradient_checkpointing={checkpointing}")
    plain, ours = (CausalPolicy(config.model, Accelerator(cpu=True), temperature=0.9) for _ in range(2))
    add_gradients_in_products(ours.model)
    for policy in (plain, ours):
        assert policy.settle_attention() is None
    plain.sums.backward = lambda loss, *, last: loss.backward()  # autograd alone
    expected = gradients(plain, config, groups, advantages)

    totals, product = [], linear.plus_product
    monkeypatch.setattr(linear, "plus_product", lambda *args: totals.append(args[0]) or product(*args))
    found = gradients(ours, config, groups, advantages)
    assert expected.keys() == found.keys() and len(found) == 2 + 2 * (7 + 3 + 2)
    assert relative_error(found, expected) <= 1e-6
    # Of the 2 x 7 layers autograd adds nothing: only in their first pass there is no sum yet.
    num_passes = len(pack(groups, advantages, pack_rules(config))[0].micro_batches)
    assert len(totals) == 14 * num_passes and sum(total is None for total in totals) == 14


def test_a_gradient_that_is_asked_for_is_given_and_changes_no_grad():
    torch.manual_seed(0)
    layer = nn.Linear(5, 3)
    x = torch.randn(2, 4, 5, requires_grad=True)
    inputs = (x, layer.weight, layer.bias)
    expected = torch.autograd.grad(layer(x).square().sum(), inputs)
    add_gradients_in_products(layer)
    assert type(layer) is AddingLinear
    for found, wanted in zip(torch.autograd.grad(layer(x).square().sum(), inputs), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
    assert layer.weight.grad is None


def test_a_hook_of_the_weight_still_changes_its_gradient():
    layer = nn.Linear(5, 3)
    add_gradients_in_products(layer)
    layer.weight.register_hook(lambda grad: grad * torch.tensor([[0.0], [1.0], [0.0]]))
    with adding():
        layer(torch.ones(2, 5)).sum().backward()
    assert layer.weight.grad.tolist() == [[0.0] * 5, [2.0] * 5, [0.0] * 5]


def test_outputs_are_those_of_autocast_and_weights_gradients_are_wider():
    """Ten micro-batches in bf16, against double precision of the same rounded numbers."""
    torch.manual_seed(0)
    plain = nn.Linear(64, 32)
    ours = copy.deepcopy(plain)
    add_gradients_in_products(ours)
    exact = torch.zeros(32, 64, dtype=torch.float64)
    for _ in range(10):
        x, slope = torch.randn(1, 16, 64).bfloat16(), torch.randn(1, 16, 32).bfloat16()
        inputs = [x.clone().requires_grad_() for _ in range(2)]
        with torch.autocast("cpu", torch.bfloat16):
            outputs = [layer(one) for layer, one in zip((plain, ours), inputs, strict=True)]
        with adding():
            for y in outputs:
                y.backward(slope)
        assert torch.equal(*outputs) and outputs[1].dtype == torch.bfloat16
        assert torch.equal(inputs[0].grad, inputs[1].grad)
        exact += slope[0].double().T @ x[0].double()
    errors = [((layer.weight.grad - exact).norm() / exact.norm()).item() for layer in (plain, ours)]
    assert ours.weight.grad.dtype == torch.float32
    assert errors[1] <= errors[0] <= 0.01
