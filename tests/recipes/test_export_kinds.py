"""Merges of other families, layers and dtypes; and what vLLM samples from a merged folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from recipes.cli import main as cohort
from recipes.export import export
from recipes.exports.merging import write_proved
from rl.diffusion.model import is_shifted, load_diffusion_model
from rl.model.adapter_folder import find_adapter
from rl.types import Prompt, SamplingParams
from tests.calling import call
from tests.conftest import make_tiny_tokenizer
from tests.recipes.exported import LORA, train
from tests.rl.families import save_tiny
from tests.vllm_engines import needs_vllm, start_vllm

IDS = torch.arange(5, 45)[None]


def random_adapter(base: Path, **lora) -> Path:
    """A folder with a random adapter of the model in another one, and a tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    wrapped = get_peft_model(model, LoraConfig(r=3, lora_alpha=6, task_type="CAUSAL_LM", **lora))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    folder = base.with_name("adapter")
    wrapped.save_pretrained(folder)
    make_tiny_tokenizer(folder)
    return folder


def merged(folder: Path, dtype: torch.dtype | None = None) -> tuple[Path, dict]:
    to = folder.with_name("merged")
    return to, write_proved(to, folder, find_adapter(str(folder), None), dtype)


@torch.no_grad()
def logprobs(model) -> torch.Tensor:
    return model.eval().float()(input_ids=IDS).logits.log_softmax(-1)


@pytest.mark.parametrize(
    ("family", "targets"),
    [("qwen3", "all-linear"), ("gemma2", ["q_proj", "down_proj"]), ("mixtral", ["q_proj", "o_proj"])],
)
def test_a_merged_model_of_any_family_has_the_log_probs_of_its_adapter(family, targets, tmp_path):
    folder = random_adapter(save_tiny(family, tmp_path / "base"), target_modules=targets)
    to, facts = merged(folder)
    theirs = logprobs(AutoPeftModelForCausalLM.from_pretrained(folder))
    torch.testing.assert_close(logprobs(AutoModelForCausalLM.from_pretrained(to)), theirs, atol=1e-4, rtol=0)
    assert facts["gap"] < 1e-4 < 1e-2 < facts["adapter_moves"]


@pytest.mark.parametrize(
    ("family", "lora", "said"),
    [
        ("gpt2", {"target_modules": ["c_attn"]}, r"no proof for transformer\.h\.0\.attn\.c_attn.*a Conv1D"),
        ("qwen2", {"target_modules": ["embed_tokens"]}, r"no proof for model\.embed_tokens.*an? Embedding"),
        ("qwen2", {"target_modules": ["q_proj"], "use_rslora": True}, "this adapter has use_rslora=True"),
    ],
    ids=["conv1d", "embeddings", "rslora"],
)  # fmt: skip
def test_a_merge_without_a_proof_is_refused_by_name(family, lora, said, tmp_path):
    folder = random_adapter(save_tiny(family, tmp_path / "base"), **lora)
    with pytest.raises(ValueError, match=said):
        merged(folder)


def test_a_merged_model_has_the_dtype_of_its_base(tmp_path):
    base = save_tiny("qwen3", tmp_path / "base")
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(base)
    to, facts = merged(random_adapter(base, target_modules="all-linear"))
    assert {t.dtype for t in load_file(to / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((to / "config.json").read_text())["dtype"] == facts["dtype"] == "bfloat16"
    assert 1e-3 < facts["gap"] < 0.5 < facts["adapter_moves"]


@pytest.mark.rotation
@pytest.mark.parametrize("form", ["full", "adapter"])
def test_a_diffusion_model_is_exported_as_it_is(patched, tiny_model_dir, tmp_path, capsys, form):
    """Its mask token and alignment come along, and its architecture is one that no causal engine serves."""
    more = {"diffusion": {"mask_token": "<unk>", "shift": True, "block_length": 4}, "engine": {}}
    lora = {"lora": LORA} if form == "adapter" else {}
    source = train(tmp_path, {"name": str(tiny_model_dir), **lora}, **more, evaluation={})
    words = ["export", str(source), "--to", str(tmp_path / "out")]
    for more in (["--merge"], ["--dtype", "bf16"]):
        assert cohort([*words, *more]) == 1
        assert "and this is a diffusion model" in capsys.readouterr().err
    if lora:
        assert cohort(words) == 1
        assert "this adapter belongs to a local folder (model)" in capsys.readouterr().err
        return
    assert cohort(words) == 0
    ours = load_diffusion_model(str(tmp_path / "out"))
    theirs = load_diffusion_model(str(source / "checkpoints" / "step-000002"))
    assert (ours.config.mask_token_id, is_shifted(ours)) == (2, True)
    assert all(torch.equal(t, ours.state_dict()[n]) for n, t in theirs.state_dict().items())
    assert 'model = load_diffusion_model("out")' in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.slow
@pytest.mark.rotation
@needs_vllm
def test_vllm_samples_greedily_from_a_merged_export_what_transformers_does(patched, tmp_path):
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}  # vLLM has kernels for 32
    sizes = {"vocab_size": 110, "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 2}
    base = save_tiny("llama", tmp_path / "base", LlamaConfig(**sizes, **heads, tie_word_embeddings=True))
    make_tiny_tokenizer(base)
    run = train(tmp_path, {"name": str(base), "lora": LORA}, evaluation={})
    to = export(run, to=tmp_path / "out", merge=True)
    prompts = [list(range(a, a + 9)) for a in (5, 30, 60)]
    beside = AutoPeftModelForCausalLM.from_pretrained(run / "checkpoints" / "step-000002")
    greedy = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    expected = [
        [m.generate(input_ids=torch.tensor([p]), **greedy)[0, 9:].tolist() for p in prompts]
        for m in (AutoModelForCausalLM.from_pretrained(to), beside)
    ]
    assert expected[0] == expected[1]
    tokenizer = AutoTokenizer.from_pretrained(to)
    engine = start_vllm(to, tokenizer, dtype=torch.float32, max_model_len=64, kv_cache_gib=0.1)
    try:
        sampling = SamplingParams(max_completion_length=12, temperature=0)
        asked = [Prompt(str(i), "", tuple(ids)) for i, ids in enumerate(prompts)]
        groups = engine.generate(call(asked, num_completions=1, sampling=sampling, seeds=[1, 2, 3]))
    finally:
        engine.close()
    assert [list(group.completions[0].token_ids) for group in groups] == expected[0]
