"""`python sharded_checkpoint.py CASES.json OUT`: two processes save, then one, two and four go on from there.

Those that save take a step, save by our store and by torch.distributed.checkpoint, and take another. The
others begin with other weights, load the former, and take the other step; four write it again into by-four.
All note whole weights and moments.
"""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator
from killed_runs import PR_SET_CHILD_SUBREAPER, in_forks
from safetensors.torch import save_file
from sharded_update import groups_of, make_policy
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from rl.batch import pack
from rl.optimizer import make_optimizer
from rl.sharded import gathered
from rl.store.checkpoint import CheckpointStore
from rl.store.trainer_state import TrainerState
from rl.update import pack_rules, update_policy
from rl.world import World


def whole(policy: Any, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    trained = dict(policy.trainable())
    tensors = {f"model.{name}": gathered(p) for name, p in trained.items()}
    for name, p in trained.items():
        state = optimizer.state[p]
        tensors |= {f"optim.state.{name}.{key}": gathered(state[key]) for key in ("exp_avg", "exp_avg_sq")}
    return {name: tensor.clone() for name, tensor in tensors.items()}


def work(mode: str, case: dict[str, Any], out: Path) -> int:
    world = World(Accelerator(cpu=True))
    config, policy, *_ = make_policy(case, world)
    optimizer = make_optimizer(policy.trainable(), config.optimizer)
    groups, advantages = groups_of(case["rows"], world)
    rules = pack_rules(config, share_prompts=policy.shares_prompts)
    store = CheckpointStore(out / "checkpoints")

    def step() -> None:
        batches = pack(groups, advantages, rules, sum_over_processes=world.sum)
        update_policy(policy, optimizer, batches, config.loss, world=world)

    def note(name: str) -> None:
        found = whole(policy, optimizer)
        if world.is_main:
            save_file(found, out / f"{name}-of-{world.size}.safetensors")

    if mode == "save":
        step()
        state = TrainerState(1, rng={"rank0": {}})
        store.save(1, write=policy.snapshot(optimizer), state=state, team=world)
        trained = dict(policy.trainable())
        own = {"model": trained, "optim": get_optimizer_state_dict(policy.model, optimizer)}
        dcp.save(own, checkpoint_id=out / "dcp")
        note("saved")
    else:
        with torch.no_grad():
            for _, p in policy.trainable():
                p.mul_(0.5)
        folder = store.load(store.path(1)).path
        policy.load(folder, optimizer)
        note("loaded")
    if world.size == 4:
        (out / "by-four").mkdir(exist_ok=True)
        policy.snapshot(optimizer)(out / "by-four")
    step()
    note("saved-and-on" if mode == "save" else "loaded-and-on")
    world.end()
    return 0


def main(cases: str, out: str) -> None:
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    for case in json.loads(Path(cases).read_text()):
        folder = Path(out, case["name"])
        for mode, size in (("save", 2), ("load", 1), ("load", 2), ("load", 4)):
            codes, _ = in_forks(lambda rank, case=case, mode=mode, to=folder: work(mode, case, to), size)
            assert codes == [0] * size, (case["name"], mode, size)


if __name__ == "__main__":
    main(*sys.argv[1:])
