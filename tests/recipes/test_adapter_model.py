"""An adapter's folder as model.name: it goes on being trained, or is merged into its base."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from recipes.grpo import main
from rl.causal import CausalPolicy
from rl.config import Config
from rl.config.read import load_config
from rl.model.adapters import add_lora, load_adapter
from rl.store.rows import read_rows

TARGETS = ["q_proj", "v_proj"]


@pytest.fixture
def adapter(tiny_model_dir, tmp_path) -> Path:
    """An adapter of rank 2 that changes the model much, in peft's own form, with its tokenizer."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    config = LoraConfig(r=2, lora_alpha=4, target_modules=TARGETS, task_type="CAUSAL_LM")
    adapted = get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn_like(parameter) * 0.5
    adapted.save_pretrained(tmp_path / "adapter")
    AutoTokenizer.from_pretrained(tiny_model_dir).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def merged(adapter: Path, base: Path) -> dict[str, torch.Tensor]:
    """What peft itself makes of the two."""
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(adapter))
    return model.merge_and_unload().state_dict()


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(5, 25)[None]).logits


SAME = "model.lora={r: 2, alpha: 4, target_modules: [q_proj, v_proj]}"


@pytest.mark.parametrize(
    ("lora", "said"),
    [
        ([], "is merged into its base"),
        ([SAME], "is trained further; a KL term keeps it near its base"),
        ([SAME.replace("r: 2", "r: 3")], "as r is 2 there and 3 in model.lora"),
        ([SAME.replace("alpha: 4", "alpha: 8")], "as lora_alpha is 4 there and 8 in model.lora"),
        ([SAME.replace("v_proj", "k_proj")], "as it adapts other layers than model.lora"),
    ],
    ids=["full", "same", "rank", "alpha", "targets"],
)
def test_a_run_begins_with_the_adapted_weights_and_samples_from_them(
    config_file, adapter, tiny_model_dir, capsys, lora, said
):
    """With a learning rate of 1e-8 the last checkpoint holds what the run began with."""
    run = config_file.parent / "run"
    words = [str(config_file), f"model.name={adapter}", "optimizer.lr=1e-8", *lora]
    assert main([*words, "train.steps=1"]) == 0
    assert said in capsys.readouterr().out
    (row,) = read_rows(run / "metrics.jsonl")
    assert row["sampler/logprob_gap_mean"] < 1e-4
    saved = run / "checkpoints" / "step-000001"
    load = AutoPeftModelForCausalLM if lora else AutoModelForCausalLM
    expected = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    plain = logits(expected)
    expected.load_state_dict(merged(adapter, tiny_model_dir))
    torch.testing.assert_close(logits(load.from_pretrained(saved)), logits(expected), atol=1e-4, rtol=0)
    assert (plain - logits(expected)).abs().max() > 0.1
    assert main([*words, "train.steps=2"]) == 0  # it goes on
    assert "going on from" in capsys.readouterr().out


def test_what_a_killed_merge_left_behind_is_removed_by_the_next(config_file, adapter):
    left = config_file.parent / "run" / ".merging-abc" / "model"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_bytes(b"half of it")
    rank = SAME.replace("r: 2", "r: 3")
    assert main([str(config_file), f"model.name={adapter}", rank, "train.steps=1"]) == 0
    assert not left.parent.exists()


def test_an_adapter_that_goes_on_is_changed_by_training(config_file, adapter, tiny_model_dir):
    assert main([str(config_file), f"model.name={adapter}", SAME, "optimizer.lr=0.01"]) == 0
    saved = config_file.parent / "run" / "checkpoints" / "step-000002"
    settings = json.loads((saved / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(tiny_model_dir)
    before, after = (load_file(f / "adapter_model.safetensors") for f in (adapter, saved))
    assert before.keys() == after.keys()
    moved = max((before[name] - after[name]).abs().max().item() for name in before)
    assert 0 < moved < 0.1
    again = ["train.steps=1", f"run_dir={config_file.parent / 'again'}"]
    assert main([str(config_file), f"model.name={saved}", SAME, *again]) == 0  # its own checkpoint as well


def test_the_policy_alone_merges_too(adapter, tiny_model_dir):
    config = Config.model_validate({"model": {"name": str(adapter), "dtype": "fp32"}}).model
    policy = CausalPolicy(config, Accelerator(cpu=True), temperature=1.0)
    for name, tensor in merged(adapter, tiny_model_dir).items():
        torch.testing.assert_close(policy.model.state_dict()[name], tensor)
    assert len(policy.trainable()) == len(list(policy.model.parameters()))


def test_an_adapter_without_a_tokenizer_takes_that_of_its_base(config_file, adapter):
    for path in adapter.iterdir():
        if not path.name.startswith("adapter_"):
            path.unlink()
    assert main([str(config_file), f"model.name={adapter}", SAME, "train.steps=1"]) == 0


def test_an_adapter_without_its_base_and_another_adapter_are_refused(
    config_file, adapter, tiny_model_dir, tmp_path, capsys
):
    words = [str(config_file), f"model.name={adapter}"]
    assert main([*words, "train.steps=1"]) == 0
    other = load_file(adapter / "adapter_model.safetensors")
    save_file({name: tensor + 1 for name, tensor in other.items()}, adapter / "adapter_model.safetensors")
    capsys.readouterr()
    assert main([*words, "train.steps=2"]) == 1
    error = capsys.readouterr().err
    assert "model: adapter_model.safetensors (" in error, error
    path = adapter / "adapter_config.json"
    base = shutil.copytree(tiny_model_dir, tmp_path / "base")
    settings = json.loads(path.read_text())
    for value, message in (
        ("", "names no base model"),
        (str(tmp_path / "nowhere"), "its base (base_model_name_or_path in adapter_config.json)"),
    ):
        path.write_text(json.dumps(settings | {"base_model_name_or_path": value}))
        assert main([str(config_file), f"model.name={adapter}", f"run_dir={tmp_path / 'x'}"]) == 1
        assert message in capsys.readouterr().err
    assert base.is_dir()


def test_an_adapter_is_loaded_where_several_processes_call_the_cpu_cpu_0(adapter, tiny_model_dir):
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    config = load_config(None, [f"model.name={tiny_model_dir}", "model.dtype=fp32", SAME]).model
    wrapped = add_lora(base, config)
    load_adapter(wrapped, adapter, torch.device("cpu", 0))
    saved = load_file(adapter / "adapter_model.safetensors")
    found = get_peft_model_state_dict(wrapped)
    assert found.keys() == saved.keys() and all(torch.equal(found[k], saved[k]) for k in saved)
