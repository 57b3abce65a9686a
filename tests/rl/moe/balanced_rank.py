"""One rank of two: `python balanced_rank.py MODEL_DIR FOLDER KIND,KIND key=value ...`; writes its gradients.

Rank 0 has three of the four groups of FOLDER/groups.json: the ranks have unequally many micro-batches.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from rl.batch import pack
from rl.types import Completion, Group, Prompt, Reward, ScoredGroup, VersionSpan
from rl.update import pack_rules, update_policy
from rl.world import World
from tests.rl.moe.tiny import load


class Recorder(torch.optim.SGD):
    def step(self, closure=None):  # type: ignore[override]
        pass

    def zero_grad(self, set_to_none=True):
        pass


def main(model_dir: str, folder: str, kinds: str, *settings: str) -> None:
    for kind in kinds.split(","):
        one_kind(model_dir, folder, kind, *settings)


def one_kind(model_dir: str, folder: str, kind: str, *settings: str) -> None:
    policy, config = load(Path(model_dir), f"moe.balance={kind}", *settings)
    world = World(policy.accelerator)
    rows = json.loads((Path(folder) / "groups.json").read_text())
    groups, advantages = [], []
    for prompt, completions, advantage in rows[:3] if world.is_main else rows[3:]:
        made = [
            Completion(i, p, [True] * len(i), "stop", [VersionSpan(0, len(i))], routes=np.array(r, np.int16))
            for i, p, r in completions
        ]
        groups.append(ScoredGroup(Group(Prompt("p", "", tuple(prompt)), made), [Reward(0.0)] * len(made)))
        advantages.append(advantage)
    optimizer = Recorder([p for _, p in policy.trainable()], lr=0.0)
    batches = pack(groups, advantages, pack_rules(config), sum_over_processes=world.sum)
    update_policy(policy, optimizer, batches, config.loss, world=world, max_grad_norm=1e9)
    found = {n: p.grad.contiguous() for n, p in policy.trainable() if p.grad is not None}
    save_file(found, Path(folder) / f"{kind}-{world.rank}.safetensors")


if __name__ == "__main__":
    main(*sys.argv[1:])
