"""Processes that split the weights read their slices alone, and then hold what a split of the whole gives."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from tests.diffusion.processes import launch

SCRIPT = Path(__file__).with_name("sharded_loading.py")
LAYERS = 10


@pytest.mark.rotation("loading in slices")
@pytest.mark.parametrize("tied", [True, False])
def test_two_processes_hold_the_same_bits_and_never_the_whole(tied, tiny_model_dir, tmp_path, monkeypatch):
    """231 MB of fp32 weights, in bf16 in the files, for policy and reference.

    A process that loads all holds two whole copies. One that reads slices holds two halves; before them the
    first two layers, a fifth, and after them three copies of a layer, as it is gathered, three tenths.
    """
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=107,  # two processes cannot have equal parts
        hidden_size=512,
        intermediate_size=3072,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=8,
        tie_word_embeddings=tied,
    )
    model = Qwen2ForCausalLM(config).to(torch.bfloat16)
    size = 4 * sum(p.numel() for p in model.parameters())
    assert size > 220e6
    model.save_pretrained(tmp_path / "model", max_shard_size="40MB")
    del model
    AutoTokenizer.from_pretrained(tiny_model_dir).save_pretrained(tmp_path / "model")
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")  # what is freed goes back to the system
    launch(SCRIPT, [str(tmp_path / "model"), str(tmp_path)], 1)
    for rank in (0, 1):
        whole, slices = (load_file(tmp_path / f"{kind}-{rank}.safetensors") for kind in ("whole", "slices"))
        assert whole.keys() == slices.keys()
        assert any("inv_freq" in name for name in whole)
        assert all(torch.equal(whole[name], slices[name]) for name in whole)
        facts = [json.loads((tmp_path / f"{kind}-{rank}.json").read_text()) for kind in ("whole", "slices")]
        assert facts[0]["packed"] and facts[1]["packed"]
        assert not json.loads((tmp_path / f"rows of one-{rank}.json").read_text())["packed"]
        assert facts[0]["canary"] == facts[1]["canary"]
        print([round(f["grew"] / size, 2) for f in facts])
        assert facts[0]["grew"] > 2.1 * size
        assert facts[1]["grew"] < 1.8 * size
