"""Policies asked about one micro-batch."""

from __future__ import annotations

from typing import Any

from accelerate import Accelerator
from torch import Tensor

from rl.batch import Batch, MicroBatch
from rl.policy import Prepared
from rl.world import World


def prepared(policy: Any, micro_batch: MicroBatch, draw: int = 0) -> Prepared:
    (found,) = policy.prepare(Batch([micro_batch], 1.0, 1.0), draw=draw)
    return found


def logprobs(policy: Any, micro_batch: MicroBatch) -> Tensor:
    return policy.score(prepared(policy, micro_batch)).logprobs_L


def alone(policy: Any = None) -> World:
    """The only process of a run, on the policy's device."""
    trained = getattr(policy, "trained", policy)
    return World(Accelerator(cpu=True) if policy is None else trained.accelerator)


def relative_error(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Relative distance of gradients, over all tensors."""
    assert a.keys() == b.keys()
    difference = sum((a[n] - b[n]).double().square().sum() for n in a) ** 0.5
    size = sum(a[n].double().square().sum() for n in a) ** 0.5
    assert size > 1e-3
    return (difference / size).item()
