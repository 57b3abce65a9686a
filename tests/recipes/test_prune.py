"""Students made of a model: which layers and channels stay, and that the folder holds what was cut."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

from recipes.prune import kept_layers, main


@pytest.fixture(scope="module")
def teacher(tiny_model_dir, tmp_path_factory):
    """Five layers; the last three have a window of 4 tokens, which `layer_types` says of each layer."""
    folder = tmp_path_factory.mktemp("teacher")
    size = {"hidden_size": 16, "intermediate_size": 12, "num_attention_heads": 2, "num_key_value_heads": 1}
    window = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2}
    torch.manual_seed(0)
    config = Qwen2Config(vocab_size=105, num_hidden_layers=5, initializer_range=0.3, **size, **window)
    Qwen2ForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model_dir).save_pretrained(folder)
    return folder


def test_layers_are_spaced_evenly_or_as_listed():
    """round(i * 29 / 11) for 12 of the 30 layers of SmolLM2-135M."""
    assert kept_layers("12", 30) == [0, 3, 5, 8, 11, 13, 16, 18, 21, 24, 26, 29]
    assert kept_layers("5", 5) == [0, 1, 2, 3, 4] and kept_layers("2", 30) == [0, 29]
    assert kept_layers("0,1,29", 30) == [0, 1, 29]


@pytest.mark.parametrize("asked", ["1", "31", "0,30", "3,2", "1,1", "-1,2", "a", "", "1,"])
def test_layers_that_the_model_does_not_have_are_refused(asked):
    with pytest.raises(
        ValueError, match=r"the model has layers 0 to 29; give a number from 2 to 30, or layers"
    ):
        kept_layers(asked, 30)


def test_a_student_is_the_teacher_without_the_other_layers(teacher, tmp_path, capsys):
    """Against the kept layers called one after the other, each with the mask of its own window."""
    assert main([str(teacher), str(tmp_path / "student"), "--layers", "0,2,4"]) == 0
    whole, student = (AutoModelForCausalLM.from_pretrained(f).eval() for f in (teacher, tmp_path / "student"))
    assert student.config.num_hidden_layers == 3
    assert student.config.layer_types == ["full_attention", "sliding_attention", "sliding_attention"]
    assert student.config.layer_types == [whole.config.layer_types[i] for i in (0, 2, 4)]
    ids = torch.randint(0, 105, (1, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        hidden, positions = whole.model.embed_tokens(ids), torch.arange(12)[None]
        rope, distance = whole.model.rotary_emb(hidden, positions), positions.T - positions
        for i in (0, 2, 4):
            seen = (distance >= 0) & ((distance < 4) | (i < 2))
            mask = torch.where(seen, 0.0, torch.finfo(torch.float32).min)[None, None]
            hidden = whole.model.layers[i](hidden, attention_mask=mask, position_embeddings=rope)
        expected = whole.lm_head(whole.model.norm(hidden))
        torch.testing.assert_close(student(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)
    vocabularies = [AutoTokenizer.from_pretrained(f).get_vocab() for f in (teacher, tmp_path / "student")]
    assert vocabularies[0] == vocabularies[1]
    assert "layers 0, 2, 4 of 5;" in capsys.readouterr().out
    assert main([str(teacher), str(tmp_path / "student"), "--layers", "2"]) != 0
    assert "already exists; name a new folder" in capsys.readouterr().err


def test_channels_without_weight_are_the_first_to_go(teacher, tmp_path):
    """Four of twelve channels get a gate, an up or a down of 0, and leaving them out changes nothing."""
    model = AutoModelForCausalLM.from_pretrained(teacher)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate_proj.weight[3] = layer.mlp.up_proj.weight[5] = 0
            layer.mlp.down_proj.weight[:, [7, 11]] = 0
    model.save_pretrained(tmp_path / "teacher")
    AutoTokenizer.from_pretrained(teacher).save_pretrained(tmp_path / "teacher")
    assert main([str(tmp_path / "teacher"), str(tmp_path / "student"), "--ffn", "8"]) == 0
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    assert student.model.layers[0].mlp.up_proj.weight.shape == (8, 16)
    ids = torch.arange(20)[None]
    torch.testing.assert_close(
        student(input_ids=ids).logits, model(input_ids=ids).logits, rtol=1e-4, atol=1e-4
    )


def test_a_folder_that_would_hold_another_model_is_not_written(tiny_model_dir, tmp_path, capsys):
    """`mlp_only_layers` names layers by number: of layers 0 and 2 it would make the second dense."""
    size = {"hidden_size": 16, "intermediate_size": 12, "num_attention_heads": 2, "num_key_value_heads": 1}
    experts = {
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 8,
        "shared_expert_intermediate_size": 8,
    }
    config = Qwen2MoeConfig(vocab_size=105, num_hidden_layers=3, mlp_only_layers=[1], **size, **experts)
    Qwen2MoeForCausalLM(config).save_pretrained(tmp_path / "teacher")
    AutoTokenizer.from_pretrained(tiny_model_dir).save_pretrained(tmp_path / "teacher")
    assert main([str(tmp_path / "teacher"), str(tmp_path / "student"), "--layers", "2"]) != 0
    assert "qwen2_moe has settings of layers that are not lists" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["teacher"]


def test_what_cannot_be_cut_is_refused(teacher, tmp_path, capsys):
    for words, message in (
        (["--layers", "6"], "give a number from 2 to 5"),
        (["--ffn", "13"], "those of qwen2 have 12"),
    ):
        assert main([str(teacher), str(tmp_path / "student"), *words]) != 0
        assert message in capsys.readouterr().err
        assert not (tmp_path / "student").exists()
