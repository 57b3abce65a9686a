"""`python sharded_loading.py MODEL OUT`: two processes split a model and a copy, loaded whole or in slices.

OUT/KIND-RANK.safetensors holds what a process then has, OUT/KIND-RANK.json by how many bytes its memory grew.
"""

from __future__ import annotations

import ctypes
import json
import resource
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from killed_runs import PR_SET_CHILD_SUBREAPER, in_forks
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from rl.causal import CausalPolicy
from rl.config.read import load_config
from rl.references import Copy, make_reference
from rl.sharded import ShardedPolicy, load_split
from rl.world import World


def most_memory() -> int:
    """Bytes resident at most so far."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def work(kind: str, model: str, out: Path) -> int:
    world = World(Accelerator(cpu=True))
    attention = "rows" if kind == "rows of one" and world.rank == 1 else "auto"
    config = load_config(None, [f"model.name={model}", "model.dtype=fp32", f"model.attention={attention}"])
    given: dict[str, Any] = {"temperature": 1.0, "plan": None}
    before = most_memory()
    if kind != "whole":
        split = load_split(config.model, world.accelerator, longest=60, **given)
        assert split is not None
        policy: Any = split[0]
    else:
        policy = CausalPolicy(config.model, world.accelerator, **given)
        policy.settle_attention(60)
    reference = make_reference(policy, moves=False)
    assert isinstance(reference, Copy)
    policy = ShardedPolicy(policy, reference, sharding="full", sent=torch.float32)
    facts = {"grew": most_memory() - before, "packed": policy.shares_prompts, "canary": policy.canary()}
    held = {}
    for name, scorer in (("policy", policy.scorer), ("reference", reference.scorer)):
        tensors = dict(scorer.named_parameters()) | dict(scorer.named_buffers())
        held |= {f"{name}.{n}": t.to_local() if isinstance(t, DTensor) else t for n, t in tensors.items()}
    save_file({n: t.detach().clone() for n, t in held.items()}, out / f"{kind}-{world.rank}.safetensors")
    (out / f"{kind}-{world.rank}.json").write_text(json.dumps(facts))
    world.end()
    return 0


def main(model: str, out: str) -> None:
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    for kind in ("whole", "slices", "rows of one"):
        assert in_forks(lambda rank, kind=kind: work(kind, model, Path(out)), 2)[0] == [0, 0], kind


if __name__ == "__main__":
    main(*sys.argv[1:])
