"""AdamW, also with moments in host memory, weight decay by group, and the learning rate of a step."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from rl.config import OptimizerConfig
from rl.model.on_host import PIECE_BYTES, host_like
from rl.together import Named, in_buckets

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
        grads = {p: p.grad for p in everything if p.grad is not None}
        for parameter in grads:
            parameter.grad = None  # AdamW skips parameters without a gradient
        for piece in in_buckets([*grads], PIECE_BYTES // len(MOMENTS)):
            homes = self._bring(piece)
            for parameter in piece:
                parameter.grad = grads[parameter]
            super().step()
            for parameter in piece:
                parameter.grad = None
                for name in MOMENTS:
                    here = self.state[parameter][name]
                    self.state[parameter][name] = homes[parameter, name].copy_(here, non_blocking=True)
        for parameter, grad in grads.items():
            parameter.grad = grad
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # before anybody reads the moments

    def _bring(self, piece: list[nn.Parameter]) -> dict[tuple[nn.Parameter, str], Tensor]:
        """Copies moments to the device; returns their host tensors, made here for new and loaded moments."""
        homes: dict[tuple[nn.Parameter, str], Tensor] = self.__dict__.setdefault("homes", {})
        if new := [(p, name) for p in piece for name in MOMENTS if (p, name) not in homes]:
            homes |= zip(new, host_like([p for p, _ in new], pinned=new[0][0].is_cuda), strict=True)
        for parameter in piece:
            for name in MOMENTS if parameter in self.state else ():
                there = self.state[parameter][name]
                here = torch.empty_like(parameter)  # with its strides, which a fused step relies on
                self.state[parameter][name] = here.copy_(there, non_blocking=True)
        return homes


def weight_decay_groups(named: Named, weight_decay: float) -> list[dict[str, object]]:
    """Matrices decay; norms and biases do not, nor does a stack of experts' biases, which has two axes."""
    decays = {name: p.ndim > 1 and not name.endswith("bias") for name, p in named}
    return [
        {"params": [p for name, p in named if decays[name]], "weight_decay": weight_decay},
        {"params": [p for name, p in named if not decays[name]], "weight_decay": 0.0},
    ]


@torch.no_grad()
def lost_to_rounding(named: Named, lr: float) -> str | None:
    """A warning if a step of size `lr`, about that of AdamW, rounds to nothing in most trained values."""
    own = [p.to_local() if isinstance(p, DTensor) else p for _, p in named]
    pieces = [piece for p in own if p.itemsize == 2 for piece in p.flatten().split(1 << 24)]
    lost = sum(int((x + lr == x).sum()) for x in pieces)
    if 2 * lost <= (total := sum(p.numel() for p in own)):
        return None
    return (
        f"{lost / total:.1%} of the trained values are too coarse in 16 bits for a step of optimizer.lr="
        f"{lr:g}: it rounds to nothing; use model.dtype=bf16-mixed, which trains them in fp32, or model.lora"
    )


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
