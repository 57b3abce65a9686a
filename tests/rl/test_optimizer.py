"""Learning rates and weight decay, beside those of transformers' trainer."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, get_scheduler
from transformers.trainer_pt_utils import get_parameter_names

from rl.config import OptimizerConfig
from rl.optimizer import lost_to_rounding, set_learning_rate, weight_decay_groups
from tests.rl.families import tiny_config

# transformers.Trainer.get_decay_parameter_names
NO_DECAY = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]


@pytest.mark.parametrize("warmup", [0, 3, 7])
@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_every_steps_rate_is_transformers_and_the_warmup_is_a_step_ahead(schedule, warmup):
    """Warm-up reaches the rate with its last step, where transformers begins with a step of rate 0."""
    config = OptimizerConfig(lr=0.5, schedule=schedule, warmup_steps=warmup)
    (ours, theirs) = (torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5) for _ in range(2))
    name = "constant_with_warmup" if schedule == "constant" else schedule
    scheduler = get_scheduler(name, theirs, num_warmup_steps=warmup, num_training_steps=10)
    for step in range(10):
        set_learning_rate(ours, config, step, 10)
        expected = theirs.param_groups[0]["lr"] if step >= warmup else 0.5 * (step + 1) / warmup
        assert ours.param_groups[0]["lr"] == pytest.approx(expected, rel=1e-12, abs=1e-15), step
        theirs.step()
        scheduler.step()
    assert schedule == "constant" or 0 < ours.param_groups[0]["lr"] < 0.5


@pytest.mark.parametrize("family", ["llama", "gpt_oss", "deepseek_v3", "recurrent_gemma"])
def test_what_decays_is_what_decays_in_transformers_trainer(family):
    """Biases of stacked experts (gpt_oss) and of gates by heads (recurrent_gemma) have two axes."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_config(family))
    named = list(model.named_parameters())
    decaying, others = weight_decay_groups(named, 0.1)
    assert (decaying["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    names = {id(p): name for name, p in named}
    found = [{names[id(p)] for p in group["params"]} for group in (decaying, others)]
    expected = {*get_parameter_names(model, [torch.nn.LayerNorm], NO_DECAY)} & {*names.values()}  # tied once
    one_axis = {name for name, p in named if p.ndim < 2}  # HF decays vectors with names of their own
    assert found[0] == expected - one_axis and found[0] | found[1] == set(names.values())


@pytest.mark.parametrize(("dtype", "lr"), [("bfloat16", 1e-6), ("bfloat16", 1e-2), ("float32", 1e-6)])
def test_a_warning_counts_the_values_that_adamw_cannot_move(dtype, lr):
    """bf16 has 8 binary digits: near 0.02 numbers are 1.2e-4 apart, and a step of 1e-6 is lost."""
    torch.manual_seed(0)
    weight = torch.nn.Parameter((0.02 * torch.randn(100, 100)).to(getattr(torch, dtype)))
    before = weight.detach().clone()
    weight.grad = torch.full_like(weight, -1)  # AdamW's first step is lr against the gradient's sign
    torch.optim.AdamW([weight], lr=lr, weight_decay=0.0, fused=True).step()
    lost = (weight.detach() == before).double().mean().item()
    weight.data.copy_(before)
    found = lost_to_rounding([("weight", weight)], lr)
    if lr == 1e-6 and dtype == "bfloat16":
        assert 0.95 < lost < 1 and found is not None and found.startswith(f"{lost:.1%} of the trained values")
        assert "optimizer.lr=1e-06: it rounds to nothing; use model.dtype=bf16-mixed" in found
    else:
        assert found is None and lost < 0.05


def test_the_warning_counts_all_parameters_and_those_in_fp32_as_moved():
    """Values near 1 are 2^-7 apart in bf16 and lost, zeros are not; a share up to a half says nothing."""
    lost, moved = (torch.nn.Parameter(torch.full((60, 10), x, dtype=torch.bfloat16)) for x in (1.0, 0.0))
    wide = torch.nn.Parameter(torch.ones(40, 10))
    assert (lost_to_rounding([("a", lost), ("b", wide)], 1e-6) or "").startswith(
        "60.0% of the trained values"
    )
    assert (lost_to_rounding([("a", lost), ("b", lost), ("c", moved)], 1e-6) or "").startswith("66.7%")
    assert lost_to_rounding([("a", lost), ("b", wide), ("c", moved)], 1e-6) is None
