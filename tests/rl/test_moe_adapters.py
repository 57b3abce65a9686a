"""What a LoRA target means in each family with experts, and experts computed beside their adapters, as
peft does.
"""

import copy

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from rl.config.sections import LoraConfig
from rl.moe.adapters import (
    audit,
    check_trained,
    expert_factors,
    innermost,
    lora_plan,
    part_of,
    split_experts,
)
from rl.moe.routers import UnknownRouter, find_routers
from rl.weights import PolicyWeights
from tests.rl.families import FAMILIES, NO_LORA, tiny_config

IDS = torch.arange(24)[None] * 5 % 120
ALWAYS = ("qwen3_moe", "mixtral", "deepseek_v3", "qwen2_moe", "gpt_oss", "phimoe", "jamba", "granitemoe")


def tiny(name, **changes):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(name, **changes), dtype=torch.float32).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    return model


def adapted(model, targets="all-linear", r=2):
    plan = lora_plan(model, LoraConfig(r=r, target_modules=targets))
    peft_model = get_peft_model(model, PeftConfig(r=r, lora_alpha=4, task_type="CAUSAL_LM", **plan))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter += 0.1 * torch.randn_like(parameter)
    return peft_model


COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


PARAMETERS = [
    pytest.param(n, marks=[] if n in ALWAYS else [pytest.mark.rotation])
    for n in FAMILIES
    if any(hasattr(tiny_config(n), c) for c in COUNTS)
]


@pytest.mark.parametrize("name", PARAMETERS)
def test_all_linear_adapts_every_part_but_routers_and_the_head(name):
    """Where peft's own leaves out the routed experts of gpt_oss, and the shared ones of DeepSeek."""
    model = tiny(name)
    if lora_plan(model, LoraConfig()) is None:
        pytest.skip("no experts by default")
    before = audit(model)
    adapted(model)
    after = audit(model)
    assert {part: total for part, (_, total) in after.items()} == {
        p: total for p, (_, total) in before.items()
    }
    for part in ("routed experts", "shared experts", "attention"):
        if any(p.ndim > 1 and part_of(model, n) == part for n, p in model.named_parameters()):
            assert after[part][0] > 0, part
    assert after["router"][0] == 0 and after["embeddings and head"][0] == 0


def test_a_list_names_the_ends_of_layers_and_experts_by_the_names_they_had():
    """2 layers; r = 2, E = 4, hidden 32, intermediate 16: A of gate_up is [4 x 2, 32], B [2 x 16, 2 x 4]."""
    model = tiny("qwen3_moe", num_experts=4)
    plan = lora_plan(model, LoraConfig(target_modules=["q_proj", "down_proj"]))
    assert plan["target_parameters"] == [f"model.layers.{i}.mlp.experts.down_proj" for i in (0, 1)]
    assert plan["target_modules"] == [f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)]
    adapted(model, ["experts"])
    trained = {
        n.split("mlp.")[1]: tuple(p.shape)
        for n, p in model.named_parameters()
        if p.requires_grad and "rs.0" in n
    }
    assert sorted(trained.values()) == sorted([(8, 32), (32, 8), (8, 16), (32, 8)])
    assert audit(model)["routed experts"] == (2 * (8 * 32 + 32 * 8 + 8 * 16 + 32 * 8), 2 * 4 * 3 * 16 * 32)
    assert check_trained(model, LoraConfig(target_modules=["experts"])).startswith(
        "trained values: routed experts 1.79 k of 12.3 k"
    )


def test_gate_without_up_and_experts_that_got_nothing_are_refused():
    with pytest.raises(ValueError, match="gate_proj and up_proj of experts are one tensor"):
        lora_plan(tiny("qwen3_moe"), LoraConfig(target_modules=["gate_proj"]))
    model = tiny("qwen2_moe")
    get_peft_model(
        model, PeftConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    )  # peft's meaning
    with pytest.raises(ValueError, match=r"none of the .* values of routed experts would be trained"):
        check_trained(model, LoraConfig())
    assert lora_plan(tiny("llama"), LoraConfig()) is None


def loss_and_gradients(model):
    model.zero_grad()
    loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
    loss.backward()
    return loss.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def check_same_step(model, loss, gradients, *, among):
    ours, split = loss_and_gradients(model)
    assert ours == pytest.approx(loss, abs=2e-6)
    assert gradients.keys() == split.keys() and any(among in n for n in split)
    for key, gradient in gradients.items():
        torch.testing.assert_close(split[key], gradient, rtol=1e-4, atol=1e-6, msg=key)


@pytest.mark.parametrize(
    "name", [p for p in PARAMETERS if p.values[0] not in ("gpt_oss", "deepseek_v4")]
)  # peft fails on v4
def test_split_experts_have_the_loss_and_the_gradients_of_pefts_own(name):
    """fp32. Measured 5e-8 and 2e-7; peft's forward pass multiplies by W + s A B."""
    model = tiny(name)
    if lora_plan(model, LoraConfig()) is None:
        pytest.skip("no experts by default")
    peft_model = adapted(model)
    loss, gradients = loss_and_gradients(model)
    done = split_experts(model)
    if not done:
        pytest.skip("peft's own way")
    check_same_step(model, loss, gradients, among="experts")
    with peft_model.disable_adapter(), torch.no_grad():
        base = model(input_ids=IDS).logits
    assert (base - model(input_ids=IDS).logits).abs().max() > 1e-3
    if name in NO_LORA:  # a parent reads a weight past its adapter, for which a run is refused
        return
    merged = copy.deepcopy(peft_model).merge_and_unload()
    sent = dict(PolicyWeights(model, lambda: ([], [])))
    for key, tensor in merged.named_parameters():
        torch.testing.assert_close(sent[key], tensor, rtol=0, atol=1e-6, msg=key)
    torch.testing.assert_close(
        merged(input_ids=IDS).logits, model(input_ids=IDS).logits, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "deepseek_v3", "olmoe"])
def test_split_experts_without_adapters_have_the_gradients_of_transformers(name):
    """fp32, every weight, routers included; transformers weights tokens after the down projection."""
    model = tiny(name)
    loss, gradients = loss_and_gradients(model)
    assert split_experts(model)
    model.set_experts_implementation("grouped_mm")
    check_same_step(model, loss, gradients, among="gate.weight")


def test_rows_are_put_in_order_and_back_without_adding_up_gradients():
    """Indexing has an IndexBackward, which sorts all S rows of a gradient to add them up."""
    model = tiny("qwen3_moe", num_experts=4)
    adapted(model)
    experts = model.model.layers[0].mlp.experts
    split_experts(model)
    x, idx = torch.randn(6, 32, requires_grad=True), torch.tensor([[0, 1], [3, 2], [1, 3]] * 2)
    todo = [experts(x, idx, torch.full((6, 2), 0.5, requires_grad=True)).grad_fn]
    seen = set()
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [following for following, _ in node.next_functions]
    names = [node.name() for node in seen]
    assert sum("Permuted" in n for n in names) == 3 and not any(n.startswith("Index") for n in names)


def test_no_merged_weight_of_experts_is_kept_for_the_backward_pass():
    """In peft's way autograd keeps W + s A B of each layer; in the split way only parameters themselves."""

    def kept(model):
        stacks, found = (4, 32, 32), []
        own = {p.data_ptr() for p in model.parameters()}
        see = lambda t: found.append(t) or t  # noqa: E731
        with torch.autograd.graph.saved_tensors_hooks(see, lambda t: t):
            model(input_ids=IDS, use_cache=False).logits.sum()
        return sum(sorted(t.shape) == sorted(stacks) and t.data_ptr() not in own for t in found)

    model = tiny("qwen3_moe", num_experts=4)
    adapted(model)
    assert kept(model) > 0
    assert len(split_experts(model)) == 2
    assert kept(model) == 0


@pytest.mark.parametrize("with_adapters", [False, True])
def test_under_autocast_experts_of_fp32_weights_are_computed_in_bf16(with_adapters):
    """transformers' own grouped_mm computes them in fp32, many times slower on a GPU."""
    model = tiny("qwen3_moe", num_experts=4)
    if with_adapters:
        adapted(model)
    experts = model.model.layers[0].mlp.experts
    x, idx, weights = torch.randn(6, 32), torch.tensor([[0, 1]] * 6), torch.full((6, 2), 0.5)
    exact = experts(x, idx, weights)
    assert split_experts(model) == [f"model.layers.{i}.mlp.experts" for i in (0, 1)]
    seen = []
    inner = innermost(experts)
    gate = inner._apply_gate
    inner._apply_gate = lambda y: seen.append(y.dtype) or gate(y)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = experts(x, idx, weights)
    assert seen == [torch.bfloat16] and rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, exact, rtol=0.05, atol=0.05)
    torch.testing.assert_close(experts(x, idx, weights), exact, rtol=1e-5, atol=1e-6)


def test_factors_by_expert_are_those_that_peft_multiplies():
    model = tiny("qwen3_moe")
    adapted(model)
    wrapper = next(m for n, m in model.named_modules() if type(innermost(m)).__name__ == "Qwen3MoeExperts")
    a, b = expert_factors(wrapper, "default")
    delta = wrapper.get_delta_weight("default")  # peft's own einsum
    torch.testing.assert_close(wrapper.scaling["default"] * b @ a, delta)


def test_parts_add_up_to_the_model():
    for name in ALWAYS:
        model = tiny(name)
        assert sum(total for _, total in audit(model).values()) == sum(p.numel() for p in model.parameters())
        try:
            sites = find_routers(model)
        except UnknownRouter:
            continue
        assert {part_of(model, f"{site.name}.weight") for site in sites} == {"router"}
