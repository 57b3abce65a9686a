"""Checkpoints of others, by their own names, in and out."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from rl.diffusion.layouts import export_llada, llada_key, llama_key
from rl.diffusion.model import hidden_states, load_diffusion_model, logits_at
from rl.model.bidirectional import Documents
from tests.diffusion.conftest import LLADA_CONFIG, MASK, SMALL, llada_tensors, plain_llada, randomised


def logits(model, ids):
    documents = Documents.of([len(ids)])
    with torch.no_grad():
        return logits_at(model, hidden_states(model, ids, documents), torch.arange(len(ids)), documents)


def test_a_llada_checkpoint_computes_what_its_formulas_say(llada_dir):
    model = load_diffusion_model(str(llada_dir))
    assert isinstance(model, LlamaForCausalLM)
    assert (model.config.mask_token_id, model.config.diffusion_shift) == (MASK, False)
    ids = torch.tensor([5, 9, MASK, MASK, 30, 7, MASK])
    torch.testing.assert_close(
        logits(model, ids).double(), plain_llada(llada_tensors(), ids), rtol=1e-5, atol=1e-5
    )


def test_ff_out_is_the_down_projection_in_a_block_and_the_head_at_the_top():
    names = list(llada_tensors())
    assert [llada_key(llama_key(name)) for name in names] == names
    assert llama_key("model.transformer.ff_out.weight") == "lm_head.weight"
    assert llama_key("model.transformer.blocks.31.ff_out.weight") == "model.layers.31.mlp.down_proj.weight"
    assert llama_key("model.transformer.blocks.0.ff_proj.weight") == "model.layers.0.mlp.gate_proj.weight"
    with pytest.raises(ValueError, match=r"blocks.0.att_proj.weight', which no LLaDA"):
        llama_key("model.transformer.blocks.0.att_proj.weight")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_export_writes_the_checkpoint_back_byte_for_byte(llada_dir, tmp_path, dtype):
    """Tensor by tensor against two shards, and the very file against a checkpoint in one."""
    model = load_diffusion_model(str(llada_dir), dtype=dtype)
    export_llada(model, tmp_path / "out")
    (path,) = (tmp_path / "out").glob("*.safetensors")
    saved, original = load_file(path), llada_tensors()
    assert saved.keys() == original.keys()
    assert all(bool((saved[n].view(torch.int16) == t.view(torch.int16)).all()) for n, t in original.items())
    save_file(original, tmp_path / "one.safetensors", metadata={"format": "pt"})
    assert path.read_bytes() == (tmp_path / "one.safetensors").read_bytes()
    assert (tmp_path / "out" / "config.json").read_bytes() == (llada_dir / "config.json").read_bytes()
    export_llada(model, tmp_path / "small", max_shard_size="20KB")
    index = json.loads((tmp_path / "small" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    assert load_diffusion_model(str(tmp_path / "small")).config.mask_token_id == MASK


def test_a_trained_llada_survives_a_plain_save_and_still_exports(llada_dir, tmp_path):
    model = load_diffusion_model(str(llada_dir))
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] += 1.0
    model.save_pretrained(tmp_path / "plain")
    again = load_diffusion_model(str(tmp_path / "plain"))
    export_llada(again, tmp_path / "out")
    saved, original = load_file(next((tmp_path / "out").glob("*.safetensors"))), llada_tensors()
    changed = [name for name, t in original.items() if (saved[name] != t).any()]
    assert changed == ["model.transformer.blocks.1.ff_out.weight"]


def test_a_model_that_was_no_llada_has_no_llada_layout(tmp_path, tiny_model_dir):
    model = load_diffusion_model(str(tiny_model_dir), mask_token_id=MASK)
    with pytest.raises(ValueError, match="was not loaded from a LLaDA checkpoint"):
        export_llada(model, tmp_path / "out")


def test_illada_and_dream_are_llama_and_qwen_by_their_own_names(tmp_path):
    llama = randomised(LlamaForCausalLM(LlamaConfig(**SMALL | {"tie_word_embeddings": True})))
    qwen = randomised(Qwen2ForCausalLM(Qwen2Config(**SMALL)))
    cases = {
        "illada": (llama, {"architectures": ["ILLaDAForCausalLM"], "model_type": "illada"}, False),
        "dream": (qwen, {"architectures": ["DreamModel"], "model_type": "Dream"}, True),
    }
    for name, (model, changes, shift) in cases.items():
        model.save_pretrained(tmp_path / name)
        config = json.loads((tmp_path / name / "config.json").read_text())
        config |= changes | {"auto_map": {"AutoModel": "code.Model"}, "mask_token_id": 5}
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        loaded = load_diffusion_model(str(tmp_path / name))
        assert (type(loaded), loaded.config.mask_token_id) == (type(model), 5)
        assert loaded.config.diffusion_shift is shift
        for key, value in model.state_dict().items():
            assert (loaded.state_dict()[key] == value).all(), key


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["LLaDAMoEModelLM"]}, "LLaDA-MoE"),
        ({"architectures": ["LLaDAModelLM"], "num_experts": 64}, "LLaDA-MoE"),
        ({"architectures": ["LLaDA2MoeModelLM"], "model_type": "llada2_moe"}, "block-causal"),
        ({"architectures": ["ILLaDAForCausalLM"], "layer_norm_eps": 1e-5}, "LayerNorm"),
        ({"block_type": "sequential"}, "only with block_type='llama'"),
        ({"include_qkv_bias": True}, "include_qkv_bias=True"),
        ({"layer_norm_type": "low_precision"}, "layer_norm_type='low_precision'"),
    ],
)
def test_layouts_that_are_not_supported_are_refused_with_a_sentence(llada_dir, changes, message):
    (llada_dir / "config.json").write_text(json.dumps(LLADA_CONFIG | changes))
    with pytest.raises(ValueError, match=message):
        load_diffusion_model(str(llada_dir))


def test_a_checkpoint_with_a_missing_shard_names_what_is_missing(llada_dir):
    (llada_dir / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match=r"10 weights are missing such as model.transformer.ff_out.weight"):
        load_diffusion_model(str(llada_dir))
