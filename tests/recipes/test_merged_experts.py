"""Adapters of experts are merged into the stacks of a mixture, each expert proved."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora.layer import ParamWrapper
from transformers import AutoModelForCausalLM, AutoTokenizer

from recipes.exports.merging import write_proved
from rl.config import ModelConfig
from rl.model.adapter_folder import find_adapter
from rl.model.adapters import add_lora
from rl.moe.adapters import expert_stacks, lora_plan
from tests.rl.families import tiny_config


@pytest.fixture
def adapter_of(tiny_model_dir, tmp_path):
    """Folders of a base and of an adapter of all its linear layers and experts."""

    def make(family):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(tiny_config(family), dtype=torch.float32)
        base, folder = tmp_path / "base", tmp_path / "adapter"
        model.save_pretrained(base)
        config = ModelConfig(name=str(base), dtype="fp32", lora={"r": 2, "alpha": 8})
        adapted = add_lora(AutoModelForCausalLM.from_pretrained(base), config, lora_plan)
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.05)
        adapted.save_pretrained(folder)
        for place in (base, folder):
            AutoTokenizer.from_pretrained(tiny_model_dir).save_pretrained(place)
        return base, folder

    return make


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_merged_experts_are_those_of_peft(adapter_of, tmp_path, family):
    """gpt_oss keeps them transposed; DeepSeek has dense layers and shared experts beside them."""
    base, folder = adapter_of(family)
    facts = write_proved(tmp_path / "out", folder, find_adapter(str(folder), None), torch.float32)
    assert facts["form"] == "merged" and facts["gap"] < 1e-4 < facts["adapter_moves"]
    plain = AutoModelForCausalLM.from_pretrained(base)
    before = {n: t.clone() for n, t in plain.state_dict().items()}
    peft = PeftModel.from_pretrained(plain, str(folder)).merge_and_unload().state_dict()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for name, tensor in merged.state_dict().items():
        torch.testing.assert_close(tensor, peft[name], atol=1e-6, rtol=1e-6)
    stacks = [f"{n}.{p}" for n in expert_stacks(merged) for p in ("gate_up_proj", "down_proj")]
    assert stacks and all(not torch.equal(peft[name], before[name]) for name in stacks)


def test_two_experts_that_change_places_are_refused_by_name(adapter_of, tmp_path, monkeypatch):
    _, folder = adapter_of("qwen3_moe")
    right = ParamWrapper.get_delta_weight
    monkeypatch.setattr(ParamWrapper, "get_delta_weight", lambda *a, **k: right(*a, **k).flip(0))
    with pytest.raises(ValueError, match=r"the merge is broken: model\.layers\.0\.mlp\.experts\.\w+ differs"):
        write_proved(tmp_path / "out", folder, find_adapter(str(folder), None), torch.float32)
