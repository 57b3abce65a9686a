"""How experts are computed: the fastest way on this machine, by a short measurement."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from rl.moe.adapters import expert_stacks
from rl.moe.routers import UnknownRouter, find_routers

WAYS = ("grouped_mm", "batched_mm", "eager")
_MAX_COPIES = 2 * 2**30  # bytes: batched_mm copies the weights of an expert for each token that it gets


def choose_experts(
    model: Any,
    asked: str,
    *,
    num_tokens: int | None = None,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> dict[str, float]:
    """Sets how the model computes its experts; returns way -> seconds of one layer, forward and backward.

    Args:
        asked: one of `WAYS`, which is set without a measurement; "auto": the fastest.
        num_tokens: tokens in the measurement; default: 4096 on a GPU, 256 on a CPU.
        autocast: the policy's autocast, under which it measures.
    """
    stacks = list(expert_stacks(model).values())
    able = [m for m in stacks if hasattr(m, "has_gate")]
    if not able:
        return {}
    if asked != "auto":
        model.set_experts_implementation(asked)
        return {asked: float("nan")}
    before, number = (
        model.config._experts_implementation,
        num_tokens or (256 if _device(model).type == "cpu" else 4096),
    )
    seconds = {}
    for way in WAYS:
        try:
            model.set_experts_implementation(way)
            with autocast():
                seconds[way] = _seconds(able[0], find_routers(model)[0].top_k, number, way)
        except (RuntimeError, NotImplementedError, UnknownRouter):  # no kernel, memory or experts per token
            continue
    best = min(seconds, key=lambda way: seconds[way], default=before)
    model.set_experts_implementation(best)
    return seconds


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _seconds(experts: Any, top_k: int, num_tokens: int, way: str) -> float:
    """Seconds of the faster of two passes after a warm-up; gradients of parameters stay as they are."""
    weight = experts.gate_up_proj if experts.has_gate else experts.up_proj
    if way == "batched_mm" and num_tokens * top_k * weight[0].numel() * weight.element_size() > _MAX_COPIES:
        raise RuntimeError("too many copies")
    width = weight.shape[1] if experts.is_transposed else weight.shape[2]
    with torch.random.fork_rng(devices=[weight.device] if weight.is_cuda else []):
        torch.manual_seed(0)
        x = torch.randn(num_tokens, width, device=weight.device, dtype=weight.dtype, requires_grad=True)
        chosen = torch.rand(num_tokens, len(weight), device=weight.device).topk(top_k).indices
    weights, took = torch.full(chosen.shape, 1 / top_k, device=weight.device, dtype=weight.dtype), []
    for _ in range(3):
        _wait(weight)
        began = time.perf_counter()
        inputs = [x, *(p for p in experts.parameters() if p.requires_grad)]
        torch.autograd.grad(experts(x, chosen, weights).float().sum(), inputs, allow_unused=True)
        _wait(weight)
        took.append(time.perf_counter() - began)
    return min(took[1:])


def _wait(tensor: torch.Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize()
