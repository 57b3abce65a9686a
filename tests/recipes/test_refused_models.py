"""Models that cannot be trained, or not with this engine, are refused with the cause and a remedy."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from recipes.cli import main as cohort
from recipes.engines import make_engine
from recipes.grpo import main
from rl.config import EngineConfig


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", "fp8", "mxfp4"])
def test_quantised_weights_are_refused_with_the_cause(config_file, tiny_model_dir, tmp_path, capsys, method):
    folder = tmp_path / "quantised"
    shutil.copytree(tiny_model_dir, folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, "load_in_4bit": True, "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))
    masked = ["diffusion={mask_token: <unk>, block_length: 4}", "engine.name=auto"]
    for kind in ([], [*masked, "loss.sampler_correction=null", f"run_dir={tmp_path}/masked"]):
        assert main([str(config_file), f"model.name={folder}", *kind]) == 1
        error = capsys.readouterr().err
        assert (
            f"holds quantised weights (quantization_config in its config.json, quant_method={method}" in error
        )
        assert "save a dequantised bfloat16 copy" in error and "Traceback" not in error
    assert cohort(["plan", str(config_file), f"model.name={folder}", "--gpu-gib", "80"]) == 1
    assert "holds quantised weights" in capsys.readouterr().err


def test_a_model_like_gpt2_is_refused_for_vllm_with_the_cause_and_not_chosen_for_it(tiny_model_dir, tmp_path):
    model = GPT2LMHeadModel(GPT2Config(vocab_size=105, n_positions=32, n_embd=16, n_layer=1, n_head=2))
    model.save_pretrained(tmp_path / "gpt2")
    said = []
    options = {
        "tokenizer": AutoTokenizer.from_pretrained(tiny_model_dir),
        "dtype": torch.float32,
        "device": torch.device("cpu"),
        "max_model_length": 32,
        "max_num_seqs": 4,
        "revision": None,
        "note": said.append,
        "trained": model,
    }
    with pytest.raises(ValueError, match=r"engine\.name=vllm: .*Conv1D.*use engine\.name=transformers"):
        make_engine(EngineConfig(name="vllm"), str(tmp_path / "gpt2"), **options)
    assert make_engine(EngineConfig(), str(tmp_path / "gpt2"), **options).name == "transformers"
    assert "keeps its matrices transposed" in said[0]
