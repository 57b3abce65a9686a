"""Runs that save memory in every way end with the weights of one that saves none, bit for bit."""

from __future__ import annotations

import shutil

import pytest
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from recipes.grpo import main
from rl.store.rows import read_rows
from tests.vllm_engines import needs_vllm

pytestmark = [
    pytest.mark.rotation,
    needs_vllm,
]
SAVING = [f"memory.{key}=true" for key in ("engine_sleeps", "optimizer_on_host", "reference_on_host")]


@pytest.fixture
def wide_model_dir(tiny_model_dir, tmp_path):
    """The tiny model with heads of 32, for which vLLM's CPU attention has a kernel."""
    folder = tmp_path / "wide"
    config = LlamaConfig.from_pretrained(tiny_model_dir, hidden_size=64, num_attention_heads=2)
    config.num_key_value_heads, config.head_dim = 1, 32
    LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model_dir).save_pretrained(folder)
    return folder


def test_a_run_that_saves_memory_is_bitwise_the_one_that_does_not(config_file, heldout, wide_model_dir):
    """It is stopped after two steps and loses its checkpoint, so it trains on records, the engine asleep."""
    runs = config_file.parent
    common = [
        str(config_file),
        *heldout,
        f"model.name={wide_model_dir}",
        "engine.name=vllm",
        "loss.kl_coef=0.1",
    ]
    common += ["engine.kv_cache_gib=0.1", "optimizer.lr=0.01"]
    assert main([*common, f"run_dir={runs}/plain", "train.steps=4"]) == 0
    saving = [*common, f"run_dir={runs}/saving", *SAVING]
    assert main([*saving, "train.steps=2"]) == 0
    shutil.rmtree(runs / "saving" / "checkpoints")
    assert main([*saving, "train.steps=4"]) == 0
    plain, saved = (
        load_file(runs / name / "checkpoints/step-000004/model.safetensors") for name in ("plain", "saving")
    )
    start = load_file(wide_model_dir / "model.safetensors")
    assert plain.keys() == saved.keys() and all((plain[name] == saved[name]).all() for name in plain)
    assert any((plain[name] != start[name]).any() for name in start)
    for name in ("plain", "saving"):
        rows = read_rows(runs / name / "metrics.jsonl")
        assert [row["step"] for row in rows] == [1, 2, 3, 4] and rows[3]["policy/kl"] > 0
