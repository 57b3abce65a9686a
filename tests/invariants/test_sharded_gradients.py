"""Laws 1 and 2 over shards: processes that split the weights step along the gradient of a whole model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import Qwen2Config, Qwen2ForCausalLM

from rl.model.packed import padded_bins
from tests.conftest import selected
from tests.diffusion.processes import launch
from tests.rl.families import save_tiny, tiny_config
from tests.scoring import relative_error

SCRIPT = Path(__file__).with_name("sharded_update.py")
KL, ALONE = "loss.kl_coef=0.05", "loss.kl_coef=0"
LORA = "model.lora={r: 4, alpha: 8}"
CHECKPOINTING = "model.gradient_checkpointing=true"
ROUNDED = {"bf16": 0.05, "bf16 teacher": 0.05, "bf16 all together": 0.01}
"""Norms have bf16 weights in a unit and fp32 ones in a whole model; bf16 itself moves these gradients by 0.02
and 0.1.
"""
MASKED = ("diffusion.block_length=4", "diffusion.mask_token=<unk>", "loss.sampler_correction=null")
CASES = {
    "tied": ("tied", [ALONE]),
    "untied": ("untied", [ALONE, "loss.name=dapo"]),
    "two minibatches twice": ("untied", [ALONE, "train.num_minibatches=2", "train.num_epochs=2"]),
    "rows": ("tied", [ALONE, "model.attention=rows"]),
    "rows of episodes": (
        "tied",
        [ALONE, "model.attention=rows", "loss.name=gspo", "loss.sampler_correction={level: sequence}"],
    ),
    "padded rows": ("falcon_h1", [ALONE]),
    "padded rows of episodes": (
        "falcon_h1",
        [ALONE, "loss.name=gspo", "loss.sampler_correction={level: sequence}", "train.num_minibatches=2"],
    ),
    "padded rows, all together": ("qwen3_next", [KL, LORA, CHECKPOINTING]),
    "padded rows of a teacher": (
        "falcon_h1",
        [KL, "teacher={name: TEACHER, divergence: reverse, dtype: fp32, top_k: 5}"],
    ),
    "padded rows with demonstrations": (
        "falcon_h1",
        [ALONE, "teacher={demonstration: solution}", "train.num_epochs=2"],
    ),
    "padded rows, one process without work": ("falcon_h1", [ALONE]),
    "kl": ("tied", [KL]),
    "lora": ("untied", [ALONE, LORA]),
    "all together": ("untied", [KL, LORA, CHECKPOINTING]),
    "clipped": ("untied", [ALONE]),
    "uneven": ("uneven", [ALONE]),
    "one process without work": ("tied", [ALONE]),
    "bf16": ("tied", [ALONE, "model.dtype=bf16-mixed"]),
    "bf16 all together": ("untied", [KL, LORA, CHECKPOINTING, "model.dtype=bf16-mixed"]),
    "teacher": ("tied", [KL, "teacher={name: TEACHER, divergence: reverse, dtype: fp32, top_k: 5}"]),
    "sampled teacher": (
        "tied",
        [KL, LORA, "rewards.functions=[]", "teacher={name: TEACHER, dtype: fp32}", "train.num_epochs=2"],
    ),
    "rows of a teacher": (
        "tied",
        [ALONE, "model.attention=rows", "teacher={name: TEACHER, divergence: jsd, dtype: fp32, top_k: 5}"],
    ),
    "bf16 teacher": (
        "tied",
        [ALONE, LORA, "model.dtype=bf16-mixed", "teacher={name: TEACHER, divergence: forward, top_k: 5}"],
    ),
    "demonstrations": ("tied", [KL, "rewards.functions=[]", "teacher={demonstration: solution}"]),
    "rows with demonstrations": (
        "tied",
        [ALONE, "model.attention=rows", "teacher={demonstration: solution}", "train.num_epochs=2"],
    ),
    "diffusion": ("tied", [KL, *MASKED, "diffusion.estimator.name=elbo", "diffusion.estimator.num_draws=2"]),
    "diffusion, one pass": ("tied", [ALONE, *MASKED, "diffusion.estimator.name=one_step"]),
    "diffusion, both bounds": (
        "tied",
        [ALONE, *MASKED, "loss.name=reinforce", "diffusion.estimator={name: sandwich, num_draws: 2}"],
    ),
    "diffusion, all together": ("untied", [KL, LORA, CHECKPOINTING, *MASKED]),
    "diffusion, one process without work": ("untied", [ALONE, LORA, *MASKED]),
    "hybrid": ("untied", [KL, "train.sharding=hybrid"]),
    "diffusion, hybrid": ("tied", [KL, LORA, CHECKPOINTING, *MASKED, "train.sharding=hybrid"]),
}


def small(**changes: Any) -> Qwen2Config:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return Qwen2Config(**sizes | {"num_key_value_heads": 2, "vocab_size": 106} | changes)


@pytest.fixture(scope="module")
def models(tiny_model_dir, tmp_path_factory) -> dict[str, Path]:
    """Tied (Llama), untied, and one of whose sizes two processes cannot have equal parts."""
    from transformers import AutoTokenizer

    folders = {"tied": tiny_model_dir}
    torch.manual_seed(0)
    odd = {"hidden_size": 36, "intermediate_size": 45, "num_attention_heads": 3, "num_key_value_heads": 1}
    for name, model in (
        ("untied", Qwen2ForCausalLM(small(tie_word_embeddings=False, initializer_range=0.2))),
        ("uneven", Qwen2ForCausalLM(small(vocab_size=107, initializer_range=0.2, **odd))),
    ):
        folders[name] = tmp_path_factory.mktemp("models") / name
        model.save_pretrained(folders[name])
        AutoTokenizer.from_pretrained(tiny_model_dir).save_pretrained(folders[name])
    for name in ("falcon_h1", "qwen3_next"):  # never packed
        own = tiny_config(name, vocab_size=105)
        folders[name] = save_tiny(name, tmp_path_factory.mktemp("models") / name, own)
        AutoTokenizer.from_pretrained(tiny_model_dir).save_pretrained(folders[name])
    return folders


OFTEN = ("tied", "two minibatches twice", "rows", "padded rows", "all together", "diffusion, all together")
NAMES = [pytest.param(n, marks=[] if n in OFTEN else [pytest.mark.rotation("rarer cases")]) for n in CASES]


@pytest.fixture(scope="module")
def found(request, models, other_model_dir, ragged_groups, tmp_path_factory) -> Path:
    """What one process and two say of every case that is asked for."""
    out, cases = tmp_path_factory.mktemp("gradients"), []
    groups, advantages = ragged_groups(num_groups=8)
    rows: list[Any] = [
        [list(g.prompt.token_ids), [[c.token_ids, c.behavior_logprobs] for c in g.completions], a]
        for g, a in zip(groups, advantages, strict=True)
    ]
    for name in selected(request, "name"):
        model, overrides = CASES[name]
        overrides = [x.replace("TEACHER", str(other_model_dir)) for x in overrides]
        case = {"name": name, "model": str(models[model]), "rows": rows, "overrides": overrides}
        if name.startswith("two minibatches"):
            case["lr"] = 0.002
        if name == "clipped":
            case |= {"max_grad_norm": 0.01, "lr": 1.0}
        case["processes"] = 4 if "hybrid" in name else 2
        if "one process without work" in name:
            case["rows"] = [[p, c, [0.0] * len(a) if i % 2 else a] for i, (p, c, a) in enumerate(rows)]
        if "rows of episodes" in name:  # the i-th of a group has i further rows: the next completions'
            case["rows"] = [
                [p, [[*c[i], *([p, *c[j]] for j in range(i))] for i in range(len(c))], a] for p, c, a in rows
            ]
        cases.append(case)
    (out / "cases.json").write_text(json.dumps(cases))
    launch(SCRIPT, [str(out / "cases.json"), str(out)], 1)
    return out


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_that_split_the_weights_have_the_gradient_of_one(found, name):
    sizes = (1, 4 if "hybrid" in name else 2)
    one, two = (load_file(found / f"{name}-of-{size}.safetensors") for size in sizes)
    limit = ROUNDED.get(name, 1e-6)
    for kind in ("sent.", ""):  # what an engine is sent after the steps, and the gradients
        of_kind = [
            {n: x for n, x in tensors.items() if n.startswith("sent.") == (kind != "")}
            for tensors in (one, two)
        ]
        assert relative_error(*of_kind) <= (1e-6 if kind else limit)
    assert all(x.dtype == torch.float32 for x in two.values())  # reduced in fp32
    facts = [json.loads((found / f"{name}-of-{size}.json").read_text()) for size in sizes]
    for metric, value in facts[0]["metrics"].items():
        if metric != "memory/peak":
            assert facts[1]["metrics"][metric] == pytest.approx(value, rel=10 * limit, abs=limit), metric
    assert facts[1]["canary"] == pytest.approx(facts[0]["canary"], abs=10 * limit)
    assert facts[0]["shares_prompts"] == facts[1]["shares_prompts"] == ("rows" not in name)


@pytest.mark.parametrize("name", ["rows", "padded rows"])
def test_a_process_with_fewer_sequences_makes_as_many_model_calls(found, name):
    """One per sequence with a signal, where a call computes a single one; else one per padded batch."""
    case = next(case for case in json.loads((found / "cases.json").read_text()) if case["name"] == name)
    widths: list[list[int]] = [[], []]
    for i, (prompt, made, advantages) in enumerate(case["rows"]):
        signal = [len(ids) for (ids, _), a in zip(made, advantages, strict=True) if a]
        widths[i % 2] += [len(prompt) + number for number in signal]
    assert len(widths[0]) != len(widths[1])
    counts = [len(w) if name == "rows" else len(padded_bins([(n, 1) for n in w], 60)) for w in widths]
    assert json.loads((found / f"{name}-of-2.json").read_text())["calls"] == max(counts)
