"""What a sharded policy makes of a model's parts, and what it refuses; its laws are in tests/invariants."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

import recipes.grpo
from rl.batch import Row, micro_batch_of
from rl.config import ModelConfig
from rl.model.adapters import add_lora
from rl.model.hollow import in_files, own_tensors
from rl.model.units import check_shardable, is_adapter, units
from rl.moe.adapters import lora_plan
from rl.sharded import deal_tensors, make_mesh, with_rows
from rl.types import Completion, Prompt
from tests.rl.families import tiny_config

MIXTURES = ("deepseek_v3", "gpt_oss", "granitemoe", "mixtral", "qwen3_moe")
SMALL = {"vocab_size": 40, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 3}
SMALL |= {"num_attention_heads": 2, "num_key_value_heads": 1}


def llama(*, tied: bool) -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**SMALL, tie_word_embeddings=tied))


def test_units_are_the_layers_and_an_embedding_that_is_not_the_head():
    tied, untied = llama(tied=True), llama(tied=False)
    assert units(tied) == list(tied.model.layers)
    assert units(untied) == [untied.model.embed_tokens, *untied.model.layers]
    other = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=8, n_layer=3, n_head=2, n_positions=16))
    assert units(other) == list(other.transformer.h)


def mixture(number: int = 4) -> Qwen2MoeForCausalLM:
    sizes = {"num_experts": number, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8}
    return Qwen2MoeForCausalLM(Qwen2MoeConfig(**SMALL, **sizes))


@pytest.mark.parametrize("name", MIXTURES)
def test_tensors_of_mixtures_are_taken_apart_as_transformers_saves_them(name, tmp_path):
    model: Any = AutoModelForCausalLM.from_config(tiny_config(name), dtype=torch.float32)
    check_shardable(model)
    model.save_pretrained(tmp_path)
    saved, found = load_file(tmp_path / "model.safetensors"), in_files(model, own_tensors(model))
    assert found.keys() == saved.keys()
    assert all(torch.equal(found[name], saved[name]) for name in saved)
    for tensor in found.values():
        tensor.data.zero_()
    assert not any(p.any() for p in model.parameters())  # they are views


def test_dense_models_can_be_split_and_others_are_refused_by_name():
    check_shardable(llama(tied=True))
    check_shardable(llama(tied=False))
    check_shardable(mixture())
    apart = llama(tied=False)
    apart.model.layers[1].mlp.experts = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(2))
    with pytest.raises(ValueError, match="cannot be split: its experts are separate modules"):
        check_shardable(apart)
    reordered = AutoModelForCausalLM.from_config(tiny_config("kimi_linear"))
    with pytest.raises(ValueError, match="its files have other tensors than the loaded model"):
        check_shardable(reordered)
    shared = llama(tied=False)
    shared.model.layers[2].mlp = shared.model.layers[0].mlp
    with pytest.raises(ValueError, match="cannot be split: its layers share weights"):
        check_shardable(shared)
    short = llama(tied=False)
    short.config.num_hidden_layers = 2
    with pytest.raises(ValueError, match="cannot be split: it has no list of decoder layers"):
        check_shardable(short)


def test_adapters_of_experts_are_split_if_each_process_gets_as_many_and_those_of_shared_ones_always():
    for number in (4, 7):
        model = mixture(number)
        add_lora(model, ModelConfig(lora={"r": 4}), lora_plan)  # type: ignore[arg-type]
        adapted = {m.num_experts for m in cast(Any, model).modules() if is_adapter(m)}
        assert adapted == {1, number}  # peft counts one expert for the layers of a shared expert
        check_shardable(model, 1)
        if number == 4:
            check_shardable(model, 2)
            continue
        with pytest.raises(ValueError, match="adapters of its 7 experts cannot be dealt to 2 proc"):
            check_shardable(model, 2)


def test_trained_weights_of_several_dtypes_are_refused_by_name():
    """FSDP reduces all gradients of a unit in one dtype; routers of this family stay fp32."""
    model = AutoModelForCausalLM.from_config(tiny_config("hunyuan_v1_moe"), dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"several dtypes, unlike under model\.dtype=bf16-mixed"):
        check_shardable(model)
    add_lora(model, ModelConfig(lora={"r": 4}), lora_plan)  # type: ignore[arg-type]
    check_shardable(model)


def test_tensors_are_dealt_in_spans_of_about_as_many_bytes():
    """40, 40, 40, 120, 80 bytes: three processes take what begins before 107, before 214, and the rest."""
    named = {str(i): torch.zeros(n) for i, n in enumerate((10, 10, 10, 30, 20))}
    assert deal_tensors(named, 3) == [0, 0, 0, 1, 2]
    assert deal_tensors(named, 1) == [0] * 5


def test_a_hybrid_needs_several_hosts(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(ValueError, match=r"4 of 4 processes are on this one; use train\.sharding=full"):
        make_mesh(torch.device("cpu"), 4, "hybrid")


@pytest.mark.parametrize("name", ["FSDP", "DEEPSPEED"])
def test_a_launch_by_accelerates_own_config_is_refused(name, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    config = tmp_path / "config.yaml"
    config.write_text(f"run_dir: {tmp_path}/run\n")
    assert recipes.grpo.main([str(config)]) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert f"accelerate is set up for {name}" in said and "set train.sharding=full" in said


def test_added_rows_change_nothing_where_each_token_has_its_own_advantage():
    completion = Completion([5, 6, 7], [-1.0, 0.0, -2.0], [True, False, True], "stop", [])
    row = Row(Prompt("p", "", (3, 4)), completion, 0, 0, [1.0, 0.0, -2.0], weight=0.5)
    padded = with_rows(micro_batch_of([[row]]), 3)
    assert [block.lengths for block in padded.blocks] == [(2, 3), (1, 1), (1, 1)]
    assert padded.advantages_L.tolist() == [1.0, -2.0] and padded.columns_L.tolist() == [2, 4]
    assert padded.num_sequences == 1
