"""What fused layers change in transformers stays within the model that they were asked for."""

from __future__ import annotations

from types import ModuleType, SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rl.model.loading import _for_one_instance, _in_fp32


def rotary(name):
    return lambda q, *rest, **options: (name, rest, options)


@pytest.fixture
def family():
    module = ModuleType("modeling_family")
    module.FamilyNorm = SimpleNamespace  # type: ignore[attr-defined]
    module.apply_rotary_pos_emb = rotary("plain")  # type: ignore[attr-defined]
    return module


def test_classes_come_back_and_a_fused_rotary_embedding_serves_cuda_tensors_only(family):
    on_cpu, on_gpu = SimpleNamespace(is_cuda=False), SimpleNamespace(is_cuda=True)
    for number in ("fused 1", "fused 2"):  # a second model of the family
        with _for_one_instance(family):
            family.FamilyNorm = dict
            family.apply_rotary_pos_emb = rotary(number)
        assert family.FamilyNorm is SimpleNamespace
        assert family.apply_rotary_pos_emb(on_cpu, 1, dim=2) == ("plain", (1,), {"dim": 2})
        assert family.apply_rotary_pos_emb(on_gpu, 1, dim=2) == (number, (1,), {"dim": 2})


def test_a_family_comes_back_after_a_fault(family):
    plain = dict(vars(family))

    def patch():
        with _for_one_instance(family):
            family.FamilyNorm, family.apply_rotary_pos_emb = dict, rotary("fused")
            raise NotImplementedError("no kernels for this family")

    with pytest.raises(NotImplementedError):
        patch()
    assert vars(family) == plain


def test_a_family_without_a_rotary_embedding_gets_none():
    family = ModuleType("modeling_family")
    with _for_one_instance(family):
        pass
    assert not hasattr(family, "apply_rotary_pos_emb")


def test_a_look_at_a_bf16_model_in_fp32_changes_nothing():
    config = LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2
    )
    model = LlamaForCausalLM(config)
    for p in model.parameters():
        p.data = p.data.bfloat16()
    before = {name: t.clone() for name, t in (*model.named_parameters(), *model.named_buffers())}
    assert any(t.dtype == torch.float32 for t in before.values())  # rotary frequencies
    ids = torch.arange(9)[None]
    found = _in_fp32(model, lambda: model(input_ids=ids).logits)
    assert found.dtype == torch.float32
    for name, t in (*model.named_parameters(), *model.named_buffers()):
        assert t.dtype == before[name].dtype and torch.equal(t, before[name]), name
