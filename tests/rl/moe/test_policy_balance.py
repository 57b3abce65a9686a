"""Law 1 with balance and replay: gradients are those of one big batch, however a step is cut."""

from __future__ import annotations

import copy
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from rl.batch import pack
from rl.moe.balance import bias_of
from rl.update import pack_rules, update_policy
from tests.rl.moe.tiny import load, random_routes, save
from tests.scoring import alone

KINDS = ["switch", "sequence", "entropy"]
BALANCED = ["moe.balance_coef=1.0", "moe.z_loss_coef=0.01"]
RANK = Path(__file__).with_name("balanced_rank.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_model_dir):
    return save("qwen3_moe", tmp_path_factory.mktemp("moe"), tiny_model_dir)


@pytest.fixture(scope="module")
def groups(ragged_groups):
    return ragged_groups(num_groups=4)


def with_routes(policy, groups):
    found = copy.deepcopy(groups)
    for number, completion in enumerate(completion for group in found for completion in group.completions):
        completion.routes = random_routes(policy, len(completion.token_ids), number)
    return found


def error(found, expected) -> float:
    assert found.keys() == expected.keys()
    off = sum((found[n] - expected[n]).double().square().sum() for n in expected) ** 0.5
    size = sum(expected[n].double().square().sum() for n in expected) ** 0.5
    assert size > 1e-3
    return (off / size).item()


@pytest.mark.parametrize(
    "kind", ["switch", *[pytest.param(k, marks=pytest.mark.rotation) for k in KINDS[1:]]]
)
@pytest.mark.parametrize("routed", [False, True])
def test_neither_token_budget_nor_packing_changes_the_gradient(folder, groups, gradients, kind, routed):
    given, advantages = groups
    found = []
    for setting in ("train.token_budget=100000", "train.token_budget=60", "model.attention=rows"):
        policy, config = load(folder, f"moe.balance={kind}", *BALANCED, setting)
        assert policy.shares_prompts == ("rows" not in setting)
        found.append(gradients(policy, config, with_routes(policy, given) if routed else given, advantages))
    plain = gradients(*load(folder), given, advantages)
    assert error(found[0], plain) > 0.05  # the balance matters here
    assert error(found[1], found[0]) < 1e-6 and error(found[2], found[0]) < 1e-6


def test_without_advantages_it_is_transformers_loss_layer_by_layer_on_copies_of_the_prompts(
    folder, groups, gradients
):
    given, advantages = groups
    policy, config = load(folder, "moe.balance=switch", "moe.balance_coef=0.5", "train.token_budget=60")
    found = gradients(policy, config, given, [[0.0] * len(a) for a in advantages])
    rows = [(*g.prompt.token_ids, *c.token_ids) for g in given for c in g.completions]
    longest = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    with policy.in_rows():
        logits = policy.model(ids, attention_mask=mask, output_router_logits=True).router_logits
    e, k = policy.sites[0].num_experts, policy.sites[0].top_k
    loss = sum(load_balancing_loss_func((layer,), e, k, mask) for layer in logits) / k / len(logits)
    named = [(name, p) for name, p in policy.trainable() if p.requires_grad]
    grads = torch.autograd.grad(0.5 * loss, [p for _, p in named], allow_unused=True)
    expected = {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(named, grads, strict=True)}
    assert error({n: found.get(n, torch.zeros_like(g)) for n, g in expected.items()}, expected) < 1e-5


def test_no_row_is_skipped_and_metrics_are_those_of_the_whole_step(folder, groups):
    given, advantages = groups
    zeros = [[0.0] * len(a) for a in advantages]
    values = []
    for budget in (100_000, 60):
        policy, config = load(folder, "moe.balance=switch", *BALANCED, f"train.token_budget={budget}")
        (batch,) = pack(given, zeros, pack_rules(config))
        assert sum(len(m.rows) for m in batch.micro_batches) == batch.num_sequences
        optimizer = torch.optim.SGD([p for _, p in policy.trainable()], lr=0.0)
        values.append(update_policy(policy, optimizer, [batch], config.loss, world=alone(policy)).metrics)
        assert len(batch.micro_batches) == (1 if budget > 60 else 5)
    one, many = ({n: v for n, v in found.items() if n.startswith("moe/")} for found in values)
    assert one["moe/balance"] > 1 and one["moe/z_loss"] > 0 and one["moe/start_overlap"] == 1.0
    assert one == pytest.approx(many, rel=1e-5)
    assert values[0]["policy/loss"] == pytest.approx(one["moe/balance"] + 0.01 * one["moe/z_loss"], rel=1e-6)


def test_gradient_checkpointing_changes_nothing(folder, groups, gradients):
    given, advantages = groups
    found = []
    for setting in ("true", "false"):
        policy, config = load(
            folder, "moe.balance=switch", *BALANCED, f"model.gradient_checkpointing={setting}"
        )
        found.append(gradients(policy, config, with_routes(policy, given), advantages))
    assert error(*found) < 1e-6


def test_biases_move_once_a_step_by_the_load_of_all_its_passes(tmp_path, tiny_model_dir, groups):
    given, advantages = groups
    save("deepseek_v3", tmp_path, tiny_model_dir)
    policy, config = load(tmp_path, "moe.bias_rate=0.01", "train.token_budget=60")
    before = [bias_of(site).clone() for site in policy.sites]
    optimizer = torch.optim.SGD([p for _, p in policy.trainable()], lr=0.0)
    batches = pack(given, advantages, pack_rules(config))
    update_policy(policy, optimizer, batches, config.loss, world=alone(policy))
    for site, old in zip(policy.sites, before, strict=True):
        moves = bias_of(site) - old
        assert 0.01 <= moves.max() - moves.min() <= 0.0201 and moves.sum().abs() < 1e-6
    frozen, config = load(tmp_path)
    update_policy(
        frozen, optimizer, pack(given, advantages, pack_rules(config)), config.loss, world=alone(frozen)
    )
    assert all(torch.equal(bias_of(site), old) for site, old in zip(frozen.sites, before, strict=True))


@pytest.mark.rotation
def test_two_processes_give_the_gradient_of_one(folder, groups, gradients, tmp_path):
    given, advantages = groups
    settings = [*BALANCED, "train.token_budget=60"]
    routed = with_routes(load(folder)[0], given)
    data = [
        [
            list(g.prompt.token_ids),
            [[c.token_ids, c.behavior_logprobs, c.routes.tolist()] for c in g.completions],
            a,
        ]
        for g, a in zip(routed, advantages, strict=True)
    ]
    (tmp_path / "groups.json").write_text(json.dumps(data))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    ranks = []
    for rank in range(2):
        env = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        env |= {"MASTER_PORT": port, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(RANK.parents[3])}
        words = [sys.executable, str(RANK), str(folder), str(tmp_path), ",".join(KINDS), *settings]
        ranks.append(subprocess.Popen(words, env={**os.environ, **env}))
    assert [rank.wait(timeout=240) for rank in ranks] == [0, 0]
    for kind in KINDS:
        policy, config = load(folder, f"moe.balance={kind}", *settings)
        expected = gradients(policy, config, routed, advantages)
        for rank in range(2):
            assert error(load_file(tmp_path / f"{kind}-{rank}.safetensors"), expected) < 1e-6
