"""`python sharded_update.py CASES.json OUT`: one process and several write the gradients that a case gives.

A case is {name, model, rows, overrides, processes}; rows are [prompt ids, [[ids, log-probs] ...], advantages]
of a group and are dealt round; further [prompt ids, ids, log-probs] of a completion are rows of its episode.
Alone it is the plain policy, among several the sharded one.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from killed_runs import PR_SET_CHILD_SUBREAPER, in_forks
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor, distribute_tensor

from recipes.models import teacher_model
from rl.batch import pack
from rl.causal import CausalPolicy
from rl.config.diffusion_rl import MaskedRunConfig
from rl.config.read import load_config
from rl.diffusion.rl_policy import MaskedPolicy
from rl.model.hollow import is_hollow
from rl.moe.adapters import lora_plan, split_experts
from rl.moe.esft import load_experts, train_only
from rl.moe.policy import MoePolicy, with_experts
from rl.references import Copy, make_reference
from rl.sharded import ShardedPolicy, gathered, load_split, own_tensors
from rl.teacher import Teacher
from rl.types import Completion, Continuation, Group, Prompt, Reward, ScoredGroup, VersionSpan
from rl.update import pack_rules, update_policy
from rl.world import World

BASE = [
    "model.dtype=fp32",
    "loss.clip_high=4.0",
    "train.token_budget=60",
    "sampling.max_completion_length=20",
]


class Recorder(torch.optim.SGD):
    """Notes the gradients of each step, and then moves along them."""

    def __init__(self, named: list[tuple[str, torch.nn.Parameter]], lr: float) -> None:
        super().__init__([p for _, p in named], lr=lr)
        self.named, self.seen = named, {}

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        number = len(self.seen) // len(self.named)
        self.seen |= {f"{number}.{name}": gathered(p.grad).clone() for name, p in self.named}  # type: ignore[arg-type]
        super().step()


def make_policy(case: dict[str, Any], world: World) -> tuple[Any, Any, Any, Any]:
    """Config, policy, reference, teacher. Among several processes each reads its slices of the weights."""
    config = load_config(None, [f"model.name={case['model']}", *BASE, *case["overrides"]])
    torch.manual_seed(0)
    given: dict[str, Any] = {"temperature": 0.9, "plan": lora_plan}
    if isinstance(config, MaskedRunConfig):
        policy: Any = MaskedPolicy(config, world.accelerator, name=case["model"])
    elif world.size > 1:
        split = load_split(config.model, world.accelerator, longest=60, settle=settle, **given)
        assert split is not None
        policy = split[0]
        own = [p for p in own_tensors(policy.model).values() if isinstance(p, torch.nn.Parameter)]
        assert all(is_hollow(p) for p in own if p.numel() > 1)
    else:
        policy = CausalPolicy(config.model, world.accelerator, **given)
        settle(policy)
        policy.settle_attention()
    if config.moe.trained_experts:
        train_only(policy.model, load_experts(config.moe.trained_experts))
    if not isinstance(config, MaskedRunConfig):
        policy = with_experts(policy, config.moe, print)
    reference = make_reference(policy, moves=False) if config.loss.kl_coef else None
    teacher = None
    if config.teacher is not None:
        teacher = Teacher(config.teacher, teacher_model(config.teacher), policy, longest=60, note=print)
    if world.size > 1:
        kind = config.train.sharding if config.train.sharding != "auto" else "full"
        split_by = partial(ShardedPolicy, reference=reference, sharding=kind, sent=torch.float32)
        policy = policy.split(split_by) if isinstance(policy, MoePolicy | MaskedPolicy) else split_by(policy)
    move(policy, reference)
    return config, policy, reference, teacher


def settle(policy: CausalPolicy) -> None:
    split_experts(policy.model)


@torch.no_grad()
def move(policy: Any, reference: Any) -> None:
    """Adds the same numbers for any number of processes; adapters, which are random, are set to them."""
    generator = torch.Generator().manual_seed(1)
    adapters = [p for n, p in policy.trainable() if "lora_" in n]
    for parameter in [*adapters, *(reference.scorer.parameters() if isinstance(reference, Copy) else [])]:
        noise = 0.02 * torch.randn(parameter.shape, generator=generator)
        if isinstance(parameter, DTensor):
            noise = distribute_tensor(noise, parameter.device_mesh, parameter.placements)
        parameter.mul_(not adapters).add_(noise)


def one_row(ids: list[int], logprobs: list[float]) -> Completion:
    return Completion(ids, logprobs, [True] * len(ids), "stop", [VersionSpan(0, len(ids))])


def groups_of(rows: list[Any], world: World) -> tuple[list[ScoredGroup], list[list[float]]]:
    groups, advantages = [], []
    for prompt_ids, completions, advantage in rows[world.rank :: world.size]:
        made = []
        for ids, logprobs, *further in completions:
            made.append(one_row(ids, logprobs))
            if further and isinstance(further[0], dict):
                made[-1].routes = np.array(further.pop(0)["routes"])
            made[-1].continuations = [Continuation(tuple(p), one_row(*row)) for p, *row in further]
        groups.append(ScoredGroup(Group(Prompt("p", "", tuple(prompt_ids)), made), [Reward(0.0)] * len(made)))
        advantages.append(advantage)
    return groups, advantages


def work(cases: str, out: str) -> int:
    world = World(Accelerator(cpu=True))
    for case in json.loads(Path(cases).read_text()):
        if world.size not in (1, case["processes"]):
            continue
        config, policy, reference, teacher = make_policy(case, world)
        assert policy.in_step == (world.size > 1)
        rules = pack_rules(config, share_prompts=policy.shares_prompts)
        groups, advantages = groups_of(case["rows"], world)
        for scored in groups if "demonstrations" in case["name"] else ():
            ids = scored.prompt.token_ids
            scored.group.prompt = replace(scored.prompt, teacher_token_ids=(*ids[::-1], 7, *ids))
        batches = pack(groups, advantages, rules, sum_over_processes=world.sum)
        optimizer = Recorder(policy.trainable(), case.get("lr", 0.0))
        result = update_policy(
            policy,
            optimizer,
            batches,
            config.loss,
            world=world,
            reference=reference,
            teacher=teacher,
            num_epochs=config.train.num_epochs,
            max_grad_norm=case.get("max_grad_norm", 1e9),
        )
        stream = {f"sent.{name}": tensor.clone() for name, tensor in policy.weights()}
        _, logprobs = policy.weights().canary()
        calls = len(policy.prepare(batches[0], draw=0))
        if world.is_main:
            name = f"{out}/{case['name']}-of-{world.size}"
            save_file(optimizer.seen | stream, f"{name}.safetensors")
            facts = {
                "metrics": result.metrics,
                "calls": calls,
                "canary": logprobs,
                "shares_prompts": policy.shares_prompts,
            }
            Path(f"{name}.json").write_text(json.dumps(facts))
    world.end()
    return 0


def main(cases: str, out: str) -> None:
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    for size in sorted({1, *(case["processes"] for case in json.loads(Path(cases).read_text()))}):
        os.environ["LOCAL_WORLD_SIZE"] = str(min(size, 2))  # four are on two hosts
        assert in_forks(lambda rank: work(cases, out), size)[0] == [0] * size


if __name__ == "__main__":
    main(*sys.argv[1:])
