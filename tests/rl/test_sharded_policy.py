"""What a sharded policy makes of a model's parts, and what it refuses; its laws are in tests/invariants."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

import recipes.grpo
from rl.batch import Row, micro_batch_of
from rl.sharded import check_shardable, deal_tensors, make_mesh, units, with_rows
from rl.types import Completion, Prompt

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


def test_dense_models_can_be_split_and_others_are_refused_by_name():
    check_shardable(llama(tied=True))
    check_shardable(llama(tied=False))
    mixture = Qwen2MoeForCausalLM(
        Qwen2MoeConfig(**SMALL, num_experts=4, moe_intermediate_size=8, shared_expert_intermediate_size=8)
    )
    with pytest.raises(ValueError, match="Qwen2MoeForCausalLM cannot be split: it has experts"):
        check_shardable(mixture)
    shared = llama(tied=False)
    shared.model.layers[2].mlp = shared.model.layers[0].mlp
    with pytest.raises(ValueError, match="cannot be split: its layers share weights"):
        check_shardable(shared)
    short = llama(tied=False)
    short.config.num_hidden_layers = 2
    with pytest.raises(ValueError, match="cannot be split: it has no list of decoder layers"):
        check_shardable(short)


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


@pytest.mark.parametrize(("words", "named"), [("hybrid", "hybrid"), ("full", "full with model.lora")])
def test_copies_on_hosts_and_adapters_of_diffusion_models_are_not_split(words, named, tmp_path, capsys):
    config = tmp_path / "config.yaml"
    adapter = "model: {lora: {r: 4}}\n" if words == "full" else ""
    config.write_text(f"run_dir: {tmp_path}/run\ndiffusion: {{}}\ntrain: {{sharding: {words}}}\n{adapter}")
    assert recipes.grpo.main([str(config)]) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert f"train.sharding={named} splits causal models only, but this run trains a diffusion" in said


def test_added_rows_change_nothing_where_each_token_has_its_own_advantage():
    completion = Completion([5, 6, 7], [-1.0, 0.0, -2.0], [True, False, True], "stop", [])
    row = Row(Prompt("p", "", (3, 4)), completion, 0, 0, [1.0, 0.0, -2.0], weight=0.5)
    padded = with_rows(micro_batch_of([[row]]), 3)
    assert [block.lengths for block in padded.blocks] == [(2, 3), (1, 1), (1, 1)]
    assert padded.advantages_L.tolist() == [1.0, -2.0] and padded.columns_L.tolist() == [2, 4]
    assert padded.num_sequences == 1
