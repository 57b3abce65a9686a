"""Upcycled models equal the dense ones at step 0, load by name alone, and lead back to dense models."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from recipes.upcycle import main
from rl.moe.routers import find_routers
from rl.moe.upcycling import dense_of, upcycle

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "vocab_size": 100, "initializer_range": 0.2, "tie_word_embeddings": True}
DENSE = {
    "mixtral": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "mixtral of mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=4)),
    "qwen2_moe of llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "qwen2_moe": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
    "qwen3_moe": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=16)),
}
IDS = torch.randint(0, 100, (3, 11), generator=torch.Generator().manual_seed(0))


def dense(name: str = "mixtral"):
    torch.manual_seed(0)
    model = DENSE[name]().eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:  # norms and biases are not all ones and zeros in a trained model
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("name", DENSE)
def test_a_mixture_of_copies_equals_the_dense_model_and_loads_by_its_folder(name, tmp_path):
    model = dense(name)
    mixture = upcycle(model, num_experts=8, top_k=2, family=name.split()[0])
    assert mixture.config.model_type == name.split()[0]
    assert [(s.num_experts, s.top_k) for s in find_routers(mixture)] == [(8, 2), (8, 2)]
    assert (logits(mixture) - logits(model)).abs().max() < 5e-6 < logits(model).std()
    mixture.save_pretrained(tmp_path)
    loaded, found = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not found["missing_keys"] and not found["unexpected_keys"]
    assert torch.equal(logits(loaded.eval()), logits(mixture))


def test_noise_makes_the_experts_differ_and_the_router_is_drawn_by_the_seed():
    model = dense()
    mixtures = [upcycle(model, noise=0.1, seed=seed) for seed in (0, 0, 1)]
    down = mixtures[0].model.layers[0].mlp.experts.down_proj
    spread = (down - model.model.layers[0].mlp.down_proj.weight).std() / down.std()
    assert 0.05 < spread < 0.15 and not torch.equal(logits(mixtures[0]), logits(model))
    assert torch.equal(logits(mixtures[0]), logits(mixtures[1]))
    assert not torch.equal(logits(mixtures[0]), logits(mixtures[2]))


@pytest.mark.parametrize("name", DENSE)
def test_all_experts_with_uniform_gates_become_their_average(name):
    mixture = upcycle(dense(name), num_experts=4, top_k=4, noise=0.5)
    for site in find_routers(mixture):
        site.module.weight.data.zero_()  # uniform gates
    back = dense_of(mixture, torch.ones(2, 4), num_experts=4)
    assert back.config.intermediate_size == 4 * 48
    assert (logits(back) - logits(mixture)).abs().max() < 5e-6


def test_a_dense_model_keeps_the_busiest_experts_in_proportion_to_their_load():
    mixture = upcycle(dense(), num_experts=4, noise=0.5)
    back = dense_of(mixture, torch.tensor([[0.0, 30, 10, 5], [1, 0, 0, 3]]), num_experts=2)
    experts, mlp = mixture.model.layers[0].mlp.experts, back.model.layers[0].mlp
    assert torch.equal(mlp.gate_proj.weight, torch.cat([experts.gate_up_proj[i, :48] for i in (1, 2)]))
    assert torch.equal(mlp.down_proj.weight[:, :48], experts.down_proj[1] * 0.75)  # 30 of 40


def test_what_cannot_be_upcycled_is_refused_by_name():
    with pytest.raises(
        ValueError, match=r"made from llama \(mixtral or qwen2_moe\), .* but not from mixtral$"
    ):
        upcycle(upcycle(dense()))
    with pytest.raises(ValueError, match="but not from qwen3 as mixtral"):
        upcycle(dense("qwen3_moe"), family="mixtral")
    with pytest.raises(ValueError, match="qwen2_moe needs heads of 8 units, unlike this model"):
        upcycle(LlamaForCausalLM(LlamaConfig(**SIZES, head_dim=16)), family="qwen2_moe")
    with pytest.raises(ValueError, match="but not from llama with attention_bias"):
        upcycle(LlamaForCausalLM(LlamaConfig(**SIZES, attention_bias=True)))
    with pytest.raises(ValueError, match="top_k=9 must be 1 to num_experts=8"):
        upcycle(dense(), top_k=9)
    with pytest.raises(ValueError, match="this one is llama, with experts in 0 of 2 layers"):
        dense_of(dense(), torch.ones(2, 4), num_experts=4)


def test_the_command_writes_a_folder_that_a_run_can_name(tiny_model_dir, tmp_path, capsys):
    folder = tmp_path / "moe"
    assert main([str(tiny_model_dir), str(folder), "--experts", "4", "--top-k", "2"]) == 0
    assert "mixtral" in capsys.readouterr().out
    a, b = (AutoModelForCausalLM.from_pretrained(path).eval() for path in (tiny_model_dir, folder))
    assert (logits(a) - logits(b)).abs().max() < 5e-6
    assert (folder / "tokenizer.json").exists()
    assert main([str(tiny_model_dir), str(folder)]) == 1
