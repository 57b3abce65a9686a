"""How experts are computed: the fastest way on this machine, by a short measurement, and what a token
costs.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import nn

from rl.moe.adapters import expert_stacks, part_of
from rl.moe.routers import find_routers

WAYS = ("grouped_mm", "batched_mm", "eager")
_MAX_COPIES = 2 * 2**30  # bytes: batched_mm copies the weights of an expert for each token that it gets


def choose_experts(
    model: Any,
    asked: str,
    *,
    num_tokens: int | None = None,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> dict[str, float]:
    """Sets how the model computes its experts; seconds of a forward and backward pass of one layer by way.

    Args:
        asked: one of `WAYS`, which is set without a measurement; "auto": the fastest.
        autocast: as the policy computes.
        num_tokens: of the measurement; default: 4096 on a GPU, 256 on a CPU.
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
        except (RuntimeError, NotImplementedError):  # this machine has no such kernel, or not the memory
            continue
    best = min(seconds, key=lambda way: seconds[way], default=before)
    model.set_experts_implementation(best)
    return seconds


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _seconds(experts: Any, top_k: int, num_tokens: int, way: str) -> float:
    """The faster of two passes after one to warm up; parameters get no gradient from it."""
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


def active_matrix_values(model: nn.Module) -> float:
    """Values of matrices that a token is multiplied with in a forward pass: of routed experts the share K
    / E.

    The head counts, the embedding does not. Adapters do not count.
    """
    sites = find_routers(model)
    shares = {site.layer: site.top_k / site.num_experts for site in sites}
    share = sum(shares.values()) / max(len(shares), 1)
    embedding, total = cast(Any, model).get_input_embeddings(), 0.0
    head = cast(Any, model).get_output_embeddings()
    for name, p in model.named_parameters():
        if (
            p.ndim < 2
            or ".lora_" in name
            or (p is embedding.weight and head is not None and head.weight is not p)
        ):
            continue
        total += p.numel() * (share if part_of(model, name) == "routed experts" and p.ndim == 3 else 1.0)
    return total


def forward_flops(model: Any, length: int, *, causal: bool = True) -> float:
    """Of one sequence: 2 x active values for each token, and 4 x heads x head size for each pair of tokens.

    Args:
        causal: only pairs that causality lets see each other.
    """
    config = model.config
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    pairs = length * (length + 1) / 2 if causal else length**2
    return 2 * length * active_matrix_values(model) + 4 * heads * size * pairs * config.num_hidden_layers
