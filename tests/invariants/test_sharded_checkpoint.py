"""Checkpoints of sharded policies hold what torch.distributed.checkpoint does, and any number reads them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from tests.diffusion.processes import launch
from tests.rl.moe.tiny import save

SCRIPT = Path(__file__).with_name("sharded_checkpoint.py")
ADAPTED = "model.lora={r: 4, alpha: 8, target_modules: %s}"
CASES = {
    "tied": [],
    "untied": [],
    "lora": [ADAPTED % "all-linear"],
    "lora of the embedding": [ADAPTED % "[embed_tokens, q_proj]"],
    "mixture": ["moe.balance=switch"],
    "lora of a mixture": [ADAPTED % "all-linear"],
}


@pytest.fixture(scope="module")
def folders(tiny_model_dir, ragged_groups, tmp_path_factory) -> Path:
    """For each case a folder in which two processes saved, and one, two and four went on."""
    from transformers import AutoTokenizer

    out = tmp_path_factory.mktemp("checkpoints")
    sizes = {"hidden_size": 36, "intermediate_size": 45, "num_attention_heads": 3, "vocab_size": 1007}
    sizes |= {"num_hidden_layers": 2, "num_key_value_heads": 1, "initializer_range": 0.2}
    torch.manual_seed(0)
    untied = out / "model"
    Qwen2ForCausalLM(Qwen2Config(**sizes, tie_word_embeddings=False)).save_pretrained(untied)
    AutoTokenizer.from_pretrained(tiny_model_dir).save_pretrained(untied)
    mixture = save("qwen3_moe", out / "mixture-model", tiny_model_dir, num_local_experts=7)
    adapted = save("qwen3_moe", out / "adapted-model", tiny_model_dir)  # eight experts: adapters are even
    groups, advantages = ragged_groups(num_groups=4)
    rows = [
        [list(g.prompt.token_ids), [[c.token_ids, c.behavior_logprobs] for c in g.completions], a]
        for g, a in zip(groups, advantages, strict=True)
    ]
    cases = []
    for name, overrides in CASES.items():
        model = {"tied": tiny_model_dir, "mixture": mixture, "lora of a mixture": adapted}.get(name, untied)
        overrides = ["loss.kl_coef=0", "optimizer.lr=1e-4", *overrides]
        cases.append({"name": name, "model": str(model), "rows": rows, "overrides": overrides})
        (out / name).mkdir()
    (out / "cases.json").write_text(json.dumps(cases))
    launch(SCRIPT, [str(out / "cases.json"), str(out)], 1)
    return out


@pytest.fixture(params=CASES)
def saved(request, folders) -> Path:
    return folders / request.param


def test_files_of_two_processes_are_read_by_one_two_and_four_bit_for_bit(saved):
    expected = load_file(saved / "saved-of-2.safetensors")
    oracle = {name: torch.zeros_like(tensor) for name, tensor in expected.items()}
    nested = {"model": {}, "optim": {"state": {}}}
    for name, tensor in oracle.items():
        if name.startswith("model."):
            nested["model"][name.removeprefix("model.")] = tensor
        else:
            path, _, key = name.removeprefix("optim.state.").rpartition(".")
            nested["optim"]["state"].setdefault(path, {})[key] = tensor
    dcp.load(nested, checkpoint_id=saved / "dcp", no_dist=True)
    assert all(torch.equal(oracle[name], expected[name]) for name in expected)
    for size in (1, 2, 4):
        loaded = load_file(saved / f"loaded-of-{size}.safetensors")
        assert loaded.keys() == oracle.keys()
        assert all(torch.equal(loaded[name], oracle[name]) for name in oracle), size


def test_the_next_step_is_bitwise_that_of_an_undisturbed_run_or_near_it_on_others(saved):
    undisturbed = load_file(saved / "saved-and-on-of-2.safetensors")
    before = load_file(saved / "saved-of-2.safetensors")
    assert any(not torch.equal(before[name], undisturbed[name]) for name in before)
    for size in (1, 2, 4):
        on = load_file(saved / f"loaded-and-on-of-{size}.safetensors")
        for name, tensor in undisturbed.items():
            if size == 2:
                assert torch.equal(on[name], tensor), name
            assert (on[name] - tensor).norm() <= 1e-6 * max(tensor.norm(), 1.0), (size, name)


def test_each_process_wrote_its_share_and_transformers_reads_the_model(saved):
    folder = saved / "checkpoints" / "step-000001"
    manifest = json.loads((folder / "manifest.json").read_text())["files"]
    assert {"trainer/optimizer.safetensors", "trainer/optimizer-rank1.safetensors"} <= manifest.keys()
    with safe_open(folder / "trainer" / "optimizer-rank1.safetensors", framework="pt") as file:
        places = json.loads(file.metadata()["places"])
    sizes = [places[name] for name in places if name.endswith("exp_avg")]
    assert sizes and all(offset[0] == -(-shape[0] // 2) for offset, shape in sizes)  # the second half of rows
    if "lora" in saved.name:
        assert (folder / "adapter_model.safetensors").is_file()
        return
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    assert files == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    held = [sum(x.nbytes for x in load_file(folder / name).values()) for name in files]
    assert min(held) > 0.2 * sum(held)
    model = AutoModelForCausalLM.from_pretrained(folder)
    expected = load_file(saved / "saved-of-2.safetensors")
    assert {f"model.{name}" for name, _ in model.named_parameters()} <= expected.keys()
    assert all(torch.equal(p, expected[f"model.{name}"]) for name, p in model.named_parameters())


def test_a_process_without_a_share_writes_no_file(saved):
    """The untied head is the last tensor, and more than the fourth process would have."""
    files = sorted((saved / "by-four").glob("*.safetensors"))
    assert files and all(load_file(path) for path in files)
    if saved.name == "untied":
        assert len(files) == 3
        model = AutoModelForCausalLM.from_pretrained(saved / "by-four")
        before = load_file(saved / "loaded-of-4.safetensors")
        assert all(torch.equal(p, before[f"model.{name}"]) for name, p in model.named_parameters())
