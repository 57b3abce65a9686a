"""Gradients summed over processes and clipped, weight decay by group, and the learning rate of a step."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from rl.config import OptimizerConfig
from rl.model.on_host import PIECE_BYTES, host_like
from rl.together import Named

Pairs = list[tuple[nn.Parameter, Tensor]]


MOMENTS = ("exp_avg", "exp_avg_sq")


def make_optimizer(named: Named, config: OptimizerConfig, *, hosted: bool = False) -> torch.optim.Optimizer:
    groups = weight_decay_groups(named, config.weight_decay)
    kind = HostedAdamW if hosted else torch.optim.AdamW
    return kind(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


class HostedAdamW(torch.optim.AdamW):
    """AdamW whose moments stay in pinned host memory and visit the parameters' device piece by piece.

    A step is bitwise that of AdamW, whose arithmetic is elementwise.
    """

    moments_on_host = True

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        everything = [p for group in self.param_groups for p in group["params"]]
        grads = [(p, p.grad) for p in everything if p.grad is not None]
        for parameter, _ in grads:
            parameter.grad = None  # AdamW skips parameters without a gradient
        for piece in in_pieces(grads, PIECE_BYTES):
            homes = self._bring(piece)
            for parameter, grad in piece:
                parameter.grad = grad
            super().step()
            for parameter, _ in piece:
                parameter.grad = None
                for name in MOMENTS:
                    here = self.state[parameter][name]
                    self.state[parameter][name] = homes[parameter, name].copy_(here, non_blocking=True)
        for parameter, grad in grads:
            parameter.grad = grad
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # before anybody reads the moments

    def _bring(self, piece: Pairs) -> dict[tuple[nn.Parameter, str], Tensor]:
        """Copies moments to the device; returns their host tensors, made here for new and loaded moments."""
        homes: dict[tuple[nn.Parameter, str], Tensor] = self.__dict__.setdefault("homes", {})
        if new := [(p, name) for p, _ in piece for name in MOMENTS if (p, name) not in homes]:
            is_cuda = new[0][0].is_cuda
            homes |= zip(new, host_like([p for p, _ in new], pinned=is_cuda), strict=True)
        for parameter, _ in piece:
            for name in MOMENTS if parameter in self.state else ():
                there = self.state[parameter][name]
                here = torch.empty_like(parameter)  # with its strides, which a fused step relies on
                self.state[parameter][name] = here.copy_(there, non_blocking=True)
        return homes


def in_pieces(grads: Pairs, size: int) -> Iterator[Pairs]:
    """Splits the pairs, in order, into pieces whose moments take at most `size` bytes, or of one pair."""
    piece: Pairs = []
    held = 0
    for parameter, grad in grads:
        if piece and held + len(MOMENTS) * parameter.nbytes > size:
            yield piece
            piece, held = [], 0
        piece.append((parameter, grad))
        held += len(MOMENTS) * parameter.nbytes
    if piece:
        yield piece


def weight_decay_groups(named: Named, weight_decay: float) -> list[dict[str, object]]:
    """Matrices decay; norms and biases (one axis) do not."""
    return [
        {"params": [p for _, p in named if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for _, p in named if p.ndim <= 1], "weight_decay": 0.0},
    ]


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
    """Sets the rate as a pure function of the step, so that a resumed run needs no scheduler state."""
    factor = learning_rate_factor(
        step, schedule=config.schedule, warmup_steps=config.warmup_steps, total_steps=total_steps
    )
    for group in optimizer.param_groups:
        group["lr"] = config.lr * factor
