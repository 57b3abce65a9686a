"""The cost of a token in a mixture of experts, against torch's own counter; and the choice of how to
compute.
"""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from rl.moe.kernels import choose_experts
from tests.bench.flops import active_matrix_values, forward_flops
from tests.rl.families import tiny_config

FAMILIES = ["qwen3_moe", "mixtral", "olmoe", "qwen2_moe"]


def tiny(name, **changes):
    torch.manual_seed(0)
    config = tiny_config(name, **changes)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()


@pytest.mark.parametrize("name", FAMILIES)
def test_flops_of_a_forward_pass_are_those_that_torch_counts(name):
    """Eager attention computes all pairs; rotary frequencies are a product of their own, 0.02 % here."""
    model = tiny(name)
    model.set_experts_implementation("eager")
    ids = torch.randint(0, 120, (1, 24), generator=torch.Generator().manual_seed(0))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=ids, use_cache=False)
    assert forward_flops(model, 24, causal=False) == pytest.approx(counter.get_total_flops(), rel=0.005)


def test_of_the_routed_experts_only_the_chosen_share_is_active():
    """E = 4, K = 2; 2 layers; hidden 32, intermediate 48, vocabulary 120.

    Attention 4 x 32 x 32 (as many keys as queries), router 4 x 32, experts 3 x 32 x 48 each.
    """
    model = tiny("olmoe", num_experts=4, num_experts_per_tok=2, num_key_value_heads=4)
    layer = 4 * 32 * 32 + 4 * 32 + 2 * 3 * 32 * 48
    assert active_matrix_values(model) == pytest.approx(2 * layer + 120 * 32)


def test_the_fastest_way_is_set_and_an_asked_one_is_not_measured(monkeypatch):
    model = tiny("qwen3_moe")
    seconds = choose_experts(model, "auto", num_tokens=32)
    assert set(seconds) == {"grouped_mm", "batched_mm", "eager"}
    assert model.config._experts_implementation == min(seconds, key=seconds.get)
    assert not any(p.grad is not None for p in model.parameters())
    assert list(choose_experts(model, "eager")) == ["eager"]
    assert model.config._experts_implementation == "eager"
    assert choose_experts(tiny("llama"), "auto") == {}
    unknown = tiny("inkling_text")  # how many experts a token gets is not known
    before = unknown.config._experts_implementation
    assert choose_experts(unknown, "auto") == {} and unknown.config._experts_implementation == before
    monkeypatch.setattr("rl.moe.kernels._MAX_COPIES", 0)
    assert "batched_mm" not in choose_experts(model, "auto", num_tokens=32)
