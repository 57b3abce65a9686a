"""What can go wrong between a policy and an engine: each fault, and the tensors that a sync has to name."""

from __future__ import annotations

import torch
from tiny_llama import make_model

Q0, Q1 = (f"model.layers.{k}.self_attn.q_proj.weight" for k in (0, 1))
DOWN = "model.layers.1.mlp.down_proj.weight"


def lora_delta():
    """A LoRA update of rank 2 for DOWN [64, 96]."""
    generator = torch.Generator().manual_seed(5)
    return 0.01 * torch.randn(64, 2, generator=generator) @ torch.randn(2, 96, generator=generator)


def dropped(tensors):
    return {name: t for name, t in tensors.items() if name != Q0}


def swapped(tensors):
    return tensors | {Q0: tensors[Q1], Q1: tensors[Q0]}


def stale(tensors):
    """The engine's own old tensor instead of the policy's."""
    return tensors | {Q0: dict(make_model(0).named_parameters())[Q0].detach()}


def lora_missing(tensors):
    return tensors | {DOWN: tensors[DOWN] - lora_delta()}


def lora_twice(tensors):
    return tensors | {DOWN: tensors[DOWN] + lora_delta()}


def transposed_rows(tensors):
    """Two rows exchanged: sums and norms stay the same."""
    return tensors | {Q0: tensors[Q0][[1, 0, *range(2, 64)]]}


FAULTS = {
    dropped: [Q0],
    swapped: [Q0, Q1],
    stale: [Q0],
    lora_missing: [DOWN],
    lora_twice: [DOWN],
    transposed_rows: [Q0],
}
