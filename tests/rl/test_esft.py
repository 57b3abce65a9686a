"""Experts are chosen by the rule of ESFT and trained alone.

DeepSeek's published scores are not at hand: expected choices come from the rule, by numbers written here.
"""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from rl.config.read import load_config
from rl.moe.adapters import audit
from rl.moe.esft import (
    TrainedExperts,
    expert_relevance,
    load_experts,
    save_experts,
    select_experts,
    train_only,
)
from rl.moe.routers import find_routers, observed, watching
from tests.rl.families import tiny_config

IDS = torch.arange(48)[None] * 7 % 120


def tiny(name="qwen3_moe"):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(name, num_experts=8), dtype=torch.float32).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    return model


def test_experts_are_taken_while_those_before_have_less_than_p():
    """0.12 + 0.07 = 0.19 < 0.2, so a third one is taken: 0.06. At p = 0.18 two are enough."""
    scores = {3: torch.tensor([0.01, 0.12, 0.05, 0.06, 0.07, 0.69 / 3, 0.69 / 3, 0.69 / 3])}
    scores[3][5:] = 0.0
    assert select_experts(scores, top_p=0.2) == {3: [1, 3, 4]}
    assert select_experts(scores, top_p=0.18) == {3: [1, 4]}
    assert select_experts({0: torch.tensor([0.9, 0.1])}, top_p=0.2) == {0: [0]}  # one alone has more than p
    with pytest.raises(ValueError, match=r"top_p=0 must be in \(0, 1\]"):
        select_experts(scores, top_p=0)


@pytest.mark.parametrize("kind", ["token", "gate"])
def test_relevance_counts_choices_or_their_weights(kind):
    model = tiny()
    seen = {}

    def see(site, output):
        _, weights, idx = observed(site, output)
        for t in range(len(idx)):  # one choice after the other
            for k, expert in enumerate(idx[t].tolist()):
                of = seen.setdefault(site.layer, [0.0] * 8)
                of[expert] += 1.0 if kind == "token" else weights[t, k].item()

    with watching(find_routers(model), see), torch.no_grad():
        model(input_ids=IDS)
    found = expert_relevance(model, [IDS[:, :48]], kind=kind)
    for layer, score in found.items():
        assert score.tolist() == pytest.approx([x / sum(seen[layer]) for x in seen[layer]], abs=1e-6)


def test_a_step_is_the_full_step_with_the_gradients_of_others_left_out():
    """Against a step of all weights whose gradients are zeroed by hand; Adam, 3 steps, no decay."""
    chosen = TrainedExperts({0: [1, 5], 1: [2]})
    full, ours = tiny(), tiny()
    train_only(ours, chosen)
    keep = {"model.layers.0.mlp.experts": [1, 5], "model.layers.1.mlp.experts": [2]}
    before = {n: p.detach().clone() for n, p in full.named_parameters()}
    found = audit(ours)  # 3 of 2 x 8 experts, each 3 x 16 x 32 values
    assert found["routed experts"] == (3 * 1536, 16 * 1536) and found["attention"][0] == 0
    steps = [
        torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.0)
        for m in (full, ours)
    ]
    for _ in range(3):
        for model, optimizer in zip((full, ours), steps, strict=True):
            optimizer.zero_grad()
            model(input_ids=IDS, labels=IDS).loss.backward()
            if model is full:
                for name, p in model.named_parameters():
                    ids = keep.get(name.rpartition(".")[0], [])
                    mask = torch.zeros(len(p), dtype=torch.bool)
                    mask[ids] = True
                    p.grad[~mask] = 0.0
            optimizer.step()
    moved = 0
    for (name, theirs), (_, own) in zip(full.named_parameters(), ours.named_parameters(), strict=True):
        assert torch.equal(theirs, own), name
        moved += int(not torch.equal(own, before[name]))
    assert moved == 4  # gate_up and down of two layers
    stack = ours.model.layers[0].mlp.experts.down_proj
    assert torch.equal(stack[0], before["model.layers.0.mlp.experts.down_proj"][0])


def test_chosen_experts_go_with_neither_adapters_nor_weight_decay():
    base = ["moe.trained_experts=task.json", "rewards.functions=[{name: math}]"]
    for other in ("model.lora={r: 4}", "optimizer.weight_decay=0.1"):
        with pytest.raises(ValueError, match=r"moe\.trained_experts trains .*optimizer\.weight_decay=0"):
            load_config(None, [*base, other])


def test_the_file_has_deepseeks_form_and_comes_back(tmp_path):
    chosen = TrainedExperts({1: [0, 5], 10: [3]})
    save_experts(chosen, tmp_path / "task.json")
    assert json.loads((tmp_path / "task.json").read_text()) == {
        "experts": {"1": [0, 5], "10": [3]},
        "shared_experts": False,
        "non_expert_modules": False,
    }
    assert load_experts(tmp_path / "task.json") == chosen
    (tmp_path / "bad.json").write_text('{"layers": 3}')
    with pytest.raises(
        ValueError, match=r"moe\.trained_experts=.*bad\.json: 'experts'; the file must have the form"
    ):
        load_experts(tmp_path / "bad.json")
    with pytest.raises(ValueError, match="layer 10 has 0 routed experts, but expert 3 is not one of them"):
        train_only(tiny(), chosen)
