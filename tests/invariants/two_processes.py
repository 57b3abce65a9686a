"""One rank of two: `python two_processes.py MODEL_DIR GROUPS.json OUT LOSS,LOSS key=value ...`; writes its
summed gradients.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file

from recipes.models import teacher_model
from rl.batch import pack
from rl.causal import CausalPolicy
from rl.config.read import load_config
from rl.moe.policy import with_experts
from rl.teacher import Teacher
from rl.together import divide, exchange, predicted_cost
from rl.types import Completion, Group, Prompt, Reward, ScoredGroup, VersionSpan
from rl.update import pack_rules, update_policy
from rl.world import World
from tests.scoring import relative_error


class Recorder(torch.optim.SGD):
    def step(self, closure=None):  # type: ignore[override]
        pass

    def zero_grad(self, set_to_none=True):
        pass


def main(model_dir: str, data: str, out: str, losses: str, *overrides: str) -> None:
    world = World(Accelerator(cpu=True))
    for loss in losses.split(","):
        one_loss(world, model_dir, data, out, loss, overrides)


def one_loss(
    world: World, model_dir: str, data: str, out: str, loss: str, overrides: tuple[str, ...]
) -> None:
    config = load_config(
        None,
        [
            f"model.name={model_dir}",
            "model.dtype=fp32",
            f"loss.name={loss}",
            "loss.clip_high=4.0",
            "train.token_budget=60",
            "loss.kl_coef=0",
            *overrides,
        ],
    )
    causal = CausalPolicy(config.model, world.accelerator, temperature=1.0)
    causal.settle_attention()
    policy = with_experts(causal, config.moe, print)
    teacher = None
    if config.teacher is not None:
        model = teacher_model(config.teacher)
        teacher = Teacher(config.teacher, model, causal, longest=64, note=print)
    rows = json.loads(Path(data).read_text())[world.rank :: world.size]
    groups, advantages = [], []
    for prompt_ids, completions, advantage in rows:
        made = [
            Completion(
                *(ids, logprobs, [True] * len(ids), "stop", [VersionSpan(0, len(ids))]),
                routes=np.array(*routes) if routes else None,
            )
            for ids, logprobs, *routes in completions
        ]
        groups.append(ScoredGroup(Group(Prompt("p", "", tuple(prompt_ids)), made), [Reward(0.0)] * len(made)))
        advantages.append(advantage)
    optimizer = Recorder([p for _, p in policy.trainable()], lr=0.0)
    rules, facts = pack_rules(config), {}
    if not config.train.deterministic:
        costs = [predicted_cost(g, a, rules) for g, a in zip(groups, advantages, strict=True)]
        owners = divide(costs, 1, world)
        groups, advantages, _ = exchange(groups, advantages, owners=owners, num_minibatches=1, team=world)
        load = sum(predicted_cost(g, a, rules) for g, a in zip(groups, advantages, strict=True))
        facts = {"facts": {"owners": owners, "before": sum(costs), "load": load}}
    batches = pack(groups, advantages, rules, sum_over_processes=world.sum)
    given = {"world": world, "teacher": teacher, "max_grad_norm": 1e9}
    result = update_policy(policy, optimizer, batches, config.loss, **given)
    gradients = {n: p.grad for n, p in policy.trainable() if p.grad is not None}
    name = f"{out}/{loss}-rank{world.rank}of{world.size}"
    save_file(gradients, f"{name}.safetensors")
    Path(f"{name}.json").write_text(json.dumps(result.metrics | facts))


def compare(folder: Path, loss: str) -> None:
    one = load_file(folder / f"{loss}-rank0of1.safetensors")
    for rank in (0, 1):
        two = load_file(folder / f"{loss}-rank{rank}of2.safetensors")
        assert relative_error(one, two) <= 1e-5
    files = [f"{loss}-{name}.json" for name in ("rank0of1", "rank0of2", "rank1of2")]
    metrics = [json.loads((folder / f).read_text()) for f in files]
    for name in metrics[0].keys() - {"memory/peak", "facts"}:  # each process has its own
        expected = pytest.approx(metrics[0][name], rel=1e-4, abs=1e-5)
        assert metrics[1][name] == metrics[2][name] == expected, name


if __name__ == "__main__":
    main(*sys.argv[1:])
