"""Gradients summed over processes and clipped, weight decay by group, and the learning rate of a step."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from rl.config import OptimizerConfig

Named = Sequence[tuple[str, nn.Parameter]]


def make_optimizer(named: Named, config: OptimizerConfig) -> torch.optim.Optimizer:
    groups = weight_decay_groups(named, config.weight_decay)
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def weight_decay_groups(named: Named, weight_decay: float) -> list[dict[str, object]]:
    """Matrices decay; norms and biases (one axis) do not."""
    return [
        {"params": [p for _, p in named if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for _, p in named if p.ndim <= 1], "weight_decay": 0.0},
    ]


def finish_gradients(named: Named, max_norm: float, *, num_processes: int) -> float:
    """Sums gradients over processes (weights are global shares: no mean), clips, returns the norm before."""
    parameters = [p for _, p in named]
    if num_processes > 1:
        sum_gradients(parameters)
    return nn.utils.clip_grad_norm_(parameters, max_norm).item()


def sum_gradients(parameters: Sequence[nn.Parameter], bucket_bytes: int = 64 << 20) -> None:
    """grad <- sum of grad over all processes, in flat buckets; a process without a gradient adds zeros."""
    buckets: list[list[nn.Parameter]] = [[]]
    size = 0
    for parameter in parameters:
        num_bytes = parameter.numel() * parameter.element_size()
        if buckets[-1] and (size + num_bytes > bucket_bytes or parameter.dtype != buckets[-1][0].dtype):
            buckets.append([])
            size = 0
        buckets[-1].append(parameter)
        size += num_bytes
    for bucket in filter(None, buckets):
        grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in bucket]
        flat = torch.cat([g.reshape(-1) for g in grads])
        torch.distributed.all_reduce(flat)
        for parameter, piece in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
            parameter.grad = piece.view_as(parameter).clone()


def learning_rate_factor(step: int, *, schedule: str, warmup_steps: int, total_steps: int) -> float:
    """Share of the peak rate at a step: linear warm-up, then constant, linear or cosine to 0 at the end."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "constant":
        return 1.0
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return 1.0 - progress if schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))


def set_learning_rate(
    optimizer: torch.optim.Optimizer, config: OptimizerConfig, step: int, total_steps: int
) -> None:
    """A pure function of the step, so that a resumed run needs no scheduler state."""
    factor = learning_rate_factor(
        step, schedule=config.schedule, warmup_steps=config.warmup_steps, total_steps=total_steps
    )
    for group in optimizer.param_groups:
        group["lr"] = config.lr * factor
