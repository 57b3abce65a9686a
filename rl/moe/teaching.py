"""A mixture-of-experts layer for reading: routing rules, expert capacity, experts without weights.

It shows the published rules side by side. Real models are trained with the layers of transformers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import linear, silu, softplus

Rule = Literal["top_k", "switch", "gshard", "noisy"]


@dataclass(frozen=True)
class Routed:
    """Which K experts each of T tokens goes to.

    Attributes:
        logits_TE: the router's logits, before noise.
        experts_TK: chosen experts, the best first.
        gates_TK: weights of the experts' outputs.
        served_TK: False if the expert was full, or the second expert was not drawn; it then adds nothing.
        is_dropped_TK: True where an expert was full.
    """

    logits_TE: Float[Tensor, "T E"]
    experts_TK: Int[Tensor, "T K"]
    gates_TK: Float[Tensor, "T K"]
    served_TK: Bool[Tensor, "T K"]
    is_dropped_TK: Bool[Tensor, "T K"]

    @property
    def drop_rate(self) -> Tensor:
        """The share of choices that found their expert full."""
        return self.is_dropped_TK.float().mean()


def top_k_gates(logits_TE: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """gates = p / sum of the k greatest p, p = softmax(logits): Mixtral's rule."""
    gates_TK, experts_TK = logits_TE.softmax(-1).topk(k)
    return gates_TK / gates_TK.sum(-1, keepdim=True), experts_TK


def switch_gates(logits_TE: Tensor) -> tuple[Tensor, Tensor]:
    """gate = the greatest p, not renormalised, so that it has a gradient (arXiv:2101.03961, eq. 2)."""
    return logits_TE.softmax(-1).topk(1)


def second_is_drawn(gates_T2: Tensor, generator: torch.Generator | None = None) -> Bool[Tensor, "T 2"]:
    """The second expert is used with probability min(1, 2 gate) (GShard, arXiv:2006.16668, algorithm 1)."""
    drawn_T2 = torch.ones_like(gates_T2, dtype=torch.bool)
    drawn_T2[:, 1] = 2 * gates_T2[:, 1] > torch.rand(len(gates_T2), generator=generator).to(gates_T2.device)
    return drawn_T2


def noisy_logits(logits_TE: Tensor, spread_TE: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """H = logits + N(0, 1) softplus(spread) (noisy top-k gating, arXiv:1701.06538, eq. 4).

    Softmax over the K greatest H equals `top_k_gates(H, K)`. Noise makes log-probs random: it is for training
    from scratch, and neither replayed nor on-policy.
    """
    noise_TE = torch.randn(logits_TE.shape, generator=generator, dtype=logits_TE.dtype).to(logits_TE.device)
    return logits_TE + noise_TE * softplus(spread_TE)


def expert_capacity(num_tokens: int, top_k: int, num_experts: int, factor: float) -> int:
    """C = ceil(factor T K / E): the tokens that an expert has room for."""
    return math.ceil(factor * num_tokens * top_k / num_experts)


def within_capacity(
    experts_TK: Int[Tensor, "T K"], chosen_TK: Bool[Tensor, "T K"], num_experts: int, capacity: int
) -> Bool[Tensor, "T K"]:
    """Which choices find room: tokens queue in order, and second choices come after all first ones.

    A choice that finds an expert full keeps its place in the queue (GShard, alg. 1).
    """
    queue = experts_TK.T.reshape(-1)
    places = nn.functional.one_hot(queue, num_experts) * chosen_TK.T.reshape(-1, 1)
    place = (places.cumsum(0) * places).sum(-1)  # 1 is the first in the queue of its expert
    return ((place <= capacity) & (place > 0)).reshape(experts_TK.T.shape).T


class TeachingMoE(nn.Module):
    """y = sum over a token's K experts of gate * expert(x): gated MLPs, and experts without weights.

    After the MLPs come MoE++'s experts (arXiv:2410.07348, eq. 3 to 5): zero(x) = 0, copy(x) = x, and
    constant(x) = a x + b v with [a, b] = softmax(W x). A choice that is not served adds 0: the residual
    connection around the layer carries the token.

    Args:
        rule: how tokens choose; `switch` means K = 1, and `gshard` K = 2.
        capacity_factor: None: every choice is served, as in today's models.
        router_fp32: selective precision (arXiv:2101.03961, section 2.4): the router computes in fp32.
        generator: draws noise and second experts.
    """

    def __init__(
        self,
        hidden: int,
        intermediate: int,
        *,
        num_experts: int,
        top_k: int = 2,
        rule: Rule = "top_k",
        capacity_factor: float | None = None,
        num_zero: int = 0,
        num_copy: int = 0,
        num_constant: int = 0,
        router_fp32: bool = True,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if rule in ("switch", "gshard") and top_k != (k := 1 if rule == "switch" else 2):
            raise ValueError(f"rule={rule} means top_k={k}, not {top_k}")
        self.num_mlps, self.num_zero, self.num_copy = num_experts, num_zero, num_copy
        self.num_experts = num_experts + num_zero + num_copy + num_constant
        self.top_k, self.rule, self.capacity_factor = top_k, rule, capacity_factor
        self.router_fp32, self.generator = router_fp32, generator
        self.router = nn.Parameter(torch.randn(self.num_experts, hidden) * hidden**-0.5)
        self.noise = nn.Parameter(torch.zeros(self.num_experts, hidden)) if rule == "noisy" else None
        self.gate_up = nn.Parameter(torch.randn(num_experts, 2 * intermediate, hidden) * hidden**-0.5)
        self.down = nn.Parameter(torch.randn(num_experts, hidden, intermediate) * intermediate**-0.5)
        self.mix = nn.Parameter(torch.randn(num_constant, 2, hidden) * hidden**-0.5)
        self.constant = nn.Parameter(torch.zeros(num_constant, hidden))

    def forward(self, x_TD: Float[Tensor, "T D"]) -> tuple[Float[Tensor, "T D"], Routed]:
        routed = self.route(x_TD)
        y_TD = torch.zeros_like(x_TD)
        for expert in range(self.num_experts):
            rows, choices = torch.where((routed.experts_TK == expert) & routed.served_TK)
            gates = routed.gates_TK[rows, choices, None].to(x_TD.dtype)
            y_TD = y_TD.index_add(0, rows, gates * self.expert(expert, x_TD[rows]))
        return y_TD, routed

    def route(self, x_TD: Float[Tensor, "T D"]) -> Routed:
        cast = torch.float32 if self.router_fp32 else x_TD.dtype
        logits_TE = linear(x_TD.to(cast), self.router.to(cast))
        seen_TE = logits_TE
        if self.noise is not None and self.training:
            seen_TE = noisy_logits(logits_TE, linear(x_TD.to(cast), self.noise.to(cast)), self.generator)
        gates, experts = switch_gates(seen_TE) if self.rule == "switch" else top_k_gates(seen_TE, self.top_k)
        drawn = torch.ones_like(gates, dtype=torch.bool)
        if self.rule == "gshard" and self.training:
            drawn = second_is_drawn(gates, self.generator)
        served = drawn
        if self.capacity_factor is not None:
            room = expert_capacity(len(x_TD), self.top_k, self.num_experts, self.capacity_factor)
            served = drawn & within_capacity(experts, drawn, self.num_experts, room)
        return Routed(logits_TE, experts, gates, served, drawn & ~served)

    def expert(self, number: int, x_TD: Tensor) -> Tensor:
        """The output of one expert for the tokens that it serves."""
        if number < self.num_mlps:
            gate, up = linear(x_TD, self.gate_up[number]).chunk(2, -1)
            return linear(silu(gate) * up, self.down[number])
        number -= self.num_mlps
        if number < self.num_zero:
            return torch.zeros_like(x_TD)
        if (number := number - self.num_zero) < self.num_copy:
            return x_TD
        number -= self.num_copy
        a, b = linear(x_TD, self.mix[number]).softmax(-1).split(1, -1)
        return a * x_TD + b * self.constant[number]
