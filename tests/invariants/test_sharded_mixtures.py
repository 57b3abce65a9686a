"""Laws 1 and 2 for mixtures whose weights processes split: replay, balance, adapters, health, checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import selected
from tests.diffusion.processes import launch
from tests.rl.moe.tiny import save
from tests.scoring import relative_error

GRADIENTS = Path(__file__).with_name("sharded_update.py")
LAYERS = 4
ALONE, KL = "loss.kl_coef=0", "loss.kl_coef=0.05"
LORA = "model.lora={r: 4, alpha: 8}"
BALANCED = ["moe.balance=switch", "moe.balance_coef=1.0", "moe.z_loss_coef=0.01"]
CHOSEN = ["moe.trained_experts=FILE", "optimizer.weight_decay=0"]
EXPERTS = {"experts": {"0": [0, 5], "1": [7], "3": [0, 1, 2]}, "non_expert_modules": True}
CASES = {
    "replayed and balanced": ("qwen3_moe", [ALONE, *BALANCED]),
    "one process without work": ("qwen3_moe", [ALONE, *BALANCED]),
    "rows": ("qwen3_moe", [ALONE, "model.attention=rows", *BALANCED, "moe.balance=sequence"]),
    "padded rows": ("granitemoehybrid", [ALONE, *BALANCED]),
    "all together": ("qwen3_moe", [KL, LORA, "model.gradient_checkpointing=true"]),
    "chosen experts": ("qwen3_moe", [KL, "model.gradient_checkpointing=true", *CHOSEN]),
    "shared experts": ("qwen2_moe", [KL, LORA, "model.gradient_checkpointing=true"]),
    "laguna": ("laguna", [ALONE, "moe.bias_rate=0.01"]),
    "hunyuan": ("hunyuan_v1_moe", [ALONE, *BALANCED]),
    "olmoe": ("olmoe", [KL, "moe.replay=none", "moe.balance=entropy"]),
    "mixtral": ("mixtral", [ALONE, *BALANCED]),
    "deepseek_v3": ("deepseek_v3", [ALONE, "moe.bias_rate=0.01", "model.gradient_checkpointing=true"]),
    "gpt_oss": ("gpt_oss", [ALONE, *BALANCED, "moe.router=freeze"]),
}
OFTEN = ("one process without work", "all together")
NAMES = [pytest.param(n, marks=[] if n in OFTEN else [pytest.mark.rotation("mixtures")]) for n in CASES]


@pytest.fixture(scope="module")
def model_of(tiny_model_dir, tmp_path_factory):
    out, made = tmp_path_factory.mktemp("models"), {}

    def make(family: str) -> Path:
        return (
            made.setdefault(family, None)
            or made.update({family: save(family, out / family, tiny_model_dir)})
            or made[family]
        )

    return make


def routes(num_tokens: int, num_experts: int, seed: int) -> dict[str, Any]:
    """Experts that no router chose; a fifth of the tokens and the last one are unknown."""
    draw = np.random.default_rng(seed)
    found = np.argsort(draw.random((num_tokens, LAYERS, num_experts)))[..., :2]
    found[draw.random(num_tokens) < 0.2] = -1
    found[-1] = -1
    return {"routes": found.tolist()}


@pytest.fixture(scope="module")
def found(request, model_of, ragged_groups, tmp_path_factory) -> Path:
    """What one process and two say of every case that is asked for."""
    out, cases = tmp_path_factory.mktemp("gradients"), []
    groups, advantages = ragged_groups(num_groups=8)
    (out / "experts.json").write_text(json.dumps(EXPERTS))
    for name in selected(request, "name"):
        family, overrides = CASES[name]
        overrides = [x.replace("FILE", str(out / "experts.json")) for x in overrides]
        model = model_of(family)
        config = json.loads((model / "config.json").read_text())
        number = next(
            config[k] for k in ("num_local_experts", "n_routed_experts", "num_experts") if k in config
        )
        rows = [
            [
                list(g.prompt.token_ids),
                [
                    [c.token_ids, c.behavior_logprobs, routes(len(c.token_ids), number, 10 * i + j)]
                    for j, c in enumerate(g.completions)
                ],
                a,
            ]
            for i, (g, a) in enumerate(zip(groups, advantages, strict=True))
        ]
        rows = rows[:1] if name == "one process without work" else rows
        case = {"name": name, "model": str(model), "rows": rows, "overrides": overrides, "processes": 2}
        cases.append(case | {"lr": 0.01})
    (out / "cases.json").write_text(json.dumps(cases))
    launch(GRADIENTS, [str(out / "cases.json"), str(out)], 1)
    return out


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_that_split_a_mixture_have_the_gradient_of_one(found, name):
    one, two = (load_file(found / f"{name}-of-{size}.safetensors") for size in (1, 2))
    for kind in ("sent.", ""):  # what an engine is sent after the step, and the gradients
        of_kind = [
            {n: x for n, x in tensors.items() if n.startswith("sent.") == (kind != "")}
            for tensors in (one, two)
        ]
        assert of_kind[0]
        print(name, kind, relative_error(*of_kind))
        assert relative_error(*of_kind) <= 1e-6
    assert all(x.dtype == torch.float32 for x in two.values())
    facts = [json.loads((found / f"{name}-of-{size}.json").read_text()) for size in (1, 2)]
    assert any(n.startswith("moe/") for n in facts[0]["metrics"])
    if name == "chosen experts":  # of eight; layer 2 has none
        grads = [two[f"0.model.layers.{layer}.mlp.experts.gate_up_proj"] for layer in (0, 1, 3)]
        moved = [{i for i, g in enumerate(grad) if g.any()} for grad in grads]
        assert moved == [{0, 5}, {7}, {0, 1, 2}]
        assert not any(".layers.2.mlp.experts" in n for n in two if not n.startswith("sent."))
    for metric, value in facts[0]["metrics"].items():
        if metric != "memory/peak":
            assert facts[1]["metrics"][metric] == pytest.approx(value, rel=1e-5, abs=1e-6), metric
    assert facts[1]["canary"] == pytest.approx(facts[0]["canary"], abs=1e-5)
